"""Rules of runs whose loss compares all replies to a prompt."""

from __future__ import annotations

from collections.abc import Iterator

from simpo.config.choices import Compat, PairChoice, ReplyChoice
from simpo.config.schema import RunConfig

WHY = "the loss compares all replies to a prompt"


def ranking_problems(run: RunConfig) -> Iterator[str]:
    """Faults of settings that such a loss makes one."""
    if not run.loss.ranks:
        return
    for index, source in enumerate(run.data.sources):
        if source.pairs is not PairChoice.best_worst:
            got = source.pairs.value
            yield f"data.sources[{index}].pairs: {WHY}, got {got} (leave it out)"
    if run.data.compat is Compat.paper:
        yield f"data.compat: paper has pairs only, and {WHY} (set data.compat=none)"
    key = "on_policy.choice" if run.rounds.choice is None else "rounds.choice"
    choice = run.rounds.choice or run.on_policy.choice
    if run.rounds.number and choice is not ReplyChoice.ranked:
        yield f"{key}: {WHY}, got {choice.value} (set {key}=ranked)"
