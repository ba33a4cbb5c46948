"""Judges answers, and shows and writes what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from simpo.config.schema import RunConfig
from simpo.data.rules import obeys
from simpo.judging import verdicts, win_rates
from simpo.judging.shapes import (
    Answer,
    Benchmark,
    Judge,
    JudgedAnswers,
    Judgement,
    Query,
    Question,
    Reward,
    Said,
)
from simpo.on_policy.rewards import RULES
from simpo.report.studies import by_bootstrap
from simpo.report.win_rates import as_judged, digits, in_words, label, official_interval
from simpo.run.judged import Judged
from simpo.run.tables import markdown_table

EXAMPLES = 3
"""Questions shown that were won, and as many that were lost."""
SHOWN_CHARS = 1200
ONE_ORDER = (
    "{:,} questions have a verdict that can be read in one order alone. It counts, and with it the "
    "judge's bias for a position."
)
MOST_CHANCE = 75.0
"""A highest possible win rate in percent up to which a note says what it is."""


def judgements_of(
    run: RunConfig,
    benchmark: Benchmark,
    judge: Judge | Reward | None,
    answers: Mapping[str, Answer],
) -> list[Judgement]:
    """What a judge or a reward finds about answers; empty if programs check them.

    Raises:
        ConfigError: a reward cannot be loaded.
        RunError: the judge cannot go on, or nothing that it said can be read.
    """
    if judge is None:
        return []
    if isinstance(judge, Reward):
        return _by_reward(run, benchmark, judge, answers)
    queries = benchmark.queries(answers, run.judge.both_orders)
    return judged_by(run, judge, queries + verdicts.repeats(run, queries), benchmark.value)


def judged_by(
    run: RunConfig,
    judge: Judge,
    queries: Sequence[Query],
    value_of: Callable[[Query, Said], float | None],
) -> list[Judgement]:
    """What a judge says to queries, in their order, and what it means.

    Args:
        value_of: the value of what was said, without its thoughts; None if it cannot be read.

    Raises:
        RunError: the judge cannot go on, or nothing that it said can be read.
        DamagedError: the file of verdicts is damaged.
    """

    def value(query: Query, said: Said) -> float | None:
        return value_of(query, replace(said, text=without_thoughts(said.text)))

    found = [
        Judgement(query, said, value(query, said))
        for query, said in verdicts.said_to(
            run, judge, queries, lambda query, said: value(query, said) is not None
        )
    ]
    if found and all(judgement.value is None for judgement in found):
        raise verdicts.unreadable(judge.name, len(found), found[0].said)
    return found


def without_thoughts(text: str) -> str:
    """What a judge that reasons says after its thoughts; empty if it was cut off within them.

    A template may have opened the thoughts already, so the text need not begin with <think>.
    """
    _, end, after = text.rpartition("</think>")
    if end:
        return after
    return "" if text.lstrip().startswith("<think>") else text


def _by_reward(
    run: RunConfig, benchmark: Benchmark, reward: Reward, answers: Mapping[str, Answer]
) -> list[Judgement]:
    """The answer with the better score wins; equal scores are a draw."""
    both = [
        (question, side[question.id].turns[0])
        for question in benchmark.questions
        for side in (answers, benchmark.baseline)
    ]
    scores = verdicts.scored(run, reward, both)
    found = []
    for question, own, other in zip(benchmark.questions, scores[::2], scores[1::2], strict=True):
        value = 0.5 if own == other else float(own > other)
        query = Query(question.id, 0, 0, (), 0, 0.0)
        found.append(Judgement(query, Said(f"{own:g} against {other:g}"), value))
    return found


def judged_as(
    run: RunConfig,
    benchmark: Benchmark,
    answered: JudgedAnswers,
    more_notes: Sequence[str] = (),
) -> Judged:
    """What judgements amount to."""
    model, judge, answers, judgements = answered
    figures, notes = benchmark.figures(judgements, answers)
    values = benchmark.by_question(judgements, answers)
    notes = [*notes, *_left_out(len(benchmark.questions), len(values))]
    counted = [judgement for judgement in judgements if judgement.query.question in values]
    if alone := win_rates.in_one_order(counted):
        notes.append(ONE_ORDER.format(alone))
    notes += win_rates.notes_on_intervals(figures, len(values))
    notes += _same_answers(benchmark, answers)
    if judge == RULES:
        notes += _ceiling(benchmark)
    texts = {"model": answers, "baseline": benchmark.baseline}
    said = [judgement.said for judgement in judgements]
    input_tokens = sum(one.input_tokens for one in said)
    output_tokens = sum(one.output_tokens for one in said)
    cost_usd = verdicts.cost_usd(run.judge, input_tokens, output_tokens)
    if cost_usd is not None and any(one.text and not one.input_tokens for one in said):
        cost_usd = None
        notes.append("The cost is not known: the server did not count the tokens of all verdicts.")
    return Judged(
        run.benchmark.name,
        run.benchmark.kind.value,
        model,
        benchmark.baseline_name,
        judge,
        figures,
        values,
        questions=len(values),
        asked=len(judgements),
        malformed=sum(judgement.value is None for judgement in judgements),
        position_bias=win_rates.position_bias(judgements),
        first_share=win_rates.first_share(judgements),
        agreement=win_rates.agreement(judgements),
        mean_chars={
            name: win_rates.mean_chars(side.values()) for name, side in texts.items() if side
        },
        examples=list(_examples(benchmark, answers, values)),
        notes=[*notes, *more_notes],
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cost_usd=cost_usd,
    )


def _left_out(questions: int, counted: int) -> list[str]:
    """A note if questions of the benchmark do not count."""
    if counted == questions:
        return []
    return [
        f"{questions - counted:,} of {questions:,} questions are left out: a verdict is missing or "
        "cannot be read."
    ]


def _same_answers(benchmark: Benchmark, answers: Mapping[str, Answer]) -> list[str]:
    """A note if half of the answers or more are the baseline's: there is little to judge."""
    both = [key for key in answers if key in benchmark.baseline]
    same = sum(answers[key].turns == benchmark.baseline[key].turns for key in both)
    if not same or 2 * same < len(both):
        return []
    return [
        f"{same:,} of {len(both):,} answers are the baseline's, word for word: they draw, or show "
        "the judge's bias alone."
    ]


def _ceiling(benchmark: Benchmark) -> list[str]:
    """A note if a model could not win by rules, since the baseline obeys most of them."""
    obeyed = [
        obeys(question.rule, benchmark.baseline[question.id].turns[0])
        for question in benchmark.questions
        if question.rule is not None and question.id in benchmark.baseline
    ]
    if not obeyed:
        return []
    most = win_rates.PERCENT * (1 - sum(obeyed) / len(obeyed) / 2)
    if most > MOST_CHANCE:
        return []
    return [
        f"The baseline ({benchmark.baseline_name}) obeys {sum(obeyed):,} of {len(obeyed):,} rules, "
        f"where a draw is the best result: the win rate is at most {most:.1f}. The pass rate, or "
        "benchmark.baseline=base, shows whether training helped."
    ]


def _examples(
    benchmark: Benchmark, answers: Mapping[str, Answer], values: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """Questions most clearly won, then those most clearly lost."""
    questions = {question.id: question for question in benchmark.questions}
    known = [key for key in values if key in questions and key in answers]
    order = sorted(known, key=lambda key: -values[key])
    even = benchmark.even if benchmark.even is not None else mean(values.values())
    won = [key for key in order if values[key] > even][:EXAMPLES]
    lost = [key for key in reversed(order) if values[key] < even][:EXAMPLES]
    for key in (*won, *lost):
        baseline = benchmark.baseline.get(key)
        yield {
            "question": _cut(_asked(questions[key])),
            "model": _cut("\n\n".join(answers[key].turns)),
            "baseline": _cut("\n\n".join(baseline.turns)) if baseline else "",
            "preference": values[key],
        }


def _asked(question: Question) -> str:
    return "\n\n".join([str(question.prompt[-1]["content"]), *question.follow_ups])


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]} ..."


def result_lines(found: Sequence[Judged], folders: Sequence[Path]) -> list[str]:
    """A table of models and their figures with 95 % intervals, and what to know about the judge.

    What is noted about all models is said once.
    """
    names = _names([judged.model for judged in found], folders)
    lines = [*markdown_table(_table(found, names)), "", _how_to_read(found, names)]
    if len(found) == 1:
        return [*lines, _about(found[0]), *map(_note, found[0].notes), f"folder {folders[0]}"]
    common = [note for note in found[0].notes if all(note in judged.notes for judged in found)]
    for name, judged, folder in zip(names, found, folders, strict=True):
        own = [_note(note) for note in judged.notes if note not in common]
        lines += [f"{name}:", *(f"  {line}" for line in (_about(judged), *own, f"folder {folder}"))]
    return [*lines, *map(_note, common)]


def _table(found: Sequence[Judged], names: Sequence[str]) -> list[dict[str, str]]:
    """Figures by model. Of figures and models the more numerous are lines, so that it is narrow."""
    keys = dict.fromkeys(key for judged in found for key in judged.figures)
    official = {
        key for one in found for key, f in one.figures.items() if f.official_low is not None
    }
    head = f"{found[0].benchmark}, {'points' if found[0].has_points else 'percent'}"
    by_model: dict[str, dict[str, str]] = {}
    for index, (name, judged) in enumerate(zip(names, found, strict=True)):
        line = by_model[name] = {}
        for key in keys:
            figure = judged.figures.get(key)
            line[label(key)] = in_words(figure, digits(judged)) if figure else "-"
            if key in official:
                line[f"{label(key)}, official"] = official_interval(figure) if figure else ""
        if len(found) > 1:
            line[f"minus {names[0]}"] = _difference(found[0], judged) if index else ""
        line["characters"] = _chars(judged)
    if len(found) > len(by_model[names[0]]):
        return [{head: name, **line} for name, line in by_model.items()]
    rows = by_model[names[0]]
    return [{head: row, **{name: line[row] for name, line in by_model.items()}} for row in rows]


def _how_to_read(found: Sequence[Judged], names: Sequence[str]) -> str:
    """The unit of the figures, and what their intervals and differences are, if there are some."""
    parts = ["points from 1 to 10" if found[0].has_points else "percent"]
    if found[0].baseline:
        parts[0] += ", a win rate of 50 is as good as the baseline"
    figures = [figure for judged in found for figure in judged.figures.values()]
    if any(figure.low is not None for figure in figures):
        parts.append("in brackets 95 % intervals from resampled questions")
    if any(figure.official_low is not None for figure in figures):
        parts.append("official: interval as the benchmark's own script computes it")
    if len(found) > 1:
        parts.append(f"minus {names[0]}: {as_judged(found[0])}")
    return f"read   {'; '.join(parts)}"


def _note(note: str) -> str:
    return f"note   {note}"


def _names(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Short names; where models share one, their folders."""
    return [
        name if names.count(name) == 1 else str(folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def _difference(first: Judged, judged: Judged) -> str:
    """Mean difference over the questions that both have, with its interval."""
    common = [key for key in first.by_question if key in judged.by_question]
    if not common:
        return "no common question"
    scale = 1.0 if judged.has_points else win_rates.PERCENT
    behind = [scale * (judged.by_question[key] - first.by_question[key]) for key in common]
    (found,) = by_bootstrap([behind])
    form = f"+.{digits(judged)}f"
    text = format(found.mean, form)
    if found.low is not None and found.high is not None:
        text += f" ({found.low:{form}} to {found.high:{form}})"
    return text if len(common) == judged.questions else f"{text}, {len(common)} questions"


def _chars(judged: Judged) -> str:
    texts = [f"{value:,.0f}" for value in judged.mean_chars.values()]
    return " against ".join(texts)


def _about(judged: Judged) -> str:
    """The judge, its biases and its price."""
    parts = [f"{judged.questions:,} questions"]
    if judged.asked:  # none by programs
        parts.append(f"{judged.asked:,} judgements")
    if judged.malformed:
        parts.append(f"{judged.malformed:,} of them not readable")
    for value, text in (
        (judged.position_bias, "{:.0%} follow the position"),
        (judged.first_share, "{:.0%} for the answer shown first"),
        (judged.agreement, "agrees with itself in {:.0%}"),
        (judged.cost_usd, "{:,.2f} USD in all"),
    ):
        if value is not None:
            parts.append(text.format(value))
    against = f" against {judged.baseline}" if judged.baseline else ""
    return f"judge  {judged.judge}{against}: {', '.join(parts)}"
