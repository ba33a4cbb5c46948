"""Logged lines in, the evaluations among them and the best step out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from simpo.config.choices import Mode
from simpo.config.errors import ConfigError
from simpo.config.schema import MonitorConfig

LESS_IS_BETTER = ("loss", "reply_repetition")

Evaluations = Mapping[int, Mapping[str, float]]
"""Held-out metrics by the number of updates they were taken after."""


def evaluations_in(lines: Iterable[Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """The evaluations among the lines of a metrics.jsonl."""
    found = {}
    for line in lines:
        values = {k.removeprefix("eval/"): v for k, v in line.items() if k.startswith("eval/")}
        if values:
            found[int(line["step"])] = values
    return found


def best_step(config: MonitorConfig, evaluations: Evaluations) -> int | None:
    """The trained step with the best metric, the earliest of equals; None if there is none.

    The model before the first step is not among them.
    """
    steps = [step for step in sorted(evaluations) if step]
    return max(
        steps, key=lambda step: config.mode.sign * evaluations[step][config.metric], default=None
    )


def mode_of(metric: str, monitor: MonitorConfig) -> Mode:
    """Whether more or less of a held-out metric is better."""
    if metric == monitor.metric:
        return monitor.mode
    return Mode.min if metric in LESS_IS_BETTER else Mode.max


def evaluations_without_gain(config: MonitorConfig, evaluations: Evaluations) -> int:
    """How many evaluations have followed that of the best step."""
    best = best_step(config, evaluations)
    return 0 if best is None else sum(step > best for step in evaluations)


def check_monitor(config: MonitorConfig, metrics: Mapping[str, float]) -> None:
    """Check that a first evaluation gave the metric to select by.

    Raises:
        ConfigError: it is not among its metrics.
    """
    if config.metric not in metrics:
        known = ", ".join(metrics) or "nothing is held out"
        raise ConfigError(
            [f"monitor.metric: no such held-out metric, got {config.metric} ({known})"]
        )
