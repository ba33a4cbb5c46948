"""Reads the docstring under the field of each setting, for --help and docs/config.md."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from functools import cache
from types import ModuleType, NoneType
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from simpo.config.check import GROUPS
from simpo.config.choices import AUTO
from simpo.config.compose import explaining
from simpo.config.composer import Composer
from simpo.config.errors import ConfigError, did_you_mean, shown
from simpo.config.plain import field_types
from simpo.config.renamed import new_name, rename_overrides

Setting = tuple[str, str, str]
"""Key, value and meaning."""


def meaning(schema: type, name: str) -> str:
    """The docstring under a field of a dataclass, its own or an inherited one, in one line; empty
    if a user's class has none.
    """
    for parent in filter(is_dataclass, schema.__mro__):
        if found := _meanings(sys.modules[parent.__module__]).get((parent.__name__, name)):
            return found
    if schema.__module__.startswith("simpo."):
        raise KeyError(f"{schema.__name__}.{name} has no docstring")
    return ""


def type_name(kind: Any) -> str:
    """A field's type in the words of the documentation; values of an enum in backquotes."""
    if NoneType in typing.get_args(kind):
        inner = next(part for part in typing.get_args(kind) if part is not NoneType)
        return f"{type_name(inner)} or null"
    if kind == int | str:
        return f"whole number or `{AUTO}`"
    if typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        return f"list of {'items, see below' if is_dataclass(inner) else type_name(inner)}"
    if typing.get_origin(kind) is dict:
        of = typing.get_args(kind)
        return "names with values" if Any in of else " to ".join(map(type_name, of))
    if issubclass(kind, Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    return {str: "text", int: "whole number", float: "number", bool: "true, false"}[kind]


def default(item: Field[Any]) -> str:
    """A field's default as the command line would take it; *required* if it has none."""
    value = item.default if item.default_factory is NO_DEFAULT else item.default_factory()
    return "*required*" if value == MISSING else shown(value)


def settings_help(
    overrides: Sequence[str], sections: Sequence[str], width: int, composer: Composer
) -> Iterator[str]:
    """Yield lines with every choice, and every key of the composed run, its value and meaning.

    Args:
        overrides: what the run is composed of.
        sections: only these, such as loss or train.epochs; all where empty.
        width: of a line, in characters.
        composer: of the command line's `--config-dir`.

    Raises:
        ConfigError: the overrides cannot be composed, or there is no such section.
    """
    overrides = rename_overrides(overrides)
    with explaining(overrides, composer):
        config = composer.compose(overrides)
    # Keys of the schemas only: Hydra adds one for the choice of an experiment.
    settings = list(_keys(config, ""))
    if sections:
        asked = [one for name in sections for one in _section(new_name(name), config, settings)]
        settings = [one for one in settings if one in asked]
    else:
        yield "Choices, as group=choice:"
        for group in (*GROUPS, "experiments"):
            choices = f"{group:12} {', '.join(composer.choices(group))}"
            yield from _wrapped(choices, "  ", " " * 15, width)
        yield ""
        yield "Settings, as key=value, with their values in this run:"
    for key, value, text in settings:
        yield from _wrapped(f"{key}={value}", "  ", "      ", width)
        yield from _wrapped(text, "      ", "      ", width)


def _section(name: str, config: DictConfig, settings: Sequence[Setting]) -> list[Setting]:
    """The settings of a section, or the one of that name.

    Raises:
        ConfigError: there is none.
    """
    if found := [one for one in settings if f"{one[0]}.".startswith(f"{name}.")]:
        return found
    schema: Any = OmegaConf.get_type(config)
    top = [item.name for item in fields(schema)]
    hint = did_you_mean(name, [*top, *(key for key, *_ in settings)], ", ".join(top))
    raise ConfigError([f"{name}: no such setting ({hint})"])


def _keys(config: DictConfig, prefix: str) -> Iterator[Setting]:
    """Key, value and meaning of everything below a section."""
    schema: Any = OmegaConf.get_type(config)
    for item in fields(schema):
        value = OmegaConf.select(config, item.name)
        below = {item.name: value}
        if isinstance(value, ListConfig):
            below = {f"{item.name}.{index}": one for index, one in enumerate(value)}
        if below and all(map(_is_section, below.values())):
            for name, section in below.items():
                yield from _keys(section, f"{prefix}{name}.")
            continue
        kind = field_types(schema)[item.name]
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        choices = type_name(kind).replace("`", "")
        text = f"{meaning(schema, item.name)} ({choices})".strip()
        yield f"{prefix}{item.name}", shown(plain), text


def _is_section(value: Any) -> bool:
    return isinstance(value, DictConfig) and is_dataclass(OmegaConf.get_type(value))


def _wrapped(text: str, first: str, rest: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


@cache
def _meanings(module: ModuleType) -> dict[tuple[str, str], str]:
    """Maps (class, field) to the docstring under the field, read from the source."""
    meanings: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            for statement, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                    name = ast.unparse(statement.target)
                    meanings[node.name, name] = " ".join(ast.literal_eval(below.value).split())
    return meanings
