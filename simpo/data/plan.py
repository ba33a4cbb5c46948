"""Chooses the pairs of each step and assigns them to rows, with pure functions of integers.

The order of the pairs depends on (seed, epoch) only, and the rows of a step on its pairs and the
token budget. The step number is therefore the whole state of the data: nothing else is saved, and
a continued run trains on exactly the same pairs as an uninterrupted one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TrainPlan:
    """The number of steps of a run, and what the order of its pairs depends on.

    Attributes:
        num_pairs: train pairs in the mixture.
        pairs_per_step: pairs per update; the last step of an epoch takes the remaining ones.
        steps_per_epoch: updates in one pass over the mixture.
        total_steps: updates of the run.
        seed: seeds the order of the pairs.
    """

    num_pairs: int
    pairs_per_step: int
    steps_per_epoch: int
    total_steps: int
    seed: int


def build_plan(
    num_pairs: int, pairs_per_step: int, epochs: int, max_steps: int | None, seed: int
) -> TrainPlan:
    """Plan a run of `epochs` passes over the pairs, of at most `max_steps` steps if given."""
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
    """Indices of the pairs of update `step` (from 0), int64 [<= pairs_per_step]."""
    epoch, place = divmod(step, plan.steps_per_epoch)
    order = np.random.default_rng([plan.seed, epoch]).permutation(plan.num_pairs)
    return order[place * plan.pairs_per_step : (place + 1) * plan.pairs_per_step]


def rows_of_pairs(
    indices: Sequence[int] | np.ndarray,
    num_tokens: np.ndarray,
    tokens_per_row: int,
    ranks: int = 1,
) -> list[list[int]]:
    """Distribute pairs over rows of similar size, with the same number of rows for each rank.

    Pairs are assigned longest first, each to the row with the fewest tokens. Rank r takes
    rows[r::ranks]; rows are sorted by size, so ranks compute rows of similar size at the same time.

    Args:
        indices: indices of the pairs.
        num_tokens: tokens of every pair of the data set, int64 [num_pairs].
        tokens_per_row: token budget of a row; a longer pair gets a row of its own.
        ranks: number of processes that share the rows.

    Returns:
        The indices of the pairs of each row, every pair exactly once. With fewer pairs than ranks
        some rows are empty.
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
    """Number of rows needed if each pair, longest first, goes into the first row with room."""
    room: list[int] = []
    for length in lengths:
        row = next((r for r, left in enumerate(room) if length <= left), None)
        if row is None:
            room.append(budget - length)
        else:
            room[row] -= length
    return len(room)
