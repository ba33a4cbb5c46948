"""The figures of a comparison besides its curves, each with views to choose from.

A figure is {"choose": what its views are, "views": {label: [panel, ...]}}; a panel is {"title",
"data", "layout"}, the last two as plotly.js takes them. Texts from data are escaped, since plotly
reads tags in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from simpo.report.compare import Comparison
from simpo.run.runs import Run, State

HEAT = ("loss.beta", "loss.gamma_beta_ratio")
"""Axes of the heat map if a sweep varies both; else the first two settings that it varies."""
BEFORE, AFTER, CHOSEN, REJECTED = "#8a97a5", "#2f6fde", "#1f9d63", "#d1495b"
BINS = 30
MOST_LABELS = 12
"""Values of a setting that an axis names one by one, and cells in a line that show their number."""

Figure = dict[str, Any]


def swept(report: Comparison) -> list[str]:
    """The one or two settings that a sweep varies, for the axes of its figure."""
    numeric = [
        key
        for key, values in report.differing.items()
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    ]
    preferred = [key for key in HEAT if key in numeric]
    rest = [key for key in numeric if key not in HEAT and key != "train.seed"]
    return (preferred + rest)[:2]


def sweep_map(report: Comparison) -> Figure | None:
    """The held-out metrics over the settings of `swept`, a view for each metric.

    Runs with the same values of these settings, such as seeds, are averaged. Those that have not
    finished count where no other has, with their newest evaluation; pruned ones do not.
    """
    axes = swept(report)
    shown = report.columns()
    others = dict.fromkeys(key for run in report.runs for key in run.metrics if key not in shown)
    metrics = [*shown, *sorted(others)]
    if not axes or not metrics:
        return None
    views = {}
    for metric in metrics:
        cells = _cells(report, axes, metric)
        if len(axes) == 1:
            panel = _line(cells, axes[0], metric)
        elif _is_grid(cells):
            panel = _heat(cells, axes, metric)
        else:
            panel = _scatter(cells, axes, metric)
        views[metric] = [panel]
    return {"choose": "metric", "views": views}


def _cells(
    report: Comparison, axes: Sequence[str], metric: str
) -> dict[tuple[float, ...], list[float]]:
    """By the values of the axes, the metric of each run that counts there."""
    finished: dict[tuple[float, ...], list[float]] = {}
    others: dict[tuple[float, ...], list[float]] = {}
    for index, run in enumerate(report.runs):
        place = tuple(report.differing[key][index] for key in axes)
        value, state = run.metrics.get(metric, math.nan), run.progress.state
        for cells, counts in (
            (finished, state is State.finished),
            (others, state not in (State.finished, State.pruned)),
        ):
            values = cells.setdefault(place, [])
            if counts and math.isfinite(value):
                values.append(value)
    return {place: values or others[place] for place, values in finished.items()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _is_grid(cells: Mapping[tuple[float, ...], object]) -> bool:
    """Whether a third of all combinations were tried; else they were drawn from intervals."""
    xs, ys = (set(values) for values in zip(*cells, strict=True))
    return len(cells) * 3 >= len(xs) * len(ys)


def _heat(
    cells: Mapping[tuple[float, ...], Sequence[float]], axes: Sequence[str], metric: str
) -> dict[str, Any]:
    xs, ys = (sorted(set(values)) for values in zip(*cells, strict=True))
    trace = {
        "type": "heatmap",
        "x": [f"{x:g}" for x in xs],
        "y": [f"{y:g}" for y in ys],
        "z": [[_mean(cells.get((x, y), ())) for x in xs] for y in ys],
        "colorscale": "Viridis",
        "xgap": 2,
        "ygap": 2,
        "colorbar": {"thickness": 12},
        "hovertemplate": f"{axes[0]} %{{x}}<br>{axes[1]} %{{y}}<br>%{{z:.5g}}<extra></extra>",
    }
    if len(xs) <= MOST_LABELS:
        trace["texttemplate"] = "%{z:.4g}"
    layout = {"xaxis": _axis(axes[0], "category"), "yaxis": _axis(axes[1], "category")}
    return {"title": metric, "data": [trace], "layout": layout}


def _scatter(
    cells: Mapping[tuple[float, ...], Sequence[float]], axes: Sequence[str], metric: str
) -> dict[str, Any]:
    known = {place: mean for place, values in cells.items() if (mean := _mean(values)) is not None}
    xs, ys = zip(*known, strict=True) if known else ((), ())
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": xs,
        "y": ys,
        "text": [f"{value:.5g}" for value in known.values()],
        "marker": {
            "color": list(known.values()),
            "colorscale": "Viridis",
            "size": 9,
            "colorbar": {"thickness": 12},
            "line": {"width": 1, "color": BEFORE},
        },
        "hovertemplate": f"{axes[0]} %{{x}}<br>{axes[1]} %{{y}}<br>%{{text}}<extra></extra>",
    }
    layout = {"xaxis": _axis(axes[0]), "yaxis": _axis(axes[1])}
    return {"title": metric, "data": [trace], "layout": layout}


def _line(
    cells: Mapping[tuple[float, ...], Sequence[float]], axis: str, metric: str
) -> dict[str, Any]:
    """The mean of each value, and a dot for each run where several have it."""
    xs = sorted(x for (x,) in cells)
    few = len(xs) <= MOST_LABELS
    names = {x: f"{x:g}" if few else x for x in xs}
    dots = [(names[x], value) for x in xs if len(cells[x,]) > 1 for value in cells[x,]]
    hover = f"{axis} %{{x}}<br>%{{y:.5g}}<extra></extra>"
    mean = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [names[x] for x in xs],
        "y": [_mean(cells[x,]) for x in xs],
        "line": {"color": AFTER},
        "hovertemplate": hover,
    }
    runs = {
        "type": "scatter",
        "mode": "markers",
        "x": [x for x, _ in dots],
        "y": [y for _, y in dots],
        "marker": {"color": BEFORE, "size": 6},
        "hovertemplate": hover,
    }
    layout = {"xaxis": _axis(axis, "category" if few else "linear"), "showlegend": False}
    return {"title": metric, "data": [mean, *([runs] if dots else [])], "layout": layout}


def _axis(title: str, kind: str = "linear") -> dict[str, Any]:
    return {"title": {"text": escape(title)}, "type": kind}


def held_out(report: Comparison, runs: Sequence[int]) -> Figure | None:
    """Margins of held-out pairs before and after; lengths of their responses and of replies.

    A view for each of the runs, in their order.
    """
    views = {report.names[i]: found for i in runs if (found := _histograms(report.runs[i]))}
    return {"choose": "run", "views": views} if views else None


def _histograms(run: Run) -> list[dict[str, Any]]:
    before, after = run.scores
    old, new = run.replies
    pairs = after or before
    panels = {
        "reward margin of held-out pairs": (
            ("before", BEFORE, before.get("rewards/margins")),
            ("after", AFTER, after.get("rewards/margins")),
        ),
        "lengths in tokens": (
            ("chosen", CHOSEN, pairs.get("chosen_tokens")),
            ("rejected", REJECTED, pairs.get("rejected_tokens")),
            ("replies before", BEFORE, _lengths(old)),
            ("replies after", AFTER, _lengths(new)),
        ),
    }
    return [
        {"title": title, "data": traces, "layout": {"barmode": "overlay", "bargap": 0}}
        for title, drawn in panels.items()
        if (traces := _bars(drawn))
    ]


def _bars(drawn: Sequence[tuple[str, str, Sequence[float] | None]]) -> list[dict[str, Any]]:
    """A histogram of each list of values, with the same bins in all."""
    finite = [
        (name, color, [value for value in values or () if math.isfinite(value)])
        for name, color, values in drawn
    ]
    every = [value for *_, values in finite for value in values]
    low, high = min(every, default=0.0), max(every, default=1.0)
    size = (high - low) / BINS or 1.0
    traces = []
    for name, color, values in finite:
        if values:
            counts = [0] * (BINS + 1)
            for value in values:
                counts[int((value - low) / size)] += 1
            traces.append(
                {
                    "type": "bar",
                    "name": name,
                    "x": [float(f"{low + (bin + 0.5) * size:.6g}") for bin in range(BINS + 1)],
                    "y": counts,
                    "width": size,
                    "opacity": 0.6,
                    "marker": {"color": color},
                    "hovertemplate": f"{name}: %{{y}} around %{{x:.3g}}<extra></extra>",
                }
            )
    return traces


def _lengths(replies: Sequence[Mapping[str, Any]]) -> list[float]:
    return [reply["tokens"] for reply in replies if "tokens" in reply]
