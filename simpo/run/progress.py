"""Prints what a run is doing: lines, and bars for what takes long.

Lines go to stdout, bars to stderr; without a terminal a bar is a line now and then. Only the first
process of a run prints; in others, all of this does nothing.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

DELAY_S = 0.5
"""A bar is shown once its work has taken this long, since shorter ones would only flicker."""
LINE_S, LONGEST_LINE_S = 10.0, 60.0
"""Time between the lines of a bar without a terminal, at first and at most."""
SETTLE_S = 0.3
"""How long a line waits for the rest of a batch, of which each item is counted."""
REDRAW_S = 0.1
"""Time between two drawings of a bar."""
RECENT = 20
"""Number of last counts whose mean is the pace of a bar."""
SMALLEST_BAR = 5
"""Columns below which a bar is text only."""


def say(*lines: str) -> None:
    """Print lines, above the bars."""
    _write(sys.stdout, lines)


def print_all_letters() -> None:
    """Let stdout show letters that its encoding lacks as escapes (\\u540d in latin-1).

    Else a reply could end a run that has only to print it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's takes all
        sys.stdout.reconfigure(errors="backslashreplace")


def on_terminal() -> bool:
    """Whether this process shows bars on a terminal that can redraw a line."""
    if not (_prints() and sys.stderr.isatty()) or os.environ.get("TERM") == "dumb":
        return False
    # Those of containers, script and expect may have no width.
    return os.get_terminal_size(sys.stderr.fileno()).columns > 0


class Bar:
    """A count of work done, with the time left."""

    def __init__(
        self, what: str, total: int, unit: str, stays: bool, in_batches: bool = False
    ) -> None:
        self._what, self._total, self._unit, self._stays = what, total, unit, stays
        self._in_batches, self._settling = in_batches, threading.Timer(SETTLE_S, self._print)
        self._prints, self._terminal = _prints(), on_terminal()
        self._first = self._done = 0
        self._printed: int | None = None  # the count of the last line
        self._text = ""
        self._paces: deque[float] = deque(maxlen=RECENT)
        self._began = self._shown_at = time.perf_counter()
        self._tqdm: Any = None
        self._open = True
        self._lock = threading.Lock()
        # Also work that is counted late or never shows that it goes on.
        self._timer = threading.Timer(DELAY_S, self._draw)
        self._timer.daemon = True
        if self._terminal and not stays:
            self._timer.start()

    def begin_at(self, done: int) -> None:
        """Begin now, with this many done already, and show it."""
        self._first = self._done = done
        self._began = self._shown_at = time.perf_counter()
        if self._terminal:
            self._draw()

    def advance(self, count: int = 1, text: str | None = None, took_s: float | None = None) -> None:
        """Count what was done.

        Args:
            text: replaces the one behind the count; None leaves it.
            took_s: time of this work; its mean is shown per `unit`.
        """
        self._done = min(self._done + count, self._total)
        self._text = self._text if text is None else text
        if took_s is not None:
            self._paces.append(took_s / count)
        now = time.perf_counter()
        since_s = now - self._shown_at
        if self._terminal:
            due, show = self._tqdm is not None and since_s >= REDRAW_S, self._draw
        else:
            pause_s = min(LONGEST_LINE_S, max(LINE_S, (now - self._began) / 10))
            due, show = since_s >= pause_s, self._print
        if due and self._in_batches:
            self._shown_at = now
            self._settling = threading.Timer(SETTLE_S, show)
            self._settling.daemon = True
            self._settling.start()
        elif due:
            show()

    def close(self, whole: bool = False) -> None:
        """End the bar; later lines are printed below it.

        Args:
            whole: all is done, whatever was counted.
        """
        if not self._open:
            return
        self._timer.cancel()
        self._settling.cancel()
        if whole:
            self._done = self._total
        if self._tqdm is not None:
            self._draw()
        with self._lock:
            self._open = False
            if self._tqdm is not None:
                self._tqdm.close()
        is_due = self._stays if self._printed is None else self._printed != self._done
        if is_due and not self._terminal:
            self._print()

    def line(self, columns: int | None = None) -> str:
        """The text of the bar: what is done, the count, the text, the time left, the pace.

        Args:
            columns: what does not fit into them is left out, from the end.
        """
        parts = [f"{self._what} {self._done}/{self._total}"]
        if self._text:
            parts.append(self._text)
        elapsed_s = time.perf_counter() - self._began
        if self._done == self._total:
            parts.append(f"took {_clock(elapsed_s)}")
        elif done := self._done - self._first:
            parts.append(f"{_clock(elapsed_s / done * (self._total - self._done))} left")
        if self._paces:
            parts.append(f"{sum(self._paces) / len(self._paces):.2f} s/{self._unit}")
        parts = ", ".join(parts).split(", ")
        while columns is not None and len(parts) > 1 and len(", ".join(parts)) > columns:
            parts.pop()
        return ", ".join(parts)

    def _print(self) -> None:
        self._shown_at = time.perf_counter()
        self._printed = self._done
        _write(sys.stderr, (self.line(),))

    def _draw(self) -> None:
        from tqdm import tqdm

        with self._lock:
            if not self._open:
                return
            self._shown_at = time.perf_counter()
            if self._tqdm is None:
                self._tqdm = tqdm(
                    total=self._total, dynamic_ncols=True, leave=self._stays, bar_format=" "
                )
            columns = self._tqdm.format_dict["ncols"]
            line = self.line(columns)
            room = columns - len(line) - 1
            # The rest of a line, unless that is too short for a bar.
            self._tqdm.bar_format = "{desc} {bar}" if room >= SMALLEST_BAR else "{desc}"
            self._tqdm.desc, self._tqdm.n = line, self._done
            self._tqdm.refresh()


@contextmanager
def bar(
    what: str, total: int, unit: str = "", *, stays: bool = False, in_batches: bool = False
) -> Iterator[Bar]:
    """Show a bar within the block.

    Args:
        what: what is being done, such as `train`.
        total: count at the end.
        unit: what is counted, such as `step`, for its pace.
        stays: the bar is shown from `begin_at` on, and stays. Others are shown after `DELAY_S`, or
            `LINE_S` without a terminal, and vanish from it.
        in_batches: many are counted at once, one by one. Else the first of a batch alone would be
            taken for what its time gives.
    """
    shown = Bar(what, total, unit, stays, in_batches)
    try:
        yield shown
    except BaseException:
        shown.close()
        raise
    shown.close(whole=not stays)


def _prints() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _write(stream: TextIO, lines: tuple[str, ...]) -> None:
    if not _prints():
        return
    tqdm: Any = sys.modules.get("tqdm")
    if tqdm is None:  # then there is no bar
        print(*lines, sep="\n", file=stream, flush=True)
        return
    with tqdm.tqdm.external_write_mode(file=stream):
        print(*lines, sep="\n", file=stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
