"""Command-line overrides in, a `RunConfig` out, or every fault of them in one `ConfigError`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from simpo.config.compose import compose_run
from simpo.config.composer import Composer
from simpo.config.errors import ConfigError, SimpoError
from simpo.config.schema import RunConfig
from simpo.run.signals import exit_on_signals

GOES_ON = "the same command goes on where it was"


class _Words(argparse.ArgumentParser):
    """Options and settings of a command; a fault is one line, as those of settings are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message} (-h tells how)"])


def command(work: Callable[[RunConfig], None], usage: str | None) -> None:
    """Compose a run from the words of a command line and do something with it.

    Exits with 2 for bad settings or data, 1 for what failed on the way, 75 where a signal ended it,
    130 where Ctrl-C did.
    """
    exit_on_signals(f"interrupted: {GOES_ON}", f"stopped ({GOES_ON})")
    parser = _Words(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-cd", "--config-dir")
    try:
        options, words = parser.parse_known_args()
        if options.help:
            print(usage)
            return
        work(compose_run(words, Composer(options.config_dir)))
    except SimpoError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
