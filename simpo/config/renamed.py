"""Accepts old and other names of settings, and old values, with a note on stderr."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from simpo.config.errors import ConfigError

RENAMED = {"objective": "monitor", "data.on_bad_row": "data.on_bad_record"}
"""Old names of sections and of single keys, with their new names in the same section."""

OLD_VALUES = {"model.gradient_checkpointing": {"true": "full", "false": "none"}}
"""Old values of settings, as they are typed, with the values that have taken their place."""

SYNONYMS = {"experiment": "experiments", "evaluate.benchmark": "benchmark"}
"""Other names for our groups. No run was ever stored under them."""

_noted: set[str] = set()


def rename_overrides(words: Sequence[str]) -> list[str]:
    """Replace the old names of settings in the words of a command line.

    Raises:
        ConfigError: a setting is given under both names.
    """
    renamed: list[str] = []
    changes: dict[str, str] = {}
    for word in words:
        start, key, rest = re.fullmatch(r"([+~]*)([\w./]*)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
        if start.startswith("~") or "=" in rest:
            if key.startswith("hydra.sweeper."):  # names settings in its value
                rest = re.sub(
                    r"(?<![\w./])[a-z_]+(\.[a-z_]+)*(?=:)", lambda m: new_name(m[0]), rest
                )
                rest = re.sub(
                    r"([\w.]+):(\s*('[^']*'|\"[^\"]*\"|[^,}]*))",
                    lambda m: f"{m[1]}:{_new_values(m[1], m[2], changes)}",
                    rest,
                )
            rest = _new_values(key, rest, changes)
            if new_name(key) != key:
                changes[key], key = new_name(key), new_name(key)
        renamed.append(f"{start}{key}{rest}")
    typed = {word.lstrip("+~").partition("=")[0] for word in words}
    _refuse_both({old: new for old, new in changes.items() if new in typed})
    _note(changes)
    return renamed


def renamed_config(config: DictConfig, section: str = "", note: bool = True) -> DictConfig:
    """Replace the old names of settings in what a YAML file holds.

    Args:
        section: the section that the file holds; empty if it holds several.
        note: print what was renamed.

    Raises:
        ConfigError: a setting is given under both names.
    """
    settings: Any = OmegaConf.to_container(config, resolve=False)
    whole = settings
    for name in reversed(section.split(".") if section else ()):
        whole = {name: whole}
    changes = _rename(whole)
    if note:
        _note(changes)
    return OmegaConf.create(settings) if changes else config


def new_name(key: str) -> str:
    """A key or group under its new name."""
    return _replaced(key, RENAMED | SYNONYMS)


def first_value(key: str, value: Any) -> Any:
    """A value of a run under its first spelling, from which the run's id is computed."""
    first = {new: old == "true" for old, new in OLD_VALUES.get(key, {}).items()}
    return first.get(value, value) if first else value


def first_text(key: str, text: str) -> str:
    """A typed value under its first spelling, from which the id of a sweep is computed."""
    for old, new in OLD_VALUES.get(key.lstrip("+~"), {}).items():
        text = re.sub(rf"\b{new}\b", old, text)
    return text


def first_name(key: str) -> str:
    """A dotted key under its first name, from which ids of runs and sweeps are computed."""
    return _replaced(key, {new: old for old, new in RENAMED.items()})


def _replaced(key: str, names: dict[str, str]) -> str:
    for name, other in names.items():
        if key == name or key.startswith((f"{name}.", f"{name}/")):
            return other + key.removeprefix(name)
    return key


def _rename(settings: dict[str, Any]) -> dict[str, str]:
    """Replace old names in settings that are nested as in a YAML file, in place.

    Returns:
        Old name to new name, for each that was replaced.
    """
    changes: dict[str, str] = {}
    for old, new in RENAMED.items():
        above, _, name = old.rpartition(".")
        section = _section(settings, above)
        if name not in section:
            continue
        value, new_leaf = section.pop(name), new.rpartition(".")[2]
        keys = list(value) if isinstance(value, dict) else []
        moved = {f"{old}.{key}": f"{new}.{key}" for key in keys} or {old: new}
        there = section.get(new_leaf)
        if isinstance(there, dict) and isinstance(value, dict):
            _refuse_both({f"{old}.{key}": f"{new}.{key}" for key in keys if key in there})
            value = there | value
        elif new_leaf in section:
            _refuse_both(moved)
        section[new_leaf] = value
        changes |= moved
    for key, values in OLD_VALUES.items():
        above, _, name = key.rpartition(".")
        section = _section(settings, above)
        typed = str(section.get(name)).lower()
        if typed in values:
            section[name] = values[typed]
            changes[f"{key}={typed}"] = values[typed]
    sweeper = _section(settings, "hydra.sweeper")
    for names in (sweeper.get("params"), *(sweeper.get("stages") or ())):
        for key in list(names) if isinstance(names, dict) else ():
            if new_name(key) != key:
                changes[key] = new_name(key)
                names[new_name(key)] = names.pop(key)
        for key in OLD_VALUES.keys() & (names.keys() if isinstance(names, dict) else set()):
            names[key] = _new_values(key, str(names[key]), changes)
    return changes


def _new_values(key: str, text: str, changes: dict[str, str]) -> str:
    """Replace the old values of a setting in the text that follows its key."""

    def new(found: re.Match[str]) -> str:
        value = OLD_VALUES[key][found[0].lower()]
        changes[f"{key}={found[0].lower()}"] = value
        return value

    old = "|".join(OLD_VALUES.get(key, ()))
    return re.sub(rf"\b({old})\b", new, text, flags=re.IGNORECASE) if old else text


def _section(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """A nested section; empty if there is none."""
    found: Any = settings
    for name in key.split(".") if key else ():
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _refuse_both(changes: dict[str, str]) -> None:
    if changes:
        raise ConfigError(
            [f"{old}: {_is(old)} {new}, got both (leave out {old})" for old, new in changes.items()]
        )


def _note(changes: dict[str, str]) -> None:
    line = ", ".join(f"{old} {_is(old)} {new}" for old, new in changes.items())
    if line and line not in _noted:
        _noted.add(line)
        print(f"note   {line}", file=sys.stderr)


def _is(name: str) -> str:
    return "is read as" if _replaced(name, SYNONYMS) != name else "is now"
