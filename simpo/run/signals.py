"""What SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C do: while a run starts they end it at once, later they
ask it to save and stop, which the loop does between two steps. A second Ctrl-C ends it at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from simpo.config.errors import INTERRUPTED, INTERRUPTION, STOPPED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send before they end a job."""
ALL = (*STOP_SIGNALS, signal.SIGINT)
SAVING = b"\ninterrupted: saving after this step (Ctrl-C again ends at once, without saving)\n"
"""Printed on a first Ctrl-C, below the progress bar."""
AGAIN_S = 1.0
"""A Ctrl-C so soon after another is the same one: torchrun passes on what a rank got as well."""
WHILE_STARTING = "stopped while starting (the same command continues)"


class _ExitOnSignal:
    """Handler of a process that has nothing to save yet."""

    exit_code = STOPPED
    interruption = INTERRUPTION
    stopped = WHILE_STARTING

    def __call__(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        line = f"{name}: {self.stopped}"
        code = self.exit_code
        if number == signal.SIGINT:
            line, code = self.interruption, INTERRUPTED
        with suppress(Exception):  # the signal may have come in the middle of a write
            sys.stdout.flush()
        # An exception could be caught by whatever is being imported or loaded.
        os.write(2, f"{line}\n".encode() if line else b"")
        os._exit(code)


_exit_on_signal = _ExitOnSignal()


def exit_on_signals(interruption: str = INTERRUPTION, stopped: str = WHILE_STARTING) -> None:
    """From now on a stopping signal or Ctrl-C ends this process, which says so in one line.

    For the first lines of a command, before it imports what takes seconds. Signals that
    `signals_blocked` kept back are delivered.

    Args:
        interruption: what is said on Ctrl-C; empty where another process says it.
        stopped: what is said on another signal, behind its name.
    """
    _exit_on_signal.interruption, _exit_on_signal.stopped = interruption, stopped
    for number in ALL:
        signal.signal(number, _exit_on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ALL)


def set_stopped_exit_code(exit_code: int) -> None:
    """Set the exit code of a process that `exit_on_signals` ends."""
    _exit_on_signal.exit_code = exit_code


@contextmanager
def signals_blocked() -> Iterator[None]:
    """While entered, stopping signals and Ctrl-C wait, here and in processes started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def forwarding_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While entered, a handler gets the stopping signals, and Ctrl-C."""
    before = {number: signal.signal(number, handler) for number in ALL}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class StopRequest:
    """While entered, a stopping signal or a first Ctrl-C is only noted.

    A second Ctrl-C does what the first would have done before. In a process that signals ended at
    once before, they are noted also afterwards: what follows is the end.

    Attributes:
        name: of the last signal that came, empty before.
    """

    def __init__(self) -> None:
        self.name = ""
        self._interrupted_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in ALL}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not _exit_on_signal:
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if number != signal.SIGINT:
            return
        if not self._interrupted_at:
            self._interrupted_at = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                os.write(2, SAVING)
        elif time.monotonic() - self._interrupted_at > AGAIN_S:
            signal.signal(number, self._before[signal.SIGINT])
            signal.raise_signal(number)
