"""The members of a sweep, and the folders and files that they find when they start."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from simpo.config.check import run_yaml
from simpo.config.errors import ConfigError, unwritable
from simpo.config.flat import MAY_DIFFER, RESULT_SECTIONS, ROUNDS_SECTIONS, holds_secret
from simpo.config.renamed import first_name, first_text
from simpo.config.schema import RunConfig
from simpo.run.atomic import write_text
from simpo.run.command import train_command
from simpo.run.files import PRUNING
from simpo.run.folder import new_folder, own_folders, refuse_other_settings
from simpo.run.pruning import Pruning

LONGEST_NAME = 120


@dataclass(frozen=True)
class Member:
    """One run of a sweep: its overrides, and those of them that other members do not share."""

    run: RunConfig
    overrides: tuple[str, ...]
    own: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the member's folder; does not depend on the order of the overrides."""
        # A nested group goes by its last name: experiments/objectives=orpo.
        words = (word.partition("=") for word in self.own)
        text = ",".join(sorted(f"{k.rpartition('/')[2]}{eq}{v}" for k, eq, v in words)) or "all"
        name = re.sub(r"[^\w.,=+-]+", "_", text)
        if name == text and len(name) <= LONGEST_NAME:
            return name
        return f"{name[:LONGEST_NAME]}-{_hash(text)}"

    @property
    def path(self) -> Path:
        """The run's folder."""
        assert self.run.run_dir is not None
        return Path(self.run.run_dir)


def single_folder(run: RunConfig) -> Path:
    """The folder of a run without a sweep."""
    return next(iter(own_folders(run)), None) or new_folder(run)


def sweep_folder(member: Member, name: str) -> Path:
    """The folder of a sweep, named by what its members share.

    Raises:
        ConfigError: run_dir is set.
    """
    run = member.run
    if run.run_dir is not None:
        raise ConfigError(
            [
                f"run_dir: each member of a sweep has its own folder, got {run.run_dir} "
                "(set launcher.sweep_dir)"
            ]
        )
    if run.launcher.sweep_dir is not None:
        return Path(run.launcher.sweep_dir).expanduser().absolute()
    shared = sorted(set(member.overrides) - set(member.own))
    # Where and how a member runs may change between two submissions of the same sweep.
    deciding = [
        f"{first_name(key)}{equals}{first_text(key, value)}"
        for key, equals, value in (text.partition("=") for text in shared)
        if _decides_numbers(key)
    ]
    parent = Path(run.output_dir).expanduser().absolute() / "sweeps"
    return parent / f"{name}-{_hash(' '.join(deciding))}"


def _decides_numbers(key: str) -> bool:
    section, _, rest = key.lstrip("+~").partition(".")
    deciding = (*RESULT_SECTIONS, *ROUNDS_SECTIONS, "experiments")
    return section in deciding and rest not in MAY_DIFFER.get(section, ())


def with_folder(member: Member, folder: Path) -> Member:
    """The member in its folder.

    Raises:
        ConfigError: a run with other settings lies there.
        DamagedError: what lies there cannot be read.
    """
    run = replace(member.run, run_dir=str(folder))
    refuse_other_settings(run, folder)
    return replace(member, run=run)


@contextmanager
def with_files(members: Sequence[Member], folder: Path, pruning: Pruning | None) -> Iterator[None]:
    """Write settings, command and pruning.json into the folders; remove new ones if nothing starts.

    Raises:
        RunError: a file or folder cannot be written.
    """
    new = [path for path in (folder, *(m.path for m in members)) if not path.exists()]
    try:
        for member in members:
            member.path.mkdir(parents=True, exist_ok=True)
            words = [text for text in member.overrides if not _is_placement(text)]
            private = holds_secret(member.run)
            command = train_command(words, member.path)
            write_text(member.path / "command.txt", f"{command}\n", private)
            write_text(member.path / "run.yaml", run_yaml(member.run), private)
            if pruning is None:
                (member.path / PRUNING).unlink(missing_ok=True)
            else:
                write_text(member.path / PRUNING, pruning.text(), private)
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise unwritable(error.filename, error) from error
    finally:
        if not any((member.path / "jobs.jsonl").is_file() for member in members):
            for path in new:
                shutil.rmtree(path, ignore_errors=True)


def _is_placement(override: str) -> bool:
    return override.partition("=")[0].partition(".")[0] in ("launcher", "run_dir")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
