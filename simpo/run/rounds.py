"""What the folder of a run with rounds has beside that of another. Imports no torch.

All of it: `simpo.launch.rounds.phases`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from simpo.config.check import load_run
from simpo.config.errors import DamagedError
from simpo.config.schema import RunConfig
from simpo.run.files import NEW_RUN, read_json, read_text

ROUNDS = "rounds"
"""The folder of the rounds, which has one for each."""
ENDED_FILE = Path(ROUNDS, "ended.txt")
"""Why the rounds ended before the last."""


class Kind(str, Enum):
    """What a phase of a round does, in the order within a round."""

    check = "check"
    generate = "generate"
    annotate = "annotate"
    train = "train"


@dataclass(frozen=True)
class Phase:
    """One piece of work of a round; `part` of those that generate at the same time."""

    round: int
    kind: Kind
    part: int = 1

    def text(self) -> str:
        """What the phase is called in messages."""
        return f"round {self.round}, {self.kind.value}" + f", part {self.part}" * (self.part > 1)


def round_folder(root: Path, number: int) -> Path:
    """The folder of a round."""
    return root / ROUNDS / str(number)


def run_folder(root: Path, number: int) -> Path:
    """The folder of the training run of a round."""
    return round_folder(root, number) / "run"


def as_begun(run: RunConfig) -> RunConfig:
    """A run as its rounds began: with their first model, data and benchmark, in its own folder.

    Of a run that is none of rounds its own settings.

    Raises:
        ConfigError: the settings of the rounds cannot be read.
    """
    if run.run_dir is None:
        return run
    folder = Path(run.run_dir).expanduser().absolute()
    root, number = folder.parent.parent.parent, folder.parent.name
    if not number.isdecimal() or folder != run_folder(root, int(number)):
        return run
    if not (root / "run.yaml").is_file():  # it was copied out of them
        return run
    return replace(load_run(root / "run.yaml", check=False), run_dir=run.run_dir)


def error_file(root: Path, phase: Phase) -> Path:
    """The file with the reason why the newest phase of a round failed; of each part its own."""
    return round_folder(root, phase.round) / f"error{f'-{phase.part}' * (phase.part > 1)}.txt"


def done_file(root: Path, phase: Phase) -> Path:
    """The file that says that a phase is done, with its seconds and what it did."""
    part = f"-{phase.part}" * (phase.part > 1)
    return round_folder(root, phase.round) / f"{phase.kind.value}{part}.json"


def ended_early(root: Path) -> str:
    """Why the rounds of a run ended before the last, in a line; empty if they did not.

    Raises:
        DamagedError: ended.txt cannot be read.
    """
    return (read_text(root / ENDED_FILE, NEW_RUN) or "").strip()


def seconds_of(root: Path, number: int) -> dict[Kind, float]:
    """How long each phase of a round took, by kind; of parts at the same time the longest.

    Raises:
        DamagedError: a file is not as it was written.
    """
    found: dict[Kind, float] = {}
    for kind in Kind:
        first = done_file(root, Phase(number, kind))
        for file in (first, *sorted(first.parent.glob(f"{kind.value}-*.json"))):
            took = read_json(file, NEW_RUN).get("seconds", 0.0) if file.is_file() else None
            if type(took) not in (int, float, type(None)):
                raise DamagedError(file, "has no number of seconds", NEW_RUN)
            if took is not None:
                found[kind] = max(found.get(kind, 0.0), took)
    return found
