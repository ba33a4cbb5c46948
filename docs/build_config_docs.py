"""Write docs/config.md and conf/schema.json from the dataclasses of the settings:
`python docs/build_config_docs.py`.

A field's meaning is the docstring under it, which only the source has; so the source is parsed.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from simpo.config.check import GROUPS
from simpo.config.json_schema import schema_text
from simpo.config.meanings import default, meaning, type_name
from simpo.config.paths import config_dir
from simpo.config.plain import field_types
from simpo.config.schema import RunConfig

PAGE = Path(__file__).with_name("config.md")
SCHEMA = config_dir("conf") / "schema.json"

HEAD = """\
# Settings

Every key of a run, as `key=value` on the command line or below its section in YAML. Keys with
*required* as their default are given by a file of `conf/`. `--cfg job` prints the composed run.
Written by `python docs/build_config_docs.py` from the dataclasses of the settings.
"""


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for key, schema, base, heading in _sections(RunConfig, ""):
        rows = [_row(key, item, schema) for item in _own_fields(schema, base)]
        table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
        doc = inspect.getdoc(schema) or ""
        parts.append("\n".join([f"## {heading}", "", doc, *(["", *table] if rows else [])]) + "\n")
    return "\n".join(parts)


def _sections(schema: type, prefix: str) -> Iterator[tuple[str, type, type, str]]:
    """(key before the fields, dataclass, one that is told elsewhere, heading), and those below."""
    yield prefix, schema, object, f"`{prefix.rstrip('.')}`" if prefix else "The run"
    for item in fields(schema):
        kind = field_types(schema)[item.name]
        key = f"{prefix}{item.name}"
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _sections(kind, f"{key}.")
            for name, choice in GROUPS.get(item.name, {}).items():
                if choice is not kind:
                    yield f"{key}.", choice, kind, f"`{key}={name}`"
        elif typing.get_origin(kind) is list and is_dataclass(typing.get_args(kind)[0]):
            # An item of a list is addressed by its number on the command line.
            yield f"{key}.0.", typing.get_args(kind)[0], object, f"`{key}`: each item"


def _own_fields(schema: type, base: type) -> list[Field[Any]]:
    """Fields that are no section of their own and not those of the base, or of another default."""
    types = field_types(schema)
    return [
        item
        for item in fields(schema)
        if not is_dataclass(types[item.name])
        and (
            not hasattr(base, item.name)
            or (item.name != "name" and getattr(base, item.name) != item.default)
        )
    ]


def _row(prefix: str, item: Field[Any], schema: type) -> str:
    kind = field_types(schema)[item.name]
    cells = [
        f"`{prefix}{item.name}`",
        type_name(kind),
        _default(item),
        meaning(schema, item.name),
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(item: Field[Any]) -> str:
    value = default(item)
    return value if value == "*required*" else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    SCHEMA.write_text(schema_text(), encoding="utf-8")
