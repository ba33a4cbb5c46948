"""Reads the command line of a command that takes the folder of a run and keys of its own."""

from __future__ import annotations

from collections.abc import Sequence
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
