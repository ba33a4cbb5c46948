"""What a reader of judgements is told: ceilings, equal answers, few questions, no interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simpo.config.compose import compose_run
from simpo.data.pairs import Pair
from simpo.data.rules import obeys
from simpo.judging.pairs import Pairs
from simpo.judging.results import judged_as, result_lines
from simpo.judging.shapes import Answer, JudgedAnswers, Judgement, Query, Said
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
    return judged_as(run, Pairs(pairs, "chosen", 0), JudgedAnswers("m", judge, answers, found))


def test_the_highest_win_rate_by_rules() -> None:
    assert obeys(RULE, "YES") and not obeys(RULE, "yes")
    found = judged("rules", ["NO"] * 20 + ["no"] * 20, ["YES"] * 30 + ["yes"] * 10, [0.5, 0] * 20)
    assert found.notes == [
        "The baseline (chosen) obeys 30 of 40 rules, where a draw is the best result: the win rate "
        "is at most 62.5. The pass rate, or benchmark.baseline=base, shows whether training helped."
    ]
    assert judged("stub", ["NO"] * 40, ["YES"] * 40, [0.5, 0] * 20).notes == [
        "No interval of pass rate: any sample of these questions gives the same value."
    ]
    assert not judged("rules", ["NO", "no"] * 20, ["yes"] * 40, [1, 0.5] * 20).notes


def test_few_questions_without_a_difference() -> None:
    found = judged("stub", ["no"] * 4, ["no"] * 2 + ["yes"] * 2, [0.5] * 4)
    assert found.figures == {"win_rate": Figure(50.0), "pass_rate": Figure(0.0)}
    assert found.notes == [
        "No interval of win rate, pass rate: any sample of these questions gives the same value.",
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
    """A line a figure; what the intervals and the difference are, where there are some."""
    one = judged("stub", ["A", "b"], ["c", "d"], [1, 0])
    few = "2 questions are few: intervals are too narrow below 30, and another sample may show"
    assert result_lines([one], [tmp_path]) == [
        "| pairs, percent | m                   |",
        "|----------------|---------------------|",
        "| win rate       | 50.0 (0.0 to 100.0) |",
        "| pass rate      | 50.0 (0.0 to 100.0) |",
        "| characters     | 1 against 1         |",
        "",
        "read   percent, a win rate of 50 is as good as the baseline; in brackets 95 % intervals "
        "from resampled questions",
        "judge  stub against chosen: 2 questions, 2 judgements",
        f"note   {few} something else.",
        f"folder {tmp_path}",
    ]
    none = replace(one, figures={"win_rate": Figure(50.0)})
    assert result_lines([none], [tmp_path])[5] == (
        "read   percent, a win rate of 50 is as good as the baseline"
    )


def compared(model: str, *notes: str) -> Judged:
    figures = {"lc_win_rate": Figure(50.0), "win_rate": Figure(40.0, 30.0, 50.0, 35.0, 45.0)}
    values = {str(number): 0.4 for number in range(40)}
    chars = {"model": 9.0, "baseline": 8.0}
    about: dict[str, Any] = {"questions": 40, "asked": 40, "mean_chars": chars}
    about["notes"] = list(notes)
    return Judged("alpaca_eval_2", "alpaca_eval", model, "gpt", "j", figures, values, **about)


def test_several_models() -> None:
    """What is noted about all of them is said once, and few models are columns, many lines."""
    found = [compared("a", "All."), compared("b", "Own.", "All.")]
    shown = result_lines(found, [Path("x"), Path("y")])
    assert shown == [
        "| alpaca_eval_2, percent | a                   | b                   |",
        "|------------------------|---------------------|---------------------|",
        "| LC win rate            | 50.0                | 50.0                |",
        "| win rate               | 40.0 (30.0 to 50.0) | 40.0 (30.0 to 50.0) |",
        "| win rate, official     | 35.0 to 45.0        | 35.0 to 45.0        |",
        "| minus a                |                     | +0.0                |",
        "| characters             | 9 against 8         | 9 against 8         |",
        "",
        "read   percent, a win rate of 50 is as good as the baseline; in brackets 95 % intervals "
        "from resampled questions; official: interval as the benchmark's own script computes it; "
        "minus a: mean difference on the same questions, as judged (no control of length)",
        "a:",
        "  judge  j against gpt: 40 questions, 40 judgements",
        "  folder x",
        "b:",
        "  judge  j against gpt: 40 questions, 40 judgements",
        "  note   Own.",
        "  folder y",
        "note   All.",
    ]
    many = result_lines([compared(name) for name in "abcdef"], [Path(name) for name in "abcdef"])
    assert many[0].split("|")[1:3] == [
        " alpaca_eval_2, percent ",
        " LC win rate ",
    ]
    assert len(many[2:8]) == 6 and many[7].startswith("| f  ")


def test_points_have_two_digits() -> None:
    """As in a report: models differ by tenths of a point."""
    found = [
        Judged("mt_bench", "mt_bench", name, "", "j", {"score": figure}, values, 2, 2)
        for name, figure, values in (
            ("a", Figure(7.5, 7.0, 8.0), {"1": 7.0, "2": 8.0}),
            ("b", Figure(7.53, 7.04, 8.02), {"1": 7.04, "2": 8.02}),
        )
    ]
    assert result_lines(found, [Path("x"), Path("y")])[2:4] == [
        "| score            | 7.50 (7.00 to 8.00) | 7.53 (7.04 to 8.02)    |",
        "| minus a          |                     | +0.03 (+0.02 to +0.04) |",
    ]


@pytest.mark.parametrize(("tokens", "cost_usd"), [((5, 5), 20e-6), ((5, 0), None), ((0, 0), None)])
def test_a_cost_is_known_if_all_tokens_are(tokens: tuple[int, int], cost_usd: float | None) -> None:
    pair = Pair(
        ({"role": "user", "content": "?"},), ({"role": "assistant", "content": "no"},), None, ""
    )
    judgements = [
        Judgement(Query("q", 0, order, (), 9, 0.0), Said("[[A]]", input_tokens=count), 1.0)
        for order, count in enumerate(tokens)
    ]
    run = compose_run(
        [
            *("benchmark=pairs", "judge.endpoint=http://localhost/v1", "judge.model=j"),
            *("judge.usd_per_million_input_tokens=2", "judge.usd_per_million_output_tokens=8"),
        ]
    )
    answered = JudgedAnswers("m", "j", {"q": Answer("q", ("x",))}, judgements)
    found = judged_as(run, Pairs({"q": pair}, "chosen", 0), answered)
    assert found.cost_usd == cost_usd
    told = "The cost is not known: the server did not count the tokens of all verdicts."
    assert (told in found.notes) == (cost_usd is None)


def test_verdicts_of_one_order_alone_are_a_note() -> None:
    """q1's other verdict cannot be read; q2 was asked in one order."""
    prompt, said = ({"role": "user", "content": "?"},), ({"role": "assistant", "content": "no"},)
    pairs = {key: Pair(prompt, said, None, "") for key in ("q0", "q1", "q2")}
    judgements = [
        Judgement(Query(key, 0, order, (), 9, 0.0), Said(""), value)
        for key, order, value in (
            *(("q0", 0, 1.0), ("q0", 1, 0.0), ("q1", 0, 1.0), ("q1", 1, None)),
            ("q2", 0, 1.0),
        )
    ]
    answers = {key: Answer(key, ("x",)) for key in pairs}
    found = judged_as(
        compose_run(["benchmark=pairs"]),
        Pairs(pairs, "chosen", 0),
        JudgedAnswers("m", "j", answers, judgements),
    )
    assert found.by_question == {"q0": 0.5, "q1": 1.0, "q2": 1.0}
    assert found.notes[0] == (
        "1 questions have a verdict that can be read in one order alone. It counts, and with it "
        "the judge's bias for a position."
    )
