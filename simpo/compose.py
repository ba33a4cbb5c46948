"""Command-line overrides in, a `RunConfig` out, or every fault of them in one `ConfigError`.

Hydra stops at the first fault and answers in its own words; `explain` goes on and says, for each
fault, the key, what is wrong with it and what to do.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from simpo.config import ConfigError, RunConfig, build_run, menu_dir, register_schemas

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
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(overrides) or [_first_line(error)]) from error


def explain(overrides: Sequence[str]) -> list[str]:
    """Every fault of overrides that do not compose; sweeps are tried value by value."""
    problems: list[str] = []
    # A group decides which keys exist, so groups are settled first.
    groups: list[str] = []
    values: list[Override] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            problems.append(f"{text}: not of the form key=value (quote special characters)")
            continue
        for single in _singles(override):
            if _group_folder(single.key_or_group).is_dir():
                problem = _group_problem(single)
                problems += [problem] if problem else []
                groups += [] if problem else [str(single.input_line)]
            else:
                values.append(single)
    base = compose_config(groups)
    good = list(groups)
    for override in values:
        try:
            if override.is_add() or override.is_delete():
                compose_config([*groups, str(override.input_line)])
            else:
                OmegaConf.update(base.copy(), override.key_or_group, override.value())
            good.append(str(override.input_line))
        except (HydraException, OmegaConfBaseException) as error:
            problems.append(_value_problem(override, error, base))
    try:
        build_run(compose_config(good))
    except ConfigError as error:
        problems += error.problems
    except (HydraException, OmegaConfBaseException) as error:
        problems.append(_first_line(error))
    return list(dict.fromkeys(problems))


def _singles(override: Override) -> list[Override]:
    if not override.is_sweep_override():
        return [override]
    parse = OverridesParser.create().parse_override
    return [parse(f"{override.key_or_group}={v}") for v in override.sweep_string_iterator()]


def _group_folder(group: str) -> Path:
    return menu_dir(group) if group == "experiments" else menu_dir("conf") / group


def _group_problem(override: Override) -> str | None:
    try:
        compose_config([str(override.input_line)])
    except HydraException:
        folder = _group_folder(override.key_or_group)
        choices = sorted(
            p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")
        )
        return (
            f"{override.key_or_group}: no such choice, got {override.value()} "
            f"(choose from {', '.join(choices)})"
        )
    except OmegaConfBaseException as error:
        return f"{override.input_line}: {_first_line(error)}"
    return None


def _value_problem(override: Override, error: Exception, base: DictConfig) -> str:
    key = override.key_or_group
    text = str(error.__cause__ or error)
    unknown = re.search(r"Key '([^']*)' (?:is not in struct|not in '(\w+)')", text)
    if unknown and unknown[1] != key.rpartition(".")[2]:
        return f"{key}: {unknown[2]} has no key {unknown[1]}"
    if unknown:
        known = _keys(base)
        near = difflib.get_close_matches(key, known, n=1)
        section = key.rpartition(".")[0]
        beside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
        if near:
            return f"{key}: no such key (did you mean {near[0]}?)"
        return f"{key}: no such key ({section or 'the top level'} has {', '.join(beside)})"
    if match := re.search(r"Value '(.*)' of type '.*' could not be converted to (\w+)", text):
        return f"{key}: must be {_TYPES.get(match[2], match[2])}, got {match[1]}"
    if match := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", text):
        return f"{key}: must be one of {match[2]}, got {match[1]}"
    return f"{key}: {_first_line(error.__cause__ or error)}"


_TYPES = {"Integer": "a whole number", "Float": "a number", "Bool": "true or false"}


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in config:
        node = None if OmegaConf.is_missing(config, key) else config._get_node(key)
        if isinstance(node, DictConfig):
            keys += _keys(node, f"{prefix}{key}.")
        keys.append(f"{prefix}{key}")
    return keys


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
