"""Finds the folder of an unfinished run or makes a new one, and writes its files.

<output_dir>/<name>/<time>-<id>/    the id is a hash of all settings that decide the numbers
    run.yaml, command.txt           resolved settings, and the command that continues the run
    environment.json, git.diff      versions, device, git commit and what differed from it
    data.json                       counts of each source, fingerprints, template hash
    metrics.jsonl, status.json      metrics by step; the state of the run and its step
    held_out/, samples/             scores of held-out pairs and replies to some, by step
    checkpoints/, model/            see simpo.loop.checkpoint and simpo.model.export
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import IO, Any, TextIO

from simpo.config.check import load_run, run_yaml
from simpo.config.errors import (
    DISK,
    ConfigError,
    DamagedError,
    DataError,
    Pruned,
    RunError,
    Stopped,
    unwritable,
)
from simpo.config.flat import holds_secret, run_id, trajectory
from simpo.config.renamed import first_value
from simpo.config.schema import RunConfig
from simpo.run.atomic import write_bytes, write_json, write_text
from simpo.run.command import train_command
from simpo.run.files import NEW_RUN, PRUNING, read_json, read_status, status_or_none

FINGERPRINTS = {
    "train_fingerprint": "data",
    "test_fingerprint": "data",
    "template_sha256": "chat template",
    "tokens_fingerprint": "tokenizer",
}
"""Keys of data.json that must be the same when a run continues."""
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""Error numbers of a lock that another process holds; others mean there are no locks."""
NEW_FOLDER_TRIES = 100
TRAIN = "simpo train"
"""The first word of `sys.argv` in processes of that command."""


class RunFolder:
    """The locked folder of a run; another process with the same settings gets another folder.

    Attributes:
        path: the folder, absolute.
        finished: whether an earlier process finished this run.
        notes: lines about the folder, printed when the run starts.
    """

    def __init__(self, run: RunConfig, followed: Path | None = None) -> None:
        """Find or make the folder.

        Args:
            followed: on other ranks, the folder that rank 0 found; methods that write do nothing.

        Raises:
            ConfigError: run_dir holds a run with other settings, or another process works in it.
            DamagedError: it holds a run whose settings or data cannot be read.
            RunError: the folder cannot be written.
        """
        self._writes = followed is None
        self._settings = trajectory(run)
        self._lock_handle: TextIO | None = None
        self.notes: list[str] = []
        self.path = followed or self._find(run)
        try:
            status = read_status(self.path)
        except DamagedError as error:
            status = {}
            self.notes.append(f"note   {error.args[0]}: {error.args[1]}; written anew")
        self.finished = status.get("state") == "finished"
        if self._writes:
            refuse_other_settings(run, self.path)
            self._write_settings(run)
            if status.get("state") == "pruned":  # whoever starts it now wants it whole
                (self.path / PRUNING).unlink(missing_ok=True)
                self.notes.append(f"note   goes on to its end now; before: {status.get('error')}")

    def _find(self, run: RunConfig) -> Path:
        """`run_dir`, or the folder of an unfinished run with the same settings, or a new one."""
        if run.run_dir is not None:
            if self._lock(path := Path(run.run_dir).expanduser().absolute()):
                return path
            raise ConfigError([f"run_dir: another process works in {path} (wait for it)"])
        for path in unfinished_folders(run):
            if self._lock(path):
                return path
            self.notes.append(f"note   another process trains with the same settings in {path}")
        for _ in range(NEW_FOLDER_TRIES):
            path = new_folder(run)
            if not path.exists() and self._lock(path):
                return path
            time.sleep(0.1)  # two runs with the same settings in the same second
        raise RunError(
            f"{path}: other processes work in it and in those of the seconds before "
            "(choose a folder with run_dir=NEW)"
        )

    def _write_settings(self, run: RunConfig) -> None:
        has_settings, has_command = (
            (self.path / name).is_file() for name in ("run.yaml", "command.txt")
        )
        private = holds_secret(run)
        if not has_command:
            write_text(self.path / "command.txt", self._command(has_settings) + "\n", private)
        if not has_settings:
            write_text(self.path / "run.yaml", run_yaml(run), private)

    def write_status(
        self, state: str, step: int, total_steps: int, error: str = "", judging: str = ""
    ) -> None:
        """Write status.json.

        Args:
            state: running, stopped, failed, pruned or finished.
            judging: the benchmark on which the model, which is saved, has yet to be judged.
        """
        status = {"state": state, "step": step, "total_steps": total_steps, "error": error}
        status |= {"judging": judging} if judging else {}
        self.write_json("status.json", status)

    def write_data(self, data: dict[str, Any]) -> None:
        """Write data.json.

        Raises:
            DataError: the run was begun on other data.
        """
        before = _read_data(self.path) if self._writes else {}
        for key, what in {**FINGERPRINTS, "loss_sha256": "code of loss.module"}.items():
            was, now = before.get(key), data.get(key)
            if before and was != now:
                raise DataError(
                    f"{self.path}: the {what} changed under this run: {key} was {was}, "
                    f"is {now} (restore it, or start anew with run_dir=NEW)"
                )
        self.write_json("data.json", {"settings": self._settings, **data})

    def tokens_per_row(self) -> int | None:
        """Tokens of a row that the run began with; None if it has not begun.

        Raises:
            DamagedError: data.json cannot be read.
        """
        written = _read_data(self.path).get("tokens_per_row")
        if written is not None and (type(written) is not int or written < 1):
            raise DamagedError(self.path / "data.json", "tokens_per_row is no number", NEW_RUN)
        return written

    def write_scores(
        self, step: int, columns: Sequence[str], scores: Iterable[tuple[str, Sequence[float | str]]]
    ) -> None:
        """Write held_out/step-<step>.csv: the place of each held-out pair and its scores, empty for
        one that it lacks."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["pair", *columns])
        table.writerows([place, *numbers] for place, numbers in scores)
        self.write_text(f"held_out/step-{step:06d}.csv", text.getvalue())

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of the folder whole or not at all."""
        if self._writes:
            write_json(self.path / name, value)

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the folder: a reader sees the old text or the new, never a part."""
        if self._writes:
            write_text(self.path / name, text)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file of the folder: a reader sees the old content or the new, never a part."""
        if self._writes:
            write_bytes(self.path / name, content)

    @contextmanager
    def recording_failure(self) -> Iterator[None]:
        """If the block raises, write to status.json that the run stopped, was pruned or failed.

        The folder is unlocked when the block ends.

        Raises:
            RunError: a file of the folder could not be written; the disk may be full.
        """
        try:
            yield
        except BaseException as error:
            status = status_or_none(self.path)
            state = {Stopped: "stopped", Pruned: "pruned"}.get(type(error), "failed")
            reason = f"{type(error).__name__}: {error}"
            step, total = status.get("step", 0), status.get("total_steps", 0)
            if status.get("state") != "finished":  # then its results could not be printed
                with suppress(RunError):  # the disk may be full
                    self.write_status(state, step, total, reason, status.get("judging", ""))
            if isinstance(error, OSError) and (place := self._place(error)):
                raise unwritable(place, error) from error
            raise
        finally:
            if self._lock_handle is not None:
                self._lock_handle.close()

    def _place(self, error: OSError) -> Path | None:
        """The file of this folder, or the folder, that an error is about; None if another."""
        if isinstance(error.filename, str):
            path = Path(error.filename)
            return path if path.is_relative_to(self.path) else None
        return self.path if error.errno in DISK else None

    def _lock(self, path: Path) -> bool:
        """Make and lock a folder; False if another process works in it."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            handle = (path / "lock").open("w")
        except OSError as error:
            raise unwritable(error.filename or path, error) from error
        for pause_s in (0.05, 0.0):  # `runs` holds the lock for a moment to see if a run is alive
            try:
                if is_free(handle, fcntl.LOCK_EX):
                    # Held until the run ends, or the process, however it ends.
                    self._lock_handle = handle
                    return True
            except OSError as error:
                self.notes.append(
                    f"note   {path}: the file system keeps no locks ({error.strerror}), so nothing "
                    "keeps another process out of this run (start it only once at a time)"
                )
                return True
            time.sleep(pause_s)
        handle.close()
        return False

    def _command(self, has_settings: bool) -> str:
        """The command that continues the run; needs no settings if the folder has them, which a
        program of a user's has composed in its own way."""
        if has_settings or sys.argv[:1] != [TRAIN]:
            return shlex.join(["python", "-m", "simpo.launch.member", str(self.path)])
        arguments = [a for a in sys.argv[1:] if not a.startswith("run_dir=")]
        return train_command(arguments, self.path)


def template_date(run: RunConfig) -> date:
    """The date that a chat template takes for today: the day on which the run began.

    All ranks must use the date of rank 0.

    Raises:
        DamagedError: the folder's data.json cannot be read.
    """
    for folder in own_folders(run):
        if written := _read_data(folder).get("template_date"):
            try:
                return date.fromisoformat(written)
            except (TypeError, ValueError) as error:
                path = folder / "data.json"
                raise DamagedError(path, "template_date is not a date", NEW_RUN) from error
    return date.today()


def is_free(handle: IO[str], kind: int) -> bool:
    """Lock a file; False if another process has locked it.

    Args:
        kind: LOCK_EX or LOCK_SH of fcntl.

    Raises:
        OSError: the file system keeps no locks.
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        return False
    return True


def refuse_unwritable(run: RunConfig) -> None:
    """Check that this user may make the folder of a run.

    Raises:
        ConfigError: this user may not, or there is something else in its place.
    """
    key = "output_dir" if run.run_dir is None else "run_dir"
    wanted = _parent(run) if run.run_dir is None else Path(run.run_dir).expanduser().absolute()
    above = next(path for path in (wanted, *wanted.parents) if os.path.lexists(path))
    if not os.path.isdir(above):  # a dangling link; the rest is checked with the settings
        raise ConfigError([f"{key}: {above} is not a folder (choose another)"])
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError([f"{key}: this user may not write in {above} (choose another)"])


def own_folders(run: RunConfig) -> list[Path]:
    """`run_dir`, or the folders of unfinished runs with the same settings, the newest first."""
    if run.run_dir is not None:
        return [Path(run.run_dir).expanduser().absolute()]
    return unfinished_folders(run)


def unfinished_folders(run: RunConfig) -> list[Path]:
    """Folders of unfinished runs with the same settings, the newest first."""
    found = sorted(_parent(run).glob(f"*-{run_id(run)}"), reverse=True)
    return [path for path in found if status_or_none(path).get("state") != "finished"]


def trained_folder(run: RunConfig) -> Path | None:
    """The folder of a run with these settings whose model is saved and has yet to be judged."""
    for folder in own_folders(run):
        if status_or_none(folder).get("judging") and (folder / "results.json").is_file():
            return folder
    return None


def new_folder(run: RunConfig) -> Path:
    """The folder of a run that begins now."""
    return _parent(run) / f"{time.strftime('%Y%m%d-%H%M%S')}-{run_id(run)}"


def _parent(run: RunConfig) -> Path:
    return (Path(run.output_dir).expanduser() / run.name).absolute()


def refuse_other_settings(run: RunConfig, folder: Path) -> None:
    """Check that a run in a folder, if any, has the same settings.

    Raises:
        ConfigError: it has others; a line for each of those that decide its numbers.
        DamagedError: data.json cannot be read.
    """
    now = json.loads(json.dumps(trajectory(run)))
    noted = _read_data(folder).get("settings", {})
    # run.yaml gives settings that another version of simpo did not have their defaults.
    before = {
        key: value
        for key, value in noted.items()
        if first_value(key, now.get(key, value)) != first_value(key, value)
    }
    if (folder / "run.yaml").exists():
        kept = trajectory(load_run(folder / "run.yaml", check=False))
        before = {
            k: kept.get(k) for k in kept.keys() | now.keys() if kept.get(k) != now.get(k)
        } | before
    refuse_changed(before, now, f"the run in {folder} has", "another folder")


def refuse_changed(
    before: Mapping[str, Any], now: Mapping[str, Any], begun: str, other: str
) -> None:
    """Check that settings are those that something was begun with.

    Args:
        begun: text before the earlier value, such as "the run in FOLDER has".
        other: what to choose instead, for the message.

    Raises:
        ConfigError: some differ; a line for each.
    """
    problems = [
        f"{key}: {begun} {value}, got {now.get(key)} (restore it, or choose {other})"
        for key, value in sorted(before.items())
        if value != now.get(key)
    ]
    if problems:
        raise ConfigError(problems)


def _read_data(folder: Path) -> dict[str, Any]:
    """A run's data.json; empty before the run has begun.

    Raises:
        DamagedError: it lacks something, or is missing beside checkpoints.
    """
    path = folder / "data.json"
    data: dict[str, Any] = read_json(path, NEW_RUN)
    if not path.exists():
        if any((folder / "checkpoints").glob("step-*")):
            raise DamagedError(path, "is missing: was the run begun on the same data?", NEW_RUN)
    elif not isinstance(data.get("settings"), dict) or not FINGERPRINTS.keys() <= data.keys():
        known = ", ".join(["settings", *FINGERPRINTS])
        raise DamagedError(path, f"lacks one of {known}", NEW_RUN)
    return data
