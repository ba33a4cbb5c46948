"""Composes command-line overrides into a checked `RunConfig`."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf.errors import OmegaConfBaseException

from simpo.config.check import build_run
from simpo.config.composer import CONF, Composer, NotComposedError
from simpo.config.errors import ConfigError, first_line
from simpo.config.explain import explain
from simpo.config.renamed import rename_overrides
from simpo.config.schema import RunConfig


def compose_run(overrides: Sequence[str], composer: Composer = CONF) -> RunConfig:
    """Compose and check a run.

    Raises:
        ConfigError: with every fault of the overrides and of the run they make.
    """
    overrides = rename_overrides(overrides)
    try:
        return build_run(composer.compose(overrides))
    except (NotComposedError, OmegaConfBaseException) as error:
        raise ConfigError(explain(overrides, composer=composer) or [first_line(error)]) from error
