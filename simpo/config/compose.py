"""Composes command-line overrides into a checked `RunConfig`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from omegaconf.errors import OmegaConfBaseException

from simpo.config.check import build_run
from simpo.config.composer import CONF, Composer, NotComposedError
from simpo.config.errors import ConfigError, first_line
from simpo.config.explain import explain
from simpo.config.renamed import SYNONYMS, rename_overrides
from simpo.config.schema import RunConfig
from simpo.config.suggest import all_keys, other_trainers_answer, take_beta


@contextmanager
def explaining(overrides: Sequence[str], composer: Composer) -> Iterator[None]:
    """Turn what Hydra or OmegaConf raises in the block into every fault of the overrides.

    Raises:
        ConfigError: in their place.
    """
    try:
        yield
    except (NotComposedError, OmegaConfBaseException) as error:
        raise ConfigError(explain(overrides, composer=composer) or [first_line(error)]) from error


def compose_run(overrides: Sequence[str], composer: Composer = CONF) -> RunConfig:
    """Compose and check a run.

    Raises:
        ConfigError: with every fault of the overrides and of the run they make.
    """
    overrides = rename_overrides(overrides)
    with explaining(overrides, composer):
        return build_run(composer.compose(overrides))


def refuse_options(words: Sequence[str]) -> None:
    """Answer settings that are typed as options, such as `--learning_rate 1e-6` or `--beta=2`.

    Raises:
        ConfigError: there are some, ours or those of other trainers.
    """
    typed: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name:
            is_value = following and "=" not in following and not following.startswith("-")
            typed[name.replace("-", "_")] = value if equals else following if is_value else "true"
    if not typed:
        return
    base = CONF.compose([])
    settings = {*all_keys(base), "experiments", *SYNONYMS}
    take_beta(base, typed.items())
    problems = {
        name: f"settings have no dashes (write {name}={value})"
        if name in settings
        else other_trainers_answer(base, name, value)
        for name, value in typed.items()
    }
    if faults := [f"--{name}: {problem}" for name, problem in problems.items() if problem]:
        raise ConfigError(faults)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message} (see --help)"])


def split_words(words: Sequence[str]) -> tuple[Composer, list[str]]:
    """Split a command line into what `--config-dir DIR` composes from, and the other words.

    Raises:
        ConfigError: DIR is missing or no folder, or a setting is typed as an option.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-cd", "--config-dir")
    refuse_options(words)
    options, rest = parser.parse_known_args(list(words))
    return Composer(options.config_dir), rest


def run_of_words(words: Sequence[str]) -> RunConfig:
    """Compose and check a run from a command line: overrides and an optional `--config-dir DIR`.

    Raises:
        ConfigError: see `compose_run`.
    """
    composer, overrides = split_words(words)
    return compose_run(overrides, composer)
