"""Starts the processes (ranks) of a run on this machine, watches them and ends them together.

The parent composes the settings once, and each rank reads them from a file. If torchrun, accelerate
launch or Slurm has started the ranks already, this process is one of them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import cpu_count
from pathlib import Path
from types import FrameType
from typing import NoReturn

from simpo.config.backends import BackendConfig, DistributedConfig
from simpo.config.check import run_yaml
from simpo.config.choices import BenchmarkKind, Device
from simpo.config.errors import (
    BROKEN_PIPE,
    INTERRUPTED,
    LOST,
    SAVED,
    ConfigError,
    LostError,
    RunError,
    Stopped,
    first_line,
)
from simpo.config.schema import RunConfig
from simpo.run.parent import start_child
from simpo.run.signals import forwarding_signals, signal_name, signals_blocked, stopped_by

GRACE_S = 20.0
"""Time that the other ranks get to end by themselves, once one has failed."""
POLL_S = 0.05
HEARTBEAT_S = 1.0
"""How often a rank touches its heartbeat file."""
HEARTBEAT_MARGIN_S = 30.0
"""How much longer a rank may be silent than `backend.timeout_s`, before it counts as hanging."""
LISTEN_VARIABLE = "SIMPO_LISTEN_FD"
"""Variable with the number of the open socket at which rank 0 answers the other ranks."""
FOLDER_VARIABLE = "SIMPO_RANKS_FOLDER"
"""Variable with the folder of files that ranks and the process that started them exchange."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which torchrun and others tell a process its rank."""
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
SHOWN_LINES = 30


def num_processes_to_start(config: BackendConfig) -> int | None:
    """How many processes to start for a run; None if this process trains it, alone or as a rank.

    Raises:
        ConfigError: neither the settings nor the GPUs of this machine give a number; or the
            environment makes this process one of several, but does not say which.
    """
    if "WORLD_SIZE" in os.environ:
        _check_rank_variables(config)
        return None
    if not isinstance(config, DistributedConfig):
        drop_rank_variables()
        return None
    if config.processes is not None:
        return config.processes
    if config.device is not Device.cpu:
        import torch

        if count := torch.cuda.device_count():
            return count
    raise ConfigError(["backend.processes: has no default without a GPU (set backend.processes=N)"])


def _check_rank_variables(config: BackendConfig) -> None:
    """Check that this process can join the ranks that the environment describes."""
    remedy = "(start with torchrun or srun, or unset WORLD_SIZE)"
    names = [name for name in (*RANK_VARIABLES, "LOCAL_WORLD_SIZE") if name in os.environ]
    for name in names:
        if name != "MASTER_ADDR" and not os.environ[name].isdecimal():
            raise ConfigError(
                [f"{name}: must be a number in the environment, got {os.environ[name]} {remedy}"]
            )
    rank, count = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE"))
    if rank >= count:
        raise ConfigError([f"RANK: must be below WORLD_SIZE={count}, got {rank} {remedy}"])
    if not isinstance(config, DistributedConfig):
        if count == 1:
            drop_rank_variables()
        return
    if missing := ", ".join(name for name in RANK_VARIABLES if name not in os.environ):
        raise ConfigError([f"WORLD_SIZE: the environment has {count}, but no {missing} {remedy}"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if config.processes not in (None, here):
        raise ConfigError(
            [
                f"backend.processes: must be {here}, which the launcher started here, got "
                f"{config.processes} (under torchrun, accelerate launch and Slurm leave it out)"
            ]
        )


def drop_rank_variables() -> None:
    """Remove the variables of an earlier launcher: frameworks would wait for its other ranks."""
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


@contextmanager
def reporting_lost_ranks() -> Iterator[None]:
    """Turn errors of lost connections between ranks into one line.

    Raises:
        LostError: in place of such an error.
    """
    try:
        yield
    except RuntimeError as error:
        names = {kind.__name__ for kind in type(error).__mro__}
        # torch's own errors, and those of gloo, which have no type.
        if "DistError" not in names and "gloo" not in str(error) and "NCCL" not in str(error):
            raise
        raise LostError(
            f"rank {os.environ.get('RANK', '0')}: the other processes do not answer: "
            f"{first_line(error)} (the same command continues from the last checkpoint)"
        ) from error


def join_slurm() -> None:
    """If srun started this process among others, set the variables that torchrun would set.

    All GPUs of a node stay visible, and the local rank is the number of the device.
    """
    if "WORLD_SIZE" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    try:
        from submitit.helpers import TorchDistributedEnvironment
    except ImportError as error:
        raise ConfigError(
            ["backend: several Slurm tasks, but submitit is not installed (simpo[slurm])"]
        ) from error
    # submitit reads Slurm's variables only if this one is set.
    os.environ.setdefault("SUBMITIT_EXECUTOR", "slurm")
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def run_in_processes(count: int, run: RunConfig) -> Path:
    """Train a run in `count` processes on this machine.

    Rank 0 prints to the output of this process. SIGTERM, SIGUSR1, SIGUSR2 and SIGINT are passed on
    to all ranks. The ranks end when this process ends in any way.

    Returns:
        The run's folder.

    Raises:
        RunError: a rank failed or hangs; the message names it.
        Stopped: a signal or Ctrl-C stopped all ranks, after saving.
        KeyboardInterrupt: Ctrl-C ended them before they could save.
    """
    assert isinstance(run.backend, DistributedConfig)
    ranks: list[subprocess.Popen[bytes]] = []
    signals: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        signals.append(number)
        if signals.count(signal.SIGINT) > 1:
            os.write(2, b"\n" * os.isatty(2))  # rank 0 cannot end the line of its bar
            raise KeyboardInterrupt  # not passed on: a rank that waits for others would not hear it
        for rank in ranks:
            rank.send_signal(number)

    with ExitStack() as stack:
        stack.enter_context(forwarding_signals(pass_on))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="simpo-")))
        (folder / "run.yaml").write_text(run_yaml(run))
        stack.callback(_kill, ranks)
        with signals_blocked(), socket.create_server(("127.0.0.1", 0)) as listener:
            for rank in range(count):
                ranks.append(_start(folder, rank, count, listener))
        if signals:  # before there was a rank to pass it on to
            pass_on(signals[-1], None)
        failed, silent = _wait(ranks, folder, run.backend.timeout_s)
        if silent:
            raise _hang_error(silent)
        if failed:
            raise _failure(failed, folder, run.train.stopped_exit_code)
        finished = finished_file(folder)
        if not finished.is_file():
            raise _printed(Stopped, folder, 0)
        path = Path(finished.read_text())
    if signals and run.benchmark.kind is not BenchmarkKind.none:  # too late for the ranks
        name, what = signal.Signals(signals[-1]).name, f"trained, not yet judged, in {path}"
        raise stopped_by(name, what, run.train.stopped_exit_code)
    return path


def _start(folder: Path, rank: int, count: int, listener: socket.socket) -> subprocess.Popen[bytes]:
    with ExitStack() as stack:
        log = None if rank == 0 else stack.enter_context(log_file(folder, rank).open("wb"))
        return start_child(
            "simpo.launch.rank",
            str(folder),
            *sys.argv,
            environment=_environment(rank, count, listener) | {FOLDER_VARIABLE: str(folder)},
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()] if rank == 0 else [],
        )


def _wait(
    ranks: list[subprocess.Popen[bytes]], folder: Path, timeout_s: float
) -> tuple[dict[int, int], list[int]]:
    """Wait until all ranks have ended well, or some have failed or hang; then end the others.

    Returns:
        Exit codes of the ranks at fault: those killed by a signal, else those that found a fault in
        settings or data, else the first to fail. The others failed because they lost a rank.
        And the ranks that hang: those that do not end though others lost them, or whose heartbeat
        stopped.
    """
    failed: dict[int, int] = {}
    looks: dict[int, tuple[float, int]] = {}
    while not failed:
        if all(rank.poll() == 0 for rank in ranks):
            return {}, []
        time.sleep(POLL_S)
        if silent := _silent_ranks(ranks, folder, looks, timeout_s + HEARTBEAT_MARGIN_S):
            _kill(ranks)
            return {}, silent
        failed = _failed(ranks)
    _lost_file(folder).touch()
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(POLL_S)
    at_last = _failed(ranks)
    alive = [number for number, rank in enumerate(ranks) if rank.poll() is None]
    _kill(ranks)
    # NCCL aborts a process whose wait timed out.
    lost = {rank for rank, code in at_last.items() if code in (LOST, -signal.SIGABRT)}
    if alive and lost == at_last.keys():
        return failed, alive
    killed = {rank: code for rank, code in at_last.items() if code < 0}
    refused = {rank: code for rank, code in at_last.items() if code == 2}
    others = {rank: code for rank, code in at_last.items() if rank not in lost}
    return killed or refused or others or failed, []


def _silent_ranks(
    ranks: list[subprocess.Popen[bytes]],
    folder: Path,
    looks: dict[int, tuple[float, int]],
    longest_s: float,
) -> list[int]:
    """Ranks without a heartbeat for `longest_s`.

    Args:
        looks: by rank, its last heartbeat and the number of polls since. Polls are counted instead
            of time, so that a suspended job does not count as hanging.
    """
    for number, rank in enumerate(ranks):
        file = heartbeat_file(folder, number)
        beat = file.stat().st_mtime if file.exists() else 0.0
        last, count = looks.get(number, (beat, 0))
        looks[number] = beat, count + 1 if beat == last and rank.poll() is None else 0
    return [number for number, (_, count) in looks.items() if count * POLL_S > longest_s]


def _hang_error(silent: list[int]) -> RunError:
    names = ", ".join(f"rank {rank}" for rank in silent)
    return RunError(
        f"{names} hang{'s' * (len(silent) == 1)}; the others were ended (the same command "
        "continues from the last checkpoint)"
    )


def _failed(ranks: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    return {number: code for number, rank in enumerate(ranks) if (code := rank.poll())}


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()


def _failure(failed: dict[int, int], folder: Path, stopped_code: int) -> BaseException:
    code = next(iter(failed.values()))
    if code == INTERRUPTED:
        return KeyboardInterrupt()
    if code == BROKEN_PIPE:
        return BrokenPipeError()
    if code == SAVED:
        return _printed(Stopped, folder, INTERRUPTED)
    if code < 0:
        names = ", ".join(
            f"rank {rank} was killed by {signal_name(-code)}" for rank, code in failed.items()
        )
        return RunError(
            f"{names}; the others were ended (the same command continues from the last checkpoint)"
        )
    lines = []
    for rank in failed:
        log = log_file(folder, rank)
        tail = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:] if log.is_file() else []
        lines += [f"rank {rank}:", *tail] if tail else []
    kind = Stopped if code == stopped_code else RunError
    exit_code = 2 if code == 2 else code if kind is Stopped else 1
    # If rank 0 has printed its error, the others report the same.
    if 0 in failed and not log_file(folder, 0).is_file():
        return _printed(kind, folder, exit_code)
    return kind("\n".join(lines), exit_code)


def _printed(kind: type[RunError], folder: Path, exit_code: int) -> RunError:
    """The error that rank 0 has printed."""
    file = printed_file(folder)
    error = kind(file.read_text() if file.is_file() else "", exit_code)
    error.printed = True
    return error


def _environment(rank: int, count: int, listener: socket.socket) -> dict[str, str]:
    """The variables that torchrun would set for a rank."""
    words = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        # All ranks are on this machine.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", LOOPBACK),
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", LOOPBACK),
        # Else each rank would use all cores and slow down the others.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_count() // count))),
    }
    if rank == 0:
        words[LISTEN_VARIABLE] = str(listener.fileno())
    return words


def a_rank_has_failed() -> bool:
    """Whether the process that started this rank and others has seen one of them fail."""
    return FOLDER_VARIABLE in os.environ and _lost_file(Path(os.environ[FOLDER_VARIABLE])).exists()


def _lost_file(folder: Path) -> Path:
    return folder / "lost"


def heartbeat_file(folder: Path, rank: int) -> Path:
    """The file that a rank touches for as long as it runs."""
    return folder / f"rank-{rank}.alive"


def log_file(folder: Path, rank: int) -> Path:
    """File with the output of a rank other than 0, and with errors that end any rank."""
    return folder / f"rank-{rank}.log"


def finished_file(folder: Path) -> Path:
    """File in which rank 0 names the folder of the run that it has finished."""
    return folder / "finished"


def printed_file(folder: Path) -> Path:
    """File with the message of an error that rank 0 has printed."""
    return folder / "printed"


def end_process(exit_code: int) -> NoReturn:
    """End this process at once, when its work is written.

    Threads of libraries may abort a process that ends in the ordinary way.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
