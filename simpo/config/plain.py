"""Writes a run.yaml, and reads one whose values have the types of their settings already.

That is how runs write it, and thirty times as fast as merging it with the schemas. A sweep writes a
thousand, and `simpo report` reads them. What needs a conversion, a default in place of a missing
section, an interpolation or a message about a fault is left to OmegaConf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader

from simpo.config.schema import RunConfig


class NotPlain(Exception):
    """A value, a key or a section that only the schemas tell what to make of."""


def read_plain(path: Path, groups: Mapping[str, Mapping[str, type]]) -> RunConfig | None:
    """The run in a run.yaml; None if anything in it is not plain.

    Args:
        groups: the schemas of each group, by the `name` in its section; `base` if there is one.
    """
    try:
        with path.open("rb") as file:
            return plain_run(yaml.load(file, Loader=_loader()), groups)
    # On a damaged file the YAML parser raises almost any error.
    except Exception:
        return None


def plain_run(raw: Mapping[str, Any], groups: Mapping[str, Mapping[str, type]]) -> RunConfig:
    """The run with these values; `groups` as in `read_plain`.

    Raises:
        NotPlain, KeyError, TypeError, AttributeError: a value is not plain.
    """
    made = {group: _section(raw[group], kinds) for group, kinds in groups.items() if group in raw}
    rest = {key: value for key, value in raw.items() if key not in groups}
    return _with_fields(RunConfig, rest, made)


def plain_text(run: RunConfig) -> str:
    """A run as YAML: the text of OmegaConf, except that it may write an emoji by its number."""
    text: str = yaml.dump(
        _as_yaml(run),
        Dumper=_dumper(),
        default_flow_style=False,
        allow_unicode=True,
        sort_keys=False,
    )
    return text


def _as_yaml(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _as_yaml(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {key: _as_yaml(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_yaml(item) for item in value]
    return value.name if isinstance(value, Enum) else value


@cache
def _dumper() -> Any:
    """OmegaConf's YAML dumper, with the emitter in C where PyYAML has it."""
    exact = get_omega_conf_dumper()
    if not yaml.__with_libyaml__:
        return exact
    return type("Dumper", (yaml.CDumper,), {"yaml_representers": exact.yaml_representers})


@cache
def _loader() -> Any:
    """OmegaConf's YAML loader, with the parser in C where PyYAML has it."""
    exact = get_yaml_loader()
    return type("Loader", (yaml.CSafeLoader, exact), {}) if yaml.__with_libyaml__ else exact


def _section(values: Any, kinds: Mapping[str, type]) -> Any:
    if values.get("module") is not None:  # of a loss: code of the user's
        raise NotPlain
    kind = kinds.get("base") or kinds[values["name"]]
    if not is_dataclass(kind):
        raise NotPlain
    return plain_value(kind, values)


def _with_fields(kind: type, values: Mapping[str, Any], made: Mapping[str, Any]) -> Any:
    hints = field_types(kind)
    built = kind(**{key: plain_value(hints[key], value) for key, value in values.items()}, **made)
    if any(isinstance(value, str) and value == MISSING for value in vars(built).values()):
        raise NotPlain
    return built


@cache
def field_types(kind: type) -> dict[str, Any]:
    """The types of the settings of a section, by name."""
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in fields(kind)}


def plain_value(kind: Any, value: Any) -> Any:
    """A value of a YAML file as a setting of type `kind`.

    Raises:
        NotPlain, KeyError, TypeError, AttributeError: it is not plain.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _with_fields(kind, value, {})  # type: ignore[arg-type]
    if origin is UnionType:
        other = next(part for part in inner if part is not NoneType)
        return plain_value(type(value) if type(value) in inner else other, value)
    if origin is list and type(value) is list:
        return [plain_value(inner[0], item) for item in value]
    if origin is dict and all(type(key) is str for key in value):
        return {key: plain_value(inner[1], item) for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[value]
    if kind is float and type(value) is int:
        return float(value)
    if kind is Any and type(value) in (bool, int, float, str):
        kind = type(value)
    if type(value) is not kind or (kind is str and ("${" in value or value == MISSING)):
        raise NotPlain
    return value
