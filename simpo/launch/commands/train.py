"""`simpo train`: train a run, or a sweep of runs.

The settings are composed and checked without importing torch.
"""

from __future__ import annotations

from simpo.run.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # importing what follows takes a while

if __name__ == "simpo.train":  # would take the place of the function
    raise ImportError("simpo.train is a function (from simpo import train)")

import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from simpo.config.check import build_run, register_own_losses
from simpo.config.compose import refuse_options
from simpo.config.composer import Composer
from simpo.config.errors import ConfigError, SimpoError, Stopped, exit_codes, first_line
from simpo.config.explain import explain
from simpo.config.paths import config_dir
from simpo.config.renamed import rename_overrides
from simpo.launch.start import start
from simpo.run.files import read_results
from simpo.run.folder import TRAIN
from simpo.run.unused import hide_unused

USAGE = """
usage: simpo train [key=value ...] [-m] [--cfg job] [--config-dir DIR] [--help [SECTION ...]]

Train one run, or with -m a sweep of runs.

  simpo train                                            the built-in demo
  simpo train model=mistral_base data=ultrafeedback loss.beta=2.5
  simpo train ... --cfg job                              print the composed run, run nothing
  simpo train -m loss.beta=2,2.5 loss.gamma_beta_ratio=0.3,0.5     one run each
  simpo train -m launcher=slurm ...                      the same as one array of jobs
  simpo train loss=dpo --help loss                       the settings of a section
"""


Defaults = Callable[[Sequence[str], Composer], Sequence[str]]
"""Settings of a command that come before those of the user: of the user's, and what composes."""


def main(words: Sequence[str], defaults: Defaults = lambda *_: ()) -> None:
    """Train the run or sweep of a command line, given as its words.

    Raises:
        ConfigError: the settings cannot be composed or used.
        SimpoError: the run failed or was stopped.
    """
    # Makes Hydra raise, instead of printing its own message and exiting with 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    parser = get_args_parser()
    parser.error = _refuse_options  # type: ignore[method-assign]
    refuse_options(words)
    # Hydra reads the command line itself.
    sys.argv = [TRAIN, *_options_first(parser, rename_overrides(words))]
    arguments = parser.parse_args()
    _check_options(arguments)
    _refuse_folders(arguments.overrides)
    register_own_losses(arguments.overrides)
    composer = Composer(arguments.config_dir, arguments.config_name or "train")
    own, first = defaults(arguments.overrides, composer), len(sys.argv) - len(arguments.overrides)
    sys.argv[first:first] = arguments.overrides[:0] = own
    # Checked before the first member runs, and before Hydra prints a line of its own.
    checked = arguments.multirun or any(word.startswith("+") for word in arguments.overrides)
    if checked and (found := explain(arguments.overrides, arguments.multirun, composer)):
        raise ConfigError(found)
    try:
        run_composed()
    except SimpoError:
        raise
    # Hydra raises any type, such as TypeError for a group set to a list of numbers.
    except (Exception, _NotBuilt) as raised:
        error = raised.__cause__ if isinstance(raised, _NotBuilt) else raised
        assert error is not None
        problems = explain(arguments.overrides, arguments.multirun, composer)
        if not problems and not isinstance(error, (HydraException, OmegaConfBaseException)):
            raise
        raise ConfigError(problems or [first_line(error)]) from error


class _NotBuilt(BaseException):
    """The settings are composed, but no run; its cause says why. Hydra lets it pass in silence."""


@hydra.main(version_base="1.3", config_path=str(config_dir("conf")), config_name="train")
def run_composed(cfg: DictConfig) -> float | None:
    """Run one composed configuration and return its `monitor.metric`, for sweepers."""
    several = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        run = build_run(cfg)
    except SimpoError:
        if several:
            raise
        with exit_codes():
            raise
    except OmegaConfBaseException as error:
        if several:
            raise
        raise _NotBuilt from error
    # Hydra prints a heading above an exception, but not above an exit. Of several runs it goes on
    # with the others, and raises at the end.
    try:
        hide_unused(run)
        return read_results(start(run, own_process=True))["eval_after"].get(run.monitor.metric)
    except (SimpoError, BrokenPipeError) as error:
        if several and not isinstance(error, Stopped):
            raise
        with exit_codes():
            raise
    except Exception:
        if several:
            raise
        traceback.print_exc()
        sys.exit(1)


def _options_first(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words with options, and their values, before the settings: argparse takes no settings
    both before and after an option.
    """
    takes_value = {name: a.nargs != 0 for a in parser._actions for name in a.option_strings}
    options: list[str] = []
    settings: list[str] = []
    value_follows = False
    for word in words:
        is_option = value_follows or word.startswith("-")
        (options if is_option else settings).append(word)
        value_follows = not value_follows and takes_value.get(word, False)
    return [*options, *settings]


def _refuse_options(message: str) -> NoReturn:
    """Replaces argparse's usage, which does not mention settings."""
    raise ConfigError(
        [f"{message} (settings are key=value, such as train.learning_rate=1e-6; see --help)"]
    )


def _refuse_folders(overrides: Sequence[str]) -> None:
    """Refuse Hydra's own folders, of which it would make an empty one beside the run's.

    Raises:
        ConfigError: there are some.
    """
    keys = [word.lstrip("+~").partition("=")[0] for word in overrides]
    if found := [key for key in keys if key.startswith(("hydra.run.", "hydra.sweep."))]:
        remedy = "set output_dir, or run_dir for the folder of one run"
        raise ConfigError([f"{key}: simpo names the folders itself ({remedy})" for key in found])


def _check_options(arguments: Namespace) -> None:
    """Refuse options for which Hydra would print a traceback.

    Raises:
        ConfigError: options exclude each other, or are not supported.
    """
    modes = ("run", "multirun", "cfg", "info", "shell_completion")
    chosen = [f"--{mode.replace('_', '-')}" for mode in modes if getattr(arguments, mode)]
    if len(chosen) > 1:
        raise ConfigError([f"{', '.join(chosen)}: exclude each other (give one)"])
    if arguments.resolve and not (arguments.cfg or arguments.help):
        raise ConfigError(["--resolve: only with --cfg"])
    if arguments.experimental_rerun:
        raise ConfigError(["--experimental-rerun: not supported (see command.txt of a run)"])


if __name__ == "__main__":
    from simpo.__main__ import main as dispatch

    dispatch(["train", *sys.argv[1:]])
