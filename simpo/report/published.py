"""Puts benchmark results of runs beside the published ones of the same model and data.

They are what `simpo judge` found, unless the user writes others into the run's folder:

    benchmarks.json    {"alpaca_eval_2_lc": 44.1, "alpaca_eval_2_wr": 40.0, "arena_hard_wr": 33.0}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from simpo.config.paths import PACKAGE
from simpo.report.win_rates import in_words
from simpo.run.files import BENCHMARKS
from simpo.run.judged import Figure
from simpo.run.runs import Run

JUDGED = {
    "alpaca_eval_2_lc": ("alpaca_eval_2", "gpt4_1106_preview", "lc_win_rate"),
    "alpaca_eval_2_wr": ("alpaca_eval_2", "gpt4_1106_preview", "win_rate"),
    "arena_hard_wr": ("arena_hard_v0.1", "gpt-4-0314", "score"),
}
"""Benchmark, baseline and figure of a judgement that can stand beside a published result."""
JUDGE = "gpt-4-1106-preview"
"""The judge of the published results."""


@dataclass(frozen=True)
class Setting:
    """A published setting; results by loss in the order of `BENCHMARKS`, in percent."""

    model: str
    data: str
    curves: str | None
    results: dict[str, list[float]]


@cache
def settings() -> dict[str, Setting]:
    """All of published.yaml, by the name that experiments/paper has for it."""
    raw: Any = OmegaConf.to_container(OmegaConf.load(PACKAGE / "report" / "published.yaml"))
    return {name: Setting(**values) for name, values in raw.items()}


def published_tables(runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """A table for each published setting that some run has: published lines, then the runs."""
    tables: dict[str, list[dict[str, str]]] = {}
    for key, setting in settings().items():
        own = [
            {
                "": name,
                "loss": run.config.loss.name,
                **_cells([_own(run, key) for key in BENCHMARKS]),
            }
            for name, run in zip(names, runs, strict=True)
            if _is_of(run, setting)
        ]
        if own:
            published = [
                {"": "published", "loss": loss, **_cells([f"{value:.1f}" for value in values])}
                for loss, values in setting.results.items()
            ]
            tables[key] = published + own
    return tables


def _is_of(run: Run, setting: Setting) -> bool:
    data = [source.path for source in run.config.data.sources]
    return run.config.model.path == setting.model and data == [setting.data]


def _cells(values: Sequence[str]) -> dict[str, str]:
    return dict(zip(BENCHMARKS.values(), values, strict=True))


def _own(run: Run, key: str) -> str:
    """A run's own result: what the user wrote, else what was judged, with its interval."""
    if key in run.benchmarks:
        return f"{run.benchmarks[key]:.1f}"
    figure = _figure(run, key)
    return "" if figure is None else in_words(figure)


def _figure(run: Run, key: str) -> Figure | None:
    benchmark, baseline, name = JUDGED[key]
    one = run.judged.get(benchmark)
    return one.figures.get(name) if one and one.baseline == baseline else None


def judged_note(runs: Sequence[Run]) -> str:
    """A line about who judged the runs' own results; empty if the user wrote them all."""
    judges = {
        run.judged[JUDGED[key][0]].judge
        for run in runs
        for key in BENCHMARKS
        if key not in run.benchmarks and _figure(run, key) is not None
    }
    if not judges:
        return ""
    return (
        f"of the runs, with 95 % intervals: judged by {', '.join(sorted(judges))}; published: "
        f"judged by {JUDGE}"
    )
