"""Figures that every benchmark of comparisons has: win rate, intervals, the judge's biases.

Both orders of a question and its repeats are judgements of the same answers, so they are averaged
first, and intervals resample questions. Resampling single judgements, as others do, takes them for
independent and gives intervals that are too narrow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from simpo.judging.shapes import Answer, Judgement
from simpo.report.studies import by_bootstrap
from simpo.report.win_rates import label
from simpo.run.judged import Figure

PERCENT = 100.0
FEW = 30
"""Questions below which percentiles of resampled means are clearly too narrow."""


def mean_figure(values: Sequence[float], scale: float = PERCENT) -> Figure:
    """The mean of a value of each question, times `scale`, with its interval; at least one.

    Values that are all the same have no interval: resampling them would show a width of 0, as if
    nothing were uncertain.
    """
    (found,) = by_bootstrap([[scale * value for value in values]])
    return Figure(found.mean, found.low, found.high)


def notes_on_intervals(figures: Mapping[str, Figure], questions: int) -> list[str]:
    """Sentences about intervals that are missing, or say too little."""
    found = []
    missing = [label(key) for key, figure in figures.items() if figure.low is None]
    if missing:
        found.append(
            f"No interval of {', '.join(missing)}: any sample of these questions gives the same "
            "value."
        )
    if questions < FEW:
        are = "s are" if questions > 1 else " is"
        narrow = f"intervals are too narrow below {FEW}, and "
        shown = narrow if len(missing) < len(figures) else ""
        found.append(
            f"{questions:,} question{are} few: {shown}another sample may show something else."
        )
    return found


def _of_both_orders(judgements: Iterable[Judgement]) -> list[tuple[float, float]]:
    """The values of first askings about the same turn, in order 0 and 1."""
    values: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for judgement in judgements:
        query = judgement.query
        if judgement.value is not None and not query.repeat:
            values[query.question, query.turn][query.order] = judgement.value
    return [(both[0], both[1]) for both in values.values() if len(both) == 2]


def position_bias(judgements: Sequence[Judgement]) -> float | None:
    """Share of questions for which the same position wins in both orders, of those asked in both.

    None if no question was asked in both orders. An answer wins above a preference of 0.5.
    """
    both = _of_both_orders(judgements)
    if not both:
        return None
    return fmean(float((a - 0.5) * (b - 0.5) < 0) for a, b in both)


def first_share(judgements: Sequence[Judgement]) -> float | None:
    """Mean preference for the answer shown first, over questions asked in both orders.

    0.5 without bias, whichever model is better; None if no question was asked in both orders.
    """
    both = _of_both_orders(judgements)
    return fmean((a + 1 - b) / 2 for a, b in both) if both else None


def in_one_order(judgements: Iterable[Judgement]) -> int:
    """How many questions were asked in both orders and have a verdict to read in one alone."""
    readable: dict[str, dict[int, bool]] = defaultdict(lambda: defaultdict(bool))
    for judgement in judgements:
        query = judgement.query
        readable[query.question][query.order] |= judgement.value is not None
    return sum(len(orders) == 2 and sum(orders.values()) == 1 for orders in readable.values())


def agreement(judgements: Sequence[Judgement]) -> float | None:
    """Share of queries asked twice whose answers mean the same: who wins, or equal points.

    None if none was.
    """
    values: dict[tuple[str, int, int], dict[int, float]] = defaultdict(dict)
    for judgement in judgements:
        query = judgement.query
        if judgement.value is not None:
            values[query.question, query.turn, query.order][query.repeat] = judgement.value
    twice = [(both[0], both[1]) for both in values.values() if len(both) == 2]
    return fmean(float(_means(a) == _means(b)) for a, b in twice) if twice else None


def _means(value: float) -> float:
    return value if value > 1 else float((value > 0.5) - (value < 0.5))


def mean_chars(answers: Iterable[Answer]) -> float:
    """Mean length in characters of answers, all turns together."""
    return fmean(sum(map(len, answer.turns)) for answer in answers)
