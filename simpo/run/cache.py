"""Cache entries: folders with a manifest that holds the size and sha256 of every file.

An entry is written to a temporary folder, gets its manifest, and is then renamed. A reader checks
the manifest first, so a file that has changed since is found.

    <entry>/
        seal.json      the manifest: name of the entry, size in bytes and sha256 of every other file
        ...            what the entry holds
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from simpo.config.errors import first_line

MANIFEST = "seal.json"
CHUNK_BYTES = 2**22


def sha256(path: Path) -> str:
    """Hash of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def flush_and_hash(path: Path) -> tuple[int, str]:
    """Flush a file to the disk and return its size in bytes and its sha256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, sha256(path)


def files_in(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def file_fault(folder: Path, name: str, num_bytes: int, expected: str) -> str | None:
    """What is wrong with a file that a manifest lists, or None."""
    file = folder / name
    try:
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != num_bytes:
            return f"{name} has {file.stat().st_size} bytes, not {num_bytes}"
        return f"{name} has changed (sha256)" if sha256(file) != expected else None
    except OSError as error:  # from a failing disk
        return f"{name} cannot be read ({error.strerror})"


def entry_fault(folder: Path) -> str | None:
    """What is wrong with a cache entry, or None if it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        name, files = manifest["entry"], dict(manifest["files"])
        if name != folder.name:
            return f"it was made for {name}"
        faults = (file_fault(folder, file, *files[file]) for file in sorted(files))
        return next(filter(None, faults), None)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return f"it cannot be read ({type(error).__name__})"


def find_entry(folder: Path) -> tuple[bool, list[str]]:
    """Look for a cache entry.

    Returns:
        Whether it exists and is whole; and a line that says what is wrong with a damaged one.
    """
    if not os.path.lexists(folder):
        return False, []
    fault = entry_fault(folder)
    if fault is None:
        return True, []
    return False, [f"note   cache: {folder} is damaged and made anew: {fault}"]


def write_entry(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a cache entry, whole or not at all; a damaged one under its name is replaced.

    Args:
        write: puts the files of the entry into an empty folder.

    Raises:
        OSError: the entry cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        part = Path(scratch) / "part"
        part.mkdir()
        write(part)
        files = {name: flush_and_hash(part / name) for name in files_in(part)}
        (part / MANIFEST).write_text(json.dumps({"entry": folder.name, "files": files}))
        for attempt in range(3):
            try:
                os.rename(part, folder)
                return
            except OSError:
                # Another process may have written the same entry first.
                if entry_fault(folder) is None:
                    return
                if attempt == 2:
                    raise
            with suppress(OSError):
                os.rename(folder, Path(scratch) / f"damaged-{attempt}")


def keep_entry(folder: Path, write: Callable[[Path], None]) -> list[str]:
    """Make a cache entry if possible; else return a line that says why not."""
    try:
        write_entry(folder, write)
    except OSError as error:
        return [not_cached(folder, error)]
    return []


def not_cached(folder: Path, error: OSError) -> str:
    """A line for the user about a cache entry that could not be written."""
    reason = error.strerror or first_line(error)
    return f"note   cache: {folder.parent} cannot be written, not cached: {reason}"
