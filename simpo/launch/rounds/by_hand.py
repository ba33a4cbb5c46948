"""The single commands that do what the phases of rounds do."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from simpo.config.compose import run_of_words
from simpo.config.data import SourceConfig
from simpo.config.errors import SimpoError
from simpo.config.flat import settings
from simpo.config.schema import RunConfig
from simpo.run.command import quoted
from simpo.run.rounds import Kind, Phase

OF_ROUNDS = ("rounds.", "monitor.", "run_dir=", "launcher")
WITHOUT = {
    Kind.train: (*OF_ROUNDS, "on_policy"),
    Kind.generate: (
        *(*OF_ROUNDS, "train.", "loss", "sample.", "export.", "watch.", "tracker"),
        "backend",
    ),
}
"""How words of the rounds' own command begin that mean nothing to those of a phase."""
KEPT = ("train.precision", "backend.device")
"""Settings among them that a phase reads too."""
MODULES = {Kind.train: ("simpo.train",), Kind.generate: ("simpo.generate", "simpo.annotate")}
SECTIONS = {
    Kind.train: ("name", "model", "data", "export", "monitor"),
    Kind.generate: ("model", "on_policy"),
}
"""Sections that a phase has of its own."""
SOURCES, NUMBER = "data.sources", "rounds.number"


def commands_of(root: Path, own: RunConfig, phase: Phase) -> str:
    """The commands that do the work of a phase by hand, a line each for a shell.

    Args:
        root: folder of the rounds, whose command.txt has their own command.
        own: settings of the phase.

    Returns:
        Nothing if the rounds were not started by words, or words cannot say the settings.
    """
    try:
        words = shlex.split((root / "command.txt").read_text())
    except (OSError, ValueError):
        return ""
    if words[:3] != ["python", "-m", "simpo.train"]:
        return ""
    kind = Kind.train if phase.kind is Kind.train else Kind.generate
    kept = [
        word
        for word in words[3:]
        if not (plain := word.lstrip("+~")).startswith(WITHOUT[kind]) or plain.startswith(KEPT)
    ]
    try:
        composed = run_of_words(kept)
        changed = _differing(settings(composed), own, SECTIONS[kind])
        if composed.rounds.number:  # a file of the user's sets it
            changed[NUMBER] = "0"
        kept = [word for word in kept if not _is_set(word, changed)]
        kept += [f"{key}={value}" for key, value in changed.items()]
        kept += [f"run_dir={quoted(own.run_dir)}"] if own.run_dir else []
        if _differing(settings(run_of_words(kept)), own, SECTIONS[kind]):
            return ""
    except SimpoError:
        return ""
    return "".join(shlex.join(["python", "-m", module, *kept]) + "\n" for module in MODULES[kind])


def _differing(
    before: Mapping[str, Any], own: RunConfig, sections: Sequence[str]
) -> dict[str, str]:
    """The settings of some sections in which a phase differs, and their values for Hydra."""
    now = settings(own)
    found = {
        key: _text(value)
        for key, value in now.items()
        if key.partition(".")[0] in sections
        and not key.startswith(SOURCES)
        and before.get(key, value) != value
    }
    if SOURCES.partition(".")[0] in sections and _of_sources(before) != _of_sources(now):
        found[SOURCES] = f"[{', '.join(map(_source, own.data.sources))}]"
    return found


def _of_sources(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat.items() if key.startswith(SOURCES)}


def _is_set(word: str, changed: Iterable[str]) -> bool:
    """Whether a word sets something that is set anew."""
    name = word.lstrip("+~").partition("=")[0]
    return any(name == key or name.startswith(f"{key}.") for key in changed)


def _source(source: SourceConfig) -> str:
    """A source as Hydra takes it, without what is as it is by default."""
    blank = SourceConfig()
    given = {item.name: getattr(source, item.name) for item in fields(source)}
    return _text({key: value for key, value in given.items() if value != getattr(blank, key)})


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_text(one)}' for key, one in value.items())}}}"
    return quoted(value) if isinstance(value, str) else str(value)
