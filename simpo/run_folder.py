"""The folder of a run: found again when it is unfinished, made new otherwise.

<output_dir>/<name>/<time>-<id>/    the id is a hash of all settings that decide the numbers
    run.yaml, command.txt           settings, resolved, and the command that continues the run
    environment.json, git.diff      versions, device, git commit and what differed from it
    data.json                       what was taken of each source, fingerprints, template hash
    metrics.jsonl, status.json      the numbers; running, stopped, failed or finished, and the step
    held_out/, samples/             numbers of each held-out pair, replies to some, by step
    checkpoints/                    see simpo.checkpoint
    model/                          see simpo.export
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo.config import RunConfig, holds_secret, load_run, run_id, run_yaml, trajectory
from simpo.errors import FULL, ConfigError, DataError, RunError, Stopped

if TYPE_CHECKING:  # for a launcher, which does without torch
    from simpo.sample import Reply

PACKAGES = (
    "simpo",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "deepspeed",
    "peft",
    "bitsandbytes",
    "hydra-core",
)
FINGERPRINTS = {
    "train_fingerprint": "data",
    "test_fingerprint": "data",
    "template_sha256": "chat template",
    "tokens_fingerprint": "tokenizer",
}
"""What of data.json a continued run must find unchanged."""


class RunFolder:
    """The locked folder of a run; another process with the same settings gets its own.

    Attributes:
        path: the folder, absolute.
        finished: whether an earlier process ended this run.
    """

    def __init__(self, run: RunConfig, followed: Path | None = None) -> None:
        """Find or make the folder.

        Args:
            followed: the folder that this run's rank 0 found. Then nothing is made, and every
                method that writes does nothing.

        Raises:
            ConfigError: run_dir holds a run of other settings, or another process works in it.
        """
        self._writes = followed is None
        if followed is not None:
            self.path = followed
        elif run.run_dir is not None:
            self.path = Path(run.run_dir).expanduser().absolute()
            if not self._lock():
                raise ConfigError([f"run_dir: another process works in {self.path} (wait for it)"])
            refuse_other_settings(run, self.path)
        else:
            for path in unfinished_folders(run):
                self.path = path
                if self._lock():
                    break
            else:
                self.path = new_folder(run)
                while not self._lock():  # two runs of the same settings in the same second
                    time.sleep(0.1)
                    self.path = new_folder(run)
        self.finished = self.status().get("state") == "finished"
        if self._writes and not (self.path / "run.yaml").is_file():
            private = holds_secret(run)
            write_text(self.path / "command.txt", self._command() + "\n", private)
            write_text(self.path / "run.yaml", run_yaml(run), private)

    def status(self) -> dict[str, Any]:
        """What status.json says; empty before the run's first step."""
        return read_status(self.path)

    def write_status(self, state: str, step: int, total_steps: int, error: str = "") -> None:
        """Say how far the run is: `state` is running, stopped, failed or finished."""
        status = {"state": state, "step": step, "total_steps": total_steps, "error": error}
        self.write_json("status.json", status)

    def write_data(self, data: dict[str, Any]) -> None:
        """Write data.json, unless the run was begun on other data.

        Raises:
            DataError: it was.
        """
        path = self.path / "data.json"
        if self._writes and path.is_file():
            before = json.loads(path.read_text())
            for key, what in FINGERPRINTS.items():
                if before[key] != data[key]:
                    raise DataError(
                        f"{self.path}: the {what} changed under this run: {key} was {before[key]}, "
                        f"is {data[key]} (restore it, or start anew with run_dir=NEW)"
                    )
        self.write_json("data.json", data)

    def write_replies(self, step: int, replies: Sequence[Reply]) -> None:
        """Write samples/step-<step>.json: prompt, reply, its length and verdict, for each."""
        rows = [
            {
                "prompt": r.pair.prompt[-1]["content"],
                "reply": r.text,
                "tokens": r.tokens,
                "obeys": r.obeys,
            }
            for r in replies
        ]
        self.write_json(f"samples/step-{step:06d}.json", rows)

    def write_scores(
        self, step: int, columns: Sequence[str], scores: Iterable[tuple[str, Sequence[float]]]
    ) -> None:
        """Write held_out/step-<step>.csv: where each held-out pair is from, and its numbers."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["pair", *columns])
        table.writerows([place, *numbers] for place, numbers in scores)
        self.write_text(f"held_out/step-{step:06d}.csv", text.getvalue())

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of the folder whole or not at all."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the folder: a reader sees the old text or the new, never a part."""
        if self._writes:
            write_text(self.path / name, text)

    @contextmanager
    def recording_failure(self) -> Iterator[None]:
        """Say in status.json that the run stopped or failed, and of what, if the block raises.

        Raises:
            RunError: the disk is full.
        """
        try:
            yield
        except BaseException as error:
            status = self.status()
            state = "stopped" if isinstance(error, Stopped) else "failed"
            reason = f"{type(error).__name__}: {error}"
            step, total = status.get("step", 0), status.get("total_steps", 0)
            with suppress(OSError):  # of a full disk, perhaps
                self.write_status(state, step, total, reason)
            if isinstance(error, OSError) and error.errno in FULL:
                raise RunError(
                    f"{self.path}: {error.strerror} (make room, and the same command continues)"
                ) from error
            raise

    def _lock(self) -> bool:
        self.path.mkdir(parents=True, exist_ok=True)
        handle = (self.path / "lock").open("w")
        for pause_s in (0.05, 0.0):  # who only looks whether a run is alive holds it for a moment
            try:
                # Held until the process ends, however it ends.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(pause_s)
            else:
                self._lock_handle = handle
                return True
        handle.close()
        return False

    def _command(self) -> str:
        arguments = [a for a in sys.argv[1:] if not a.startswith("run_dir=")]
        return shlex.join(["python", "-m", "simpo.train", *arguments, f"run_dir={self.path}"])


def template_date(run: RunConfig) -> date:
    """The day that a chat template takes for today: that of the run's start, also when it goes on.

    Every process that reads it before the folder is found must take that of rank 0.
    """
    own = [] if run.run_dir is None else [Path(run.run_dir).expanduser()]
    for folder in own or unfinished_folders(run):
        if written := read_json(folder / "data.json").get("template_date"):
            return date.fromisoformat(written)
    return date.today()


def unfinished_folders(run: RunConfig) -> list[Path]:
    """Folders of runs of the same settings that have not finished, the newest first."""
    found = sorted(_parent(run).glob(f"*-{run_id(run)}"), reverse=True)
    return [path for path in found if read_status(path).get("state") != "finished"]


def new_folder(run: RunConfig) -> Path:
    """Where a run goes that begins now."""
    return _parent(run) / f"{time.strftime('%Y%m%d-%H%M%S')}-{run_id(run)}"


def _parent(run: RunConfig) -> Path:
    return (Path(run.output_dir).expanduser() / run.name).absolute()


def refuse_other_settings(run: RunConfig, folder: Path) -> None:
    """Do nothing, unless a folder holds a run whose numbers must be other ones.

    Raises:
        ConfigError: it does; a line for each setting.
    """
    if not (folder / "run.yaml").is_file():
        return
    before, now = trajectory(load_run(folder / "run.yaml")), trajectory(run)
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if changed:
        raise ConfigError(
            [
                f"{key}: the run in {folder} has {before.get(key)}, got {now.get(key)} "
                "(restore it, or choose another folder)"
                for key in changed
            ]
        )


def read_status(folder: Path) -> dict[str, Any]:
    """What a run's status.json says; empty before its first step."""
    return read_json(folder / "status.json")


def read_json(path: Path) -> dict[str, Any]:
    """What a file of a run's folder holds; empty where it is not written yet."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_text(path: Path, text: str, private: bool = False) -> None:
    """Write a file: a reader sees the old text or the new, never a part.

    Args:
        private: for its owner alone.
    """
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    if private:
        part.unlink(missing_ok=True)
        part.touch(mode=0o600)
    part.write_text(text)
    os.replace(part, path)


def environment(device: str) -> dict[str, Any]:
    """Versions and machine of this process, for the run's records."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "packages": packages,
        "device": device,
        "cpus": os.cpu_count(),
        "git_commit": _git("rev-parse", "HEAD").strip() if _in_git() else "",
    }


def git_diff() -> str:
    """What differs from the commit in the source this process runs from; empty outside git."""
    return _git("diff", "HEAD") if _in_git() else ""


def _in_git() -> bool:
    """Whether git tracks this file: an installed copy may lie below somebody else's checkout."""
    return bool(_git("ls-files", str(Path(__file__).resolve())))


def _git(*arguments: str) -> str:
    source = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""
