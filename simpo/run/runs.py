"""Reads runs from their folders and finds out their states, at any time. Imports no torch.

The folder of a launched run has jobs.jsonl, a line for each submission or start: `id` of the Slurm
job, or `pid` of the process on this machine; `log`; `restarts` of the job; `chain`, the ids of the
jobs of a chain up to this one, with blanks between them.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from simpo.config.check import load_run
from simpo.config.errors import DamagedError, SimpoError, refused_paths
from simpo.config.schema import RunConfig
from simpo.run import judged, slurm
from simpo.run.best import evaluations_in
from simpo.run.files import (
    NEW_RUN,
    check_metrics,
    checkpoints_in,
    last_job,
    read_benchmarks,
    read_json,
    read_manifest,
    read_metrics,
    read_replies,
    read_results,
    read_scores,
    read_status,
)
from simpo.run.folder import is_free
from simpo.run.judged import Judged, read_judged
from simpo.run.logs import last_line
from simpo.run.rounds import ROUNDS

RECORDS = {"run.yaml", "status.json"}
SKIPPED = {"checkpoints", "model", "samples", "held_out", "slurm", "wandb", "tensorboard"}
SKIPPED |= {judged.FOLDER}


class State(str, Enum):
    """State of a run.

    killed: it ended without writing why; stopped: a signal ended it after saving; pruned: a search
    found it hopeless; damaged: its folder cannot be read.
    """

    pending = "pending"
    running = "running"
    finished = "finished"
    pruned = "pruned"
    stopped = "stopped"
    cancelled = "cancelled"
    killed = "killed"
    failed = "failed"
    damaged = "damaged"


IN_PROGRESS = (State.pending, State.running)
UNSUCCESSFUL = (State.stopped, State.cancelled, State.killed, State.failed, State.damaged)


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        step, total_steps: updates done, and in all; 0 before it has begun. Rounds, if it has some.
        requeued: how often Slurm started it again.
        judging: the benchmark on which its model, which is saved, has yet to be judged.
        note: a line; why a pending run waits, or why a run was pruned or ended badly.
        log: the log file of a launched run.
    """

    state: State
    step: int = 0
    total_steps: int = 0
    requeued: int = 0
    judging: str = ""
    note: str = ""
    log: Path | None = None
    unit: str = "step"

    def text(self) -> str:
        """The progress in words, without the note."""
        words = str(self.state.value)
        if self.state is not State.pending and self.total_steps:
            words += f", {self.unit} {self.step} of {self.total_steps}"
        if self.judging:
            done = "judging" if self.state is State.running else "not yet judged"
            words += f", {done} on {self.judging}"
        if self.requeued:
            words += f", requeued {self.requeued} time{'s' * (self.requeued > 1)}"
        return words


@dataclass(frozen=True)
class Run:
    """A run's folder, read.

    Attributes:
        lines: the lines of metrics.jsonl.
        evaluations: held-out metrics by step.
        results: results.json; empty before the run has finished.
        benchmarks: numbers of benchmarks.json, by key of `BENCHMARKS`, in percent.
        scores: columns of held_out/, before training and after (of the saved model, or the newest
            evaluation); empty if there are none, NaN for a number that a pair lacks.
        replies: replies of samples/, before and after likewise.
        held_out_fingerprint: hash of the texts of the held-out pairs; empty if it is not known.
        judged: what judges found about the model, by benchmark.
    """

    folder: Path
    config: RunConfig
    progress: Progress
    lines: list[dict[str, float]] = field(repr=False)
    evaluations: dict[int, dict[str, float]] = field(repr=False)
    results: dict[str, Any] = field(repr=False)
    benchmarks: dict[str, float] = field(repr=False)
    scores: tuple[dict[str, list[float]], dict[str, list[float]]] = field(repr=False)
    replies: tuple[list[dict[str, Any]], list[dict[str, Any]]] = field(repr=False)
    held_out_fingerprint: str = ""
    judged: Mapping[str, Judged] = field(default_factory=dict, repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """Held-out metrics of the saved model; of the newest evaluation while the run trains.

        With the figures of benchmarks, such as `alpaca_eval_2/win_rate`.
        """
        newest = self.evaluations[max(self.evaluations)] if self.evaluations else {}
        found = self.results["eval_after"] if self.results else newest
        figures = {
            f"{benchmark}/{key}": figure.value
            for benchmark, one in self.judged.items()
            for key, figure in one.figures.items()
        }
        return {**found, **figures}

    @property
    def monitored(self) -> float | None:
        """Value of `monitor.metric`; None if there is none yet."""
        return self.metrics.get(self.config.monitor.metric)


@dataclass(frozen=True)
class DamagedRun:
    """A run's folder that cannot be read.

    Attributes:
        fault: a line with the file, what is wrong with it and what to do.
    """

    folder: Path
    fault: str


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """The folders of runs in and below folders, each once, sorted; then those that may be runs, but
    that this user may not read."""
    found: dict[Path, None] = {}
    faults: list[OSError] = []
    for folder in folders:
        for path, below, files in os.walk(folder, onerror=faults.append):
            # A run without run.yaml is a damaged run. A run stands for its rounds.
            if is_run := bool(RECORDS & {*below, *files}):
                found[Path(path).resolve()] = None
            below[:] = sorted(set(below) - SKIPPED - set([ROUNDS] * is_run))
    closed = (Path(fault.filename) for fault in faults if isinstance(fault, PermissionError))
    return list(found | dict.fromkeys(path.resolve() for path in closed))


Known = dict[Path, tuple[object, "Run | DamagedRun"]]
"""What was read of each folder, with the stamp of its files at that time."""


def read_runs(
    folders: Sequence[Path], known: Known | None = None
) -> tuple[list[Run], list[DamagedRun]]:
    """Read the folders of runs; a run that is being written is read up to its last whole line.

    Args:
        known: what an earlier call read. A run whose files and progress have not changed is the
            same object again. Brought up to date.

    Returns:
        The runs, and those that cannot be read, each in the order given.
    """
    earlier = {} if known is None else known.copy()
    read: Known = {}
    for folder, progress in zip(folders, read_progress(folders), strict=True):
        # The stamp is taken first: what is written meanwhile is read the next time.
        stamp = None if known is None else (progress, _stamp(folder))
        same = folder in earlier and earlier[folder][0] == stamp
        read[folder] = earlier[folder] if same else (stamp, _read_or_damaged(folder, progress))
    if known is not None:
        known.clear()
        known.update(read)
    found = [run for _, run in read.values()]
    return (
        [run for run in found if isinstance(run, Run)],
        [run for run in found if isinstance(run, DamagedRun)],
    )


def _stamp(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of what a run's folder and those in it that are read hold."""
    found = []
    benchmarks = (folder / judged.FOLDER).glob("*")
    for place in (folder, folder / "held_out", folder / "samples", *benchmarks):
        with suppress(OSError), os.scandir(place) as entries:
            for entry in entries:
                with suppress(OSError):
                    facts = entry.stat()
                    found.append((entry.path, facts.st_size, facts.st_mtime_ns))
    return sorted(found)


def _read_or_damaged(folder: Path, progress: Progress) -> Run | DamagedRun:
    if progress.state is State.damaged:
        return DamagedRun(folder, progress.note)
    try:
        with refused_paths():
            return _read(folder, progress)
    except SimpoError as error:
        return DamagedRun(folder, str(error).splitlines()[0])


def _read(folder: Path, progress: Progress) -> Run:
    config = load_run(folder / "run.yaml", check=False)
    _check_manifest(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    evaluations, results = evaluations_in(lines), read_results(folder)
    if not results and progress.state is State.finished:
        remedy = "remove status.json: the run's own command writes both anew"
        raise DamagedError(folder / "results.json", "is missing beside a finished run", remedy)
    # The saved model's step, or the newest.
    step = results["train"]["model_step"] if results else max(evaluations, default=0)
    # A judge adds its figures.
    if results and not evaluations.get(step, {}).items() <= results["eval_after"].items():
        fault = f"differs from metrics.jsonl in the evaluation after step {step}"
        remedy = "remove it and status.json: the run's own command writes both anew"
        raise DamagedError(folder / "results.json", fault, remedy)
    names = [f"step-{number:06d}" for number in (0, step)]
    before, after = (read_scores(folder / "held_out" / f"{name}.csv") for name in names)
    old, new = (read_replies(folder / "samples" / f"{name}.json") for name in names)
    return Run(
        folder,
        config,
        progress,
        lines,
        evaluations,
        results,
        read_benchmarks(folder),
        (before, after if step else {}),
        (old, new if step else []),
        str(read_json(folder / "data.json", NEW_RUN).get("test_fingerprint", "")),
        read_judged(folder),
    )


def _check_manifest(folder: Path) -> None:
    """Compare metrics.jsonl with the manifest of the newest checkpoint that is whole.

    Raises:
        DamagedError: it is not the file that the manifest describes.
    """
    for checkpoint in reversed(checkpoints_in(folder / "checkpoints")):
        try:
            manifest = read_manifest(checkpoint)
        # Damaged, which training handles, or deleted meanwhile.
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue
        check_metrics(folder, manifest)
        return


def read_progress(folders: Sequence[Path]) -> list[Progress]:
    """The progress of the runs in folders; asks Slurm about its jobs.

    The note of a damaged run names the file, what is wrong with it and what to do.
    """
    found: dict[Path, Progress] = {}
    jobs: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        try:
            jobs[folder] = last_job(folder)
        except DamagedError as error:
            found[folder] = Progress(State.damaged, note=str(error))
    ids = {folder: job.get("chain", job.get("id", "")).split() for folder, job in jobs.items()}
    known = slurm.jobs(chain.from_iterable(ids.values()))
    for folder, job in jobs.items():
        own = [known[name] for name in ids[folder] if name in known]
        try:
            found[folder] = _progress(folder, job, slurm.telling(own))
        except DamagedError as error:
            found[folder] = Progress(State.damaged, note=str(error))
    return [found[folder] for folder in folders]


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
    elif (locked := _is_locked(folder)) or _is_alive(job, folder):
        state, note = State.running, ""
    elif known is not None and known.state != "COMPLETED":
        if known.state in slurm.PENDING_STATES:
            state, note = State.pending, known.reason
        elif known.state in slurm.ACTIVE_STATES:
            state, note = State.running, ""
        elif state is State.pruned:  # before its job ended
            pass
        elif known.state == "CANCELLED":
            state, note = State.cancelled, ""
        elif state is not State.stopped:
            how = [f"exit code {known.exit_code}" if known.state == "FAILED" else known.state]
            state, note = State.failed, ": ".join([*how, note or last_line(log)])
    elif state is State.running and locked is None and not job:
        note = "or killed: the file system has no locks, which would show it"
    elif state is State.running:
        state, note = State.killed, last_line(log)
    elif state is State.pending and (job or (folder / "lock").exists()):
        gone = f"Slurm knows no job {job['id']}, or does not answer" if "id" in job else ""
        state, note = State.killed, last_line(log) or gone or "it ended before its first step"
    return Progress(
        state,
        max(int(status.get("step", 0)), _last_step(folder)),
        int(status.get("total_steps", 0)),
        max(int(job.get("restarts", 0)), known.restarts if known else 0),
        str(status.get("judging", "")),
        note,
        log,
        "round" if (folder / ROUNDS).is_dir() else "step",
    )


def _is_locked(folder: Path) -> bool | None:
    """Whether a process of this machine works in a run's folder; None if it cannot be known."""
    try:
        with (folder / "lock").open() as handle:
            return not is_free(handle, fcntl.LOCK_SH)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        return False
    except OSError:
        return None


def _is_alive(job: dict[str, Any], folder: Path) -> bool:
    """Whether the process that runs it still exists."""
    try:
        # The pid may belong to another process by now.
        return "pid" in job and str(folder) in psutil.Process(job["pid"]).cmdline()
    except psutil.Error:
        return False


def _last_step(folder: Path) -> int:
    """Step of the last line of metrics.jsonl; `read_metrics` checks the other lines."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        whole = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    try:
        return int(json.loads(whole)["step"]) if whole else 0
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DamagedError(path, "its last line is not a line of metrics", NEW_RUN) from error
