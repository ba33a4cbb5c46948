"""Write docs/config.md from the dataclasses of the settings: `python docs/build_config_docs.py`.

A field's meaning is the docstring under it, which only the source has; so the source is parsed.
"""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

from omegaconf import MISSING

from simpo.config import backends, inputs, launchers, losses
from simpo.config import schema as run_schema
from simpo.config.check import GROUPS
from simpo.config.schema import RunConfig

PAGE = Path(__file__).with_name("config.md")

HEAD = """\
# Settings

Every key of a run, as `key=value` on the command line or below its section in YAML. Keys with
*required* as their default are given by a file of `conf/`. `--cfg job` prints the composed run.
Written by `python docs/build_config_docs.py` from the dataclasses in `simpo/config`.
"""


def render() -> str:
    """The whole page."""
    meanings = _meanings()
    parts = [HEAD]
    for key, schema, base, heading in _sections(RunConfig, ""):
        rows = [_row(key, item, schema, meanings) for item in _own_fields(schema, base)]
        table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
        doc = (schema.__doc__ or "").strip()
        # A loss describes itself by its formula.
        doc = f"`{doc.rstrip('.')}`" if doc.count("(") > 1 else doc
        parts.append("\n".join([f"## {heading}", "", doc, *(["", *table] if rows else [])]) + "\n")
    return "\n".join(parts)


def _sections(schema: type, prefix: str) -> Iterator[tuple[str, type, type, str]]:
    """(key before the fields, dataclass, one that is told elsewhere, heading), and those below."""
    yield prefix, schema, object, f"`{prefix.rstrip('.')}`" if prefix else "The run"
    for item in fields(schema):
        kind = _types(schema)[item.name]
        key = f"{prefix}{item.name}"
        if is_dataclass(kind):
            yield from _sections(kind, f"{key}.")
            for name, choice in GROUPS.get(item.name, {}).items():
                if choice is not kind:
                    yield f"{key}.", choice, kind, f"`{key}={name}`"
        elif typing.get_origin(kind) is list and is_dataclass(typing.get_args(kind)[0]):
            # An item of a list is addressed by its number on the command line.
            yield f"{key}.0.", typing.get_args(kind)[0], object, f"`{key}`: each item"


def _own_fields(schema: type, base: type) -> list[Field[Any]]:
    """Fields that are no section of their own and not those of the base, or of another default."""
    types = _types(schema)
    return [
        item
        for item in fields(schema)
        if not is_dataclass(types[item.name])
        and (
            not hasattr(base, item.name)
            or (item.name != "name" and getattr(base, item.name) != item.default)
        )
    ]


def _row(prefix: str, item: Field[Any], schema: type, meanings: dict[tuple[str, str], str]) -> str:
    kind = _types(schema)[item.name]
    cells = [
        f"`{prefix}{item.name}`",
        _type_name(kind),
        _default(item),
        next(
            meanings[parent.__name__, item.name]
            for parent in schema.__mro__
            if (parent.__name__, item.name) in meanings
        ),
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _types(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _type_name(kind: Any) -> str:
    if NoneType in typing.get_args(kind):
        inner = next(part for part in typing.get_args(kind) if part is not NoneType)
        return f"{_type_name(inner)} or null"
    if typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        return f"list of {'items, see below' if is_dataclass(inner) else _type_name(inner)}"
    if issubclass(kind, Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    return {str: "text", int: "whole number", float: "number", bool: "true, false"}[kind]


def _default(item: Field[Any]) -> str:
    value = item.default if item.default_factory is NO_DEFAULT else item.default_factory()
    if value == MISSING:
        return "*required*"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    value = value.value if isinstance(value, Enum) else value
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{'null' if value is None else value}`"


def _meanings() -> dict[tuple[str, str], str]:
    """(class, field) to the docstring under the field."""
    meanings: dict[tuple[str, str], str] = {}
    modules = (backends, inputs, launchers, losses, run_schema)
    for node in (node for m in modules for node in ast.parse(inspect.getsource(m)).body):
        if isinstance(node, ast.ClassDef):
            for statement, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                    name = ast.unparse(statement.target)
                    meanings[node.name, name] = " ".join(ast.literal_eval(below.value).split())
    return meanings


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
