"""Says which keys and values there are: what an unknown key may mean, what a setting takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import (
    BooleanNode,
    DictConfig,
    EnumNode,
    FloatNode,
    IntegerNode,
    ListConfig,
    OmegaConf,
    UnionNode,
)
from omegaconf.errors import ConfigTypeError, OmegaConfBaseException

from simpo.config.check import GROUPS
from simpo.config.choices import AUTO
from simpo.config.other_trainers import ANSWERS, answer
from simpo.loss import LossConfig


def unknown_key(base: DictConfig, key: str, value: str | None = None) -> str:
    """The message for a key that a composed configuration lacks, with the nearest keys.

    Args:
        value: what it was to be set to, as typed on a command line.
    """
    known = all_keys(base)
    section, _, leaf = key.rpartition(".")
    group = key.partition(".")[0]
    if key == f"loss.{leaf}" and not hasattr(LossConfig, leaf):
        kind: Any = OmegaConf.get_type(base, group)
        untyped = leaf not in (item.name for item in fields(kind))
        if untyped and isinstance(default := getattr(kind, leaf, None), bool | int | float | str):
            typed = f"{leaf}: {type(default).__name__} = {default!r}"
            return f"no setting, as it has no type in {kind.__name__} (write {typed})"
    if choices := choices_with(key):
        return f"only with {group}={' or '.join(choices)}"
    around: DictConfig | ListConfig = base
    while section:
        if section in known and OmegaConf.is_config(found := OmegaConf.select(base, section)):
            around = found
            break
        section = section.rpartition(".")[0]
    beside = [k for k in known if k.rpartition(".")[0] == section]
    if isinstance(around, ListConfig):
        return f"no such item of {section} (set all of it: {section}='[{{path: ...}}, ...]')"
    if "train" in known and (found := other_trainers_answer(base, key, value)):
        return found
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


def other_trainers_answer(base: DictConfig, key: str, value: str | None) -> str:
    """What a key of another trainer is here; empty for a name that none has."""
    return answer(key, value, _beta(base))


def _beta(base: DictConfig) -> float | None:
    """`loss.beta` of a composed configuration; None if the loss has none, or it cannot be read."""
    with suppress(OmegaConfBaseException):
        beta = OmegaConf.select(base, "loss.beta")
        return beta if isinstance(beta, float) else None
    return None


def take_beta(base: DictConfig, settings: Iterable[tuple[str, Any]]) -> None:
    """Set `loss.beta` of a composed configuration to the beta of any trainer among settings.

    Args:
        settings: keys and values; those that are no numbers do not count.
    """
    names = [name for name, ours in ANSWERS.items() if ours == "loss.beta"]
    has_beta = _beta(base) is not None
    for key, value in settings:
        if has_beta and key.rpartition(".")[2] in names:
            with suppress(TypeError, ValueError):
                OmegaConf.update(base, "loss.beta", float(value))


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
    with suppress(ConfigTypeError):  # a name where a list has numbers
        return any(isinstance(node, DictConfig) and not OmegaConf.is_struct(node) for node in above)
    return False


def wanted(node: Any) -> str:
    """Describe the values that a setting takes."""
    if isinstance(node, EnumNode):
        kind = f"one of {', '.join(node.enum_type.__members__)}"
    elif isinstance(node, ListConfig):
        schema = node._metadata.element_type
        items = {int: "1, 2", float: "0.5, 2", bool: "true, false"}.get(schema, "a, b")
        kind = f"a list such as [{wanted(schema) if is_dataclass(schema) else items}]"
    elif isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict:
        kind = "of the form {name: value, ...}"
    elif isinstance(node, DictConfig) or is_dataclass(node):
        schema = node._metadata.object_type if isinstance(node, DictConfig) else node
        kind = f"of the form {{{fields(schema)[0].name}: ..., ...}}"
        return kind if isinstance(node, DictConfig) else kind.removeprefix("of the form ")
    elif isinstance(node, UnionNode):
        kind = f"a whole number or {AUTO}"
    else:
        kinds = {BooleanNode: "true or false", IntegerNode: "a whole number", FloatNode: "a number"}
        kind = kinds.get(type(node), "text")
    return f"{kind} or null" if node._metadata.optional else kind
