"""What a reader of judgements is told: ceilings, equal answers, few questions, no interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simpo.config.compose import compose_run
from simpo.data.pairs import Pair
from simpo.data.rules import obeys
from simpo.judging.pairs import Pairs
from simpo.judging.results import judged_as, result_lines
from simpo.judging.shapes import Answer, Judgement, Query, Said
from simpo.run.judged import Figure, Judged

RULE = {"name": "upper_case"}


def judged(
    judge: str, own: Sequence[str], chosen: Sequence[str], values: Sequence[float]
) -> Judged:
    """Answers to prompts that ask for capital letters, with the preference for each."""
    pairs = {
        str(number): Pair(
            ({"role": "user", "content": f"{number}?"},),
            ({"role": "assistant", "content": text},),
            ({"role": "assistant", "content": "no"},),
            "here",
            rule=RULE,
        )
        for number, text in enumerate(chosen)
    }
    answers = {str(number): Answer(str(number), (text,)) for number, text in enumerate(own)}
    found = [
        Judgement(Query(str(number), 0, 0, (), 0, 0.0), Said(""), value)
        for number, value in enumerate(values)
    ]
    run = compose_run(["benchmark=pairs"])
    return judged_as(run, Pairs(pairs, "chosen", 0), "m", judge, answers, found)


def test_the_highest_win_rate_by_rules() -> None:
    assert obeys(RULE, "YES") and not obeys(RULE, "yes")
    found = judged("rules", ["NO"] * 20 + ["no"] * 20, ["YES"] * 30 + ["yes"] * 10, [0.5, 0] * 20)
    assert found.notes == [
        "The baseline (chosen) obeys 30 of 40 rules, where a draw is the best result: the win rate "
        "is at most 62.5. The pass rate, or benchmark.baseline=base, shows whether training helped."
    ]
    assert judged("stub", ["NO"] * 40, ["YES"] * 40, [0.5, 0] * 20).notes == [
        "No interval of pass rate: all questions have the same value."
    ]
    assert not judged("rules", ["NO", "no"] * 20, ["yes"] * 40, [1, 0.5] * 20).notes


def test_few_questions_without_a_difference() -> None:
    found = judged("stub", ["no"] * 4, ["no"] * 2 + ["yes"] * 2, [0.5] * 4)
    assert found.figures == {"win_rate": Figure(50.0), "pass_rate": Figure(0.0)}
    assert found.notes == [
        "No interval of win rate, pass rate: all questions have the same value.",
        "4 questions are few: another sample may show something else.",
        "2 of 4 answers are the baseline's, word for word: they draw, or show the judge's bias "
        "alone.",
    ]


def test_one_question_and_few_with_an_interval() -> None:
    one, two = (judged("stub", ["no"] * n, ["yes"] * n, [1, 0][:n]) for n in (1, 2))
    assert one.notes[-1] == "1 question is few: another sample may show something else."
    assert two.notes[-1] == (
        "2 questions are few: intervals are too narrow below 30, and another sample may show "
        "something else."
    )


def test_how_to_read(tmp_path: Path) -> None:
    shown = result_lines([judged("stub", ["A", "b"], ["c", "d"], [1, 0])], [tmp_path])
    assert shown[3:5] == [
        "",
        "read   percent, a win rate of 50 is as good as the baseline; in brackets 95 % intervals "
        "from resampled questions",
    ]
    shown = result_lines([judged("stub", ["A"], ["c"], [1])], [tmp_path])
    assert shown[4] == "read   percent, a win rate of 50 is as good as the baseline"
