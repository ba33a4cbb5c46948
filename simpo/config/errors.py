"""The errors that a user sees as lines of text, and the exit codes they end a command with.

0 finished, 1 failed, 2 bad settings or data, 75 stopped by a signal after saving
(`train.stopped_exit_code`), 130 interrupted by Ctrl-C, after saving where training had begun.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130
"""Exit code of what Ctrl-C ended."""

INTERRUPTION = (
    "interrupted (the same command continues from the last checkpoint, or else from the start)"
)
"""What is said then."""

STOPPED = 75
"""Exit code of what a signal ended, where the settings name no other."""

BROKEN_PIPE = 141
"""Exit code where nobody reads the output to its end, as shells give it."""

LOST = 76
"""Exit code of a rank that others do not answer, for the process that started it."""

SAVED = 77
"""Exit code of a rank that saved after a Ctrl-C, for the process that started it."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk, quota or file size that is used up."""
DISK = (*FULL, errno.EROFS, errno.EIO, errno.ESTALE)
"""Error numbers that only a file system gives."""


class SimpoError(Exception):
    """An error whose message is all that a user sees, without a traceback.

    `exit_code` is the process's: 1 for a failed run, 2 for bad settings or data.
    """

    exit_code = 1


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
    """A file of a run's folder that is not as the run wrote it; `str()` is one line."""

    def __init__(self, path: Path, fault: str, remedy: str) -> None:
        super().__init__(path, fault, remedy)  # all of them, or it could not be pickled

    def __str__(self) -> str:
        path, fault, remedy = self.args
        return f"{path}: {fault} ({remedy})"


class RunError(SimpoError):
    """A run that could not go on; what it had computed is in its folder."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class LostError(RunError):
    """Other processes of the run do not answer; one of them has failed or hangs."""


class Stopped(RunError):
    """A run that a signal ended, after it had saved."""


def unwritable(path: Path | str, error: OSError) -> RunError:
    """The error of a file or folder that the system did not let us write."""
    if error.errno in FULL:
        remedy = "make room, and the same command continues"
    elif error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        remedy = "something else lies in its place: move that away"
    else:
        remedy = "let this user write there, or choose another folder"
    return RunError(f"{path}: {error.strerror or first_line(error)} ({remedy})")


def first_line(error: BaseException | str) -> str:
    """The first line with text of an error's message, with the next one where it ends in a colon;
    else the error's type: never empty.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


@contextmanager
def exit_codes() -> Iterator[None]:
    """End the process where the block raises an error that a user sees: a line, and an exit code.

    Raises:
        SystemExit: with the code; other errors pass.
    """
    try:
        yield
        sys.stdout.flush()
    except SimpoError as error:
        if str(error):  # not where a rank has printed it
            print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(INTERRUPTION, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # of `| head`
        # Python would flush it again when it ends, and say that it could not.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
