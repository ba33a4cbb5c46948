"""Renders a comparison as one self-contained web page: table, figures, replies, settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from simpo.report.compare import Comparison, shared_facts, shared_settings
from simpo.report.curves import panels
from simpo.report.figures import held_out, sweep_map, swept
from simpo.report.findings import findings
from simpo.report.hub_results import CAPTION, others_figures
from simpo.report.published import judged_note, published_tables, settings
from simpo.report.rounds import MEANINGS, by_round
from simpo.run.runs import Run
from simpo.run.tables import html_page

FOLDER = Path(__file__).parent

COLORS = (
    "#2f6fde",
    "#d9690a",
    "#1f9d63",
    "#d1495b",
    "#8e5bd0",
    "#0f8fa0",
    "#a67c00",
    "#d63fa0",
)
"""Colours of curves, which can be told apart on white and on the dark page."""
DETAILED = len(COLORS)
"""Number of best runs whose curves are in colour at first, and whose replies the page holds."""
MOST_RUNS = 1000
"""Runs that the table and the curves of a page show at most, the best ones."""


def render(report: Comparison) -> str:
    """The whole page, with the plotting library inside."""
    return page(content(report), title(report))


def page(inside: str, name: str, live: bool = False) -> str:
    """The page around what `content` gives.

    Args:
        live: the page asks its server for news, and shows them.
    """
    return html_page(
        FOLDER / "page.html.jinja",
        content=Markup(inside),
        title=name,
        plotly=Markup(get_plotlyjs()),
        live=live,
    )


def title(report: Comparison) -> str:
    names = [*report.names, *report.damaged]
    return ", ".join(names) if len(names) < 4 else f"{len(names)} runs"


def content(report: Comparison) -> str:
    """The sections of the page, as HTML."""
    states = [run.progress.state.value for run in report.runs] + ["damaged"] * len(report.damaged)
    name, sweep, axes, every = title(report), sweep_map(report), swept(report), len(states)
    if len(report.runs) > MOST_RUNS or len(report.damaged) > MOST_RUNS:
        report = report.of_best(MOST_RUNS)
    best = report.order[:DETAILED]
    return html_page(
        FOLDER / "content.html.jinja",
        breakable=breakable,
        title=name,
        report=report,
        left_out=every - len(report.runs) - len(report.damaged),
        states={state: states.count(state) for state in dict.fromkeys(states)},
        facts=shared_facts(report),
        findings=findings(report),
        settings=shared_settings(report),
        columns=report.columns(),
        curves={
            "names": report.names,
            "prefix": len(report.prefix),
            "colors": COLORS,
            "panels": panels(report),
        },
        sweep=sweep,
        axes=axes,
        held_out=held_out(report, best),
        replies={index: rows for index in best if (rows := _replies(report.runs[index]))},
        detailed=best,
        rounds=by_round(report, DETAILED),
        rounds_meanings=MEANINGS,
        others=others_figures(report),
        others_caption=CAPTION,
        published=published_tables(report.runs, report.names),
        judged_note=judged_note(report.runs),
        sources={name: setting.curves for name, setting in settings().items()},
    )


def waiting(folders: Sequence[Path], reason: str) -> str:
    """The content of a page that has no run to show yet."""
    return html_page(FOLDER / "waiting.html.jinja", folders=folders, reason=reason)


def breakable(name: object) -> Markup:
    """A name or value, escaped for HTML, which browsers may break after its signs but not within
    numbers.
    """
    text = f"{name:.6g}" if isinstance(name, float) else str(name)
    parts = re.split(r"(?<=[,/=_])|(?<=\.)(?=[a-z])", text)
    return Markup("<wbr>").join(parts)


def _replies(run: Run) -> list[Mapping[str, Any]]:
    """A line for each sampled prompt, with the reply before and after."""
    return [
        {"prompt": (old or new)["prompt"], "before": old, "after": new}
        for old, new in zip_longest(*run.replies)
    ]
