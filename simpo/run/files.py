"""Reads the files of a run's folder and checks them: a disk or an editor may have damaged them.

A missing file is read as empty, since a run writes most of its files as it proceeds.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simpo.config.errors import DamagedError

STATES = ("running", "stopped", "failed", "pruned", "finished")
"""Values of `state` in status.json."""
BENCHMARKS = {
    "alpaca_eval_2_lc": "AlpacaEval 2 LC",
    "alpaca_eval_2_wr": "AlpacaEval 2",
    "arena_hard_wr": "Arena-Hard",
}
"""Keys of benchmarks.json, in the order of published.yaml, with their usual names."""
PRUNING = "pruning.json"
"""What a search compares a run with, to prune it; see `simpo.run.pruning`."""
JOB: dict[str, str | int] = {"log": "", "id": "", "chain": "", "pid": 0, "restarts": 0}
"""Keys of a line of jobs.jsonl, with values of their types."""
NEW_RUN = "restore it, or start anew with run_dir=NEW"


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint, which lies in it as seal.json.

    Attributes:
        step: updates done.
        metrics_bytes: length of metrics.jsonl, to which a continued run truncates it.
        metrics_sha256: hash of that many bytes of it.
        format: see `Backend.checkpoint_format`.
        processes: number of processes that wrote it.
        files: size in bytes and sha256 of every file but seal.json, by its path in the folder.
    """

    step: int
    metrics_bytes: int
    metrics_sha256: str
    format: str
    processes: int
    files: dict[str, tuple[int, str]]

    def text(self) -> str:
        """The text of seal.json: the manifest with its own hash."""
        return json.dumps({**asdict(self), "sha256": _hash_of(asdict(self))}, indent=1)


def checkpoints_in(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, the oldest first.

    By number: in the order of names, step-1000000 would come before step-999999.
    """
    found = (p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name))
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The updates done before a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        OSError, ValueError, TypeError: it is missing or has changed.
    """
    raw = json.loads((checkpoint / "seal.json").read_bytes())
    if raw.pop("sha256", None) != _hash_of(raw):
        raise ValueError
    return Manifest(**raw)


def _hash_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_text(path: Path, remedy: str) -> str | None:
    """The text of a file; None if there is no such file.

    Args:
        remedy: what to do if it is damaged, for the message.

    Raises:
        DamagedError: it cannot be read, or is not UTF-8.
    """
    if not is_there(path, remedy):
        return None
    if not path.is_file():
        raise DamagedError(path, "is not a file", remedy)
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    except UnicodeDecodeError as error:
        raise DamagedError(path, f"is not UTF-8 at byte {error.start + 1}", remedy) from error


def is_there(path: Path, remedy: str) -> bool:
    """Whether there is a file or folder of that name.

    Raises:
        DamagedError: it leads to nothing, or may not be looked at.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error, remedy) from error
    if not path.exists():
        raise DamagedError(path, "is a link to nothing", remedy)
    return True


def _unreadable(path: Path, error: OSError, remedy: str) -> DamagedError:
    if isinstance(error, PermissionError):
        remedy = "let this user read it"
    return DamagedError(path, f"cannot be read: {error.strerror}", remedy)


def read_json(path: Path, remedy: str, kind: type = dict) -> Any:
    """The value of a JSON file, of type `kind` (dict or list); empty if there is no such file.

    Raises:
        DamagedError: it is not JSON, or of another type.
    """
    text = read_text(path, remedy)
    if text is None:
        return kind()
    try:
        value = json.loads(text)
    # Deeply nested brackets raise RecursionError.
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, "is empty" if not text else "is not JSON", remedy) from error
    if not isinstance(value, kind):
        raise DamagedError(path, f"holds {repr(value)[:40]}, not a {kind.__name__}", remedy)
    return value


def read_status(folder: Path) -> dict[str, Any]:
    """A run's status.json; empty before its first step.

    Raises:
        DamagedError: its state is not in `STATES`, or its steps are not numbers.
    """
    path, remedy = folder / "status.json", "remove it: the run's own command writes it anew"
    status: dict[str, Any] = read_json(path, remedy)
    if status or path.exists():
        numbers = [status.get("step", 0), status.get("total_steps", 0)]
        if status.get("state") not in STATES:
            known = ", ".join(STATES)
            raise DamagedError(
                path, f"state is {repr(status.get('state'))[:40]}, none of {known}", remedy
            )
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise DamagedError(path, f"steps are {repr(numbers)[:40]}, not whole numbers", remedy)
    return status


def status_or_none(folder: Path) -> dict[str, Any]:
    """A run's status.json; empty also if it is damaged."""
    try:
        return read_status(folder)
    except DamagedError:
        return {}


def read_results(folder: Path) -> dict[str, Any]:
    """A run's results.json; empty before the run has finished.

    Raises:
        DamagedError: its metrics or its step are not numbers.
    """
    path = folder / "results.json"
    remedy = "remove it and status.json: the run's own command writes both anew"
    results: dict[str, Any] = read_json(path, remedy)
    if results or path.exists():
        train = results.get("train")
        step = train.get("model_step") if isinstance(train, dict) else None
        if type(step) is not int or not _are_numbers(results.get("eval_after")):
            raise DamagedError(path, "lacks eval_after or train.model_step", remedy)
    return results


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, without an unfinished last one.

    Raises:
        DamagedError: a line is not an object of numbers with the key `step`.
    """
    whole = (read_text(path, NEW_RUN) or "").rpartition("\n")[0]
    lines = []
    for number, text in enumerate(whole.split("\n") if whole else [], 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not _are_numbers(line) or type(line.get("step")) is not int:
            raise DamagedError(path, f"line {number} is not a line of metrics", NEW_RUN)
        lines.append(line)
    return lines


def check_metrics(folder: Path, manifest: Manifest) -> None:
    """Check that metrics.jsonl still begins as it was when a checkpoint was saved.

    Raises:
        DamagedError: it does not.
    """
    path, wanted = folder / "metrics.jsonl", f"when step {manifest.step} was saved"
    num_bytes = path.stat().st_size if path.is_file() else 0
    if num_bytes < manifest.metrics_bytes:
        raise DamagedError(
            path, f"holds {num_bytes} bytes, {manifest.metrics_bytes} {wanted}", NEW_RUN
        )
    if manifest.metrics_sha256 != metrics_sha256(folder, manifest.metrics_bytes):
        raise DamagedError(
            path, f"its first {manifest.metrics_bytes} bytes are not as {wanted} (sha256)", NEW_RUN
        )


def metrics_sha256(folder: Path, num_bytes: int) -> str:
    """Hash of the first bytes of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return hashlib.sha256().hexdigest()
    with path.open("rb") as file:
        return hashlib.sha256(file.read(num_bytes)).hexdigest()


def read_replies(path: Path) -> list[dict[str, Any]]:
    """The replies in a file of samples/, each with `prompt`, `reply` and `obeys`.

    Raises:
        DamagedError: a reply lacks one of them.
    """
    remedy = "restore it, or remove it: no number depends on it"
    replies: list[dict[str, Any]] = read_json(path, remedy, list)
    for reply in replies:
        known = isinstance(reply, dict) and all(
            isinstance(reply.get(key), kind)
            for key, kind in (("prompt", str), ("reply", str), ("obeys", bool | None))
        )
        if not known or not is_number(reply.get("tokens", 0)):
            raise DamagedError(path, f"holds {repr(reply)[:40]}, not a reply", remedy)
    return replies


def read_scores(path: Path) -> dict[str, list[float]]:
    """The columns of a file of held_out/ but the first; empty if there is no such file. A number
    that a pair lacks, since it has one response alone, is NaN.

    Raises:
        DamagedError: it is not a table of numbers.
    """
    remedy = "restore it, or remove it: no other number depends on it"
    text = read_text(path, remedy)
    if text is None:
        return {}
    try:
        header, *lines = csv.reader(text.splitlines())
        rows = [[float(cell or "nan") for cell in line[1:]] for line in lines]
        columns = list(zip(*rows, strict=True))
        return dict(zip(header[1:], map(list, columns), strict=True)) if lines else {}
    except (ValueError, csv.Error) as error:
        raise DamagedError(path, "is not a table of numbers", remedy) from error


def read_benchmarks(folder: Path) -> dict[str, float]:
    """The numbers that a user wrote into benchmarks.json; empty if there is none.

    Raises:
        DamagedError: it holds anything but numbers with the keys of `BENCHMARKS`.
    """
    path = folder / "benchmarks.json"
    known = ", ".join(BENCHMARKS)
    found: dict[str, float] = read_json(path, f"it holds numbers of {known}")
    if not _are_numbers(found) or not found.keys() <= BENCHMARKS.keys():
        raise DamagedError(path, f"must hold numbers of {known}, got {repr(found)[:80]}", "mend it")
    return found


def last_job(folder: Path) -> dict[str, Any]:
    """The newest line of a run's jobs.jsonl; empty if the run was not launched.

    Raises:
        DamagedError: its last line has no log, or an impossible job or process id.
    """
    path = folder / "jobs.jsonl"
    remedy = "mend its last line, or remove the file if no job of this run is under way"
    lines: Sequence[str] = (read_text(path, remedy) or "").splitlines()
    if not lines:
        return {}
    try:
        job = json.loads(lines[-1])
    except (ValueError, RecursionError):
        job = None
    known = (
        isinstance(job, dict)
        and "log" in job
        and all(isinstance(job.get(key, default), type(default)) for key, default in JOB.items())
        and re.fullmatch(r"(\d+(_\d+)?)?", job.get("id", ""), re.ASCII)
        and job.get("pid", 0) >= 0
    )
    if not known:
        raise DamagedError(path, f"line {len(lines)} is not a line about a job", remedy)
    return job


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a number that can be computed with."""
    try:
        # Whole numbers of JSON may be larger than any that can be computed with.
        return type(value) in (int, float) and float(value) is not None  # type: ignore[arg-type]
    except OverflowError:
        return False


def series(lines: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    """Step and value of each line that has a key."""
    return [(line["step"], line[key]) for line in lines if key in line]
