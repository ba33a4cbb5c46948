"""Finds signs of a collapse in the lines of metrics.jsonl, and reports each once in one line.

Loss, accuracy and margin still improve while a policy collapses: it makes chosen replies less
likely, and its own replies loop. Three metrics are compared with their values at the start:

    logps/chosen        falls far below where it was, in training or on held-out pairs
    reply_repetition    rises: greedy replies repeat themselves
    grad_norm           rises by an order of magnitude

The remedies are those of SimPO's authors (https://github.com/princeton-nlp/SimPO/issues/42 and 80),
and an NLL term, with which the demo survives a learning rate that destroys it otherwise.

A watch depends only on the lines it has read, so a continued run reads the earlier lines again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from simpo.config.schema import WatchConfig

REMEDY = "lower train.learning_rate, raise loss.beta or add loss.sft_weight"


@dataclass(frozen=True)
class Finding:
    """A sign of collapse.

    Attributes:
        step: updates done when it was found.
        good_step: updates done when the metric was last within half of its limit.
        text: one line with the metric, its change, the last good step and the remedy.
    """

    step: int
    good_step: int
    text: str


class CollapseWatch:
    """Reads the lines that a run logs and finds signs of a collapse.

    Attributes:
        findings: all so far, in the order found; at most one for each signal.
    """

    def __init__(
        self, config: WatchConfig, unit: str = "step", replies: str = "samples/step-{step:06d}.json"
    ) -> None:
        """
        Args:
            unit: what the lines call a step: a step, or a round.
            replies: where those lie that were measured; of `step`, and `following` is the next.
        """
        self.findings: list[Finding] = []
        signals = [
            _Signal(
                "train/logps/chosen",
                "the log-prob of a chosen token fell from {start:.2f} to {now:.2f}, by more than "
                "watch.chosen_drop={limit}",
                REMEDY,
                config.chosen_drop,
                config.window,
                _drop,
            ),
            _Signal(
                "eval/logps/chosen",
                "the log-prob of a held-out chosen token fell from {start:.2f} to {now:.2f}, by "
                "more than watch.chosen_drop={limit}",
                REMEDY,
                config.chosen_drop,
                1,
                _drop,
            ),
            _Signal(
                "eval/reply_repetition",
                "the share of repeated 4-grams in replies rose from {start:.2f} to {now:.2f}, by "
                "more than watch.repetition_rise={limit}",
                f"read {replies}; {REMEDY}",
                config.repetition_rise,
                1,
                _rise,
            ),
            _Signal(
                "train/grad_norm",
                "the gradient's norm rose from {start:.1f} to {now:.1f}, to more than "
                "watch.grad_norm_ratio={limit} times",
                "lower train.learning_rate or raise train.warmup_ratio",
                config.grad_norm_ratio,
                config.window,
                _ratio,
            ),
        ]
        self._signals = [signal for signal in signals if signal.limit]
        self._unit = unit

    def read(self, line: Mapping[str, float]) -> list[Finding]:
        """Read the next line of metrics.jsonl.

        Returns:
            The findings that are new with this line. A value of nan exceeds every limit.
        """
        found = []
        for signal in self._signals:
            if signal.key in line:
                finding = signal.read(int(line["step"]), line[signal.key], self._unit)
                found += [] if finding is None else [finding]
        self.findings += found
        return found


@dataclass
class _Signal:
    """A metric, bad if `harm(start, now)` exceeds `limit`; both are means over `window` lines.

    `recent` holds the last values, each with the updates done before it was measured.
    """

    key: str
    what: str
    remedy: str
    limit: float
    window: int
    harm: Callable[[float, float], float]
    recent: list[tuple[int, float]] = field(default_factory=list)
    start: float | None = None
    good_step: int = 0
    found: bool = False

    def read(self, step: int, value: float, unit: str) -> Finding | None:
        # Train metrics are computed before the step's update, held-out ones after it.
        updates = step - 1 if self.key.startswith("train/") else step
        self.recent = [*self.recent, (updates, value)][-self.window :]
        if self.found or len(self.recent) < self.window:
            return None
        now = sum(value for _, value in self.recent) / self.window
        if self.start is None:
            self.start = now
        harm = self.harm(self.start, now)
        if harm <= self.limit / 2:
            # The oldest step of the window: the newest may be bad, hidden in the mean.
            self.good_step = self.recent[0][0]
        # Not `harm > limit`: that is False for nan.
        if harm <= self.limit:
            return None
        self.found = True
        what = self.what.format(start=self.start, now=now, limit=self.limit)
        remedy = self.remedy.format(step=step, following=step + 1)
        text = f"{unit} {step}: {what}; last good {unit} {self.good_step} ({remedy})"
        return Finding(step, self.good_step, text)


def _drop(start: float, now: float) -> float:
    return start - now


def _rise(start: float, now: float) -> float:
    return now - start


def _ratio(start: float, now: float) -> float:
    """The ratio; 0 if the start is 0."""
    return now / start if start else 0.0
