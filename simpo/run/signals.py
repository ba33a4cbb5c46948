"""Handles SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C. While a run starts they end it at once; later they
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

from simpo.config.errors import INTERRUPTED, INTERRUPTION, STOPPED, Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that schedulers send before they end a job."""
ALL = (*STOP_SIGNALS, signal.SIGINT)
SAVING = "interrupted: saving after this step (Ctrl-C again ends at once, without saving)"
"""Printed on a first Ctrl-C."""
AGAIN_S = 1.0
"""A Ctrl-C this soon after another is the same one: torchrun passes it on to ranks that got it."""
WHILE_STARTING = "stopped while starting (the same command continues)"


def signal_name(number: int) -> str:
    """The name of a signal; its number if it has none, such as most real-time signals."""
    return {one.value: one.name for one in signal.Signals}.get(number, f"signal {number}")


def tell(line: str) -> None:
    """Write a line to stderr in the handler of a signal; on a terminal below the bar and its ^C."""
    os.write(2, b"\n" * os.isatty(2) + line.encode() + b"\n")


class _ExitOnSignal:
    """Handler of a process that has nothing to save yet."""

    exit_code = STOPPED
    interruption = INTERRUPTION
    stopped = WHILE_STARTING

    def __call__(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        line = self.stopped and f"{name}: {self.stopped}"
        code = self.exit_code
        if number == signal.SIGINT:
            line, code = self.interruption, INTERRUPTED
        with suppress(Exception):  # the signal may have interrupted a write
            sys.stdout.flush()
        # Not an exception: code that is being imported could catch it.
        if line:
            tell(line)
        os._exit(code)


_exit_on_signal = _ExitOnSignal()


def exit_on_signals(interruption: str = INTERRUPTION, stopped: str = WHILE_STARTING) -> None:
    """Let a stopping signal or Ctrl-C end this process with one line, from now on.

    Commands call this first, before slow imports. Signals that `signals_blocked` held back are
    delivered.

    Args:
        interruption: message on Ctrl-C; empty if another process prints it.
        stopped: message on another signal, after its name; empty likewise.
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
    """Hold back stopping signals and Ctrl-C while entered, also in processes started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def forwarding_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Pass stopping signals and Ctrl-C to a handler while entered.

    Outside the main thread nothing is passed on.
    """
    before = _handled_by(handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _handled_by(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Set the handler of all our signals; returns those before. Python allows this in the main
    thread only, so others set and return none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in ALL}


class _SignalledError(BaseException):
    """A signal came; not an Exception, which libraries might catch."""


class _RaiseOnSignal:
    """Handler of `stopping_at_once`.

    Attributes:
        name: of the first signal; empty before one.
    """

    def __init__(self) -> None:
        self.name = ""
        self._at = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name, self._at = signal.Signals(number).name, time.monotonic()
            raise _SignalledError
        if time.monotonic() - self._at > AGAIN_S:  # the first was caught, or what it ends hangs
            _exit_on_signal(number, frame)

    def check(self) -> None:
        """Raise what the signal raised, if one came."""
        if self.name:
            raise _SignalledError


@contextmanager
def stopping_at_once(what: str, stopped_exit_code: int) -> Iterator[None]:
    """Let a stopping signal or Ctrl-C end the block, wherever it is.

    A signal that a `StopRequest` has recorded since its end counts as one of now.

    Args:
        what: what had not been done, for the message.

    Raises:
        Stopped: a signal came.
    """
    left = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    end = _RaiseOnSignal()
    with forwarding_signals(end):
        try:
            if isinstance(left, StopRequest):
                end.name = left.name
            end.check()
            yield
            end.check()
        except _SignalledError as error:
            raise stopped_by(end.name, what, stopped_exit_code) from error


def check_stopped() -> None:
    """End the block of `stopping_at_once` if a signal came.

    Called after code of a user's, which may have caught what the signal raised: `except:` does.
    """
    if isinstance(end := signal.getsignal(signal.SIGTERM), _RaiseOnSignal):
        end.check()


def stopped_by(name: str, what: str, stopped_exit_code: int) -> Stopped:
    """The error after a signal.

    Args:
        name: of the signal.
        what: what had been done, or not.
    """
    interrupted = name == "SIGINT"
    return Stopped(
        f"{'interrupted' if interrupted else name}: {what} (the same command continues)",
        INTERRUPTED if interrupted else stopped_exit_code,
    )


class StopRequest:
    """Records a stopping signal or a first Ctrl-C while entered, for the loop to act on.

    A second Ctrl-C is handled as it was before entering. If signals ended the process at once
    before entering, they are still only recorded after leaving: the process is about to end, or
    enters `stopping_at_once`.

    Attributes:
        name: name of the last signal received; empty before one.
    """

    def __init__(self) -> None:
        self.name = ""
        self._interrupted_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = _handled_by(self._note)
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
                tell(SAVING)
        elif time.monotonic() - self._interrupted_at > AGAIN_S:
            signal.signal(number, self._before[signal.SIGINT])
            signal.raise_signal(number)
