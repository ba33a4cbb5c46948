"""Writes files whole or not at all."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from simpo.config.errors import unwritable


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there.

    Raises:
        RunError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def write_text(path: Path, text: str, private: bool = False) -> None:
    """Write a file: a reader sees the old text or the new, never a part.

    Args:
        private: readable by its owner alone.

    Raises:
        RunError: it cannot be written.
    """
    write_bytes(path, text.encode(errors="backslashreplace"), private)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON: a reader sees the old text or the new, never a part.

    Raises:
        RunError: it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_bytes(path: Path, content: bytes, private: bool = False) -> None:
    """Write a file: a reader sees the old content or the new, never a part.

    Args:
        private: readable by its owner alone.

    Raises:
        RunError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        if private:
            part.unlink(missing_ok=True)
            part.touch(mode=0o600)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise unwritable(path, error) from error
