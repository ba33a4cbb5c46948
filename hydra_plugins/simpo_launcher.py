"""Hydra's launcher plugin, which calls `simpo.launch.sweep`.

Hydra finds plugins only in the package `hydra_plugins`, and imports this file at every start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, open_dict

if TYPE_CHECKING:
    from simpo.run.pruning import Pruning
    from simpo.run.runs import Run

ConfigStore.instance().store(
    group="hydra/launcher",
    name="simpo",
    node={"_target_": "hydra_plugins.simpo_launcher.SimpoLauncher"},
    provider="simpo",
)


class SimpoLauncher(Launcher):
    """Composes all members of a sweep, and runs them as `launcher` says.

    Attributes:
        pruning: what may prune the next members; None: nothing.
    """

    pruning: Pruning | None = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        from simpo.config.errors import unwritable

        self._loader, self._config = hydra_context.config_loader, config
        folder = config.hydra.sweep.dir
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)  # else Hydra does, with a traceback
        except OSError as error:
            raise unwritable(error.filename or folder, error) from error

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the members with these overrides; return the folder and `monitor.metric` of each, if
        waited for."""
        from simpo.config.alike import compose_alike
        from simpo.config.check import check_training
        from simpo.config.errors import ConfigError
        from simpo.launch.folders import Member
        from simpo.launch.sweep import launch

        # Hydra's own record, in the folder of all sweeps. Each sweep's folder has its settings.
        (Path(self._config.hydra.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)
        parse = cache(OverridesParser.create().parse_override)
        # By key: the last override of a key counts.
        typed = {
            override.get_key_element(): override.is_sweep_override()
            for override in map(parse, self._config.hydra.overrides.task)
        }
        shared = {key for key, is_swept in typed.items() if not is_swept}
        members = []
        runs = compose_alike(self._compose, job_overrides)
        for words, run in zip(job_overrides, runs, strict=True):
            own = [text for text in words if parse(text).get_key_element() not in shared]
            check_training(run)
            if self.pruning and (problems := [*self.pruning.problems(run)]):
                raise ConfigError(problems)
            members.append(Member(run, tuple(words), tuple(own)))
        sweeper = self._config.hydra.sweeper
        sweeps = len(shared) < len(typed) or sweeper.get("params") or sweeper.get("stages")
        search = sweeper._target_.startswith("hydra_plugins.simpo_sweepers.")
        name = self._config.name if sweeps else None
        ended: Sequence[Run | None] | None = launch(members, name, search, self.pruning)
        return [
            JobReturn(
                overrides=words,
                status=JobStatus.COMPLETED,
                working_dir=str(run.folder) if run else None,
                _return_value=run.monitored if run else None,
            )
            for words, run in zip(job_overrides, ended or [None] * len(members), strict=True)
        ]

    def _compose(self, overrides: list[str]) -> DictConfig:
        config = self._loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            del config["hydra"]
        return config


class GridSweeper(BasicSweeper):
    """Hydra's sweeper, which lets our launcher compose and check the members."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose all members, as other launchers begin before all are composed."""
        if not isinstance(self.launcher, SimpoLauncher):
            super().validate_batch_is_legal(batch)


# In the place of Hydra's own.
ConfigStore.instance().store(
    group="hydra/sweeper",
    name="basic",
    node=BasicSweeperConf(_target_="hydra_plugins.simpo_launcher.GridSweeper"),
    provider="simpo",
)
