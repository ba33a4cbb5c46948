"""Loads a user's Python code that a setting names: a module, or `module:function`."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from simpo.config.errors import ConfigError, first_line

RAISED = (Exception, SystemExit)
"""What a user's code may raise. A signal that ends the process raises nothing."""


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
    return f"{type(error).__name__}: {first_line(error)}{raised_at(error, name)}"


def raised_at(error: BaseException, name: str) -> str:
    """The line of the module of `name` that raised, or called what did; empty if it did not run."""
    module, place = name.partition(":")[0], ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, names = frame.f_code.co_filename, frame.f_globals
        if names.get("__name__") == module and names.get("__file__") == file:
            place = f" ({Path(file).name}, line {line})"
    return place


def load_function(key: str, name: str) -> Any:
    """Import the function that a setting names as `module:function`; see `load`.

    Raises:
        OwnCodeError: it cannot be imported, or is no function.
    """
    found = load(key, name)
    if not callable(found):
        raise OwnCodeError([f"{key}: {name} must be a function, got {found!r}"])
    return found


def load(key: str, name: str) -> Any:
    """Import a module, or a name in it, from the working directory or the Python path.

    What it prints goes to stderr, as our stdout may be read by a program.

    Args:
        key: the setting that names it, for messages.

    Raises:
        OwnCodeError: it cannot be imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: its files must not hide Python's own
    module, _, attribute = name.partition(":")
    try:
        with redirect_stdout(sys.stderr):
            found: Any = importlib.import_module(module)
        own = _hidden(module, getattr(found, "__file__", None))
        if attribute and own is None:
            found = getattr(found, attribute)
    except RAISED as error:
        reason = first_line(error)
        if isinstance(error, SystemExit):
            reason = "it ends the process"
        elif isinstance(error, ModuleNotFoundError) and error.name == module:
            reason += " (start in its folder, or add that to PYTHONPATH)"
        reason += raised_at(error, name)
        raise OwnCodeError([f"{key}: {name} cannot be imported: {reason}"]) from error
    if own is not None:
        fault = f"is hidden by another module of that name (rename {own})"
        raise OwnCodeError([f"{key}: {module} {fault}"])
    return found


def _hidden(module: str, imported: str | None) -> Path | None:
    """The file of a module in the working directory, if another was imported in its place."""
    own = Path(f"{module.replace('.', os.sep)}.py")
    if own.is_file() and not (imported and os.path.exists(imported) and own.samefile(imported)):
        return own
    return None


def source_sha256(module: str) -> str:
    """Hash of the file of an imported module, without what that imports."""
    file = getattr(sys.modules[module], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()
