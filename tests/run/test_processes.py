"""How a run determines its number of processes; signals before and after its steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from simpo.config.backends import BackendConfig, DdpConfig, SingleConfig
from simpo.config.benchmarks import BenchmarkConfig
from simpo.config.check import run_yaml
from simpo.config.choices import BenchmarkKind
from simpo.config.compose import compose_run
from simpo.config.errors import BROKEN_PIPE, ConfigError, LostError, RunError, Stopped
from simpo.config.schema import RunConfig
from simpo.launch import rank as rank_program
from simpo.run import processes
from simpo.run.processes import (
    LOST,
    SAVED,
    _failure,
    log_file,
    num_processes_to_start,
    reporting_lost_ranks,
)

START = "(start with torchrun or srun, or unset WORLD_SIZE)"
TORCHRUN = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
TWO = DdpConfig(processes=2)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Of a process that nobody has started as one of several."""
    for name in TORCHRUN:
        monkeypatch.setenv(name, "")  # so that what is changed comes back
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("words", "config", "problem"),
    [
        (
            {"WORLD_SIZE": "1", "RANK": "0"},
            TWO,
            "WORLD_SIZE: the environment has 1, but no LOCAL_RANK, MASTER_ADDR, MASTER_PORT "
            + START,
        ),
        (
            TORCHRUN | {"MASTER_ADDR": None},
            DdpConfig(),
            "WORLD_SIZE: the environment has 1, but no MASTER_ADDR " + START,
        ),
        (
            TORCHRUN | {"RANK": None, "WORLD_SIZE": "2"},
            TWO,
            "WORLD_SIZE: the environment has 2, but no RANK " + START,
        ),
        (
            TORCHRUN | {"WORLD_SIZE": "two"},
            TWO,
            "WORLD_SIZE: must be a number in the environment, got two " + START,
        ),
        (
            {"WORLD_SIZE": ""},
            SingleConfig(),
            "WORLD_SIZE: must be a number in the environment, got  " + START,
        ),
        (
            TORCHRUN | {"RANK": "-1"},
            TWO,
            "RANK: must be a number in the environment, got -1 " + START,
        ),
        (TORCHRUN | {"RANK": "1"}, TWO, "RANK: must be below WORLD_SIZE=1, got 1 " + START),
        (
            TORCHRUN,
            TWO,
            "backend.processes: must be 1, which the launcher started here, got 2 (under torchrun, "
            "accelerate launch and Slurm leave it out)",
        ),
    ],
)
def test_a_place_that_cannot_be(
    words: dict[str, str | None],
    config: BackendConfig,
    problem: str,
    environment: pytest.MonkeyPatch,
) -> None:
    for name, value in words.items():
        if value is not None:
            environment.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        num_processes_to_start(config)
    assert str(error.value) == problem


def test_places_that_can_be(environment: pytest.MonkeyPatch) -> None:
    assert num_processes_to_start(TWO) == 2
    environment.setenv("RANK", "7")  # left over, and set anew for the ranks that are started
    assert num_processes_to_start(TWO) == 2
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    assert num_processes_to_start(DdpConfig()) is None
    assert num_processes_to_start(DdpConfig(processes=1)) is None
    assert num_processes_to_start(SingleConfig()) is None
    assert "WORLD_SIZE" not in os.environ and "LOCAL_RANK" not in os.environ, (
        "alone, and sure of it"
    )


def test_others_that_do_not_answer(environment: pytest.MonkeyPatch) -> None:
    """gloo's errors have no type of their own; any other error stays what it is."""
    environment.setenv("RANK", "3")
    with pytest.raises(LostError) as error, reporting_lost_ranks():
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer\nstack")
    assert str(error.value) == (
        "rank 3: the other processes do not answer: [/gloo/transport/tcp/pair.cc:547] Connection "
        "closed by peer (the same command continues from the last checkpoint)"
    )
    with pytest.raises(RuntimeError, match="shapes"), reporting_lost_ranks():
        raise RuntimeError("shapes do not match")


def test_exit_codes_of_runs_whose_ranks_fail(tmp_path: Path) -> None:
    """Settings and data alone give 2: ranks that lost each other are a failed run."""
    for rank in (0, 1):
        log_file(tmp_path, rank).write_text(f"rank {rank}: the other processes do not answer\n")
    for codes, exit_code, kind in (
        ({0: LOST, 1: LOST}, 1, RunError),
        ({1: 1}, 1, RunError),
        ({1: 2}, 2, RunError),
        ({1: 120}, 1, RunError),
        ({0: 75, 1: 75}, 75, Stopped),
        ({0: SAVED, 1: SAVED}, 130, Stopped),
    ):
        error = _failure(codes, tmp_path, stopped_code=75)
        assert type(error) is kind and error.exit_code == exit_code, codes
        assert ("rank 1: the other processes do not answer" in str(error)) == (
            SAVED not in codes.values()
        )


def test_a_signal_while_ranks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came too late for them to stop, but not for this process, which would judge the model."""
    monkeypatch.setattr(processes, "_start", lambda *_: SimpleNamespace(kill=int, wait=int))

    def end(ranks: object, folder: Path, timeout_s: float) -> tuple[dict[int, int], list[int]]:
        (folder / "finished").write_text("outputs/run")
        ranks.clear()  # type: ignore[attr-defined]
        signal.raise_signal(signal.SIGTERM)
        return {}, []

    monkeypatch.setattr(processes, "_wait", end)
    two = ["backend=ddp", "backend.processes=2", "train.stopped_exit_code=9"]
    assert processes.run_in_processes(2, compose_run(two)) == Path("outputs/run")
    with pytest.raises(Stopped) as error:
        processes.run_in_processes(2, compose_run([*two, "benchmark=pairs"]))
    assert error.value.exit_code == 9
    assert str(error.value) == (
        "SIGTERM: trained, not yet judged, in outputs/run (the same command continues)"
    )


def test_output_of_ranks_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`simpo train | head` ends without a traceback here too."""

    def printing(run: RunConfig) -> Path:
        raise BrokenPipeError

    (tmp_path / "run.yaml").write_text(run_yaml(compose_run([])))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["rank", str(tmp_path), "simpo train"])
    monkeypatch.setattr(rank_program, "hide_unused", lambda run: None)
    monkeypatch.setattr(rank_program, "_heartbeat", lambda file: None)
    monkeypatch.setattr("simpo.loop.train.train", printing)
    code = rank_program.main()
    assert code == BROKEN_PIPE == 141
    assert not log_file(tmp_path, 0).exists()
    assert type(_failure({0: code, 1: LOST}, tmp_path, stopped_code=75)) is BrokenPipeError


def test_signals_through_the_life_of_a_process() -> None:
    """Held, then at once; noted while a run saves; and never again what ends it without a word."""
    code = """
import os, signal, subprocess, sys, time
from simpo.config.errors import Stopped
from simpo.run.signals import StopRequest, exit_on_signals, signals_blocked, stopping_at_once
with signals_blocked():
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
    child.send_signal(signal.SIGUSR1)
print("child", child.wait(), flush=True)
exit_on_signals()
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGUSR2)
    print(stop.name, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # by torchrun, of the same Ctrl-C
    print(stop.name, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("still here", flush=True)
try:
    with stopping_at_once("not yet judged", 75):
        print("judged, though a signal came before", flush=True)
except Stopped as error:
    print(error, error.exit_code, flush=True)
time.sleep(1.1)
os.kill(os.getpid(), signal.SIGINT)
print("never", flush=True)
"""
    child = """
import time
from simpo.run.signals import exit_on_signals, set_stopped_exit_code
set_stopped_exit_code(9)
time.sleep(0.2)
exit_on_signals()
"""
    done = subprocess.run([sys.executable, "-c", code, child], capture_output=True, text=True)
    assert done.stderr == (
        "SIGUSR1: stopped while starting (the same command continues)\n"
        "interrupted: saving after this step (Ctrl-C again ends at once, without saving)\n"
        "interrupted (the same command continues from the last checkpoint, or else from the "
        "start)\n"
    )
    assert done.stdout == (
        "child 9\nSIGUSR2\nSIGINT\nstill here\n"
        "SIGTERM: not yet judged (the same command continues) 75\n"
    )
    assert done.returncode == 130


def test_an_impatient_program_of_its_own_is_interrupted() -> None:
    """Where a program trains in its own process, a second Ctrl-C raises what it would expect."""
    from simpo.run.signals import StopRequest

    # A shell starts its background jobs with an ignored Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"
        stop._interrupted_at -= 2
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_between_training_and_judging_is_not_lost() -> None:
    from simpo.run.signals import StopRequest, exit_on_signals, stopping_at_once

    exit_on_signals()
    with StopRequest():
        pass
    with stopping_at_once("not judged", 75):
        pass
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped) as caught, stopping_at_once("not judged", 75):
        raise AssertionError
    assert str(caught.value) == "SIGTERM: not judged (the same command continues)"
    assert caught.value.exit_code == 75


def test_a_signal_that_code_of_a_user_caught_still_stops() -> None:
    """A bare `except:` catches whatever the signal raises."""
    from simpo.on_policy.rewards import scores_of
    from simpo.run.signals import stopping_at_once

    begun, scored = [], []

    def reward(*_: object) -> list[float]:
        begun.append(1)
        try:
            signal.raise_signal(signal.SIGTERM)
        except:  # noqa: E722
            return [0.0]
        return [1.0]

    with pytest.raises(Stopped) as caught, stopping_at_once("not scored", 75):
        scored.append(
            scores_of(reward, "on_policy.reward", "own:reward", "a prompt", [], ["a"], None)
        )
    assert str(caught.value) == "SIGTERM: not scored (the same command continues)"
    assert begun and not scored
    with pytest.raises(Stopped), stopping_at_once("not scored", 75):
        reward()


def test_a_second_signal_ends_what_the_first_did_not() -> None:
    code = """
import signal, time
from simpo.run import signals
signals.AGAIN_S = 0.0
with signals.stopping_at_once("not scored", 75):
    try:
        signal.raise_signal(signal.SIGTERM)
    except:
        signals.set_stopped_exit_code(9)
        signal.raise_signal(signal.SIGTERM)
print("never")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (9, "")


def test_a_process_whose_parent_has_ended_already_ends() -> None:
    code = """
import os, sys
from simpo.run.parent import VARIABLE, die_with_parent, parent_variable
os.environ[VARIABLE] = sys.argv[1] or str(os.getppid())
die_with_parent()
assert VARIABLE not in os.environ and parent_variable() == {VARIABLE: str(os.getpid())}
print("lives")
"""
    for parent, told in (("", (0, "lives\n")), ("1", (1, ""))):
        done = subprocess.run([sys.executable, "-c", code, parent], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == told


def test_a_signal_that_ranks_did_not_heed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were about to end; what the starter would do after them is not begun."""

    def ended(ranks: object, folder: Path, timeout_s: float) -> tuple[dict[int, int], list[int]]:
        processes.finished_file(folder).write_text("/runs/a")
        signal.raise_signal(signal.SIGINT)
        return {}, []

    monkeypatch.setattr(processes, "_start", lambda *args: subprocess.Popen(["true"]))
    monkeypatch.setattr(processes, "_wait", ended)
    run = compose_run(["backend=ddp", "backend.processes=2", "backend.device=cpu"])
    assert processes.run_in_processes(2, run) == Path("/runs/a")
    with pytest.raises(Stopped) as caught:
        processes.run_in_processes(
            2, replace(run, benchmark=BenchmarkConfig(kind=BenchmarkKind.pairs))
        )
    assert str(caught.value) == (
        "interrupted: trained, not yet judged, in /runs/a (the same command continues)"
    )
    assert caught.value.exit_code == 130


def test_handlers_come_back() -> None:
    """Where a program trains in its own process, its signals are its own again afterwards."""
    from simpo.run.signals import ALL, StopRequest

    before = [signal.getsignal(number) for number in ALL]
    with StopRequest():
        assert [signal.getsignal(number) for number in ALL] != before
    assert [signal.getsignal(number) for number in ALL] == before
