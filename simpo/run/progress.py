"""Prints what a run is doing: lines, and a bar for what takes long.

Only the first process of a run prints; in others, all of this does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LINE_S = 10.0
"""Time between updates of a bar that no terminal shows."""


def say(*lines: str) -> None:
    """Print lines, above the bars."""
    if not _prints():
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
        print(*lines, sep="\n", flush=True)


class Bar:
    """A bar, which appears with the first `advance`."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._tqdm: Any = None

    def begin_at(self, done: int) -> None:
        """Begin with this many done already, before the first `advance`."""
        self._done = done

    def advance(self, count: int = 1, text: str = "") -> None:
        """Count what was done; a `text` replaces the one at the end of the bar."""
        if self._tqdm is None:
            from tqdm import tqdm

            self._tqdm = tqdm(
                total=self._total,
                initial=self._done,
                unit=self._unit,
                desc=self._what,
                dynamic_ncols=True,
                disable=not _prints(),
                mininterval=0.1 if sys.stderr.isatty() else LINE_S,
            )
        if text:
            self._tqdm.set_postfix_str(text, refresh=False)
        self._tqdm.update(count)

    def close(self) -> None:
        """Leave the bar as it is; later lines are printed below it."""
        if self._tqdm is not None:
            self._tqdm.close()


@contextmanager
def bar(what: str, total: int, unit: str) -> Iterator[Bar]:
    """Show a bar within the block.

    Args:
        what: what is being done, such as `train`.
        total: count at the end.
        unit: what is counted, such as `pair`.
    """
    shown = Bar(what, total, unit)
    try:
        yield shown
    finally:
        shown.close()


def _prints() -> bool:
    return os.environ.get("RANK", "0") == "0"
