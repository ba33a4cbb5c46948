"""The command line that starts a run, or continues it, in a folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path


def train_command(overrides: Sequence[str], folder: Path) -> str:
    """The command line that starts, or continues, a run in a folder, for a shell.

    Args:
        overrides: settings as Hydra takes them.
    """
    return shlex.join(["python", "-m", "simpo.train", *overrides, f"run_dir={quoted(folder)}"])


def quoted(value: Path | str) -> str:
    """A text as Hydra takes it: it reads the signs of names such as `loss.beta=2` itself."""
    text = str(value)
    if re.fullmatch(r"[\w/.+-]+", text, re.ASCII):
        return text
    return '"' + re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + m[2].replace('"', '\\"'), text) + '"'
