"""Loads a user's Python code that a setting names: a module, or `module:function`."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from simpo.config.errors import ConfigError, first_line


class OwnCodeError(ConfigError):
    """A user's code cannot be loaded; the settings that name it may be right."""


def is_function(name: str) -> bool:
    """Whether a setting is of the form `module:function`."""
    return re.fullmatch(r"[\w.]+:\w+", name) is not None


def fault_of(error: BaseException, name: str) -> str:
    """What a user's code raised, and where: "KeyError: 'text' (my_readers.py, line 3)".

    Args:
        name: the module, or `module:function`, that was called.
    """
    return f"{type(error).__name__}: {first_line(error)}{_raised_at(error, name)}"


def _raised_at(error: BaseException, name: str) -> str:
    """The line of the module of `name` that raised, or called what did; empty if it did not run."""
    module, place = name.partition(":")[0], ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, names = frame.f_code.co_filename, frame.f_globals
        if names.get("__name__") == module and names.get("__file__") == file:
            place = f" ({Path(file).name}, line {line})"
    return place


def load(key: str, name: str) -> Any:
    """Import a module, or a function of it, from the working directory or the Python path.

    Args:
        key: the setting that names it, for messages.

    Raises:
        OwnCodeError: it cannot be imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: its files must not hide Python's own
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found
    except (Exception, SystemExit) as error:  # whatever the module does
        reason = first_line(error)
        if isinstance(error, SystemExit):
            reason = "it ends the process"
        elif isinstance(error, ModuleNotFoundError) and error.name == module:
            reason += " (start in its folder, or add that to PYTHONPATH)"
        reason += _raised_at(error, name)
        raise OwnCodeError([f"{key}: {name} cannot be imported: {reason}"]) from error


def source_sha256(module: str) -> str:
    """Hash of the file of an imported module, without what that imports."""
    file = getattr(sys.modules[module], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()
