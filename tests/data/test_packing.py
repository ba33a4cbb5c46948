"""Packing and planning: every pair is packed once, with the positions it has outside a row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.data.plan import build_plan, pairs_of_step, rows_of_pairs


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenizedPair:
    return TokenizedPair(
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


def test_without_a_prompt_the_first_token_is_not_scored() -> None:
    row = pack([pair([], [21, 22], [31, 32, 33])], [0])
    assert row.targets.tolist() == [22, 32, 33]
    assert row.predictors.tolist() == [0, 2, 3]
    assert row.response_tokens == (1, 2)


@pytest.mark.parametrize("empty", [pair([1], [], [2]), pair([], [1], [2, 3])])
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


def test_row_with_a_prompt_for_each_response() -> None:
    row = pack([pair([11, 12], [21], [31, 32]), pair([], [23, 24], [34, 35])], [7, 5], False)
    assert row.input_ids.tolist() == [[11, 12, 21, 11, 12, 31, 32, 23, 24, 34, 35]]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 1]]
    assert row.targets.tolist() == [21, 31, 32, 24, 35]
    assert row.predictors.tolist() == [1, 4, 5, 7, 9]
    assert row.response_tokens == (1, 2, 1, 1)
    assert (row.segments, row.keys) == ((), None)


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
