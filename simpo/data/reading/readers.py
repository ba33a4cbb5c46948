"""Reads the records of one file, by its kind: JSON, JSON lines, CSV, parquet or Arrow.

A line or row that cannot be parsed is a `RecordFault` in place of its record; a file that cannot be
read is a `ValueError`. Files are never read through a cache that knows them by path or time stamp.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, cast

from simpo.config.data_path import kind
from simpo.config.errors import first_line
from simpo.data.reading.records import RecordFault
from simpo.data.reading.turns import is_message

Line = int | None
"""Number of the line in its file where a record begins; None where there are no such lines."""
COMPRESSED = {
    ".gz": b"\x1f\x8b",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ\x00",
    ".zst": b"\x28\xb5\x2f\xfd",
}
"""First bytes of compressed files, by the suffix that they must have."""
BYTE_ORDER_MARK = "\ufeff"
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""First bytes of a frame of zstandard without data, which pzstd writes before the others."""
NOT_TEXT = {
    b"\xff\xfe": "it is UTF-16 or UTF-32 text (convert it to UTF-8)",
    b"\xfe\xff": "it is UTF-16 text (convert it to UTF-8)",
    b"PAR1": "it is a parquet file (name it .parquet)",
    b"ARROW1": "it is an Arrow file (name it .arrow)",
    b"PK\x03\x04": "it is a zip archive or an Excel workbook (unpack it, or save it as CSV)",
}
"""First bytes of files that are not UTF-8 text, with the message for each."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
MAX_CELL_LETTERS = 2**27
"""A longer cell of a table is taken for a quote that is not closed."""
ROWS_AT_ONCE = 1024
"""Rows of a parquet or Arrow file that are in memory as Python objects."""
BUFFER_BYTES = 2**20
MAX_NAME_LETTERS = 100
"""A longer cell of a table's first row is taken for a text and not for the name of a column."""


def read_file(path: Path, suffixes: str | None = None) -> Iterator[tuple[Line, Any]]:
    """Yield the line and the value of each record of a file, or the fault of a record.

    Args:
        suffixes: those of its kind, as `kind` gives them; None: by its name.

    Raises:
        ValueError: the file cannot be read, is not of its kind, or changed while it was read.
    """
    before = path.stat()
    found = kind(str(path)) if suffixes is None else suffixes
    if found in (".arrow", ".feather"):
        yield from ((None, record) for record in _arrow(path))
    elif found == ".parquet":
        yield from ((None, record) for record in _parquet(path))
    else:
        yield from _text_file(path, found)
    after = path.stat()
    if (before.st_ino, before.st_size, before.st_mtime_ns) != (
        after.st_ino, after.st_size, after.st_mtime_ns,
    ):  # fmt: skip
        raise ValueError("it changed while it was read (run the same command again)")


def _text_file(path: Path, suffixes: str) -> Iterator[tuple[Line, Any]]:
    compression = next((suffix for suffix in COMPRESSED if suffixes.endswith(suffix)), "")
    plain = path.stem if compression else path.name
    content = suffixes.removesuffix(compression)
    separator = SEPARATORS.get(content)
    with path.open("rb") as file:
        begin = file.read(8)
    for suffix, first_bytes in COMPRESSED.items():
        if begin.startswith(first_bytes) and suffix != compression:
            raise ValueError(f"it is compressed (name it {plain}{suffix})")
    skippable = compression == ".zst" and SKIPPABLE.match(begin)
    if compression and not (skippable or begin.startswith(COMPRESSED[compression])):
        raise ValueError(f"it is not compressed (name it {plain})")
    count = 0
    try:
        with _opened(path, compression) as binary:
            _refuse_not_text(binary.peek(8))
            # utf-8-sig skips a byte order mark. Bytes that are not UTF-8 are kept as surrogates, so
            # that only their record is refused. A CSV reader wants the line ends as they are.
            newline = "" if separator else None
            text = io.TextIOWrapper(
                binary, encoding="utf-8-sig", errors="surrogateescape", newline=newline
            )
            if separator:
                records = _table(text, separator)
            else:
                records = _json(text) if content == ".json" else _json_lines(text)
            for record in records:
                yield record
                count += 1
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if not compression:
            raise
        fault = f"its compressed data ends early or is damaged, after {count} records"
        raise ValueError(f"{fault}: {first_line(error)} (copy it again)") from None


def _opened(path: Path, compression: str) -> io.BufferedReader:
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    # The readers of the standard library have the methods of a BufferedReader.
    opens: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
    }
    return cast(io.BufferedReader, opens[compression](path)) if compression else path.open("rb")


def _refuse_not_text(begin: bytes) -> None:
    for first_bytes, fault in NOT_TEXT.items():
        if begin.startswith(first_bytes):
            raise ValueError(fault)
    if b"\x00" in begin[:4]:
        raise ValueError("it is UTF-16 or UTF-32 text (convert it to UTF-8)")


def _json_lines(lines: TextIO) -> Iterator[tuple[Line, Any]]:
    """Yield the value of each line that is not blank, or the fault of a line that is not JSON."""
    full = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    index, value = -1, None
    for index, (number, line) in enumerate(full):
        if index == 0 and line.strip() in ("[", "{"):
            raise ValueError(_ONE_LIST if line.strip() == "[" else _INDENTED)
        value = None
        try:
            # With the line feed, the fault of a truncated line would be on the next line.
            value = _value(line.rstrip())
            yield number, value
        except RecordFault as fault:
            yield number, fault
    if index == 0 and isinstance(value, list):
        raise ValueError(_ONE_LIST)


_ONE_LIST = "it is one JSON list and not JSON lines (name it .json)"
_INDENTED = "its objects span several lines (write each on one line, such as with jq -c .)"


def _json(text: TextIO) -> Iterator[tuple[Line, Any]]:
    """Yield the records of a JSON list, of an object that holds one, or of JSON lines."""
    whole = text.read()
    first = whole.strip().partition("\n")[0]
    try:
        records = _records(_value(whole))
    except RecordFault as fault:
        if first.startswith("{") and first.rstrip().endswith("}"):
            yield from _json_lines(io.StringIO(whole))
            return
        several = first.startswith("{") and "Extra data" in str(fault)
        raise ValueError(_INDENTED if several else str(fault)) from None
    yield from ((None, record) for record in records)


def _records(value: Any) -> list[Any]:
    """The records of a whole JSON file: its list, the only list of records in its object, or the
    object itself."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    lists = {key: items for key, items in value.items() if _holds_records(items)}
    if len(lists) > 1:
        names = ", ".join(lists)
        raise ValueError(f"its object has several lists of records: {names} (write a file of each)")
    return next(iter(lists.values()), [value])


def _holds_records(items: Any) -> bool:
    """Whether a value is a list of objects that are not messages."""
    return (
        isinstance(items, list)
        and bool(items)
        and all(isinstance(item, dict) and not is_message(item) for item in items)
    )


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
        if text[error.pos : error.pos + 1] == BYTE_ORDER_MARK:
            raise _mark_inside(_position(text, error.pos)) from error
        what = error.msg.removesuffix(" at")
        raise RecordFault(f"not JSON: {what} at {_position(text, error.pos)}") from error
    except RecursionError as error:
        raise RecordFault("not JSON: lists or objects are nested too deeply") from error
    except ValueError as error:
        raise RecordFault("not JSON: a number has too many digits") from error


def _mark_inside(place: str) -> RecordFault:
    what = "a byte order mark inside the file, as cat of two files leaves it"
    return RecordFault(f"{what}, at {place} (remove it)")


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


def _table(text: TextIO, separator: str) -> Iterator[tuple[Line, Any]]:
    """Yield the rows of a table as text, an empty cell as None; the first row names the columns.

    Libraries that read tables guess types, and would make 7 of "007" and nothing of "NA".
    """
    before, given, first = [], None, text.readline()
    while (first and not first.strip()) or (given := _GIVEN_SEPARATOR.fullmatch(first)):
        separator = given[1] if given else separator
        before.append("\n")  # it counts as a line
        first = text.readline()
    unquoted = re.sub('"[^"]*"', "", first)
    if separator not in unquoted:
        separator = max(separator, ",", ";", "\t", "|", key=unquoted.count)
    csv.field_size_limit(MAX_CELL_LETTERS)
    rows = csv.reader(chain(before, [first], text), delimiter=separator, strict=True)
    names: list[str] = []
    while True:
        line = rows.line_num + 1
        try:
            cells = next(rows, None)
        except csv.Error:
            raise ValueError(
                f"the row at line {line} has a quote that is not closed, "
                'or one inside a cell that is not doubled (write "" for it)'
            ) from None  # callers report the cause of an error if it has one
        if cells is None:
            break
        if cells and not names:  # a blank line has no cells
            names = _header(cells)
        elif cells:
            yield line, _row(names, cells)
    if not names:
        raise ValueError(f"it has no header {_NAME_COLUMNS}")


_GIVEN_SEPARATOR = re.compile(r'"?sep=([,;|\t])"?\s*', re.IGNORECASE)  # Excel's first line
_NAME_COLUMNS = "(the first row must name the columns)"


def _header(cells: list[str]) -> list[str]:
    """The names of the columns; one without a name, such as an index, is Unnamed and its number."""
    names = [name.strip() or f"Unnamed: {index}" for index, name in enumerate(cells)]
    for index, name in enumerate(names):
        if len(name) > MAX_NAME_LETTERS or "\n" in name:
            what = f"column {index + 1} begins with a text"
            raise ValueError(f"it has no header: {what} {_NAME_COLUMNS}")
        if name in names[:index]:
            raise ValueError(f"its header has the name {name} twice {_NAME_COLUMNS}")
        if _not_utf_8(name):
            raise ValueError("its header is not UTF-8 (convert the file to UTF-8)")
    return names


def _row(names: list[str], cells: list[str]) -> dict[str, str | None] | RecordFault:
    if cells[0].startswith(BYTE_ORDER_MARK):
        return _mark_inside("column 1")
    if len(cells) != len(names):
        return RecordFault(f"has {len(cells)} cells where the header has {len(names)}")
    if _not_utf_8("".join(cells)):
        return RecordFault("not UTF-8 (convert the file to UTF-8)")
    return {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _not_utf_8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    # Without a buffer, columns of a whole row group are in memory, which may be the whole file.
    with ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _arrow(path: Path) -> Iterator[Any]:
    """Yield the records of an Arrow IPC file, which feather files are, or an Arrow IPC stream."""
    from pyarrow import OSFile, ipc

    with OSFile(str(path)) as file:
        begin = file.read(6)
        file.seek(0)
        if begin != b"ARROW1":
            for batch in ipc.open_stream(file):
                yield from _rows(batch)
            return
        batches = ipc.open_file(file)
        for index in range(batches.num_record_batches):
            yield from _rows(batches.get_batch(index))


def _rows(batch: Any) -> Iterator[Any]:
    """The rows of an Arrow record batch, of which few are Python objects at a time."""
    for start in range(0, batch.num_rows, ROWS_AT_ONCE):
        yield from batch.slice(start, ROWS_AT_ONCE).to_pylist()
