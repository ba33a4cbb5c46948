"""Sequences of items that lie in a file: a process holds those alone that it looks at."""

from __future__ import annotations

import pickle
import tempfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar, overload

import numpy as np

from simpo.config.errors import unwritable
from simpo.data.pairs import Pair

T = TypeVar("T")


class Lines(Sequence[T]):
    """Items that lie one after the other in an array of bytes; each is read when it is asked for.

    Args:
        letters: uint8 [bytes].
        bounds: int64 [items + 1], where the items end in `letters`, from 0.
        read: makes an item of its bytes.
    """

    def __init__(self, letters: np.ndarray, bounds: np.ndarray, read: Callable[[bytes], T]) -> None:
        self._letters, self._bounds, self._read = letters, bounds, read

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._bounds[index : index + 2].tolist()
        return self._read(self._letters[start:end].tobytes())


class PairFile:
    """A file that pairs are written to, one after the other, and then read from.

    It has no name and goes when the process does. Processes that are forked read it too.

    Args:
        folder: where it lies; the system's temporary folder if that is None or cannot be written.

    Raises:
        RunError: the file cannot be made.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._file = _opened(folder)
        self._bounds = array("q", [0])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def add(self, pair: Pair) -> None:
        """
        Raises:
            RunError: there is no room for the pair.
        """
        # JSON would make lists of tuples.
        text = pickle.dumps(pair, pickle.HIGHEST_PROTOCOL)
        try:
            self._file.write(text)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        self._bounds.append(self._bounds[-1] + len(text))

    def pairs(self) -> Sequence[Pair]:
        """All pairs in order, each of which is read when it is asked for. None can be added after.

        Raises:
            RunError: there is no room for the last ones.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise unwritable(self._folder, error) from error
        letters = np.zeros(0, np.uint8)
        if len(self):  # an empty file cannot be mapped
            letters = np.asarray(np.memmap(self._file, np.uint8, mode="r"))
        return Lines(letters, np.frombuffer(self._bounds, np.int64), pickle.loads)


class Picked(Sequence[T]):
    """Items of a sequence in another order, some of them or some several times.

    It equals every sequence of equal items.

    Args:
        indices: int64 [items], their places in the sequence.
    """

    def __init__(self, items: Sequence[T], indices: np.ndarray) -> None:
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        picked = self._indices[index].tolist()
        if isinstance(index, slice):
            return [self._items[i] for i in picked]
        return self._items[picked]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def _opened(folder: Path | None) -> tuple[Path, BinaryIO]:
    """A file without a name, and the folder whose disk it is on."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return folder, tempfile.TemporaryFile(dir=folder)
        except OSError:  # the caches say so
            pass
    system = Path(tempfile.gettempdir())
    try:
        return system, tempfile.TemporaryFile(dir=system)
    except OSError as error:
        raise unwritable(system, error) from error
