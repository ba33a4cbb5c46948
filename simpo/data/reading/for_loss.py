"""Chooses what reads the records that a loss is trained on, and reads pairs with scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from simpo.data.pairs import Pair
from simpo.data.reading.records import (
    COLUMNS,
    RecordFault,
    check_sizes,
    known_scores,
    to_dialogue,
    to_labelled,
    to_pair,
    to_ranking,
)

if TYPE_CHECKING:
    from simpo.loss import LossConfig


def reader_of(loss: LossConfig) -> Callable[[Any, str], Pair]:
    """What reads the records that a loss is trained on."""
    if loss.reads_labels:
        return to_labelled
    if not loss.needs_rejected:
        return to_dialogue
    if loss.ranks:
        return to_ranking
    return to_scored_pair if loss.needs_scores else to_pair


def to_scored_pair(record: Any, place: str) -> Pair:
    """Read one record, whose scores the pair then has.

    Args: as `to_pair`.

    Raises:
        RecordFault: as `to_pair`, or the record has no scores of chosen and rejected, or too large
            ones.
    """
    pair = to_pair(record, place)
    scores = known_scores(record)
    if scores is None:
        raise RecordFault(
            "has no scores of chosen and rejected, which the loss needs (add the numbers "
            "score_chosen and score_rejected, or choose a loss without scores)"
        )
    check_sizes(scores)
    return replace(pair, scores=scores)


COLUMNS[to_scored_pair] = COLUMNS[to_pair]
