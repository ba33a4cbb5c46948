"""Reads and writes the files of benchmarks that have a JSON object in each line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpo.config.errors import DataError, first_line
from simpo.run.atomic import make_folder, write_text


def read_jsonl(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file, empty lines left out.

    Args:
        keys: that each of them must have.

    Raises:
        DataError: the file cannot be read, is empty, or a line is no such object.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)} (copy it again)") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not record.keys() >= set(keys):
            wanted = ", ".join(keys)
            raise DataError(f"{path}:{number}: must be a JSON object with {wanted} (copy it again)")
        records.append(record)
    if not records:
        raise DataError(f"{path}: is empty (copy it again)")
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file with a record a line, whole or not at all, and its folder.

    Raises:
        RunError: it cannot be written.
    """
    make_folder(path.parent)
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
