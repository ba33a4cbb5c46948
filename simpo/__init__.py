"""SimPO preference optimisation as a Hydra-composed experiment framework."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

# `python -m simpo.train` and the other commands are files of this folder.
__path__.append(str(Path(__file__).parent / "launch" / "commands"))

# It advises when it is imported, which transformers does, and at every product with 8-bit weights.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from simpo.config.errors import SimpoError, Stopped
    from simpo.config.schema import RunConfig
    from simpo.launch.api import Preview, TrainedRun, load_run_config, preview, train

__all__ = [
    "Preview",
    "RunConfig",
    "SimpoError",
    "Stopped",
    "TrainedRun",
    "load_run_config",
    "preview",
    "train",
]


def __getattr__(name: str) -> Any:
    """A name of `simpo.launch.api`, which is imported when one is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from simpo.launch import api

    return getattr(api, name)
