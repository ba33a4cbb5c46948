"""Sweepers that select by `monitor.metric`: `hydra/sweeper=stages` and `hydra/sweeper=optuna`.

Both run a sequence of sweeps whose members keep their folders, so the same command finds finished
members, makes the same choices and continues.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

if TYPE_CHECKING:
    from simpo.run.pruning import Ended, Pruning

STAGES = {"_target_": "hydra_plugins.simpo_sweepers.StagedSweeper", "stages": []}
OPTUNA = {
    "_target_": "hydra_plugins.simpo_sweepers.OptunaSweeper",
    "params": {},
    "num_trials": 20,
    "trials_at_once": 1,
    "seed": 42,
    "pruner": "none",
    "startup_trials": 5,
    "warmup_steps": 0,
}
for name, node in (("stages", STAGES), ("optuna", OPTUNA)):
    ConfigStore.instance().store(name, node, group="hydra/sweeper", provider="simpo")
NEVER_ASKED = (
    "note   the first trials had no evaluation before their end at which the pruner decides, so it "
    "may prune none (set train.eval_every or hydra.sweeper.warmup_steps lower)"
)


class MetricSweeper(Sweeper):
    """Launches members, for both sweepers."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        from simpo.config.errors import ConfigError

        if config.launcher.get("wait") is False:
            raise ConfigError(["launcher.wait: a search needs its results (launcher.wait=true)"])
        self._metric = str(config.monitor.metric)
        self._sign = config.monitor.mode.sign
        self._launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self._loader = hydra_context.config_loader
        self._launched = 0

    def _typed(self, arguments: Sequence[str]) -> dict[str, Override]:
        """Overrides by key; the last override of a key counts."""
        parsed = OverridesParser.create(config_loader=self._loader).parse_overrides([*arguments])
        return {override.get_key_element(): override for override in parsed}

    def _run(
        self, fixed: Sequence[str], members: Sequence[Mapping[str, str]]
    ) -> Sequence[JobReturn]:
        """Run members with the fixed settings and their own; what each returns is its
        `monitor.metric`.

        Raises:
            ConfigError: one has none.
        """
        from simpo.config.errors import ConfigError

        overrides = [[*fixed, *(f"{k}={v}" for k, v in own.items())] for own in members]
        results: Sequence[JobReturn]
        results = self._launcher.launch(overrides, initial_job_idx=self._launched)
        self._launched += len(members)
        if None in [result.return_value for result in results]:
            raise ConfigError(
                [f"monitor.metric: a member has no such held-out metric, got {self._metric}"]
            )
        return results

    def _print_best(self, settings: Mapping[str, str], value: float) -> None:
        words = " ".join(f"{key}={text}" for key, text in settings.items())
        print(f"best   {words}: {self._metric} {value:.4f}", flush=True)


class StagedSweeper(MetricSweeper):
    """Searches stage by stage, keeping the best values: fewer runs than one grid of all settings.

    `hydra.sweeper.stages` is a list; each item is a grid of settings and the values to try. On the
    command line, several values of a setting replace those of its stage, or make a last stage;
    a single value takes the setting out of the search.
    """

    def __init__(self, stages: Sequence[Mapping[str, str]]) -> None:
        self._stages = stages

    def sweep(self, arguments: list[str]) -> dict[str, str]:
        """Run the stages one after the other.

        Returns:
            The best value found for each setting that was tried.

        Raises:
            ConfigError: there is no stage, or a member lacks `monitor.metric`.
        """
        from simpo.config.errors import ConfigError

        typed = self._typed(arguments)
        swept = {key: o for key, o in typed.items() if o.is_sweep_override()}
        fixed = [_text(o) for key, o in typed.items() if key not in swept]
        stages = [
            {
                key: swept.pop(key) if key in swept else self._typed([f"{key}={values}"])[key]
                for key, values in stage.items()
                if key in swept or key not in typed
            }
            for stage in self._stages
        ]
        stages = [stage for stage in [*stages, swept] if stage]
        if not stages:
            raise ConfigError(["hydra.sweeper.stages: empty (list settings with values to try)"])
        best: dict[str, str] = {}
        best_value: float | None = None
        for number, stage in enumerate(stages, 1):
            print(f"stage  {number} of {len(stages)}: {', '.join(stage)}", flush=True)
            grid = itertools.product(*(_values(override) for override in stage.values()))
            tried = [best | dict(zip(stage, values, strict=True)) for values in grid]
            found = [result.return_value for result in self._run(fixed, tried)]
            value = max(found, key=lambda value: self._sign * value)
            # A stage may lack the best settings of the stage before.
            if best_value is None or self._sign * value > self._sign * best_value:
                best, best_value = tried[found.index(value)], value
            self._print_best(best, best_value)
        return best


class OptunaSweeper(MetricSweeper):
    """Searches `hydra.sweeper.params` and sweeps of the command line with Optuna's TPE.

    A setting is searched in `interval(low, high)`, on a logarithmic scale in
    `tag(log, interval(low, high))`, or among listed values. The sampler is seeded.
    """

    def __init__(
        self,
        params: Mapping[str, str],
        num_trials: int,
        trials_at_once: int,
        seed: int,
        pruner: str,
        startup_trials: int,
        warmup_steps: int,
    ) -> None:
        self._params = params
        self._num_trials, self._trials_at_once, self._seed = num_trials, trials_at_once, seed
        self._pruner, self._startup_trials = pruner, startup_trials
        self._warmup_steps = warmup_steps

    def sweep(self, arguments: list[str]) -> dict[str, str]:
        """Run the trials.

        Returns:
            The settings of the best one.

        Raises:
            ConfigError: there is nothing to search, nothing could be pruned, a trial lacks
                `monitor.metric`, or Optuna is not installed.
            RunError: no trial has a result.
        """
        from simpo.config.errors import ConfigError, RunError

        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                ["hydra/sweeper: optuna is not installed (pip install 'simpo[optuna]')"]
            ) from error

        from simpo.run.pruning import tell

        self._check_numbers()
        pruning = self._pruning()
        typed = self._typed([*(f"{key}={text}" for key, text in self._params.items()), *arguments])
        space = {key: _space(o) for key, o in typed.items() if o.is_sweep_override()}
        if not space:
            raise ConfigError(["hydra.sweeper.params: empty (such as loss.beta: interval(1,3))"])
        fixed = [_text(o) for key, o in typed.items() if key not in space]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            direction="maximize" if self._sign > 0 else "minimize",
            sampler=optuna.samplers.TPESampler(
                seed=self._seed, multivariate=True, constant_liar=self._trials_at_once > 1
            ),
        )
        told: list[Ended] = []
        for first in range(0, self._num_trials, self._trials_at_once):
            count = min(self._trials_at_once, self._num_trials - first)
            trials = [study.ask(space) for _ in range(count)]
            members = [{key: _short(v) for key, v in trial.params.items()} for trial in trials]
            if pruning is not None:
                self._launcher.pruning = replace(pruning, trials=tuple(told))
            ended = self._ended(fixed, members)
            for trial, one in zip(trials, ended, strict=True):
                tell(study, trial, one)
            if pruning and not told and not any(map(pruning.decides_on, ended)):
                print(NEVER_ASKED, flush=True)
            told += ended
            pruned = f", {sum(one.value is None for one in told)} pruned" if pruning else ""
            print(f"trials {first + count} of {self._num_trials}{pruned}", flush=True)
        if not study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
            raise RunError(f"hydra/sweeper: no trial has a {self._metric} that is a number")
        best = {key: _short(value) for key, value in study.best_params.items()}
        self._print_best(best, study.best_value)
        return best

    def _check_numbers(self) -> None:
        from simpo.config.errors import ConfigError

        least = {"num_trials": 1, "trials_at_once": 1, "startup_trials": 0, "warmup_steps": 0}
        for key, lowest in {**least, "seed": 0}.items():
            number = getattr(self, f"_{key}")
            if not isinstance(number, int) or not lowest <= number < 2**32:
                problem = f"must be a whole number from {lowest}, got {number}"
                raise ConfigError([f"hydra.sweeper.{key}: {problem}"])

    def _pruning(self) -> Pruning | None:
        """What may prune the first trials; None without a pruner.

        Raises:
            ConfigError: there is no such pruner, or it could never prune a trial.
        """
        from simpo.config.errors import ConfigError
        from simpo.run.pruning import Pruner, Pruning

        known = [pruner.value for pruner in Pruner]
        if self._pruner not in known:
            problem = f"must be one of {', '.join(known)}, got {self._pruner}"
            raise ConfigError([f"hydra.sweeper.pruner: {problem}"])
        if self._pruner == Pruner.none:
            return None
        if not hasattr(self._launcher, "pruning"):
            raise ConfigError(
                ["hydra.sweeper.pruner: only simpo's launcher prunes (leave out hydra/launcher)"]
            )
        for key in ("trials_at_once", "startup_trials"):
            if (number := getattr(self, f"_{key}")) >= self._num_trials:
                problem = f"{number} of {self._num_trials} trials, so none can be pruned"
                remedy = "set it lower, or hydra.sweeper.pruner=none"
                raise ConfigError([f"hydra.sweeper.{key}: {problem} ({remedy})"])
        return Pruning(Pruner(self._pruner), self._startup_trials, self._warmup_steps)

    def _ended(self, fixed: Sequence[str], members: Sequence[Mapping[str, str]]) -> list[Ended]:
        """Run trials with the fixed settings and their own; return how each has ended."""
        from simpo.run.pruning import Ended
        from simpo.run.runs import read_runs

        results = self._run(fixed, members)
        paths = [Path(one.working_dir) for one in results if one.working_dir is not None]
        if len(paths) < len(results):  # another launcher's
            return [Ended({}, one.return_value) for one in results]
        runs = {run.folder: run for run in read_runs(paths)[0]}
        return [Ended.of(runs[path]) for path in paths]


def _text(override: Override) -> str:
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    return [override.get_value_element_as_str()]


def _space(override: Override) -> Any:
    from optuna import distributions

    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        assert low is not None and high is not None
        if isinstance(low, int) and isinstance(high, int):  # of int(interval(low, high))
            return distributions.IntDistribution(low, high, log="log" in value.tags)
        return distributions.FloatDistribution(low, high, log="log" in value.tags)
    return distributions.CategoricalDistribution(_values(override))


def _short(value: Any) -> str:
    """A value as text; six digits are enough, also for the name of a folder."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
