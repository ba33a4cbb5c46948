"""The processes of a run: how many to start, started here, watched, and ended together.

Settings are composed once, in the parent; each rank reads them resolved from a file. Where
torchrun, accelerate launch or Slurm has started the ranks already, there is nothing to start.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing import cpu_count
from pathlib import Path
from types import FrameType

from simpo.config import BackendConfig, Device, ManyConfig, RunConfig, run_yaml
from simpo.errors import INTERRUPTED, ConfigError, RunError, Stopped
from simpo.signals import passing_on

GRACE_S = 20.0
"""How long the others get to end by themselves, once one process has failed."""
POLL_S = 0.05
PR_SET_PDEATHSIG = 1
SHOWN_LINES = 30


def to_start(config: BackendConfig) -> int | None:
    """How many processes to start for a run; None where this one is to do it.

    Raises:
        ConfigError: neither the settings nor this machine say how many.
    """
    if not isinstance(config, ManyConfig) or "WORLD_SIZE" in os.environ:
        return None
    if config.processes is not None:
        return config.processes
    if config.device is not Device.cpu:
        import torch

        if count := torch.cuda.device_count():
            return count
    raise ConfigError(["backend.processes: how many? Without GPUs it has no default (set it)"])


def join_slurm() -> None:
    """Where srun started this process among others, say so in the words of torchrun.

    All GPUs of a node stay visible, and the local rank is a device's number.
    """
    if "WORLD_SIZE" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    try:
        from submitit.helpers import TorchDistributedEnvironment
    except ImportError as error:
        raise ConfigError(
            ["backend: several Slurm tasks, but submitit is not installed (simpo[slurm])"]
        ) from error
    # submitit knows Slurm's words, but believes only this one that it is there.
    os.environ.setdefault("SUBMITIT_EXECUTOR", "slurm")
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def end_with_parent() -> None:
    """Have the system kill this process when the one that started it ends, however it does."""
    if sys.platform == "linux":
        # A parent that was killed can end nobody.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_in(count: int, run: RunConfig) -> dict[str, float]:
    """Train a run in so many processes on this machine.

    What rank 0 prints goes where this process prints. SIGTERM, SIGUSR1, SIGUSR2 and SIGINT are
    passed on to all ranks. They end when this process ends, however it does.

    Returns:
        The held-out metrics of the trained model.

    Raises:
        RunError: a rank failed; the message names it, with the code that it ended with.
        Stopped: a signal stopped all of them.
        KeyboardInterrupt: a Ctrl-C did.
    """
    with tempfile.TemporaryDirectory(prefix="simpo-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "run.yaml").write_text(run_yaml(run))
        ranks: list[subprocess.Popen[bytes]] = []

        def pass_on(number: int, _: FrameType | None) -> None:
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(number)

        stack.enter_context(passing_on(pass_on))
        port = _free_port()
        for rank in range(count):
            log = None if rank == 0 else stack.enter_context(_log(folder, rank).open("wb"))
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "simpo.rank", name, *sys.argv[1:]],
                    env=os.environ | _environment(run.backend, rank, count, port),
                    stdout=log,
                    stderr=log,
                    # A terminal's Ctrl-C would reach them beside the one passed on.
                    start_new_session=True,
                )
            )
        stack.callback(_end, ranks)
        if failed := _wait(ranks):
            raise _failure(failed, folder, run.train.stopped_exit_code)
        result = folder / "metrics.json"
        if not result.is_file():
            raise Stopped("", 0)
        metrics: dict[str, float] = json.loads(result.read_text())
        return metrics


def _wait(ranks: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait until all have ended well, or some have failed and the others are ended.

    Returns:
        Exit codes of the ranks that failed of themselves: those that a signal killed, else those
        with settings or data at fault, else the first to end. Another's error may be no more than
        that it lost them.
    """
    failed: dict[int, int] = {}
    while not failed:
        if all(rank.poll() == 0 for rank in ranks):
            return {}
        time.sleep(POLL_S)
        failed = _failed(ranks)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(POLL_S)
    at_last = _failed(ranks)
    _end(ranks)
    killed = {rank: code for rank, code in at_last.items() if code < 0}
    refused = {rank: code for rank, code in at_last.items() if code == 2}
    return killed or refused or failed


def _failed(ranks: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    codes = {number: rank.poll() for number, rank in enumerate(ranks)}
    return {number: code for number, code in codes.items() if code}


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()


def _failure(failed: dict[int, int], folder: Path, stopped_code: int) -> BaseException:
    code = next(iter(failed.values()))
    if code == INTERRUPTED:
        return KeyboardInterrupt()
    if code < 0:
        names = ", ".join(
            f"rank {rank} was killed by {signal.Signals(-code).name}"
            for rank, code in failed.items()
        )
        return RunError(
            f"{names}; the others were ended (the same command continues from the last checkpoint)"
        )
    lines = []
    for rank in failed:
        log = _log(folder, rank)
        tail = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:] if log.is_file() else []
        lines += [f"rank {rank}:", *tail] if tail else []
    # Rank 0 has said itself what stopped it, and the others say the same.
    said = 0 in failed and not _log(folder, 0).is_file()
    kind = Stopped if code == stopped_code else RunError
    return kind("" if said else "\n".join(lines), code)


def _environment(config: BackendConfig, rank: int, count: int, port: int) -> dict[str, str]:
    """Where a rank is, in the words of torchrun."""
    words = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Each would take all cores, and the last be as slow as all together.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cpu_count() // count))),
    }
    if config.device is Device.cpu:
        words |= {"DS_ACCELERATOR": "cpu"}
    return words


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
