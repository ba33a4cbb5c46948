"""Lines of metrics.jsonl in, signs of a collapse out, each once and as one sentence.

A run that falls apart still looks well by its loss, accuracy and margin: all of them improve while
the policy leaves the chosen replies and loops. What gives it away is compared with the run's own
start:

    logps/chosen        falls far below where it was, in training or on held-out pairs
    reply_repetition    rises: greedy replies repeat themselves
    grad_norm           rises by an order of magnitude

The remedies are those of SimPO's authors (https://github.com/princeton-nlp/SimPO/issues/42 and 80),
and an NLL term, with which the demo bears a learning rate that destroys it otherwise.

A watch knows nothing but the lines it has read: one that reads the lines of an interrupted run goes
on as if nothing had happened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from simpo.config.schema import WatchConfig

REMEDY = "lower train.learning_rate, raise loss.beta or add loss.sft_weight"


@dataclass(frozen=True)
class Finding:
    """A sign of collapse.

    Attributes:
        step: updates done when it was found.
        good_step: updates done when the signal was last within half of its limit.
        text: what, by how much, since when and what to do, in one line.
    """

    step: int
    good_step: int
    text: str


class CollapseWatch:
    """Reads the lines a run logs and says what in them means a collapse.

    Attributes:
        findings: all so far, in the order found; at most one for each signal.
    """

    def __init__(self, config: WatchConfig) -> None:
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
                "read samples/step-{step:06d}.json; " + REMEDY,
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
        self._series = [_Series(signal) for signal in signals if signal.limit]

    def read(self, line: Mapping[str, float]) -> list[Finding]:
        """Take in one line of metrics.jsonl; lines come in the order logged.

        Returns:
            What this line reveals and no line before it did. A value that is no number counts as
            beyond every limit.
        """
        found = []
        for series in self._series:
            if series.signal.key in line:
                finding = series.add(int(line["step"]), line[series.signal.key])
                found += [] if finding is None else [finding]
        self.findings += found
        return found


@dataclass(frozen=True)
class _Signal:
    """A metric and when it is bad: `harm(start, now)` above `limit`, both means of `window`."""

    key: str
    what: str
    remedy: str
    limit: float
    window: int
    harm: Callable[[float, float], float]


class _Series:
    """The values of one signal so far, as far as they still matter."""

    def __init__(self, signal: _Signal) -> None:
        self.signal = signal
        self._recent: deque[tuple[int, float]] = deque(maxlen=signal.window)
        self._start: float | None = None
        self._good_step = 0
        self._found = False

    def add(self, step: int, value: float) -> Finding | None:
        signal = self.signal
        # A step's pairs are computed before its update, held-out ones after it.
        updates = step - 1 if signal.key.startswith("train/") else step
        self._recent.append((updates, value))
        if self._found or len(self._recent) < signal.window:
            return None
        now = sum(value for _, value in self._recent) / signal.window
        if self._start is None:
            self._start = now
        harm = signal.harm(self._start, now)
        if harm <= signal.limit / 2:
            # The oldest of the window: its newest may be bad already and outweighed by the others.
            self._good_step = self._recent[0][0]
        # Not `harm > limit`, which is false for nan.
        if harm <= signal.limit:
            return None
        self._found = True
        what = signal.what.format(start=self._start, now=now, limit=signal.limit)
        remedy = signal.remedy.format(step=step)
        text = f"step {step}: {what}; last in order at step {self._good_step} ({remedy})"
        return Finding(step, self._good_step, text)


def _drop(start: float, now: float) -> float:
    return start - now


def _rise(start: float, now: float) -> float:
    return now - start


def _ratio(start: float, now: float) -> float:
    """A norm that was zero has no ratio."""
    return now / start if start else 0.0
