"""Reads the prompts of benchmarks, and finds texts that contain one or a part of one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpo.config.data import SourceConfig
from simpo.config.errors import DataError, first_line
from simpo.config.filters import BENCHMARK_FILE, holds_prompts
from simpo.data.cleaning.duplicates import words
from simpo.data.reading.records import RecordFault
from simpo.data.reading.sources import METADATA_FILES, raw_records

COLUMNS = (
    *("prompt", "question", "instruction", "problem", "query", "input"),
    *("turns", "messages", "text", "ctx"),
)
"""Columns of a benchmark's file that hold its prompts; all that a record has are read."""
NGRAM_WORDS = 13
"""Words in a row that count as a part of a prompt, as in the decontamination of GPT-3."""


class Benchmarks:
    """The prompts of benchmarks, as runs of `NGRAM_WORDS` words; a shorter prompt is one run."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Read the files, and all files of the folders.

        Raises:
            DataError: a file cannot be read, or has no prompts.
        """
        self._places: dict[tuple[str, ...], str] = {}
        for path in files_of_benchmarks(paths):
            empty = True
            for number, prompt in _prompts(path):
                for run in _runs(words(prompt)):
                    self._places.setdefault(run, f"{path.name} record {number}")
                    empty = False
            if empty:
                raise DataError(f"data.filter.benchmarks: {path}: no prompt in it (leave it out)")

    def overlap(self, text: str) -> str | None:
        """What a text has in common with a prompt: its place and the words; None if nothing."""
        for run in _runs(words(text)):
            if place := self._places.get(run):
                return f"{place}: {' '.join(run)}"
        return None


def _runs(found: list[str]) -> Iterator[tuple[str, ...]]:
    """All runs of `NGRAM_WORDS` words; all words of a shorter text; none of a blank one."""
    if found:
        for start in range(max(1, len(found) - NGRAM_WORDS + 1)):
            yield tuple(found[start : start + NGRAM_WORDS])


def files_of_benchmarks(paths: Sequence[str]) -> Iterator[Path]:
    """The files that paths name, and all files of the folders.

    Raises:
        DataError: a folder has none.
    """
    for path in map(Path, map(os.path.expanduser, paths)):
        if not path.is_dir():
            yield path
            continue
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and holds_prompts(str(file))
            and not file.name.startswith(".")
            and file.name not in METADATA_FILES
        ]
        if not inside:
            raise DataError(f"data.filter.benchmarks: {path} must hold {BENCHMARK_FILE}")
        yield from inside


def _prompts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number of each record of a file, from 1, with each of its prompts."""
    for number, record in enumerate(_records(path), start=1):
        if isinstance(record, RecordFault):
            raise DataError(f"data.filter.benchmarks: {path} record {number}: {record}")
        texts = list(_texts(record))
        if not texts and not _has_column(record):
            raise DataError(
                f"data.filter.benchmarks: {path} record {number}: no prompt in it "
                f"(name its column one of {', '.join(COLUMNS)})"
            )
        yield from ((number, text) for text in texts)


def _records(path: Path) -> Iterator[Any]:
    if path.suffix.lower() != ".txt":
        source = SourceConfig(path=str(path))
        yield from (record for _, record in raw_records(source, "benchmark", False, 0))
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fault = first_line(error)
        raise DataError(f"data.filter.benchmarks: {path}: cannot be read: {fault}") from error
    yield from (line for line in text.splitlines(keepends=True) if line.strip())


def _texts(value: Any) -> Iterator[str]:
    """The prompts in a value of a file: a text, a list of texts or messages, or a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping) and "content" in value:
        if value.get("role", "user") == "user":
            yield from _texts(value["content"])
    elif isinstance(value, Mapping):
        for column, item in value.items():
            if str(column).lower() in COLUMNS:
                yield from _texts(item)


def _has_column(record: Any) -> bool:
    """Whether a record has a column of prompts, if only without a value."""
    return isinstance(record, Mapping) and any(str(key).lower() in COLUMNS for key in record)
