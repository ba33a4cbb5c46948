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


def no_folder(key: str, word: str | Path) -> str:
    """The message about a word that should name a folder.

    Args:
        key: what the usage calls it.
    """
    if str(word).startswith("-"):
        return f"{word}: no such option (settings are key=value; see --help)"
    if Path(word).is_file():
        return f"{key}: must be a folder, got the file {word}"
    return f"{key}: no such folder, got {word}"


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
