"""Reads the files of benchmarks, and writes those that have a JSON object in each line."""

from __future__ import annotations

import hashlib
import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpo.config.errors import DataError, first_line
from simpo.data.reading.readers import read_file
from simpo.data.reading.records import RecordFault
from simpo.run.atomic import make_folder, write_text

LFS_POINTER = b"version https://git-lfs"
COPY = "copy the file again"
ONE_LINE = "keep one of both lines"
SPLIT = "write a file of each"


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)} ({COPY})") from error


def records(path: Path, keys: Sequence[str] = ()) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """The line and the object of each record of a file of JSON lines, or of a JSON list, whose
    records have no lines. What begins with [ is a list, whatever its name.

    Args:
        keys: that each of them must have.

    Raises:
        DataError: it cannot be read, is empty, or a record is no such object.
    """
    record = None
    try:
        with path.open("rb") as file:
            begin = file.read(len(LFS_POINTER))
        if begin == LFS_POINTER:
            raise DataError(f"{path}: is a pointer to a file of Git LFS (run git lfs pull)")
        is_list = begin.removeprefix(BOM_UTF8).lstrip().startswith(b"[")
        for line, record in read_file(path, ".json" if is_list else None) if begin else ():
            if isinstance(record, RecordFault):
                raise fault(path, line, str(record))
            if not isinstance(record, dict):
                raise fault(path, line, "not an object")
            if not record.keys() >= set(keys):
                raise fault(path, line, f"must be a JSON object with {', '.join(keys)}")
            yield line, record
        if record is None:
            raise DataError(f"{path}: is empty ({COPY})")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror} (copy the file again, or let "
            "this user read it)"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: {with_remedy(str(error))}") from error


def with_remedy(text: str) -> str:
    """A fault of a file with a remedy behind it, unless it has its own."""
    return text if text.endswith(")") else f"{text} ({COPY})"


def fault(path: Path, line: int | None, what: str, remedy: str | None = None) -> DataError:
    """The error about a line of a file, or about a record without lines."""
    told = with_remedy(what) if remedy is None else f"{what} ({remedy})"
    return DataError(f"{path}: {told}" if line is None else f"{path}: line {line}: {told}")


def read_jsonl(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file, empty lines left out; see `records`.

    Raises:
        DataError: the file cannot be read, is empty, or a line is no such object.
    """
    return [record for _, record in records(path, keys)]


def answer_id(*texts: str) -> str:
    """The id of an answer, of its model, question and text; which may hold half a character."""
    whole = "\0".join(texts).encode(errors="surrogatepass")
    return hashlib.sha256(whole).hexdigest()[:22]


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file with a record a line, whole or not at all, and its folder.

    Raises:
        RunError: it cannot be written.
    """
    make_folder(path.parent)
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
