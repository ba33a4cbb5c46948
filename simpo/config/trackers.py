"""The settings of trackers: where metrics go besides the terminal and metrics.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

from simpo.config.choices import WandbMode

NOT_IN_PROJECTS = "/\\#?%:"
"""Characters that Weights & Biases refuses in the name of a project."""


@dataclass(kw_only=True)
class TrackerConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    name: str = "console"
    """Kind of tracker; set by the group."""


@dataclass(kw_only=True)
class WandbConfig(TrackerConfig):
    """Weights & Biases."""

    name: str = "wandb"
    project: str = "simpo"
    """Project the run is listed under."""
    entity: str | None = None
    """Team or user; null takes the account's default."""
    mode: WandbMode = WandbMode.online
    """offline writes into the run's folder and needs no key; `wandb sync` uploads it later."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""

    def problems(self) -> Iterator[str]:
        yield from _not_installed("wandb")
        if not 1 <= len(self.project) <= 128 or set(self.project) & set(NOT_IN_PROJECTS):
            yield (
                f"project: must have 1 to 128 characters, none of them in {NOT_IN_PROJECTS}, "
                f"got {self.project or 'nothing'}"
            )
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                yield f"tags: a tag must have 1 to 64 characters, got {tag or 'nothing'}"


@dataclass(kw_only=True)
class TrackioConfig(TrackerConfig):
    """Trackio, on this machine."""

    name: str = "trackio"
    project: str = "simpo"
    """Project the run is listed under; `trackio show --project simpo` shows it."""

    def problems(self) -> Iterator[str]:
        yield from _not_installed("trackio")
        if not self.project:
            yield "project: must not be empty"


@dataclass(kw_only=True)
class TensorBoardConfig(TrackerConfig):
    """TensorBoard, with the events in the run's folder."""

    name: str = "tensorboard"

    def problems(self) -> Iterator[str]:
        yield from _not_installed("tensorboard")


@dataclass(kw_only=True)
class MlflowConfig(TrackerConfig):
    """MLflow, with a server or a database file."""

    name: str = "mlflow"
    tracking_uri: str = MISSING
    """Server or database: http://HOST:5000, sqlite:///FILE. MLFLOW_TRACKING_URI if that is set,
    else a SQLite file in output_dir."""
    experiment: str = "simpo"
    """Experiment the run is listed under; made if it does not exist."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the run."""

    def problems(self) -> Iterator[str]:
        yield from _not_installed("mlflow")
        for key in ("tracking_uri", "experiment"):
            if not getattr(self, key):
                yield f"{key}: must not be empty"


def _not_installed(library: str) -> Iterator[str]:
    if importlib.util.find_spec(library) is None:
        yield f"name: {library} is not installed (pip install 'simpo[{library}]')"
