"""Compares runs: the settings that differ, their progress, and which is the best."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, takewhile
from os.path import commonpath
from pathlib import Path
from statistics import fmean
from typing import Any

from simpo.config.choices import Mode
from simpo.config.errors import ConfigError
from simpo.config.flat import settings, trajectory
from simpo.config.schema import MonitorConfig, RunConfig
from simpo.report.studies import Difference, by_bootstrap, half_width, holm
from simpo.report.win_rates import BEST, TIED, WinRates, first_names, win_rates
from simpo.run.best import mode_of
from simpo.run.runs import DamagedRun, Run, State, find_runs, read_runs
from simpo.run.tables import metric_labels

# Settings of where a run is and how it is started are not compared.
PLACES = ("name", "output_dir", "run_dir", "cache_dir", "launcher.")
ALL = "all"
"""Name of the only group, if runs differ in nothing else."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: short, unique names of the runs.
        metric, mode: the held-out metric by which they are compared.
        differing: settings that differ, by dotted key, with the value of each run.
        damaged: by name, runs whose folders cannot be read; their numbers are not used.
        folders: that the user named, in and below which the runs are.
    """

    runs: list[Run]
    names: list[str]
    metric: str
    mode: Mode
    differing: dict[str, list[Any]]
    damaged: dict[str, DamagedRun]
    folders: Sequence[Path] = ()

    def monitored(self, index: int) -> float | None:
        """Value of `metric` of a run; None if it has none yet."""
        return self.runs[index].metrics.get(self.metric)

    @cached_property
    def order(self) -> list[int]:
        """Indices of the runs: the best value of `metric` first, those without one last."""

        def place(index: int) -> float:
            value = self.monitored(index)
            if value is None or not math.isfinite(value):
                return math.inf
            return -self.mode.sign * value

        return sorted(range(len(self.runs)), key=place)

    @cached_property
    def known(self) -> dict[int, float]:
        """The finite values of `metric` of finished runs, by their index."""
        return {
            index: value
            for index, run in enumerate(self.runs)
            if run.progress.state is State.finished
            and math.isfinite(value := run.metrics.get(self.metric, math.nan))
        }

    @cached_property
    def leaders(self) -> list[int]:
        """Indices of the finished runs with the best value: several if they tie."""
        best = max((self.mode.sign * value for value in self.known.values()), default=None)
        return [index for index, value in self.known.items() if self.mode.sign * value == best]

    @property
    def best(self) -> int | None:
        """Index of the finished run with the best value, the first of several; None without."""
        return next(iter(self.leaders), None)

    def place(self, index: int) -> str:
        """What to call a run that no other is ahead of; empty for another."""
        if index not in self.leaders:
            return ""
        return BEST if len(self.leaders) == 1 else TIED

    def best_in_words(self) -> str:
        """The names of `leaders`, of which there is one at least."""
        names = [self.names[index] for index in self.leaders]
        return names[0] if len(names) == 1 else f"{first_names(names)} ({TIED})"

    @cached_property
    def behind_best(self) -> dict[int, Difference]:
        """How far finished runs are behind the best one in `metric`, by their index.

        Of those alone that were evaluated on the same held-out pairs and kept the metric of each
        pair. A bootstrap of the pairs; p-values are Holm's.
        """
        if self.best is None:
            return {}
        best = self.runs[self.best]
        own = self._by_pair(best)
        others = [
            index
            for index, run in enumerate(self.runs)
            if index != self.best
            and run.progress.state is State.finished
            and run.held_out_fingerprint == best.held_out_fingerprint != ""
            and len(self._by_pair(run)) == len(own) > 1
        ]
        if not others:
            return {}
        scores = [self._by_pair(self.runs[index]) for index in others]
        behind = [
            [self.mode.sign * (a - b) for a, b in zip(own, other, strict=True)] for other in scores
        ]
        return dict(zip(others, holm(by_bootstrap(behind)), strict=True))

    def _by_pair(self, run: Run) -> list[float]:
        """`metric` of each held-out pair; empty if it is not known, or not finite, of one."""
        values = run.scores[1].get(self.metric, [])
        return values if all(map(math.isfinite, values)) else []

    @cached_property
    def judged(self) -> list[WinRates]:
        """What judges found about the runs, by benchmark."""
        return win_rates(self.runs)

    @cached_property
    def prefix(self) -> str:
        """What all names begin with, up to a / or a comma; empty for a single run."""
        names = [*self.names, *self.damaged]
        parts = [re.split("(?<=[/,])", name)[:-1] for name in names if len(names) > 1]
        common = takewhile(lambda same: len(set(same)) == 1, zip(*parts, strict=False))
        return "".join(same[0] for same in common)

    def of_best(self, number: int) -> Comparison:
        """The same without all but its best runs, and the first damaged ones."""
        kept = self.order[:number]
        return replace(
            self,
            runs=[self.runs[index] for index in kept],
            names=[self.names[index] for index in kept],
            differing={key: [values[i] for i in kept] for key, values in self.differing.items()},
            damaged=dict(islice(self.damaged.items(), number)),
        )

    def _behind(self, index: int) -> dict[str, float | None]:
        found = self.behind_best.get(index)
        values = (found.mean, found.low, found.high, found.p) if found else (None,) * 4
        keys = ("behind best", "behind best low", "behind best high", "behind best p")
        return dict(zip(keys, values, strict=True))

    def columns(self) -> dict[str, str]:
        """The held-out metrics that tables show, with their labels; first `metric`."""
        known = dict.fromkeys(key for run in self.runs for key in run.metrics)
        labels = metric_labels(known)
        wanted = dict.fromkeys([self.metric, *labels])
        return {key: labels.get(key, key) for key in wanted if key in known}

    def lines(self) -> list[dict[str, Any]]:
        """A line for each run: settings that differ, state, and its held-out metrics."""
        metrics = list(dict.fromkeys(key for run in self.runs for key in run.metrics))
        judged: list[dict[str, Any]] = [
            {key: value for one in self.judged for key, value in one.columns(index).items()}
            for index in range(len(self.runs))
        ]
        no_judge = dict.fromkeys(key for columns in judged for key in columns)
        lines = [
            {
                "run": name,
                **{key: values[index] for key, values in self.differing.items()},
                "state": run.progress.state.value,
                "step": run.progress.step,
                "total_steps": run.progress.total_steps,
                "requeued": run.progress.requeued,
                "note": run.progress.note,
                "best": index in self.leaders,
                **{key: run.metrics.get(key) for key in metrics},
                **(self._behind(index) if self.behind_best else {}),
                **{**no_judge, **judged[index]},
                "folder": str(run.folder),
            }
            for index, (name, run) in enumerate(zip(self.names, self.runs, strict=True))
        ]
        empty = dict.fromkeys(lines[0] if lines else ())
        error_columns = {
            name: {"state": "damaged", "note": d.fault, "best": False, "folder": str(d.folder)}
            for name, d in self.damaged.items()
        }
        return lines + [empty | {"run": name} | words for name, words in error_columns.items()]


@dataclass(frozen=True)
class Group:
    """Finished runs that differ in one setting alone, such as their seed.

    Attributes:
        name: what the runs have in common, by their names or else their settings; `ALL` if nothing
            else differs.
        runs: by their value of that setting, as repr gives it. Runs of one value are repeats.
    """

    name: str
    runs: dict[str, list[Run]]

    def by_value(self, metric: str) -> dict[str, float]:
        """The mean of a held-out metric over the repeats of each value whose runs all have it."""
        return {
            value: fmean(run.metrics[metric] for run in same)
            for value, same in self.runs.items()
            if all(metric in run.metrics for run in same)
        }

    def metrics(self) -> dict[str, list[float]]:
        """The held-out metrics that all runs have, by `by_value`."""
        (first, *_), *_ = self.runs.values()
        found = {key: list(self.by_value(key).values()) for key in first.metrics}
        return {key: values for key, values in found.items() if len(values) == len(self.runs)}


def groups(report: Comparison, key: str) -> list[Group]:
    """The groups of finished runs that differ in one setting alone.

    Raises:
        ConfigError: the runs do not differ in that setting.
    """
    if key not in report.differing:
        known = ", ".join(report.differing) or "nothing"
        raise ConfigError([f"over: the runs do not differ in {key} ({known})"])
    found: dict[str, Group] = {}
    for index, run in enumerate(report.runs):
        if run.progress.state is State.finished:
            others = {k: v[index] for k, v in report.differing.items() if k != key}
            name = _without(key, report.names[index], others)
            group = found.setdefault(repr(others), Group(name, {}))
            group.runs.setdefault(repr(report.differing[key][index]), []).append(run)
    return list(found.values())


def _without(key: str, name: str, others: Mapping[str, Any]) -> str:
    """The name of a run without the setting that differs within its group.

    Args:
        others: the other settings that differ between runs, which name it if its own name does not.
    """
    kept, count = re.subn(rf",{re.escape(key)}=[^,/]*|\b{re.escape(key)}=[^,/]*,?", "", name)
    by_settings = ",".join(f"{k}={v}" for k, v in others.items())
    return kept.strip("/") * bool(count) or by_settings or ALL


def averages(report: Comparison, key: str) -> list[dict[str, Any]]:
    """A line for each group of runs that differ only in one setting, such as their seed.

    Returns:
        Name of the group, number of the values of the setting that its finished runs have, and for
        each held-out metric that they all have, the mean over these values, minimum, maximum and
        half the interval of the mean: `metric`, `metric min`, `metric max`, `metric +-` (None for a
        single value).

    Raises:
        ConfigError: the runs do not differ in that setting.
    """
    lines = []
    for group in groups(report, key):
        line: dict[str, Any] = {"runs": group.name, "number": len(group.runs)}
        for metric, values in group.metrics().items():
            line |= {
                metric: fmean(values),
                f"{metric} min": min(values),
                f"{metric} max": max(values),
                f"{metric} +-": half_width(values),
            }
        lines.append(line)
    return lines


def compare(folders: Sequence[Path], metric: str | None = None) -> Comparison:
    """Read all runs in and below folders.

    Args:
        metric: held-out metric to compare by; higher is better except for loss,
            repetition and the reward of rejected responses.
            None: `monitor.metric` of the first run.

    Raises:
        ConfigError: there is no run, or none has such a metric.
    """
    paths = find_runs(folders)
    if not paths:
        raise ConfigError([f"DIR: no run in {', '.join(map(str, folders))} (no run.yaml below)"])
    return comparison(*read_runs(paths), metric, folders)


def comparison(
    runs: Sequence[Run],
    damaged: Sequence[DamagedRun],
    metric: str | None = None,
    folders: Sequence[Path] = (),
) -> Comparison:
    """Put runs that were read side by side; at least one.

    Args:
        folders: that the user named.

    Raises:
        ConfigError: no run has the metric.
    """
    paths = [*(run.folder for run in runs), *(run.folder for run in damaged)]
    known = sorted({key for run in runs for key in run.metrics})
    if metric is not None and metric not in known:
        raise ConfigError(
            [f"metric: no such held-out metric, got {metric} ({', '.join(known) or 'none yet'})"]
        )
    monitor = runs[0].config.monitor if runs else MonitorConfig()
    metric = metric or monitor.metric
    names = dict(zip(paths, _names(paths), strict=True))
    return Comparison(
        list(runs),
        [names[run.folder] for run in runs],
        metric,
        mode_of(metric, monitor),
        _differing(runs),
        {names[run.folder]: run for run in damaged},
        folders,
    )


def _names(paths: Sequence[Path]) -> list[str]:
    if len(paths) == 1:
        return [paths[0].name]
    above = Path(commonpath(paths))
    return [path.relative_to(above).as_posix() for path in paths]


def _differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    flat = [settings(run.config) for run in runs]
    table = {
        key: [one.get(key) for one in flat] for key in dict.fromkeys(k for f in flat for k in f)
    }
    return {
        key: values
        for key, values in table.items()
        if not key.startswith(PLACES) and any(value != values[0] for value in values)
    }


def shared_facts(report: Comparison) -> dict[str, str]:
    """What decides the numbers of the runs and is the same in all of them, by label."""
    facts = [_facts(run.config) for run in report.runs]
    return {
        label: value
        for label, value in (facts[0] if facts else {}).items()
        if all(other[label] == value for other in facts)
    }


def _facts(run: RunConfig) -> dict[str, str]:
    train, own = run.train, run.loss.module
    revision = f", revision {run.model.revision}" if run.model.revision else ""
    lora = f"adapters of rank {run.model.lora.rank}"
    passes = f"{train.epochs} pass{'es' * (train.epochs > 1)} over the pairs"
    steps = "" if train.max_steps is None else f", at most {train.max_steps} steps"
    return {
        "model": run.model.path + revision,
        "trained": lora if run.model.lora.used else "all weights",
        "data": ", ".join(source.path for source in run.data.sources),
        # Reading a run's settings does not run its code.
        "loss": f"{run.loss.name} of the module {own}" if own else run.loss.formula(),
        "steps": f"{train.pairs_per_step} pairs a step, {passes}{steps}",
        "learning rate": f"{train.learning_rate:g}, {train.schedule.value} after a warm-up over "
        f"{train.warmup_ratio:g} of the steps",
        "seed": str(train.seed),
    }


def shared_settings(report: Comparison) -> dict[str, Any]:
    """The settings that decide the numbers of the runs and are the same in all, by dotted key."""
    flat = trajectory(report.runs[0].config) if report.runs else {}
    return {key: value for key, value in flat.items() if key not in report.differing}
