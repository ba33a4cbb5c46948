"""What a run has logged so far, and what follows from it: the best step, patience, a collapse.

All of it is in metrics.jsonl, so a continued run reads it there again.
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


class History:
    """The lines of metrics.jsonl, those of earlier processes of the run included.

    Attributes:
        evaluations: held-out metrics by the number of updates they were taken after.
    """

    def __init__(
        self,
        run: RunConfig,
        lines: Sequence[dict[str, float]],
        tracker: Tracker,
        store: CheckpointStore,
    ) -> None:
        """Read what was logged before; its signs of a collapse were printed then."""
        self.evaluations = evaluations_in(lines)
        self._run, self._tracker, self._store = run, tracker, store
        self._watch = CollapseWatch(run.watch)
        for line in lines:
            self._watch.read(line)

    def log(self, step: int, prefix: str, metrics: dict[str, float]) -> None:
        """Log metrics of a step, unless there are none; `prefix` is train or eval.

        Raises:
            RunError: they show a collapse, with watch.action=stop.
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
            self._tracker.print(message)

    @property
    def findings(self) -> tuple[str, ...]:
        """The signs of a collapse so far, a line each."""
        return tuple(finding.text for finding in self._watch.findings)

    @property
    def best_step(self) -> int | None:
        """The step with the best held-out metric, where the best model is to be kept."""
        return best_step(self._run.monitor, self.evaluations) if self._run.train.keep_best else None

    @property
    def out_of_patience(self) -> bool:
        """Whether so many evaluations without a better one have passed that the run ends."""
        patience = self._run.train.patience_evals
        if not patience:
            return False
        return evaluations_without_gain(self._run.monitor, self.evaluations) >= patience
