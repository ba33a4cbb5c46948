"""simpo from Python: `from simpo import load_run_config, train, preview`."""

from __future__ import annotations

from simpo.config.compose import compose_run
from simpo.config.schema import RunConfig
from simpo.launch.start import start


def load_run_config(*overrides: str) -> RunConfig:
    """Compose and check the settings of a run.

    Args:
        overrides: words of a command line, such as `"model=mistral_base"` and `"loss.beta=2.5"`.

    Raises:
        ConfigError: with every fault of the settings.
    """
    return compose_run(overrides)


def train(run: RunConfig) -> dict[str, float]:
    """Train, evaluate and save a run, or continue it where it stopped.

    Returns:
        The held-out metrics of the saved model; empty if nothing is held out.

    Raises:
        SimpoError: the settings or the data cannot be used, or the run failed or was stopped.
    """
    return start(run)


def preview(run: RunConfig, pairs: int = 3) -> str:
    """What a run would be trained on, as text: messages, template text, tokens and packed rows.

    Args:
        pairs: number of pairs shown.

    Raises:
        SimpoError: the settings or the data cannot be used.
    """
    from simpo.previewing.stages import Stages, text

    return text(Stages.of(run, pairs))
