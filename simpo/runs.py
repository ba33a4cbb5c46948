"""Folders of runs in, what each run has done and is doing out: at any moment, without torch.

A launched run has jobs.jsonl in its folder, a line for each time that it was submitted or started:
`id` of the Slurm job, or `pid` of the process on this machine; `log`; `restarts` of the job.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

from simpo import slurm
from simpo.config import RunConfig, load_run
from simpo.objective import evaluations_in
from simpo.run_folder import read_json, read_status
from simpo.tracker import read_metrics

SKIPPED = {"checkpoints", "model", "samples", "held_out", "slurm", "wandb"}


PROGRESS = re.compile(r"\d+%\|")
"""A progress bar in a log."""


class State(str, Enum):
    """What a run is doing. killed: it ended without a word; stopped: a signal ended it, saved."""

    pending = "pending"
    running = "running"
    finished = "finished"
    stopped = "stopped"
    cancelled = "cancelled"
    killed = "killed"
    failed = "failed"


UNDER_WAY = (State.pending, State.running)
NOT_WELL = (State.stopped, State.cancelled, State.killed, State.failed)


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step, total_steps: updates done, and to do; 0 before it has begun.
        requeued: how often Slurm started it again.
        note: a line; of a pending run why it waits, of one that ended badly of what.
        log: of a launched run.
    """

    state: State
    step: int = 0
    total_steps: int = 0
    requeued: int = 0
    note: str = ""
    log: Path | None = None

    def text(self) -> str:
        """In words, without the note."""
        words = str(self.state.value)
        if self.state is not State.pending and self.total_steps:
            words += f", step {self.step} of {self.total_steps}"
        if self.requeued:
            words += f", requeued {self.requeued} time{'s' * (self.requeued > 1)}"
        return words


@dataclass(frozen=True)
class Run:
    """A run's folder, read.

    Attributes:
        lines: of metrics.jsonl.
        evaluations: held-out metrics by step.
        results: results.json; empty before the end.
    """

    folder: Path
    config: RunConfig
    progress: Progress
    lines: list[dict[str, float]] = field(repr=False)
    evaluations: dict[int, dict[str, float]] = field(repr=False)
    results: dict[str, Any] = field(repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """Held out: of the saved model, before the end of the newest evaluation."""
        if self.results:
            return dict(self.results["eval_after"])
        return self.evaluations[max(self.evaluations)] if self.evaluations else {}

    @property
    def objective(self) -> float | None:
        """Value of `objective.metric`; None where there is none yet."""
        return self.metrics.get(self.config.objective.metric)


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """The folders of runs among and below folders, each once, in the order of their names."""
    found: dict[Path, None] = {}
    for folder in folders:
        for path, below, files in os.walk(folder):
            below[:] = sorted(set(below) - SKIPPED)
            if "run.yaml" in files:
                found[Path(path).resolve()] = None
    return list(found)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs' folders; a run that is being written is as of its last whole line.

    Raises:
        ConfigError: a run.yaml is of another version, or damaged.
    """
    runs = []
    for folder, progress in zip(folders, read_progress(folders), strict=True):
        metrics = folder / "metrics.jsonl"
        lines = read_metrics(metrics) if metrics.is_file() else []
        runs.append(
            Run(
                folder,
                load_run(folder / "run.yaml"),
                progress,
                lines,
                evaluations_in(lines),
                read_json(folder / "results.json"),
            )
        )
    return runs


def read_progress(folders: Sequence[Path]) -> list[Progress]:
    """How far the runs in folders are; asks Slurm about those that it was given."""
    last = [last_job(folder) for folder in folders]
    known = slurm.jobs(job["id"] for job in last if job.get("id"))
    return [
        _progress(folder, job, known.get(job.get("id", "")))
        for folder, job in zip(folders, last, strict=True)
    ]


def last_job(folder: Path) -> dict[str, Any]:
    """The newest line of a run's jobs.jsonl; empty where it was not launched."""
    path = folder / "jobs.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else {}


def note_job(folder: Path, log: Path, **job: Any) -> None:
    """Add a line to a run's jobs.jsonl; the log's path is kept relative to the folder."""
    line = {**job, "log": os.path.relpath(log, folder)}
    with (folder / "jobs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _progress(folder: Path, job: dict[str, Any], known: slurm.Job | None) -> Progress:
    status = read_status(folder)
    log = Path(os.path.normpath(folder / job["log"])) if job else None
    state = State(status.get("state", "pending"))
    note = (str(status.get("error", "")).splitlines() or [""])[0]
    if state is State.finished:
        pass
    elif _is_locked(folder) or _is_alive(job, folder):
        state, note = State.running, ""
    elif known is not None and known.state != "COMPLETED":
        if known.state in slurm.WAITING:
            state, note = State.pending, known.reason
        elif known.state in slurm.AT_WORK:
            state, note = State.running, ""
        elif known.state == "CANCELLED":
            state, note = State.cancelled, ""
        elif state is not State.stopped:
            how = [f"exit code {known.exit_code}" if known.state == "FAILED" else known.state]
            state, note = State.failed, ": ".join([*how, note or _last_line(log)])
    elif state is State.running:
        state, note = State.killed, _last_line(log)
    elif state is State.pending and job:
        # It ended before its first step, or before it was begun.
        gone = f"Slurm knows no job {job['id']}, or does not answer" if "id" in job else ""
        state, note = State.killed, _last_line(log) or gone
    return Progress(
        state,
        max(int(status.get("step", 0)), _last_step(folder)),
        int(status.get("total_steps", 0)),
        max(int(job.get("restarts", 0)), known.restarts if known else 0),
        note,
        log,
    )


def _is_locked(folder: Path) -> bool:
    """Whether a process of this machine works in a run's folder."""
    try:
        with (folder / "lock").open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _is_alive(job: dict[str, Any], folder: Path) -> bool:
    """Whether the process that a run was started in is still there."""
    try:
        # The number may be another's by now.
        return "pid" in job and str(folder) in psutil.Process(job["pid"]).cmdline()
    except psutil.Error:
        return False


def _last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        whole = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    return int(json.loads(whole)["step"]) if whole.startswith(b"{") else 0


def _last_line(log: Path | None) -> str:
    if log is None or not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2**14))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]|(?=srun: |slurmstepd: )", text)]
    lines = [line for line in lines if line and not PROGRESS.search(line)]
    # What Slurm says of the end is not what led to it.
    told = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
    return (told or lines or [""])[-1]
