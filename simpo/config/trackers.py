"""The settings of trackers: where metrics go besides the terminal and metrics.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field

from simpo.config.choices import WandbMode


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
        if importlib.util.find_spec("wandb") is None:
            yield "name: wandb is not installed (pip install 'simpo[wandb]')"
