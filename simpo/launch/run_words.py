"""Reads the command line of a command that has keys of its own, beside runs or settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def split_run_words(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split `RUN key=value ...` into what names runs, and the values of keys.

    A folder's name may hold an = itself, as those of a sweep's members do: loss.beta=2.
    """
    runs: list[str] = []
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key.isidentifier() and not Path(word).is_dir():
            given[key] = value
        else:
            runs.append(word)
    return runs, given


def split_settings(
    words: Sequence[str], options: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Split `SETTINGS... key=value ...` into the settings of a run, and the values of keys.

    Args:
        options: the command's own keys with their defaults.
    """
    settings: list[str] = []
    given = dict(options)
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in options:
            given[key] = value
        else:
            settings.append(word)
    return settings, given
