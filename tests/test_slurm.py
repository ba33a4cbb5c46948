"""Runs and sweeps on a real Slurm: submitted, disturbed in every way, and looked at meanwhile.

Jobs that are to end alike train the same thing under another `train.keep_checkpoints`, which
decides no number.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from whole_runs import (
    assert_same_run,
    logged,
    run,
)

from simpo.runs import UNDER_WAY, State, last_job, read_progress

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm")]

STEPS = 900
ON_N1 = 'launcher.options=["--nodelist=n1"]'
ON_N2 = 'launcher.options=["--nodelist=n2"]'


def slurm_command(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def until(condition: Callable[[], bool], what: str, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def hurry(folder: Path) -> State:
    """A run's state; Slurm's two minutes between a requeue and the next start are cut short."""
    (progress,) = read_progress([folder])
    if progress.state is State.pending and progress.note == "BeginTime":
        slurm_command("scontrol", "update", f"JobId={job_of(folder)}", "StartTime=now")
    return progress.state


def ended(folder: Path) -> bool:
    return hurry(folder) not in UNDER_WAY


def job_of(folder: Path) -> str:
    return str(last_job(folder)["id"])


def log_of(folder: Path) -> str:
    return (folder / last_job(folder)["log"]).read_text()


def processes_of(folder: Path) -> list[psutil.Process]:
    """The training processes of a run: those that hold its files open."""
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if any(Path(file.path).parent == folder for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def long_run(tiny_run: list[str]) -> list[str]:
    """Overrides of a run with time to be disturbed, evaluations and checkpoints on the way."""
    return [
        *tiny_run,
        f"train.max_steps={STEPS}",
        "train.epochs=200",
        "train.eval_every=300",
        "train.checkpoint_every=25",
    ]


def same_numbers(left: Path, right: Path, scratch: Path) -> None:
    """Bit for bit."""
    assert assert_same_run(left, right, scratch) > 0


def test_disturbed_jobs_end_as_undisturbed_ones(long_run: list[str], tmp_path: Path) -> None:
    """An array of four and two single jobs, each met by something else, all at the same time."""
    sweep = tmp_path / "sweep"
    slurm = ["launcher=slurm", "launcher.poll_s=0.5"]
    command = ["-m", *slurm, ON_N1, f"launcher.sweep_dir={sweep}"]
    output = run([*command, "train.keep_checkpoints=2,3,4,5", *long_run])
    calm, requeued, cancelled, killed = (
        sweep / f"train.keep_checkpoints={number}" for number in (2, 3, 4, 5)
    )
    array = job_of(calm).partition("_")[0]
    assert f"job    {array}: 4 members" in output
    assert f"cancel scancel {array}" in output
    assert [job_of(path) for path in (calm, killed)] == [f"{array}_0", f"{array}_3"]

    preempted = tmp_path / "preempted"
    run([*slurm, ON_N2, f"run_dir={preempted}", *long_run])
    limited = tmp_path / "limited"
    times = ["launcher.time_min=2", "launcher.signal_before_s=100"]
    run([*slurm, ON_N1, *times, f"run_dir={limited}", *long_run])

    until(logged(preempted, 40), "the run on n2")
    urgent = ["sbatch", "--partition=high", "--nodelist=n2", "--exclusive", "--output=/dev/null"]
    slurm_command(*urgent, "--wrap", "sleep 1")
    until(lambda: read_progress([preempted])[0].requeued == 1, "preemption")

    until(logged(requeued, 40), "the run to requeue")
    slurm_command("scontrol", "requeue", job_of(requeued))
    until(logged(cancelled, 40), "the run to cancel")
    slurm_command("scancel", job_of(cancelled))
    until(logged(killed, 40), "the run to kill")
    (victim,) = processes_of(killed)
    victim.send_signal(signal.SIGKILL)

    until(logged(limited, 40), "the run with a time limit")
    # Asleep it takes no time from the others; Slurm wakes it to say that its own is up.
    (process,) = processes_of(limited)
    process.suspend()

    def second_life() -> bool:
        return hurry(preempted) is State.running and "continued after step" in log_of(preempted)

    until(second_life, "the preempted run's second life")
    step = read_progress([preempted])[0].step
    until(logged(preempted, step + 40), "the preempted run further on")
    slurm_command("scontrol", "update", "NodeName=n2", "State=down", "Reason=test")
    until(lambda: read_progress([preempted])[0].requeued == 2, "the loss of its node")
    # slurmd has it return by itself, or not, as it is quicker than this or slower.
    subprocess.run(["scontrol", "update", "NodeName=n2", "State=resume"], capture_output=True)
    free = ["sinfo", "--noheader", "--nodes=n2", "--partition=main", "--format=%t"]
    until(lambda: slurm_command(*free).strip() == "idle", "the node's return")

    until(lambda: read_progress([limited])[0].requeued >= 1, "the requeue at the time limit")
    assert "SIGUSR2: saved after step" in log_of(limited)

    disturbed = (calm, requeued, cancelled, killed, preempted, limited)
    until(lambda: all([ended(path) for path in disturbed]), "the end of all")
    names = ("calm", "requeued", "cancelled", "killed", "preempted", "limited")
    progress = dict(zip(names, read_progress(disturbed), strict=True))
    assert progress["calm"].text() == f"finished, step {STEPS} of {STEPS}"
    assert progress["requeued"].text() == f"finished, step {STEPS} of {STEPS}, requeued 1 time"
    assert progress["preempted"].text() == f"finished, step {STEPS} of {STEPS}, requeued 2 times"
    assert progress["cancelled"].state is State.cancelled
    assert progress["killed"].state is State.failed
    assert progress["killed"].note.startswith("exit code 137")
    for path in (requeued, preempted, limited):
        assert "continued after step" in log_of(path)
        same_numbers(calm, path, tmp_path)

    # The same command again: only those that have not finished.
    output = run([*command, "launcher.wait=true", "train.keep_checkpoints=2,3,4,5", *long_run])
    assert "2 of 4 members finished already" in output
    assert ": 2 members" in output
    for path in (cancelled, killed):
        assert read_progress([path])[0].state is State.finished
        same_numbers(calm, path, tmp_path)
