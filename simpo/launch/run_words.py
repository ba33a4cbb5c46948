"""Reads the command line of a command that has keys of its own, beside runs or settings."""

from __future__ import annotations

from collections.abc import Container, Sequence
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


def split_settings(words: Sequence[str], keys: Container[str]) -> tuple[list[str], dict[str, str]]:
    """Split `WORD... key=value ...` into words that are none of a command's own keys, such as the
    settings of a run, and the values of those keys."""
    others: list[str] = []
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in keys:
            given[key] = value
        else:
            others.append(word)
    return others, given
