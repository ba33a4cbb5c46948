"""SIGTERM, SIGUSR1 and SIGUSR2 in, a wish to stop out, which the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send before they end a job."""


@contextmanager
def passing_on(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While entered, a handler gets the stopping signals, and Ctrl-C."""
    before = {number: signal.signal(number, handler) for number in (*STOPPING, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StopRequest:
    """While entered, a stopping signal is only noted.

    Attributes:
        name: of the last signal that came, empty before.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
