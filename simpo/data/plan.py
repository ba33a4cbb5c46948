"""Chooses the pairs of each step and assigns them to rows, with pure functions of integers.

The order of the pairs depends on (seed, epoch) only, and the rows of a step on its pairs and the
token budget. The step number is therefore the whole state of the data: nothing else is saved, and
a continued run trains on exactly the same pairs as an uninterrupted one.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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
    order = _order_of_epoch(plan.seed, epoch, plan.num_pairs)
    return order[place * plan.pairs_per_step : (place + 1) * plan.pairs_per_step]


@lru_cache(maxsize=1)  # all steps of an epoch take from it, and 10M pairs take 0.6 s to draw
def _order_of_epoch(seed: int, epoch: int, num_pairs: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
    order.flags.writeable = False
    return order


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
    pairs = np.asarray(indices, dtype=np.int64)
    pairs = pairs[np.lexsort((pairs, -num_tokens[pairs]))]
    lengths = num_tokens[pairs].tolist()
    fewest = -(-_first_fit(lengths, tokens_per_row) // ranks) * ranks

    def keeps_budget(num_rows: int) -> bool:
        rows = _spread(lengths, num_rows)
        return all(load <= tokens_per_row or len(places) == 1 for load, places in rows)

    # One row more never makes the fullest row fuller. In twice as many rows as first fit needs,
    # the mean is at most half a budget, and so is the pair that a row gets last.
    counts = range(fewest, 2 * fewest + 1, ranks)
    num_rows = counts[bisect_left(counts, True, key=keeps_budget)]
    return [pairs[places].tolist() for _, places in _spread(lengths, num_rows)]


def _spread(lengths: Sequence[int], num_rows: int) -> list[tuple[int, list[int]]]:
    """Put each pair, longest first, into the row with the fewest tokens.

    Returns:
        Tokens and places in `lengths` of each row, the fullest row first.
    """
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads = [(0, row) for row in range(num_rows)]
    for place, length in enumerate(lengths):
        load, row = loads[0]
        rows[row].append(place)
        heapq.heapreplace(loads, (load + length, row))
    loads.sort(key=lambda item: (-item[0], item[1]))
    return [(load, rows[row]) for load, row in loads]


def _first_fit(lengths: Sequence[int], budget: int) -> int:
    """Number of rows needed if each pair, longest first, goes into the first row with room."""
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    # A binary tree: node i has the children 2i and 2i + 1, the leaves are the rows, and each node
    # knows the most room that a row below it has.
    room = [budget] * (2 * leaves)
    last = alone = 0
    for length in lengths:
        if length > budget:
            alone += 1
            continue
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < length
        room[node] -= length
        last = max(last, node + 1 - leaves)
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return last + alone
