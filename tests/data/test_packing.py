"""Packing and planning: every pair is packed once, with the positions it has outside a row."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo.data import loader
from simpo.data.loader import PackedSet
from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.data.plan import build_plan, pairs_of_step, rows_of_pairs
from tests.support.tiny_models import token_set


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenizedPair:
    return TokenizedPair.of(
        np.array(prompt, np.int32), np.array(chosen, np.int32), np.array(rejected, np.int32)
    )


def test_row_written_out() -> None:
    """The example of the module: prompts of 3 and 2 tokens."""
    row = pack([pair([11, 12, 13], [21, 22], [31, 32, 33]), pair([14, 15], [23], [34, 35])], [7, 5])
    assert row.input_ids.tolist() == [[11, 12, 13, 21, 22, 31, 32, 33, 14, 15, 23, 34, 35]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 2, 3]]
    assert row.segments == ((0, 3, 5, 8), (8, 10, 11, 13))
    assert row.targets.tolist() == [21, 22, 31, 32, 33, 23, 34, 35]
    # Both responses of a pair are first predicted from the prompt's last position.
    assert row.predictors.tolist() == [2, 3, 2, 5, 6, 9, 9, 11]
    assert row.response_tokens == (2, 3, 1, 2)
    assert row.chosen_tokens == 3
    assert row.pairs == (7, 5)


def test_pairs_without_scores_among_ranked_ones() -> None:
    ranked = replace(TokenizedPair.of([1], [2], [3], [4]), scores=(3.0, 1.0, 2.0))
    row = pack([ranked, TokenizedPair.of([1], [2], [3])], [0, 1])
    assert row.scores is not None
    nan = math.nan
    np.testing.assert_array_equal(row.scores, [3, 1, 2, nan, nan, nan])
    assert pack([TokenizedPair.of([1], [2], [3])], [0]).scores is None


def test_without_a_prompt_the_first_token_is_not_scored() -> None:
    row = pack([pair([], [21, 22], [31, 32, 33])], [0])
    assert row.targets.tolist() == [22, 32, 33]
    assert row.predictors.tolist() == [0, 2, 3]
    assert row.response_tokens == (1, 2)


@pytest.mark.parametrize("empty", [pair([1], [], []), pair([], [1], [2, 3])])
def test_a_response_without_a_scored_token_never_passes(empty: TokenizedPair) -> None:
    with pytest.raises(ValueError, match="pair 4: a response has no token to score"):
        pack([empty], [4])


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths, st.integers(1, 100), st.integers(1, 5))
def test_rows_hold_every_pair_once_and_keep_the_budget(
    lengths: list[int], budget: int, ranks: int
) -> None:
    rows = rows_of_pairs(range(len(lengths)), np.array(lengths), budget, ranks)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert len(rows) % ranks == 0
    for row in rows:
        assert sum(lengths[i] for i in row) <= budget or len(row) == 1
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert sums == sorted(sums, reverse=True)
    # No row could give its smallest pair to the emptiest one and both be more alike.
    for row, total in zip(rows, sums, strict=True):
        assert total - sums[-1] <= max(lengths[i] for i in row) if row else True


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=20, max_size=60), st.integers(2, 4))
def test_ranks_compute_alike(lengths: list[int], ranks: int) -> None:
    rows = rows_of_pairs(range(len(lengths)), np.array(lengths), 100, ranks)
    loads = [sum(lengths[i] for row in rows[r::ranks] for i in row) for r in range(ranks)]
    assert max(loads) - min(loads) <= max(lengths)


def test_rows_worked_out_by_hand() -> None:
    """First fit needs three rows of 15 (9 6, 8 7, 5); longest first to the emptiest evens them."""
    lengths = np.array([5, 9, 7, 8, 6])
    assert rows_of_pairs(range(5), lengths, 15) == [[3, 0], [2, 4], [1]]
    assert rows_of_pairs(range(5), lengths, 20) == [[1, 4, 0], [3, 2]]
    assert rows_of_pairs([1], lengths, 4) == [[1]]
    assert rows_of_pairs([1, 0], lengths, 20, ranks=3) == [[1], [0], []]


def rows_one_by_one(lengths: list[int], budget: int, ranks: int) -> list[list[int]]:
    """The layout by its definition: the fewest rows, from first fit's number, that keep it."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    room: list[int] = []
    for i in order:
        fitting = [row for row, left in enumerate(room) if lengths[i] <= left]
        row = fitting[0] if fitting else len(room)
        room[row:] = [(room[row] if fitting else budget) - lengths[i], *room[row + 1 :]]
    number = -(-len(room) // ranks) * ranks
    while True:
        rows: list[list[int]] = [[] for _ in range(number)]
        for i in order:
            min(rows, key=lambda row: sum(lengths[j] for j in row)).append(i)
        sums = [sum(lengths[j] for j in row) for row in rows]
        if all(total <= budget or len(row) == 1 for total, row in zip(sums, rows, strict=True)):
            return [rows[i] for i in sorted(range(number), key=lambda i: (-sums[i], i))]
        number += ranks


@settings(deadline=None)
@given(lengths, st.integers(1, 100), st.integers(1, 5))
def test_rows_are_those_of_a_search_one_by_one(lengths: list[int], budget: int, ranks: int) -> None:
    rows = rows_of_pairs(range(len(lengths)), np.array(lengths), budget, ranks)
    assert rows == rows_one_by_one(lengths, budget, ranks)


@settings(deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=100),
    st.integers(1, 100),
    st.integers(1, 4),
    st.integers(1, 50),
)
def test_a_whole_set_is_laid_out_in_blocks(
    lengths: list[int], budget: int, ranks: int, block: int
) -> None:
    """Every pair once, no row above the budget, and each process as many rows."""
    tokens = [pair([1] * (n - 1), [2], []) for n in lengths]
    data = token_set(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "BLOCK_PAIRS", block)
        sets = [PackedSet(data, budget, True, r, ranks) for r in range(ranks)]
        rows = [list(packed.rows()) for packed in sets]
    filled = [row for of_rank in rows for row in of_rank if row.pairs]
    assert sorted(i for row in filled for i in row.pairs) == list(range(len(lengths)))
    assert all(row.input_ids.numel() <= budget or len(row.pairs) == 1 for row in filled)
    assert len({len(of_rank) for of_rank in rows}) == 1
    # Any two rows of first fit are more than one full row.
    blocks = -(-len(lengths) // block)
    fewest = sum(min(n, budget) for n in lengths) / budget
    assert len(rows[0]) <= 2 * (2 * fewest + blocks) / ranks + 2 * blocks


def test_rows_of_a_large_set() -> None:
    """Lengths like UltraFeedback's fill nine tenths of the rows."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(800), 0.6, 5_000).clip(20, 3000).astype(np.int64)
    rows = rows_of_pairs(range(len(lengths)), lengths, 4096, 8)
    assert len(rows) * 4096 * 0.9 < lengths.sum()


def test_row_with_a_prompt_for_each_response() -> None:
    row = pack([pair([11, 12], [21], [31, 32]), pair([], [23, 24], [34, 35])], [7, 5], False)
    assert row.input_ids.tolist() == [[11, 12, 21, 11, 12, 31, 32, 23, 24, 34, 35]]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 1]]
    assert row.targets.tolist() == [21, 31, 32, 24, 35]
    assert row.predictors.tolist() == [1, 4, 5, 7, 9]
    assert row.response_tokens == (1, 2, 1, 1)
    # A sequence is a segment of its own.
    assert row.segments == ((0, 2, 3), (3, 5, 7), (7, 7, 9), (9, 9, 11))
    assert row.keys.index.tolist() == list(range(11))
    assert row.keys.query_ends.tolist() == row.keys.key_ends.tolist() == [0, 3, 7, 9, 11]


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 3), st.integers(0, 5))
def test_an_epoch_is_a_permutation(num_pairs: int, per_step: int, epochs: int, seed: int) -> None:
    plan = build_plan(num_pairs, per_step, epochs, None, seed)
    steps = [pairs_of_step(plan, step) for step in range(plan.total_steps)]
    for epoch in range(epochs):
        part = steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        assert sorted(np.concatenate(part)) == list(range(num_pairs))
        assert all(len(step) == per_step for step in part[:-1])
    assert plan.total_steps == epochs * plan.steps_per_epoch


def test_an_epoch_is_drawn_once_and_in_the_same_order_ever_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator, drawn = np.random.default_rng, []

    def noted(seed: list[int]) -> np.random.Generator:
        drawn.append(seed)
        return generator(seed)

    monkeypatch.setattr(np.random, "default_rng", noted)
    plan = build_plan(12, 5, 2, None, seed=7_654_321)
    orders = [pairs_of_step(plan, step).tolist() for step in range(plan.total_steps)]
    assert drawn == [[7_654_321, 0], [7_654_321, 1]]
    assert orders == [
        *([7, 10, 11, 6, 2], [8, 5, 1, 9, 4], [0, 3]),
        *([1, 0, 5, 4, 8], [10, 9, 3, 6, 11], [7, 2]),
    ]
    assert pairs_of_step(plan, 0).tolist() == orders[0], "an earlier epoch is drawn again"


def test_order_depends_on_seed_and_epoch_only() -> None:
    plan = build_plan(100, 10, 2, None, seed=1)
    again = build_plan(100, 10, 2, None, seed=1)
    other = build_plan(100, 10, 2, None, seed=2)
    first = pairs_of_step(plan, 0).tolist()
    assert pairs_of_step(again, 0).tolist() == first
    assert pairs_of_step(other, 0).tolist() != first
    assert pairs_of_step(plan, plan.steps_per_epoch).tolist() != first


def test_max_steps_cuts_the_run_short_but_never_lengthens_it() -> None:
    assert build_plan(100, 32, 1, 2, 0).total_steps == 2
    assert build_plan(100, 32, 1, 99, 0).total_steps == 4
