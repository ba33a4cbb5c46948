"""Keeps what a run has logged, and finds the best step, the end of patience and a collapse.

A continued run reads it again from metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence

from simpo.config.choices import WatchAction
from simpo.config.errors import RunError
from simpo.config.schema import RunConfig
from simpo.loop.checkpoint import CheckpointStore
from simpo.loop.tracker import Tracker
from simpo.loop.watch import CollapseWatch
from simpo.run.best import best_step, evaluations_in, evaluations_without_gain
from simpo.run.progress import say


class History:
    """The lines of metrics.jsonl, with those of earlier processes of the run.

    Attributes:
        evaluations: held-out metrics by the number of updates done before them.
    """

    def __init__(
        self,
        run: RunConfig,
        lines: Sequence[dict[str, float]],
        tracker: Tracker,
        store: CheckpointStore,
    ) -> None:
        """Read earlier lines; their signs of a collapse are not printed again."""
        self.evaluations = evaluations_in(lines)
        self._run, self._tracker, self._store = run, tracker, store
        self._watch = CollapseWatch(run.watch)
        for line in lines:
            self._watch.read(line)

    def log(self, step: int, prefix: str, metrics: dict[str, float]) -> None:
        """Log metrics of a step, unless there are none; `prefix` is train or eval.

        Raises:
            RunError: they show a collapse, and watch.action is stop.
        """
        if not metrics:
            return
        if prefix == "eval":
            self.evaluations[step] = metrics
        for finding in self._watch.read(self._tracker.log(step, prefix, metrics)):
            good = self._store.newest(finding.good_step) or "none kept"
            message = f"watch  {finding.text}; last good checkpoint: {good}"
            if self._run.watch.action is WatchAction.stop:
                raise RunError(message)
            say(message)

    @property
    def findings(self) -> tuple[str, ...]:
        """The signs of a collapse so far, a line each."""
        return tuple(finding.text for finding in self._watch.findings)

    @property
    def best_step(self) -> int | None:
        """The step with the best held-out metric; None without train.keep_best."""
        return best_step(self._run.monitor, self.evaluations) if self._run.train.keep_best else None

    @property
    def out_of_patience(self) -> bool:
        """Whether train.patience_evals evaluations have passed without a better one."""
        patience = self._run.train.patience_evals
        if not patience:
            return False
        return evaluations_without_gain(self._run.monitor, self.evaluations) >= patience
