"""Figures of comparisons: by hand, and how often their interval holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simpo.judging.results import result_lines
from simpo.judging.shapes import Answer, Judgement, Query, Said, by_question
from simpo.judging.win_rates import (
    agreement,
    first_share,
    in_one_order,
    mean_chars,
    mean_figure,
    position_bias,
)
from simpo.report import studies
from simpo.run.judged import Judged

STUDIES = 1000
PROMPTS = 100


def judgement(
    question: str, order: int, value: float | None, repeat: int = 0, turn: int = 0
) -> Judgement:
    return Judgement(Query(question, turn, order, (), 1, 1.0, repeat=repeat), Said(""), value)


JUDGEMENTS = [
    judgement("a", 0, 0.9),
    judgement("a", 0, 0.7, repeat=1),
    judgement("a", 1, 0.2),  # the first position wins both times
    judgement("b", 0, 0.6),
    judgement("b", 1, 0.8),
    judgement("b", 1, 0.4, repeat=1),
    judgement("c", 0, 0.5),
    judgement("c", 1, 0.1),  # a tie is no bias
    judgement("d", 0, 1.0),
    judgement("d", 1, None),
    judgement("e", 0, None),
]


def test_by_hand() -> None:
    assert by_question(JUDGEMENTS) == pytest.approx(
        {
            "a": ((0.9 + 0.7) / 2 + 0.2) / 2,
            "b": (0.6 + (0.8 + 0.4) / 2) / 2,
            "c": 0.3,
            "d": 1.0,
        }
    )
    assert position_bias(JUDGEMENTS) == pytest.approx(1 / 3)
    first = [(0.9 + 0.8) / 2, (0.6 + 0.2) / 2, (0.5 + 0.9) / 2]
    assert first_share(JUDGEMENTS) == pytest.approx(sum(first) / 3)
    assert agreement(JUDGEMENTS) == 0.5
    assert in_one_order(JUDGEMENTS) == 1
    assert mean_chars([Answer("a", ("12", "345")), Answer("b", ("1",))]) == 3


def test_turns_and_points() -> None:
    """Points of two turns; a repeat agrees if it gives as many."""
    rated = [
        judgement("a", 0, 8.0),
        judgement("a", 0, 6.0, turn=1),
        judgement("a", 0, 8.0, repeat=1),
        judgement("a", 0, 7.0, repeat=1, turn=1),
    ]
    assert by_question(rated) == {"a": (8 + 6.5) / 2}
    assert agreement(rated) == 0.5


def test_without_both_orders_or_repeats() -> None:
    once = [judgement("a", 0, 0.9), judgement("b", 1, 0.2)]
    assert (position_bias(once), first_share(once), agreement(once)) == (None, None, None)


def test_interval_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resampling prompts covers the true rate; resampling single judgements does not.

    The two orders of a prompt have a common part, as the same two answers are judged.
    """
    monkeypatch.setattr(studies, "RESAMPLES", 300)
    draw = np.random.default_rng(0)
    by_prompts = by_judgements = 0
    for _ in range(STUDIES):
        common = draw.beta(1.2, 1.0, (PROMPTS, 1))
        orders = common + draw.normal(0, 0.1, (PROMPTS, 2))
        ours, single = (
            mean_figure(orders.mean(axis=1).tolist()),
            mean_figure(orders.ravel().tolist()),
        )
        true = 100 * 1.2 / 2.2
        assert None not in (ours.low, ours.high, single.low, single.high)
        by_prompts += ours.low <= true <= ours.high  # type: ignore[operator]
        by_judgements += single.low <= true <= single.high  # type: ignore[operator]
    assert 0.93 <= by_prompts / STUDIES <= 0.97
    assert by_judgements / STUDIES < 0.88


def test_what_is_said_of_the_judge() -> None:
    """Programs give no judgements, and those that cannot be read are counted."""
    programs = Judged("ifbench", "ifbench", "run", "", "programs", {}, {}, questions=9, asked=0)
    assert result_lines([programs], [Path("here")])[-2] == "judge  programs: 9 questions"
    model = Judged("mt_bench", "mt_bench", "run", "", "a", {}, {}, 9, 18, malformed=3)
    assert result_lines([model], [Path("here")])[-2] == (
        "judge  a: 9 questions, 18 judgements, 3 of them not readable"
    )
