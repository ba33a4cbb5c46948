"""Prunes trials of a search by Optuna's pruners, though its trials are processes of their own.

The sweeper writes pruning.json into the folder of each trial that it starts: the pruner, and the
evaluations of the trials that had ended by then. After an evaluation the trial replays them in a
study of its own in memory and asks Optuna. A trial is not compared with those that run beside it:
how far these are depends on the machine, and a search that is started again must decide the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo.config.benchmarks import FIGURES
from simpo.config.choices import Mode
from simpo.config.errors import DamagedError
from simpo.config.schema import RunConfig
from simpo.run.files import PRUNING, read_json
from simpo.run.runs import Run, State

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner


class Pruner(str, Enum):
    """Which of Optuna's pruners ends hopeless trials."""

    none = "none"
    median = "median"
    halving = "halving"


@dataclass(frozen=True)
class Ended:
    """A trial that has ended.

    Attributes:
        values: `monitor.metric` by the number of updates done; not of the untrained model.
        value: that of the saved model; None if the trial was pruned.
    """

    values: dict[int, float]
    value: float | None

    @staticmethod
    def of(run: Run) -> Ended:
        """What the run of a trial has left."""
        values = trained_values(run.config.monitor.metric, run.evaluations)
        return Ended(values, None if run.progress.state is State.pruned else run.monitored)


@dataclass(frozen=True)
class Pruning:
    """What decides whether a trial is hopeless.

    Attributes:
        startup_trials: trials that must have finished before any is pruned.
        warmup_steps: updates before which no trial is pruned; for halving also the first rung, at
            0 a hundredth of a trial's steps.
        trials: the trials that ended earlier, in their order.
    """

    pruner: Pruner
    startup_trials: int
    warmup_steps: int
    trials: tuple[Ended, ...] = ()

    def text(self) -> str:
        """The text of pruning.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def problems(self, run: RunConfig) -> Iterator[str]:
        """Why no trial with these settings could ever be pruned, as lines for the user."""
        train, metric = run.train, run.monitor.metric
        remedy = "or hydra.sweeper.pruner=none"
        if run.rounds.number:
            yield (
                "hydra.sweeper.pruner: rounds are not pruned (hydra.sweeper.pruner=none; "
                "rounds.patience ends them)"
            )
            return
        if metric in FIGURES:
            yield (
                f"hydra.sweeper.pruner: monitor.metric={metric} is known at the end of a run only "
                f"(choose a held-out metric, {remedy})"
            )
        elif not any(source.has_held_out() for source in run.data.sources):
            yield (
                "hydra.sweeper.pruner: nothing is held out, so trials cannot be compared "
                f"(test_split or test_path of data.sources, {remedy})"
            )
        every, last = train.eval_every, train.max_steps
        if not every:
            yield (
                "train.eval_every: 0, so trials are evaluated at their end only and none can be "
                f"pruned (set it, {remedy})"
            )
        elif last is not None and (last - 1) // every * every < max(self.warmup_steps, 1):
            after = f" from step {self.warmup_steps} on" if self.warmup_steps else ""
            yield (
                f"train.eval_every: {every}, so trials of {last} steps are not evaluated{after} "
                f"before their end and none can be pruned (set it lower, {remedy})"
            )

    def decides_on(self, ended: Ended) -> bool:
        """Whether a finished trial was evaluated where it could have been pruned."""
        *before_end, _ = sorted(ended.values) or [0]
        return any(step >= self.warmup_steps for step in before_end)

    def is_hopeless(self, mode: Mode, values: Mapping[int, float]) -> bool:
        """Whether Optuna would prune a trial now.

        Args:
            values: `monitor.metric` of each of its evaluations so far, by the number of updates.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            direction="maximize" if mode is Mode.max else "minimize", pruner=self._optuna_pruner()
        )
        for ended in self.trials:
            tell(study, study.ask(), ended)
        told = _report(study.ask(), values)
        finished = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        # Optuna's halving has no such setting.
        return told and len(finished) >= self.startup_trials

    def _optuna_pruner(self) -> BasePruner:
        from optuna.pruners import MedianPruner, SuccessiveHalvingPruner

        if self.pruner is Pruner.median:
            return MedianPruner(self.startup_trials, self.warmup_steps)
        return SuccessiveHalvingPruner(min_resource=self.warmup_steps or "auto")


def trained_values(metric: str, evaluations: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
    """A metric by step, where it was evaluated; without step 0, at which all trials are equal."""
    return {
        step: metrics[metric]
        for step, metrics in sorted(evaluations.items())
        if step and metric in metrics
    }


def tell(study: Study, trial: Trial, ended: Ended) -> None:
    """Tell a study how a trial has ended, with its evaluations."""
    from optuna.trial import TrialState

    _report(trial, ended.values)
    if ended.value is None:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, ended.value)


def _report(trial: Trial, values: Mapping[int, float]) -> bool:
    """Report evaluations, each with Optuna's question, at which halving notes its rungs; the answer
    to the last one."""
    told = False
    for step, value in values.items():
        trial.report(value, step)
        told = trial.should_prune()
    return told


def may_be_pruned(run: RunConfig) -> bool:
    """Whether a search may prune the run; the run's folder is then set."""
    return run.run_dir is not None and (Path(run.run_dir).expanduser() / PRUNING).exists()


def read_pruning(folder: Path) -> Pruning | None:
    """What may prune the run of a folder; None if nothing may.

    Raises:
        DamagedError: pruning.json is not as a sweep writes it.
    """
    path = folder / PRUNING
    remedy = "remove it: the sweep's command writes it anew, and nothing else prunes the run"
    found: dict[str, Any] = read_json(path, remedy)
    if not path.exists():
        return None
    try:
        trials = tuple(
            Ended({int(step): float(v) for step, v in one["values"].items()}, _value(one["value"]))
            for one in found["trials"]
        )
        startup, warmup = int(found["startup_trials"]), int(found["warmup_steps"])
        return Pruning(Pruner(found["pruner"]), startup, warmup, trials)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(path, "is not as a sweep writes it", remedy) from error


def _value(value: Any) -> float | None:
    return None if value is None else float(value)
