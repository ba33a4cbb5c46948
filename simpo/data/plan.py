"""Which pairs a step trains on and how they are laid out in rows: pure functions of integers.

The order of the pairs is a function of (seed, epoch), the rows of a step one of its pairs and the
token budget. A step number is therefore the whole state of the data: nothing else is saved, and a
continued run sees exactly the pairs that it would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TrainPlan:
    """The numbers that follow from the settings and the size of the mixture.

    Attributes:
        num_pairs: pairs in the mixture.
        pairs_per_step: pairs behind one update; the last step of an epoch takes what is left.
        steps_per_epoch: updates in one pass over the mixture.
        total_steps: updates of the run.
        seed: decides the order.
    """

    num_pairs: int
    pairs_per_step: int
    steps_per_epoch: int
    total_steps: int
    seed: int


def build_plan(
    num_pairs: int, pairs_per_step: int, epochs: int, max_steps: int | None, seed: int
) -> TrainPlan:
    """Work out the steps of a run of `epochs` passes, ended early by `max_steps` if given."""
    steps_per_epoch = -(-num_pairs // pairs_per_step)
    steps = steps_per_epoch * epochs
    return TrainPlan(
        num_pairs=num_pairs,
        pairs_per_step=pairs_per_step,
        steps_per_epoch=steps_per_epoch,
        total_steps=steps if max_steps is None else min(steps, max_steps),
        seed=seed,
    )


def pairs_of_step(plan: TrainPlan, step: int) -> np.ndarray:
    """Indices of the pairs behind update `step` (from 0), int64 [<= pairs_per_step]."""
    epoch, place = divmod(step, plan.steps_per_epoch)
    order = np.random.default_rng([plan.seed, epoch]).permutation(plan.num_pairs)
    return order[place * plan.pairs_per_step : (place + 1) * plan.pairs_per_step]


def rows_of_pairs(
    indices: Sequence[int] | np.ndarray, num_tokens: np.ndarray, tokens_per_row: int
) -> list[list[int]]:
    """Share pairs out over rows: longest first, each into the first row that has room.

    Args:
        indices: the pairs to lay out.
        num_tokens: tokens of every pair of the data set, int64 [num_pairs].
        tokens_per_row: budget of a row; a pair above it gets a row of its own.

    Returns:
        The pairs of each row; every pair exactly once.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted((int(i) for i in indices), key=lambda i: (-num_tokens[i], i)):
        length = int(num_tokens[index])
        row = next((r for r, left in enumerate(room) if length <= left), None)
        if row is None:
            rows.append([])
            room.append(tokens_per_row)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= length
    return rows
