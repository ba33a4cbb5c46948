"""Describes the settings as a JSON schema (draft 7), with which editors check and complete YAML."""

from __future__ import annotations

import json
import typing
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from inspect import getdoc
from types import NoneType
from typing import Any

from omegaconf import MISSING

from simpo.config.check import GROUPS
from simpo.config.choices import AUTO
from simpo.config.meanings import meaning
from simpo.config.plain import field_types
from simpo.config.schema import RunConfig
from simpo.config.suggest import choices_with

Schema = dict[str, Any]

# A text where another type is wanted: an interpolation, or the mark of a value that is missing.
STAND_IN = r"\$\{|^\?\?\?$"
TYPES = {str: ["string", "number"], int: ["integer"], float: ["number"], bool: ["boolean"]}
DEFAULTS: Schema = {
    "description": "Hydra's defaults list: the files that this one is composed with, in order.",
    "type": "array",
    "items": {"type": ["string", "object"]},
}
HYDRA: Schema = {"description": "Settings of Hydra itself, such as its sweeper.", "type": "object"}


def settings_schema() -> Schema:
    """The schema of a file that sets keys of a whole run, such as those of experiments/.

    `definitions` has the schemas of files that hold one section, by group and the name of its
    dataclass: `loss.sigmoid` for conf/loss/sigmoid.yaml.
    """
    run = _section(RunConfig)
    for group in GROUPS:
        run["properties"][group] = _any_choice(group)
    run["properties"] = {"defaults": DEFAULTS, "hydra": HYDRA} | run["properties"]
    definitions = {}
    for group, schemas in GROUPS.items():
        for name, kind in schemas.items():
            choice = _section(kind)
            choice["properties"] = {"defaults": DEFAULTS} | choice["properties"]
            definitions[f"{group}.{name}"] = choice
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Settings of simpo",
        **run,
        "definitions": definitions,
    }


def schema_text() -> str:
    """The schema as a file has it."""
    return json.dumps(settings_schema(), indent=1) + "\n"


def _section(kind: type) -> Schema:
    types = field_types(kind)
    return {
        "description": " ".join((getdoc(kind) or "").split()),
        **_or_text({"type": ["object"]}),
        "additionalProperties": False,
        "properties": {
            item.name: _property(kind, item, types[item.name])
            for item in fields(kind)
            if item.name not in GROUPS or kind is not RunConfig
        },
    }


def _property(section: type, item: Field[Any], kind: Any) -> Schema:
    if is_dataclass(kind):
        return _section(typing.cast(type, kind))
    return {"description": meaning(section, item.name), **_value(kind), **_default(item)}


def _any_choice(group: str) -> Schema:
    """The schema of a section in a file that need not say which choice of the group it is for."""
    known: Schema = {}
    for kind in GROUPS[group].values():
        for key, value in _section(kind)["properties"].items():
            known.setdefault(key, []).append(value)
    properties: Schema = {}
    for key, values in known.items():
        first = properties[key] = values[0]
        if any(value.get("default") != first.get("default") for value in values):
            properties[key] = {name: part for name, part in first.items() if name != "default"}
        if any(value["type"] != first["type"] for value in values):
            properties[key] = {"description": first["description"], "anyOf": values}
        if len(values) < len(GROUPS[group]):
            only = " or ".join(choices_with(f"{group}.{key}"))
            properties[key] = properties[key] | {
                "description": f"{first['description']} Only with {group}={only}.".strip()
            }
    return _section(field_types(RunConfig)[group]) | {"properties": properties}


def _value(kind: Any) -> Schema:
    """What a value of a field's type may be."""
    if NoneType in typing.get_args(kind):
        inner = _value(next(part for part in typing.get_args(kind) if part is not NoneType))
        return inner | {"type": [*inner["type"], "null"]}
    if kind == int | str:
        return {
            "anyOf": [{"type": "integer"}, {"enum": [AUTO]}, {"pattern": STAND_IN}],
            "type": ["integer", "string"],
        }
    if typing.get_origin(kind) is list:
        items = typing.get_args(kind)[0]
        return _or_text({"type": ["array"], "items": _value(items)})
    if typing.get_origin(kind) is dict:
        values = typing.get_args(kind)[1]
        return _or_text(
            {
                "type": ["object"],
                "additionalProperties": True if values is Any else _value(values),
            }
        )
    if is_dataclass(kind):
        return _section(typing.cast(type, kind))
    if issubclass(kind, Enum):
        return {
            "anyOf": [{"enum": [choice.value for choice in kind]}, {"pattern": STAND_IN}],
            "type": ["string"],
        }
    return _or_text({"type": TYPES[kind]})


def _or_text(schema: Schema) -> Schema:
    if "string" in schema["type"]:
        return schema
    return schema | {
        "type": [*schema["type"], "string"],
        "pattern": STAND_IN,
        # What the YAML extension says instead of showing the pattern.
        "patternErrorMessage": f"Incorrect type. Expected {schema['type'][0]}.",
    }


def _default(item: Field[Any]) -> Schema:
    value = item.default if item.default_factory is NO_DEFAULT else item.default_factory()
    if value == MISSING:
        return {}
    return {"default": value.value if isinstance(value, Enum) else value}
