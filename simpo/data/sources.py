"""Reads the raw records of one split of a source: file, saved data set or hub data set.

A line that cannot be parsed is a fault of that record; a file that cannot be read is a `DataError`.
Local files are never read through a cache that identifies them by path or time stamp.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simpo.config.data import SourceConfig
from simpo.config.errors import DataError
from simpo.data import hub
from simpo.data.demo.records import demo_records
from simpo.data.records import RecordFault

FIRST_BYTES = {
    b"\xff\xfe": "it is UTF-16 or UTF-32 text (convert it to UTF-8)",
    b"\xfe\xff": "it is UTF-16 text (convert it to UTF-8)",
    b"\x00\x00\xfe\xff": "it is UTF-32 text (convert it to UTF-8)",
    b"\x1f\x8b": "it is compressed (gunzip it)",
    b"PAR1": "it is a parquet file (name it .parquet)",
}
"""First bytes of files that are not JSON lines in UTF-8, with the message for each."""


def origin(source: SourceConfig, held_out: bool) -> str:
    """Path or hub id of a split, as written in the settings."""
    return source.test_path if held_out and source.test_path else source.path


def raw_records(source: SourceConfig, split: str, held_out: bool, seed: int) -> Iterator[Any]:
    """Yield the records of a split, and a `RecordFault` for each line that is not JSON.

    Raises:
        DataError: the source cannot be read, or changed while it was read.
    """
    path = Path(os.path.expanduser(origin(source, held_out)))
    # Libraries raise errors of many types, with messages of many lines.
    try:
        if source.path == "builtin:demo":
            yield from demo_records(seed, split)
        elif source.is_file():
            yield from _file(path)
        else:
            yield from _dataset(source, path, split)
    except Exception as error:
        # The reason of "An error occurred while generating the dataset" is in its cause.
        fault = hub.reason(error.__cause__ or error, f"datasets/{source.path}")
        raise DataError(f"{origin(source, held_out)} {split}: cannot be read: {fault}") from error


def _file(path: Path) -> Iterator[Any]:
    readers = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}
    before = path.stat()
    yield from readers[path.suffix.lower()](path)
    after = path.stat()
    if (before.st_ino, before.st_size, before.st_mtime_ns) != (
        after.st_ino, after.st_size, after.st_mtime_ns,
    ):  # fmt: skip
        raise ValueError("it changed while it was read (run the same command again)")


def _json_lines(path: Path) -> Iterator[Any]:
    """Yield the value of each line that is not blank, or the fault of a line that is not JSON."""
    with path.open("rb") as file:
        begin = file.read(4)
    for first_bytes, fault in FIRST_BYTES.items():
        if begin.startswith(first_bytes):
            raise ValueError(fault)
    # utf-8-sig skips a byte order mark. Bytes that are not UTF-8 are kept as surrogates, so only
    # their line is refused.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for line in lines:
            if line.strip():
                try:
                    # With the line feed, the fault of a truncated line would be on the next line.
                    yield _value(line.rstrip())
                except RecordFault as fault:
                    yield fault


def _json(path: Path) -> Iterator[Any]:
    """Yield the records of a JSON list, or of JSON lines in a file named .json."""
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        yield from _value(text)
    except RecordFault as fault:
        raise ValueError(str(fault)) from None  # callers report the cause of an error if it has one


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _value(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        RecordFault: the text is not JSON, or JSON parsers disagree on it (a repeated key).
    """
    try:
        text.encode()
        return _DECODER.decode(text)
    except UnicodeEncodeError as error:
        raise RecordFault(f"not UTF-8 at {_position(text, error.start)}") from error
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise RecordFault(f"not JSON: {what} at {_position(text, error.pos)}") from error
    except RecursionError as error:
        raise RecordFault("not JSON: lists or objects are nested too deeply") from error
    except ValueError as error:
        raise RecordFault("not JSON: a number has too many digits") from error


def _position(text: str, index: int) -> str:
    line = text.count("\n", 0, index)
    column = index - text.rfind("\n", 0, index)
    return f"column {column}" if line == 0 else f"line {line + 1} column {column}"


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(items)
    if len(made) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecordFault(f"not JSON: an object has the key {twice} twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _dataset(source: SourceConfig, path: Path, split: str) -> Any:
    # Imported here because it takes a second, mostly for pandas and pyarrow.
    import datasets
    from datasets import DatasetDict, load_dataset, load_from_disk
    from huggingface_hub import constants

    datasets.disable_progress_bars()
    if not path.is_dir():
        hub.go_offline_if_unreachable()
        datasets.config.HF_HUB_OFFLINE |= constants.HF_HUB_OFFLINE
        return load_dataset(source.path, source.subset, split=split, revision=source.revision)
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        saved = load_from_disk(str(path))
        # A saved data set without named splits is one split, like a file.
        only = source.train_split or source.test_split
        splits: dict[Any, Any] = saved if isinstance(saved, DatasetDict) else {only: saved}
        if split not in splits:
            raise ValueError(
                f"no such split, only {', '.join(splits)} (set it to null to leave it out)"
            )
        return splits[split]
    # Streamed because the library's cache identifies the folder's files by time stamp only.
    return load_dataset(str(path.absolute()), source.subset, split=split, streaming=True)
