"""The learning curves of a comparison, as the page's script draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from simpo.report.compare import Comparison
from simpo.run.files import series

CURVES = (
    ("loss", "loss"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "reward margin"),
    ("rewards/chosen", "reward of chosen responses"),
    ("rewards/rejected", "reward of rejected responses"),
    ("rewards/rank_correlation", "rank correlation of rewards and scores"),
    ("rewards/best_accuracies", "best response has the highest reward"),
    ("logps/chosen", "log-prob of a chosen token"),
    ("logps/rejected", "log-prob of a rejected token"),
    ("grad_norm", "gradient norm"),
    ("reply_reward", "reward of replies, by round"),
    ("reply_pass_rate", "pass rate of replies, by round"),
    ("reply_tokens", "length of replies in tokens, by round"),
    ("reply_kl", "KL from the first model in nats per token, by round"),
)
SPLITS = ("train", "eval")
MOST_POINTS = 300
POINTS_OF_ALL = 20_000
"""Points of a curve, and of all curves of one split in one panel, that a page holds at most."""
LEAST_POINTS = 20

Point = tuple[float, float]


def panels(report: Comparison) -> list[dict[str, Any]]:
    """A panel for each metric of `CURVES` that some run has logged.

    Returns:
        For each: its `title`, and `lines` of [index of the run, split, steps, values].
    """
    most = min(MOST_POINTS, max(LEAST_POINTS, POINTS_OF_ALL // max(1, len(report.runs))))
    found = []
    for key, title in CURVES:
        lines = []
        for index, run in enumerate(report.runs):
            for split in SPLITS:
                if points := thinned(_finite(run.lines, f"{split}/{key}"), most):
                    steps, values = zip(*points, strict=True)
                    lines.append([index, split, steps, [float(f"{y:.5g}") for y in values]])
        if lines:
            found.append({"title": title, "lines": lines})
    return found


def _finite(lines: Sequence[Mapping[str, float]], key: str) -> list[Point]:
    return [point for point in series(lines, key) if math.isfinite(point[1])]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most that many points of a curve (4 or more), of any number.

    They are the first, the last, and the lowest and highest of equal stretches, so spikes stay.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / ((most - 2) // 2))
    kept = {points[0], points[-1]}
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept |= {min(stretch, key=_value), max(stretch, key=_value)}
    return sorted(kept)


def _value(point: Point) -> float:
    return point[1]
