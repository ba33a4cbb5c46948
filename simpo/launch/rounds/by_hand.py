"""The single commands that do what the phases of rounds do."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from simpo.config.flat import settings
from simpo.config.schema import RunConfig
from simpo.run.command import quoted

WITHOUT = (
    *("rounds.", "monitor.", "run_dir=", "launcher", "train.", "loss", "sample.", "export."),
    *("watch.", "tracker", "backend=", "backend.processes"),
)
"""How words of the rounds' own command begin that mean nothing to those of their phases."""
KEPT = "train.precision"


def commands_of(root: Path, run: RunConfig, own: RunConfig) -> str:
    """The commands that generate and annotate a round's replies by hand, a line each for a shell.

    Args:
        root: folder of the rounds, whose command.txt has their own command.
        run: settings of the rounds.
        own: settings of the phases that generate and annotate.

    Returns:
        Nothing if the rounds were not started by words.
    """
    try:
        words = shlex.split((root / "command.txt").read_text())
    except (OSError, ValueError):
        return ""
    if words[:3] != ["python", "-m", "simpo.train"]:
        return ""
    kept = [
        word
        for word in words[3:]
        if not (plain := word.lstrip("+~")).startswith(WITHOUT) or plain.startswith(KEPT)
    ]
    changed = [*_changed(run, own, ("model", "on_policy"))]
    return "".join(
        shlex.join(["python", "-m", module, *kept, *changed]) + "\n"
        for module in ("simpo.generate", "simpo.annotate")
    )


def _changed(run: RunConfig, own: RunConfig, sections: tuple[str, ...]) -> Iterable[str]:
    """The settings of some sections in which a phase differs, as Hydra takes them."""
    before = settings(run)
    for key, value in settings(own).items():
        if key.partition(".")[0] in sections and before[key] != value:
            yield f"{key}={_text(value)}"


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return quoted(value) if isinstance(value, str) else str(value)
