"""Command-line overrides in, a `RunConfig` out, or every fault of them in one `ConfigError`.

Hydra stops at the first fault and answers in its own words; `explain` goes on and says, for each
fault, the key, what is wrong with it and what to do.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import (
    BooleanNode,
    DictConfig,
    EnumNode,
    FloatNode,
    IntegerNode,
    ListConfig,
    OmegaConf,
)
from omegaconf.errors import OmegaConfBaseException

from simpo.config import GROUPS, RunConfig, build_run, menu_dir, register_schemas
from simpo.errors import INTERRUPTED, ConfigError, SimpoError, first_line

# Hydra raises ValueError for a group set to null or a number.
NOT_COMPOSED = (HydraException, OmegaConfBaseException, ValueError)

# Where Hydra finds the group `experiments`; conf/train.yaml reads it.
os.environ["SIMPO_MENUS"] = str(menu_dir("experiments").parent)
register_schemas()


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose conf/train.yaml with overrides, as the command line does."""
    with initialize_config_dir(str(menu_dir("conf")), version_base="1.3"):
        return compose("train", list(overrides))


def compose_run(overrides: Sequence[str]) -> RunConfig:
    """Compose and check a run.

    Raises:
        ConfigError: with every fault of the overrides and of the run they make.
    """
    try:
        return build_run(compose_config(overrides))
    except NOT_COMPOSED as error:
        raise ConfigError(explain(overrides) or [first_line(error)]) from error


def explain(overrides: Sequence[str], multirun: bool = False) -> list[str]:
    """Every fault of overrides; sweeps (only meant so with `multirun`) are tried by value."""
    problems: list[str] = []
    # A group decides which keys exist, so groups are settled first.
    groups: dict[str, list[str]] = {}
    faulty: set[str] = set()
    values: list[Override] = []
    several = False
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            override = None
        if override is None or not override.key_or_group:
            problems.append(_unreadable(text))
            continue
        several |= override.is_sweep_override()
        if not _is_group(override):
            values += _singles(override)
            continue
        group = override.key_or_group
        choices = _singles(override)
        faults = [fault for choice in choices if (fault := _group_problem(choice))]
        problems += faults
        if faults:
            faulty.add(group)
        else:
            groups[group] = [str(choice.input_line) for choice in choices]
    for member in _members(list(groups.values())):
        problems += _member_problems(member, values, faulty)
    if several and not multirun and not problems:
        problems.append(
            "several values in one setting: -m starts a run for each; a list is key=[a,b], "
            "a text with commas is 'key=\"a,b\"'"
        )
    return list(dict.fromkeys(problems))


def _members(groups: list[list[str]]) -> Iterator[list[str]]:
    """Choices of every group such that each choice comes up, the other groups at their first."""
    first = [choices[0] for choices in groups]
    yield first
    for index, choices in enumerate(groups):
        for choice in choices[1:]:
            yield [*first[:index], choice, *first[index + 1 :]]


def _member_problems(groups: list[str], values: list[Override], faulty: set[str]) -> list[str]:
    try:
        base = compose_config(groups)
    except NOT_COMPOSED as error:
        return [f"{' '.join(groups)}: {first_line(error)}"]
    problems: list[str] = []
    good: list[str] = []
    bad: list[str] = []
    for override in values:
        key = override.key_or_group
        if faults := _override_problems(override, base, groups):
            # A key that another choice of a misspelt group has may be what that choice is for.
            wanted = key.partition(".")[0] in faulty and _choices_with(key)
            problems += [] if wanted else faults
            bad.append(key)
        else:
            good.append(str(override.input_line))
    try:
        build_run(compose_config([*groups, *good]))
    except ConfigError as error:
        # Without the setting that was refused above, the run may lack what it was to give.
        problems += [p for p in error.problems if p.partition(":")[0] not in bad]
    except NOT_COMPOSED as error:
        problems.append(first_line(error))
    return problems


def _unreadable(text: str) -> str:
    key, equals, value = text.partition("=")
    if not (equals and key):
        return f"{text}: not of the form key=value"
    if "[" in key:
        return f"{key}: an item of a list is {key.replace('[', '.').replace(']', '')}"
    return f"{text}: special characters need quotes within quotes ('{key}=\"{value}\"')"


def _singles(override: Override) -> list[Override]:
    if not override.is_sweep_override():
        return [override]
    parse = OverridesParser.create().parse_override
    key, line = override.key_or_group, str(override.input_line)
    start = line[: line.index(key)] + key
    return [parse(f"{start}={value}") for value in override.sweep_string_iterator()]


def _is_group(override: Override) -> bool:
    group = override.key_or_group
    # An `experiments` folder without a file is not part of a checkout.
    return group == "experiments" or (menu_dir("conf") / group).is_dir()


def _group_problem(override: Override) -> str | None:
    group, choice = override.key_or_group, _shown(override.value())
    folder = menu_dir(group) if group == "experiments" else menu_dir("conf") / group
    choices = sorted(
        p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")
    )
    try:
        compose_config([str(override.input_line)])
    except NOT_COMPOSED as error:
        if override.is_delete():
            return f"{group}: cannot be left out (leave out the ~)"
        if choice not in choices:
            known = f"choose from {', '.join(choices)}" if choices else f"{folder} has none"
            return f"{group}: no such choice, got {choice} ({known})"
        if override.is_add():
            return f"{group}: set already (leave out the +)"
        return f"{override.input_line}: {first_line(error)}"
    return None


def _override_problems(override: Override, base: DictConfig, groups: list[str]) -> list[str]:
    key = override.key_or_group
    if not (override.is_add() or override.is_delete() or key.startswith("hydra")):
        return _value_problems(base, key, override.value())
    try:
        compose_config([*groups, str(override.input_line)])
    except NOT_COMPOSED as error:
        if override.is_delete():
            return [f"{key}: cannot be left out (leave out the ~)"]
        if override.is_add() and key in _keys(base):
            return [f"{key}: set already (leave out the +)"]
        return [f"{key}: {first_line(error)}"]
    return []


def _value_problems(base: DictConfig, key: str, value: Any) -> list[str]:
    """Faults of setting a key of a composed configuration to a value, item by item."""
    if key not in _keys(base):
        return [f"{key}: {_unknown(base, key)}"]
    node: Any = base
    for part in key.split("."):
        node = node._get_node(int(part) if isinstance(node, ListConfig) else part)
    if isinstance(node, DictConfig) and isinstance(value, dict):
        return [p for k, item in value.items() for p in _value_problems(base, f"{key}.{k}", item)]
    schema = node._metadata.element_type if isinstance(node, ListConfig) else None
    if is_dataclass(schema) and isinstance(value, list):
        problems: list[str] = []
        for index, item in enumerate(value):
            if isinstance(item, dict):
                empty = OmegaConf.structured(schema)
                faults = [p for k, v in item.items() for p in _value_problems(empty, str(k), v)]
                problems += [f"{key}[{index}].{fault}" for fault in faults]
            else:
                problems.append(f"{key}[{index}]: must be {_wanted(schema)}, got {_shown(item)}")
        return problems
    changed = base.copy()
    try:
        OmegaConf.update(changed, key, value)
    except OmegaConfBaseException:
        return [f"{key}: must be {_wanted(node)}, got {_shown(value)}"]
    try:
        OmegaConf.select(changed, key)
    except OmegaConfBaseException as error:
        return [f"{key}: {first_line(error)}"]
    return []


def _wanted(node: Any) -> str:
    """What a setting takes, in words."""
    if isinstance(node, EnumNode):
        kind = f"one of {', '.join(node.enum_type.__members__)}"
    elif isinstance(node, ListConfig):
        schema = node._metadata.element_type
        kind = f"a list such as [{_wanted(schema) if is_dataclass(schema) else 'a, b'}]"
    elif isinstance(node, DictConfig) or is_dataclass(node):
        schema = node._metadata.object_type if isinstance(node, DictConfig) else node
        kind = f"of the form {{{fields(schema)[0].name}: ..., ...}}"
        return kind if isinstance(node, DictConfig) else kind.removeprefix("of the form ")
    else:
        kinds = {BooleanNode: "true or false", IntegerNode: "a whole number", FloatNode: "a number"}
        kind = kinds.get(type(node), "text")
    return f"{kind} or null" if node._metadata.optional else kind


def _shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return "''" if value == "" else str(value)


def _unknown(base: DictConfig, key: str) -> str:
    """What is wrong with a key that a composed configuration lacks, and what comes close."""
    known = _keys(base)
    section, _, leaf = key.rpartition(".")
    group = key.partition(".")[0]
    if choices := _choices_with(key):
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
    names_here = ", ".join(k.rpartition(".")[2] for k in beside)
    return f"no such key ({section or 'the top level'} has {names_here})"


def _choices_with(key: str) -> list[str]:
    """Choices of the key's group whose schema has the key, where schemas differ by choice."""
    group, _, leaf = key.partition(".")
    schemas = {name: schema for name, schema in GROUPS.get(group, {}).items() if name != "base"}
    return [name for name, schema in schemas.items() if leaf in (f.name for f in fields(schema))]


def _keys(config: DictConfig | ListConfig, prefix: str = "") -> list[str]:
    """Dotted keys in the order of the schemas, a section's own key before those in it."""
    keys: list[str] = []
    names: Iterable[Any] = range(len(config)) if isinstance(config, ListConfig) else config
    for key in names:
        keys.append(f"{prefix}{key}")
        node = config._get_node(key)
        if isinstance(node, (DictConfig, ListConfig)) and not (
            node._is_none() or node._is_missing()
        ):
            keys += _keys(node, f"{prefix}{key}.")
    return keys


def command(work: Callable[[RunConfig], None], usage: str | None) -> None:
    """Compose a run from the words of a command line and do something with it.

    Exits with 2 for bad settings or data, 1 for what failed on the way, 130 where Ctrl-C ended it.
    """
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(usage)
        return
    try:
        work(compose_run(words))
    except SimpoError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr)
        sys.exit(INTERRUPTED)
