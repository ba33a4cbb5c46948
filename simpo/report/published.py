"""Puts benchmark results of runs beside the published ones of the same model and data.

The user writes a run's benchmark results into its folder:

    benchmarks.json    {"alpaca_eval_2_lc": 44.1, "alpaca_eval_2_wr": 40.0, "arena_hard_wr": 33.0}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from simpo.config.paths import PACKAGE
from simpo.run.files import BENCHMARKS
from simpo.run.runs import Run


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
                **_cells([run.benchmarks.get(key) for key in BENCHMARKS]),
            }
            for name, run in zip(names, runs, strict=True)
            if _is_of(run, setting)
        ]
        if own:
            published = [
                {"": "published", "loss": loss, **_cells(values)}
                for loss, values in setting.results.items()
            ]
            tables[key] = published + own
    return tables


def _is_of(run: Run, setting: Setting) -> bool:
    data = [source.path for source in run.config.data.sources]
    return run.config.model.path == setting.model and data == [setting.data]


def _cells(values: Sequence[float | None]) -> dict[str, str]:
    shown = ("" if value is None else f"{value:.1f}" for value in values)
    return dict(zip(BENCHMARKS.values(), shown, strict=True))
