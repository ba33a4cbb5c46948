"""A thread packs the next step: the same rows, at most one step ahead, and gone at the end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from simpo.data.loader import steps_ahead
from simpo.data.packing import pack
from simpo.data.plan import build_plan, pairs_of_step
from tests.support.tiny_models import random_pairs

PAIRS = random_pairs(np.random.default_rng(0), 10)
PLAN = build_plan(10, 4, 2, None, 3)


class Rows:
    """Packs the pairs of a step into one row, and remembers which steps it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def rows(self, indices: Sequence[int]) -> Any:
        self.asked.append([int(i) for i in indices])
        yield pack([PAIRS[i] for i in indices], indices)


@pytest.mark.parametrize("in_thread", [True, False])
def test_the_same_rows(in_thread: bool) -> None:
    rows = Rows()
    steps = list(steps_ahead(PLAN, rows, 2, in_thread))  # type: ignore[arg-type]
    assert len(steps) == PLAN.total_steps - 2 == 4
    for step, (indices, (row,)) in enumerate(steps, 2):
        assert np.array_equal(indices, pairs_of_step(PLAN, step))
        wanted = pack([PAIRS[i] for i in indices], list(indices))
        assert row.pairs == wanted.pairs
        assert torch.equal(row.input_ids, wanted.input_ids)
    assert len(rows.asked) == 4


def test_one_step_ahead_until_it_is_closed() -> None:
    rows, before = Rows(), threading.active_count()
    steps = steps_ahead(PLAN, rows, 0, True)  # type: ignore[arg-type]
    assert threading.active_count() == before, "nothing is packed before it is asked for"
    next(steps)
    next(steps)
    steps.close()
    assert rows.asked == [pairs_of_step(PLAN, step).tolist() for step in range(3)]
    assert threading.active_count() == before
