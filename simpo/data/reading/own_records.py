"""Writes records that a Python program holds into a file, from which a run reads them.

So a run of own records continues, starts several processes and is described by its run.yaml as one
of a user's files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from simpo.config.errors import DataError, first_line
from simpo.run.atomic import make_folder, write_text


def write_records(records: Iterable[Mapping[Any, Any]], what: str, folder: Path) -> Path:
    """Write records as JSON lines, unless they have been written before.

    Args:
        records: of any shape that is read from a file. NaN, NA and NaT, which pandas puts
            where a value is missing, become null; arrays become lists.
        what: name of the records in messages.
        folder: where to write; the name of the file is a hash of its content.

    Raises:
        DataError: there is no record, or one is not a dict or cannot be written as JSON.
        RunError: the file cannot be written.
    """
    if isinstance(records, str | Mapping) or not isinstance(records, Iterable):
        given = f"got {type(records).__name__} (name a file in data.sources)"
        raise DataError(f"{what}: must be a list of dicts, {given}")
    text = "".join(f"{_line(record, f'{what}[{i}]')}\n" for i, record in enumerate(records))
    if not text:
        raise DataError(f"{what}: no record in it (a generator can be read once)")
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    path = folder / f"{what}-{digest[:16]}.jsonl"
    if not path.is_file():
        make_folder(folder)
        write_text(path, text)
    return path


def _line(record: Any, place: str) -> str:
    if not isinstance(record, Mapping):
        kind = type(record).__name__
        raise DataError(
            f"{place}: must be a dict, got {kind} (of a DataFrame take df.to_dict('records'))"
        )
    whole = {
        key: None if isinstance(value, Real) and value != value else value
        for key, value in record.items()
    }
    try:
        return json.dumps(whole, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: cannot be written as JSON: {first_line(error)} (make it text, numbers, "
            "lists and dicts)"
        ) from error


def _plain(value: Any) -> Any:
    """A number or an array of NumPy as Python's own, and what pandas has for a missing one."""
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in it")
