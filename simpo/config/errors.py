"""The errors that a user sees as lines of text, and the exit codes they end a command with.

0 finished (or pruned), 1 failed, 2 bad settings or data, 75 stopped by a signal after saving
(`train.stopped_exit_code`), 130 interrupted by Ctrl-C, after saving if training had begun.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

INTERRUPTION = (
    "interrupted (the same command continues from the last checkpoint, or else from the start)"
)
"""Message after Ctrl-C."""

STOPPED = 75
"""Exit code after a signal, unless `train.stopped_exit_code` sets another."""

BROKEN_PIPE = 141
"""Exit code when the reader of the output closes it early, as shells give it (128 + SIGPIPE)."""

LOST = 76
"""Exit code by which a rank tells its starter that other ranks do not answer."""

SAVED = 77
"""Exit code by which a rank tells its starter that it saved after a Ctrl-C."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, an exceeded quota or file-size limit."""
DISK = (*FULL, errno.EROFS, errno.EIO, errno.ESTALE)
"""Error numbers that only a file system gives."""


class SimpoError(Exception):
    """An error whose message is all that a user sees, without a traceback.

    Attributes:
        exit_code: that of the process: 1 for a failed run, 2 for bad settings or data.
        printed: whether another process of the run has printed the message.
    """

    exit_code = 1
    printed = False

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of the error (IPython calls this)."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(SimpoError):
    """One or more faults in the settings; `str()` is one line per fault."""

    exit_code = 2

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(SimpoError):
    """Data that cannot be trained on; `str()` is a line per fault with source, split and record."""

    exit_code = 2


class DamagedError(DataError):
    """A file in a run's folder is not as the run wrote it; `str()` is one line."""

    def __init__(self, path: Path, fault: str, remedy: str) -> None:
        super().__init__(path, fault, remedy)  # pickling needs all arguments

    def __str__(self) -> str:
        path, fault, remedy = self.args
        return f"{path}: {fault} ({remedy})"


class RunError(SimpoError):
    """A run could not go on; its results so far are in its folder."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class LostError(RunError):
    """Other processes of the run do not answer: one of them failed or hangs."""


class Stopped(RunError):
    """A signal asked the run to stop; it has been saved."""


class Pruned(Stopped):
    """The pruner of a search ended the run, which counts as a success."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 0)


def unwritable(path: Path | str, error: OSError) -> RunError:
    """The error for a file or folder that could not be written."""
    if error.errno in FULL:
        remedy = "make room, and the same command continues"
    elif error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        remedy = "something else lies in its place: move that away"
    else:
        remedy = "let this user write there, or choose another folder"
    return RunError(f"{path}: {error.strerror or first_line(error)} ({remedy})")


@contextmanager
def refused_paths() -> Iterator[None]:
    """Tell of a file or folder that this user may not read in one line.

    Raises:
        DataError: in place of a PermissionError of the block.
    """
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{error.filename}: {error.strerror} (let this user read it)") from error


def first_line(error: BaseException | str) -> str:
    """The first non-empty line of an error's message, joined with the next if it ends in a colon;
    the error's type if there is no message.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def shown(value: Any) -> str:
    """The value of a setting as the command line would take it."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(item)}' for key, item in value.items())}}}"
    value = value.value if isinstance(value, Enum) else value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(value).replace("e-0", "e-")
    return "null" if value is None else str(value) or "''"


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """What to say of a name that is not known: the nearest known one, else another text."""
    near = get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]}?" if near else otherwise


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn a user's error in the block into its message on stderr and its exit code.

    Raises:
        SystemExit: with that code. Other errors pass through.
    """
    try:
        yield
        sys.stdout.flush()
    except SimpoError as error:
        if not error.printed:
            print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(INTERRUPTION, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # of `| head`
        # Else Python flushes stdout again at its end, and prints that it could not.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
