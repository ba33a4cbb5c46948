"""Finds the evaluations among logged lines, and the step with the best one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from simpo.config.choices import Mode
from simpo.config.errors import ConfigError
from simpo.config.schema import MonitorConfig

LESS_IS_BETTER = ("loss", "reply_repetition", "rewards/rejected")
"""Ends of the names of metrics; of several held-out sets they follow that of the set."""

Evaluations = Mapping[int, Mapping[str, float]]
"""Held-out metrics by the number of updates done before them."""


def evaluations_in(lines: Iterable[Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """The evaluations among the lines of a metrics.jsonl."""
    found = {}
    for line in lines:
        values = {k.removeprefix("eval/"): v for k, v in line.items() if k.startswith("eval/")}
        if values:
            found[int(line["step"])] = values
    return found


def best_step(config: MonitorConfig, evaluations: Evaluations) -> int | None:
    """The step with the best metric; None if there is none.

    Of equals, such as accuracies of 1, the lowest loss is the best, then the earliest. Step 0, the
    untrained model, does not count.
    """
    steps = [step for step in sorted(evaluations) if step]

    def goodness(step: int) -> tuple[float, float]:
        metrics = evaluations[step]
        return config.mode.sign * metrics[config.metric], -metrics.get("loss", 0.0)

    return max(steps, key=goodness, default=None)


def mode_of(metric: str, monitor: MonitorConfig) -> Mode:
    """Whether a higher or a lower value of a held-out metric is better."""
    if metric == monitor.metric:
        return monitor.mode
    return Mode.min if metric.endswith(LESS_IS_BETTER) else Mode.max


def evaluations_without_gain(config: MonitorConfig, evaluations: Evaluations) -> int:
    """Number of evaluations after that of the best step."""
    best = best_step(config, evaluations)
    return 0 if best is None else sum(step > best for step in evaluations)


def check_monitor(config: MonitorConfig, metrics: Sequence[str]) -> None:
    """Check that evaluations, which have these metrics, have `monitor.metric`.

    Raises:
        ConfigError: they do not.
    """
    if config.metric not in metrics:
        *_, last = config.metric.split("/")
        # Tables say accuracy where the key is rewards/accuracies.
        near = [key for key in metrics if last[:6] in key] or get_close_matches(last, metrics)
        hint = f"did you mean {near[0]}?" if near else ", ".join(metrics) or "nothing is held out"
        raise ConfigError(
            [f"monitor.metric: no such held-out metric, got {config.metric} ({hint})"]
        )
