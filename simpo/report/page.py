"""Renders a comparison as one self-contained web page: figures, replies, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative, sample_colorscale
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from simpo.report.compare import Comparison
from simpo.report.published import published_tables, settings
from simpo.run.files import series
from simpo.run.runs import Run
from simpo.run.tables import SHOWN, html_page

CURVES = (
    ("loss", "loss"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "reward margin"),
    ("logps/chosen", "log-prob of a chosen token"),
    ("logps/rejected", "log-prob of a rejected token"),
    ("grad_norm", "gradient norm"),
)
HEAT = ("loss.beta", "loss.gamma_beta_ratio")
"""Axes of the heat map if a sweep varies both; else the first two settings that it varies."""
BEFORE, AFTER, CHOSEN, REJECTED = "#9aa5b1", "#2f6fde", "#2a9d5c", "#d1495b"
BINS = 30
MAX_COLORS = len(qualitative.D3)


SPLITS: dict[str, dict[str, Any]] = {
    "train": {"name": "train", "mode": "lines", "line": {"width": 1.2}, "opacity": 0.75},
    "eval": {
        "name": "held out",
        "mode": "lines+markers",
        "line": {"width": 2.2, "dash": "dot"},
        "opacity": 1.0,
    },
}


def render(report: Comparison) -> str:
    """The page's HTML, with the plotting library inside."""
    figures = {
        "Learning curves": curves(report),
        "Held-out metrics over the swept settings": sweep_map(report),
        "Held-out pairs and replies": histograms(report),
    }
    names = [*report.names, *report.damaged]
    return html_page(
        Path(__file__).with_name("page.html.jinja"),
        title=", ".join(names) if len(names) < 4 else f"{len(names)} runs",
        plotly=get_plotlyjs(),
        report=report,
        shown=[(key, name) for key, name in SHOWN if any(key in r.metrics for r in report.runs)],
        figures={
            name: figure.to_html(
                full_html=False,
                include_plotlyjs=False,
                default_width="100%",
                config={"displaylogo": False},
            )
            for name, figure in figures.items()
            if figure is not None
        },
        replies=[_replies(run) for run in report.runs],
        published=published_tables(report.runs, report.names),
        curves={name: setting.curves for name, setting in settings().items()},
        same=len(report.runs) > 1 and not report.differing,
    )


def curves(report: Comparison) -> go.Figure | None:
    """Train and held-out metrics over steps, a colour for each run."""
    panels = [
        (key, title)
        for key, title in CURVES
        if any(f"{split}/{key}" in x for r in report.runs for x in r.lines for split in SPLITS)
    ]
    if not panels:
        return None
    figure = make_subplots(
        rows=-(-len(panels) // 3),
        cols=3,
        subplot_titles=[title for _, title in panels],
        horizontal_spacing=0.06,
        vertical_spacing=0.14,
    )
    colors = _colors(len(report.runs))
    for place, (key, _) in enumerate(panels):
        row, col = place // 3 + 1, place % 3 + 1
        for name, run, color in zip(report.names, report.runs, colors, strict=True):
            for split, style in SPLITS.items():
                if points := series(run.lines, f"{split}/{key}"):
                    x, y = zip(*points, strict=True)
                    figure.add_scatter(
                        x=x,
                        y=y,
                        name=name,
                        legendgroup=name,
                        showlegend=place == 0 and split == "train",
                        line={"color": color, **style["line"]},
                        mode=style["mode"],
                        opacity=style["opacity"],
                        hovertemplate=f"{name}<br>{style['name']}, step %{{x}}: %{{y:.4g}}"
                        "<extra></extra>",
                        row=row,
                        col=col,
                    )
        figure.update_xaxes(title_text="step", title_standoff=4, row=row, col=col)
    return _styled(figure, 300 * -(-len(panels) // 3) + 60 + 20 * len(report.runs))


def sweep_map(report: Comparison) -> go.Figure | None:
    """The held-out metrics over one or two settings that a sweep varies, one shown at a time.

    Runs with the same values of them (such as seeds) are averaged.
    """
    axes = _swept(report)
    metrics = list(dict.fromkeys(key for run in report.runs for key in run.metrics))
    if not axes or not metrics:
        return None
    metrics.sort(key=lambda key: (key != report.metric, [k for k, _ in SHOWN].count(key) == 0, key))
    make = _heat if len(axes) == 2 else _line
    figure = go.Figure([make(report, axes, metric, metric == metrics[0]) for metric in metrics])
    _add_menu(figure, {m: [other == m for other in metrics] for m in metrics}, 1.16)
    figure.update_xaxes(title_text=axes[0], type="category")
    if len(axes) == 2:
        figure.update_yaxes(title_text=axes[1], type="category")
    return _styled(figure, 460)


def _add_menu(figure: go.Figure, views: Mapping[str, Sequence[bool]], height: float) -> None:
    """Add a menu above a figure; each entry gives the visibility of the traces."""
    buttons = [
        {"label": label, "method": "update", "args": [{"visible": list(seen)}]}
        for label, seen in views.items()
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": height, "yanchor": "top"}
    figure.update_layout(updatemenus=[menu])


def _swept(report: Comparison) -> list[str]:
    numeric = [
        key
        for key, values in report.differing.items()
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    ]
    preferred = [key for key in HEAT if key in numeric]
    rest = [key for key in numeric if key not in HEAT and key != "train.seed"]
    return (preferred + rest)[:2]


def _heat(report: Comparison, axes: Sequence[str], metric: str, visible: bool) -> go.Heatmap:
    xs, ys = (sorted(set(report.differing[key])) for key in axes)
    cells = [[_mean(report, dict(zip(axes, (x, y), strict=True)), metric) for x in xs] for y in ys]
    return go.Heatmap(
        x=[f"{x:g}" for x in xs],
        y=[f"{y:g}" for y in ys],
        z=cells,
        texttemplate="%{z:.4g}",
        colorscale="Viridis",
        colorbar={"title": {"text": metric, "side": "right"}},
        hovertemplate=f"{axes[0]} %{{x}}<br>{axes[1]} %{{y}}<br>{metric} %{{z:.5g}}<extra></extra>",
        visible=visible,
    )


def _line(report: Comparison, axes: Sequence[str], metric: str, visible: bool) -> go.Scatter:
    xs = sorted(set(report.differing[axes[0]]))
    return go.Scatter(
        x=[f"{x:g}" for x in xs],
        y=[_mean(report, {axes[0]: x}, metric) for x in xs],
        mode="lines+markers",
        line={"color": AFTER},
        hovertemplate=f"{axes[0]} %{{x}}<br>{metric} %{{y:.5g}}<extra></extra>",
        visible=visible,
    )


def _mean(report: Comparison, cell: dict[str, Any], metric: str) -> float | None:
    values = [
        run.metrics[metric]
        for index, run in enumerate(report.runs)
        if metric in run.metrics
        and all(report.differing[key][index] == value for key, value in cell.items())
    ]
    return sum(values) / len(values) if values else None


def histograms(report: Comparison) -> go.Figure | None:
    """Margins of held-out pairs before and after; lengths of their responses and of replies.

    Shows one run at a time, the best first.
    """
    order = sorted(range(len(report.runs)), key=lambda index: index != report.best)
    shown = [(index, traces) for index in order if (traces := _run_histograms(report.runs[index]))]
    if not shown:
        return None
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=["reward margin of held-out pairs", "lengths in tokens"],
        horizontal_spacing=0.08,
    )
    owners: list[int] = []
    for index, traces in shown:
        for column, trace in traces:
            trace.visible = index == shown[0][0]
            figure.add_trace(trace, row=1, col=column)
            owners.append(index)
    if len(shown) > 1:
        views = {report.names[i]: [owner == i for owner in owners] for i, _ in shown}
        _add_menu(figure, views, 1.3)
    figure.update_layout(barmode="overlay")
    figure.update_yaxes(title_text="pairs", row=1, col=1)
    return _styled(figure, 420)


def _run_histograms(run: Run) -> list[tuple[int, go.Histogram]]:
    """Histograms of a run, each with the column of its panel."""
    before, after = run.scores
    old, new = run.replies
    pairs = after or before
    drawn = (
        (1, "before", BEFORE, before.get("rewards/margins")),
        (1, "after", AFTER, after.get("rewards/margins")),
        (2, "chosen", CHOSEN, pairs.get("chosen_tokens")),
        (2, "rejected", REJECTED, pairs.get("rejected_tokens")),
        (2, "replies before", BEFORE, _lengths(old)),
        (2, "replies after", AFTER, _lengths(new)),
    )
    return [
        (
            column,
            go.Histogram(
                x=list(values),
                name=name,
                marker_color=color,
                opacity=0.6,
                xbins=_bins([v for other, *_, vs in drawn if other == column for v in vs or ()]),
            ),
        )
        for column, name, color, values in drawn
        if values
    ]


def _bins(values: Sequence[float]) -> dict[str, float]:
    """Bins for all histograms of a panel."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    size = (high - low) / BINS or 1.0
    return {"start": low, "end": high + size, "size": size}


def _lengths(replies: Sequence[Mapping[str, Any]]) -> list[float]:
    return [reply["tokens"] for reply in replies if "tokens" in reply]


def _replies(run: Run) -> list[dict[str, Any]]:
    """A line for each sampled prompt, with the reply before and after."""
    return [
        {"prompt": (old or new)["prompt"], "before": old, "after": new}
        for old, new in zip_longest(*run.replies)
    ]


def _colors(count: int) -> list[str]:
    if count <= MAX_COLORS:
        return list(qualitative.D3[:count])
    return list(sample_colorscale("Viridis", [index / (count - 1) for index in range(count)]))


def _styled(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        height=height,
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 70, "b": 50},
        legend={"orientation": "h", "y": -0.12, "yanchor": "top"},
        font={"family": "system-ui, sans-serif", "size": 12},
    )
    return figure
