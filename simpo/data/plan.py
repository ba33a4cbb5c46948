"""Which pairs a step trains on and how they are laid out in rows: pure functions of integers.

The order of the pairs is a function of (seed, epoch), the rows of a step one of its pairs and the
token budget. A step number is therefore the whole state of the data: nothing else is saved, and a
continued run sees exactly the pairs that it would have seen.
"""

from __future__ import annotations

import heapq
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
    indices: Sequence[int] | np.ndarray,
    num_tokens: np.ndarray,
    tokens_per_row: int,
    ranks: int = 1,
) -> list[list[int]]:
    """Share pairs out over rows of like size, as many rows for each rank.

    Longest first, each pair goes to the row with the fewest tokens. Rank r takes rows[r::ranks]:
    rows are in order of size, so those that ranks compute at the same time are alike.

    Args:
        indices: the pairs to lay out.
        num_tokens: tokens of every pair of the data set, int64 [num_pairs].
        tokens_per_row: budget of a row; a pair above it gets a row of its own.
        ranks: processes that share the rows.

    Returns:
        The pairs of each row, every pair exactly once. With fewer pairs than ranks some are empty.
    """
    longest_first = sorted((int(i) for i in indices), key=lambda i: (-num_tokens[i], i))
    lengths = [int(num_tokens[i]) for i in longest_first]
    num_rows = -(-_first_fit(lengths, tokens_per_row) // ranks) * ranks
    while True:
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        loads = [(0, row) for row in range(num_rows)]
        for index, length in zip(longest_first, lengths, strict=True):
            load, row = heapq.heappop(loads)
            rows[row].append(index)
            heapq.heappush(loads, (load + length, row))
        if all(load <= tokens_per_row or len(rows[row]) == 1 for load, row in loads):
            return [rows[row] for _, row in sorted(loads, key=lambda item: (-item[0], item[1]))]
        num_rows += ranks


def _first_fit(lengths: Sequence[int], budget: int) -> int:
    """Rows needed when each pair, longest first, goes into the first one that has room."""
    room: list[int] = []
    for length in lengths:
        row = next((r for r, left in enumerate(room) if length <= left), None)
        if row is None:
            room.append(budget - length)
        else:
            room[row] -= length
    return len(room)
