"""Suggests what an unknown key may mean: the nearest settings, and the choices that have it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from omegaconf import (
    DictConfig,
    ListConfig,
    OmegaConf,
)

from simpo.config.check import GROUPS


def unknown_key(base: DictConfig, key: str) -> str:
    """The message for a key that a composed configuration lacks, with the nearest keys."""
    known = all_keys(base)
    section, _, leaf = key.rpartition(".")
    group = key.partition(".")[0]
    if choices := choices_with(key):
        return f"only with {group}={' or '.join(choices)}"
    while section and section not in known:
        section = section.rpartition(".")[0]
    beside = [k for k in known if k.rpartition(".")[0] == section]
    if isinstance(OmegaConf.select(base, section) if section else base, ListConfig):
        return f"no such item of {section} (set all of it: {section}='[{{path: ...}}, ...]')"
    near = [k for k in known if k.rpartition(".")[2] == leaf.lower()]
    if not near:
        names = {k.rpartition(".")[2]: k for k in beside}
        close = [name for name in names if leaf.lower() in name.split("_")]
        close = close or difflib.get_close_matches(leaf.lower(), names, n=1)
        near = [names[name] for name in close]
    if near:
        return f"no such key (did you mean {' or '.join(near)}?)"
    here = section or ("the top level" if "train" in known else "an item")
    return f"no such key ({here} has {', '.join(k.rpartition('.')[2] for k in beside)})"


def choices_with(key: str) -> list[str]:
    """Choices of the key's group whose schema has the key, where schemas differ by choice."""
    group, _, leaf = key.partition(".")
    schemas = {name: schema for name, schema in GROUPS.get(group, {}).items() if name != "base"}
    return [name for name, schema in schemas.items() if leaf in (f.name for f in fields(schema))]


def all_keys(config: DictConfig | ListConfig, prefix: str = "") -> list[str]:
    """Dotted keys in the order of the schemas, a section's own key before those in it."""
    keys: list[str] = []
    names: Iterable[Any] = range(len(config)) if isinstance(config, ListConfig) else config
    for key in names:
        keys.append(f"{prefix}{key}")
        node = config._get_node(key)
        if isinstance(node, (DictConfig, ListConfig)) and not (
            node._is_none() or node._is_missing()
        ):
            keys += all_keys(node, f"{prefix}{key}.")
    return keys


def is_free(base: DictConfig, key: str) -> bool:
    """Whether a key is, or is within, a section that takes any names."""
    parts = key.split(".")
    above = (OmegaConf.select(base, ".".join(parts[:end])) for end in range(1, len(parts) + 1))
    return any(isinstance(node, DictConfig) and not OmegaConf.is_struct(node) for node in above)
