"""Tells which differences between runs are more than chance.

Numbers of a study are uncertain for two reasons. Other pairs could have been held out: runs that
were evaluated on the same pairs are compared pair by pair, by a bootstrap. And other seeds could
have been drawn: runs that differ in their seed alone give an interval by Student's t, and groups of
runs with the same seeds are compared seed by seed. Where several runs are compared with the best,
p-values are Holm's: the chance that any of the differences called clear is none is 5 % at most.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from statistics import NormalDist, fmean, stdev
from typing import Any

LEVEL = 0.95
"""Of all intervals."""
POWER = 0.8
"""Share of studies that would show a difference, for the number of seeds that are needed."""
MOST_BY_T = 1000
"""Seeds up to which Student's t differs from the normal distribution."""
STEPS = 20_000
STEP = math.pi / 2 / STEPS
RESAMPLES = 2000
RESAMPLED_AT_ONCE = 2_000_000
"""Pairs drawn at once, which bounds the memory of a bootstrap to 16 MB."""
ROUNDING = 1e-12
"""The part of the largest by which equal differences differ at most: 0.82 - 0.8, 0.81 - 0.79."""


@dataclass(frozen=True)
class Difference:
    """A mean difference.

    Attributes:
        low, high: its interval at `LEVEL`; None if all differences are the same, which says
            nothing about their spread.
        p: the chance of one as large if there is none, two-sided.
    """

    mean: float
    low: float | None
    high: float | None
    p: float

    @property
    def clear(self) -> bool:
        """Whether it is more than chance."""
        return self.p < 1 - LEVEL


def by_bootstrap(differences: Sequence[Sequence[float]]) -> list[Difference]:
    """The mean differences of runs from another one, by resampling pairs.

    Intervals are percentiles; p-values are a normal distribution's with the bootstrap's standard
    error, which can be small enough for a large sweep, but at least those of `_p_of_signs`.

    Args:
        differences: of each run, the finite difference of each pair; all of the same pairs.
    """
    import numpy as np

    by_pair = np.array(differences, dtype=np.float64).T
    pairs = len(by_pair)
    draw = np.random.default_rng(0)
    at_once = max(1, RESAMPLED_AT_ONCE // pairs)
    means = np.concatenate(
        [
            draw.multinomial(pairs, np.full(pairs, 1 / pairs), size=min(at_once, RESAMPLES - done))
            @ by_pair
            / pairs
            for done in range(0, RESAMPLES, at_once)
        ]
    )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).tolist()
    mean, error = by_pair.mean(axis=0).tolist(), means.std(axis=0, ddof=1).tolist()
    return [
        _without_spread(m, pairs)
        if _are_equal(own)
        else Difference(m, below, above, max(_p_of_normal(m, e), _p_of_signs(pairs)))
        for own, m, below, above, e in zip(differences, mean, low, high, error, strict=True)
    ]


def _p_of_normal(mean: float, error: float) -> float:
    return math.erfc(abs(mean) / error / math.sqrt(2)) if error else 0.0


def _p_of_signs(number: int) -> float:
    """The chance that so many differences all have the same sign, if either sign is as likely."""
    return 2.0 ** (1 - number)


def _are_equal(differences: Sequence[float]) -> bool:
    low, high = min(differences), max(differences)
    return high - low <= ROUNDING * max(abs(low), abs(high))


def _without_spread(mean: float, number: int) -> Difference:
    """The mean of equal differences."""
    return Difference(mean, None, None, _p_of_signs(number) if mean else 1.0)


def by_t(differences: Sequence[float]) -> Difference:
    """The mean of differences, such as those of each seed, by Student's t; at least two."""
    mean = fmean(differences)
    if _are_equal(differences):
        return _without_spread(mean, len(differences))
    error = stdev(differences) / math.sqrt(len(differences))
    half = error * _quantile(len(differences) - 1)
    return Difference(mean, mean - half, mean + half, _p_of_t(mean / error, len(differences) - 1))


def half_width(values: Sequence[float]) -> float | None:
    """Half the interval of a mean over seeds, by Student's t; None for a single value, for equal
    ones, and if one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    found = by_t(values)
    return None if found.high is None else found.high - found.mean


def _quantile(freedom: int) -> float:
    """The value below which |t| lies at `LEVEL`."""
    areas = _student(freedom)
    above = bisect_left(areas, LEVEL)
    part = (LEVEL - areas[above - 1]) / (areas[above] - areas[above - 1])
    return math.sqrt(freedom) * math.tan((above - 1 + part) * STEP)


def _p_of_t(t: float, freedom: int) -> float:
    areas = _student(freedom)
    part, below = math.modf(math.atan(abs(t) / math.sqrt(freedom)) / STEP)
    low, high = [*areas, 1.0][int(below) :][:2]
    return 1 - low - part * (high - low)


@cache
def _student(freedom: int) -> list[float]:
    """The distribution of |t| at angles from 0 to a right one, `STEP` apart.

    With t = sqrt(freedom) * tan(angle) its density is that of cos(angle)^(freedom - 1).
    """
    density = [math.cos(number * STEP) ** (freedom - 1) for number in range(STEPS + 1)]
    areas = list(accumulate(map(fmean, pairwise(density)), initial=0.0))
    return [area / areas[-1] for area in areas]


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """The same with p-values for all of them together (Holm 1979)."""
    order = sorted(range(len(differences)), key=lambda i: differences[i].p)
    found = list(differences)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * differences[i].p))
        found[i] = replace(differences[i], p=largest)
    return found


def seeds_needed(differences: Sequence[float]) -> float:
    """About how many seeds show a difference of this size in `POWER` of all studies; infinite for
    none at all."""
    normal = NormalDist()
    once = normal.inv_cdf(POWER)
    mean = fmean(differences)
    spread = stdev(differences) / mean if mean else math.inf
    ratio = spread * spread
    if math.isinf(ratio):
        return ratio
    number = max(2, math.ceil((normal.inv_cdf((1 + LEVEL) / 2) + once) ** 2 * ratio))
    # Few seeds know their own spread badly, which Student's t allows for.
    while number <= MOST_BY_T and number < (_quantile(number - 1) + once) ** 2 * ratio:
        number += 1
    return number


def shares(settings: Mapping[str, Sequence[Any]], values: Sequence[float]) -> dict[str, float]:
    """The share of the variance of values between runs that each setting explains by itself.

    In a whole grid the shares of all settings add up to 1 at most. The rest comes from settings
    that work together and from chance.

    Args:
        settings: the value of each run, by setting. One without repeated values is left out.
        values: the number of each run.
    """
    mean = fmean(values)
    total = sum((value - mean) ** 2 for value in values)
    found = {}
    for key, own in settings.items():
        groups: dict[str, list[float]] = {}
        for setting, value in zip(own, values, strict=True):
            groups.setdefault(repr(setting), []).append(value)
        if total and 1 < len(groups) <= len(values) / 2:
            between = sum(len(group) * (fmean(group) - mean) ** 2 for group in groups.values())
            found[key] = between / total
    return dict(sorted(found.items(), key=lambda item: -item[1]))
