"""Chooses which replies to a prompt make pairs, by their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simpo.config.choices import PairChoice, ReplyChoice
from simpo.data.reading.scored import LeftOut, Scored, scored_pairs
from simpo.on_policy.files import content_hash


def pairs_of_replies(
    scores: Sequence[float], choice: ReplyChoice, prompt_id: str
) -> list[tuple[int, int]]:
    """The pairs of a prompt's different replies, as `data.sources.pairs` makes them.

    Of equal scores the first reply is the best, and the first is the worst. margin and ranked give
    what best_worst gives.

    Args:
        scores: of two replies or more.
        prompt_id: seeds the draw of best_random.

    Returns:
        Indices of (chosen, rejected); chosen has the higher score. Empty if all scores are equal.
    """
    scored = Scored(None, [(index, scores[index]) for index in best_first(scores)])
    as_best_worst = choice in (ReplyChoice.margin, ReplyChoice.ranked)
    as_read = PairChoice.best_worst if as_best_worst else PairChoice(choice.value)
    rng = np.random.default_rng(int(content_hash(prompt_id), 16))
    made = scored_pairs(scored, as_read, 0.0, rng)
    return [(one["chosen"], one["rejected"]) for one in made if not isinstance(one, LeftOut)]


def best_first(scores: Sequence[float]) -> list[int]:
    """Indices of replies, best first. Of equal scores the first reply is the best, and the first is
    the worst: `scored_pairs` takes the first as best and the last as worst."""
    best = scores.index(max(scores))
    others = [i for i in reversed(range(len(scores))) if i != best]
    return [best, *sorted(others, key=lambda i: -scores[i])]


def with_wide_margins(pairs: Sequence[Mapping[str, Any]], quantile: float) -> list[Any]:
    """The pairs whose margin reaches a quantile of all their margins, interpolated linearly."""
    if not pairs:
        return []
    margins = [margin(pair) for pair in pairs]
    least = float(np.quantile(margins, quantile))
    return [pair for pair, own in zip(pairs, margins, strict=True) if own >= least]


def margin(pair: Mapping[str, Any]) -> float:
    """The score of the chosen, or the best, reply above that of the rejected, or the worst, one."""
    if "responses" in pair:
        return float(pair["scores"][0] - pair["scores"][-1])
    return float(pair["chosen_score"] - pair["rejected_score"])
