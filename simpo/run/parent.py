"""Lets a process end with the one that started it. Imports nothing slow."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

VARIABLE = "SIMPO_PARENT_PID"
"""Variable with the id of the process that started this one."""
PR_SET_PDEATHSIG = 1


def parent_variable() -> dict[str, str]:
    """The environment by which a process that this one starts knows its parent."""
    return {VARIABLE: str(os.getpid())}


def start_child(
    module: str, *words: str, environment: Mapping[str, str], **streams: Any
) -> subprocess.Popen[bytes]:
    """Start one of our modules, which calls `die_with_parent`, in a process of its own.

    Args:
        environment: variables beside those of this process.
        streams: as of `subprocess.Popen`.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        env={**os.environ, **parent_variable(), **environment},
        # Else a Ctrl-C would reach it twice: from the terminal, and passed on.
        start_new_session=True,
        **streams,
    )


def die_with_parent(parent: int | None = None) -> None:
    """Have the system kill this process when its parent ends in any way, or has ended already.

    Args:
        parent: id of the parent; None takes that of `parent_variable`, if there is one.
    """
    told = os.environ.pop(VARIABLE, "")  # not for the processes that this one starts
    if sys.platform != "linux":
        return
    # A parent that was killed cannot end its children.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = parent or int(told or 0)
    if parent and parent != os.getppid():
        os._exit(1)
