"""What a phase has done, in the few words that the terminal shows."""

from __future__ import annotations

from pathlib import Path

from simpo.config.schema import RunConfig
from simpo.run.files import NEW_RUN, read_json, read_results


def of_generating(folder: Path, own: RunConfig) -> str:
    """The number of prompts and of replies to each.

    Args:
        folder: of the replies.
        own: settings of the phase.
    """
    prompts = num_lines(folder / "prompts.jsonl")
    return f"{prompts} prompts, {len(own.on_policy.seeds)} replies each"


def of_annotating(folder: Path) -> str:
    """The numbers of pairs and of prompts of both splits.

    Raises:
        DamagedError: measures.json is not as it was written.
    """
    measures = read_json(folder / "measures.json", NEW_RUN)
    told = []
    for split, name in (("train", "train"), ("test", "held-out")):
        if prompts := measures.get(split, {}).get("prompts"):
            told.append(f"{num_lines(folder / f'{split}.jsonl')} pairs of {prompts} {name} prompts")
    return ", ".join(told)


def of_training(folder: Path) -> str:
    """The number of steps.

    Args:
        folder: of the run.

    Raises:
        DamagedError: results.json is not as it was written.
    """
    steps = read_results(folder).get("train", {}).get("steps", 0)
    return f"{steps} step{'s' * (steps != 1)}"


def num_lines(file: Path) -> int:
    """The number of lines of a file."""
    with file.open("rb") as lines:
        return sum(1 for _ in lines)
