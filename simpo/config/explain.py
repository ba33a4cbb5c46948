"""Finds every fault of overrides: a line each with the key, what is wrong and what to do.

Hydra itself stops at the first fault.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import (
    DictConfig,
    ListConfig,
    OmegaConf,
)
from omegaconf.errors import OmegaConfBaseException, ValidationError

from simpo.config.check import build_run, fault_line
from simpo.config.composer import CONF, Composer, NotComposedError, no_such_choice
from simpo.config.errors import ConfigError, first_line, shown
from simpo.config.suggest import (
    all_keys,
    choices_with,
    is_free,
    take_beta,
    unknown_key,
    wanted,
)

SEARCHPATH = "hydra.searchpath="
MOST_MEMBERS = 10_000
"""Largest sweep: more members must be a typing mistake."""


@dataclass(frozen=True)
class Sweeper:
    """The choice of hydra/sweeper, and the sweeps that its own settings name."""

    kind: str = "basic"
    params: tuple[str, ...] = ()


def explain(
    overrides: Sequence[str], multirun: bool = False, composer: Composer = CONF
) -> list[str]:
    """Every fault of overrides; each value of a sweep is tried, which only `multirun` allows."""
    if searchpath := tuple(word for word in overrides if word.startswith(SEARCHPATH)):
        composer = replace(composer, searchpath=searchpath)
    if searchpath or composer.config_name != CONF.config_name:
        try:
            composer.compose([])
        except NotComposedError as error:
            return [f"{SEARCHPATH[:-1] if searchpath else '--config-name'}: {error}"]
    if split := _split_by_the_shell(overrides):
        return [f"{split}: the shell has split it into words (quote it: '{split}')"]
    sweeper, problems = _sweeper(composer, overrides) if multirun else (None, [])
    # A group decides which keys exist, so groups are settled first.
    groups: dict[str, list[Override]] = {}
    values: list[Override] = []
    counts: dict[str, int] = {}
    for text in (*(sweeper.params if sweeper else ()), *overrides):
        try:
            override = _parsed(composer, text)
            singles = _singles(composer, override, sweeper)
        except NotComposedError as error:
            problems.append(str(error))
            continue
        key = override.key_or_group
        counts[key] = len(singles) if override.is_sweep_override() else 0
        # A mapping sets keys of a group's section.
        if _is_group(composer, key) and not isinstance(singles[0].value(), dict):
            groups[key] = singles
        else:
            values += singles
    members = math.prod(count or 1 for count in counts.values())
    if sweeper and sweeper.kind == "basic" and members > MOST_MEMBERS:
        return [*problems, f"this sweep has {members:,} members (at most {MOST_MEMBERS:,})"]
    faulty: set[str] = set()
    good: list[list[str]] = []
    for group, singles in groups.items():
        others = [str(more[0].input_line) for name, more in groups.items() if name != group]
        if faults := [p for one in singles if (p := _group_problem(composer, one, others))]:
            problems += faults
            faulty.add(group)
        else:
            good.append([str(one.input_line) for one in singles])
    for member in _members(good):
        problems += _member_problems(composer, member, values, faulty)
    if any(counts.values()) and not multirun and not problems:
        problems.append(
            "several values in one setting: -m starts a run for each; a list is key=[a,b], "
            "a text with commas is 'key=\"a,b\"'"
        )
    return list(dict.fromkeys(problems))


def _split_by_the_shell(words: Sequence[str]) -> str:
    """The setting whose brackets close only in a later word; empty if there is none."""
    for start, word in enumerate(words):
        if "=" not in word or _open_brackets(word) <= 0:
            continue
        for end in range(start + 2, len(words) + 1):
            joined = " ".join(words[start:end])
            if _open_brackets(joined) == 0:
                return joined
    return ""


def _open_brackets(text: str) -> int:
    """Number of brackets that are opened but not closed, outside of quotes."""
    bare = re.sub(r"""(["']).*?(?<!\\)\1""", "", text)
    return sum(bare.count(c) for c in "[{(") - sum(bare.count(c) for c in "]})")


def _sweeper(composer: Composer, overrides: Sequence[str]) -> tuple[Sweeper, list[str]]:
    """The sweeper that overrides choose, and the faults of the sweeps in its settings."""
    deciding: list[str] = []
    for text in overrides:
        with suppress(NotComposedError):
            override = _parsed(composer, text)
            key = override.key_or_group
            if not override.is_sweep_override() and (
                key[:5] == "hydra" or _is_group(composer, key)
            ):
                deciding.append(text)
    try:
        composed = composer.compose(deciding, with_hydra=True).hydra
        node = OmegaConf.to_container(composed.sweeper, resolve=True)
    except (NotComposedError, OmegaConfBaseException):
        return Sweeper(), []  # reported with the overrides
    assert isinstance(node, dict)
    swept: dict[str, Any] = {}
    for name, example in (("params", '{loss.beta: "1,2"}'), ("stages", '[{loss.beta: "1,2"}]')):
        value = node.get(name) or []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                problem = f"must be of the form {example}, got {shown(value)}"
                return Sweeper(), [f"hydra.sweeper.{name}: {problem}"]
            swept |= item
    params = (f"{key}={shown(value)}" for key, value in swept.items())
    return Sweeper(composed.runtime.choices["hydra/sweeper"], tuple(params)), []


def _is_group(composer: Composer, key: str) -> bool:
    # The folder `experiments` may be missing: git does not keep an empty one.
    return key == "experiments" or ("." not in key and bool(composer.choices(key)))


def _parsed(composer: Composer, text: str) -> Override:
    try:
        with composer.loader() as loader:  # glob() looks up its choices
            (override,) = OverridesParser.create(config_loader=loader).parse_overrides([text])
    except HydraException as error:
        raise NotComposedError(_unreadable(text, error)) from error
    if not override.key_or_group:
        raise NotComposedError(_unreadable(text))
    return override


def _unreadable(text: str, error: Exception | None = None) -> str:
    key, equals, value = text.partition("=")
    if text.startswith("-"):
        return f"{text}: no such option (settings are key=value; -h lists what there is)"
    if not (equals and key):
        return f"{text or repr(text)}: not of the form key=value"
    # Hydra's own words about a function: 'choice()': empty choice is not legal.
    for line in str(error).splitlines():
        if " while evaluating " in line:
            return f"{key}: {line.partition(' while evaluating ')[2]}"
    if "[" in key:
        dotted = key.replace("[", ".").replace("]", "")
        return f"{key}: items of a list are named with a dot (write {dotted})"
    if not re.fullmatch(r"[+~]*[\w./@:]+", key):
        return f"{text}: {key!r} is no key (letters, digits, _ and dots, without blanks)"
    return f"{text}: special characters need quotes within quotes ('{key}=\"{value}\"')"


def _singles(composer: Composer, override: Override, sweeper: Sweeper | None) -> list[Override]:
    """One override for each value of a sweep, or for both ends of an interval.

    Raises:
        NotComposedError: there is no value or no end of values, or the sweeper takes no interval.
    """
    if not override.is_sweep_override():
        return [override]
    key, line, sweep = override.key_or_group, str(override.input_line), override.value()
    text = line.partition("=")[2]
    if isinstance(sweep, IntervalSweep):
        if sweeper is not None and sweeper.kind != "optuna":
            remedy = f"list values: {key}=a,b"
            raise NotComposedError(f"{key}: {text} needs hydra/sweeper=optuna ({remedy})")
        low, high = sweep.start, sweep.end
        if low is None or high is None or not -math.inf < low < high < math.inf:
            raise NotComposedError(f"{key}: an interval goes from low to high, got {text}")
        if "log" in sweep.tags and low <= 0:
            raise NotComposedError(f"{key}: a logarithmic interval is above 0, got {text}")
        values = [str(low), str(high)]
    else:
        if isinstance(sweep, RangeSweep):
            _check_range(key, text, sweep)
        values = list(override.sweep_string_iterator())
        if not values:
            raise NotComposedError(f"{key}: {text} gives no value (list some: {key}=a,b)")
    start = line[: line.index(key)] + key
    return [_parsed(composer, f"{start}={value}") for value in values]


def _check_range(key: str, text: str, sweep: RangeSweep) -> None:
    assert sweep.start is not None and sweep.stop is not None
    ends = (float(sweep.start), float(sweep.stop), float(sweep.step))
    if not all(map(math.isfinite, ends)) or not sweep.step:
        raise NotComposedError(f"{key}: a range has finite ends and a step, got {text}")
    count = (ends[1] - ends[0]) / ends[2]
    if count > MOST_MEMBERS:
        raise NotComposedError(f"{key}: {text} has {count:,.0f} values (at most {MOST_MEMBERS:,})")


def _members(groups: list[list[str]]) -> Iterator[list[str]]:
    """Yield a choice of every group: each choice once, with the other groups at their first."""
    first = [choices[0] for choices in groups]
    yield first
    for index, choices in enumerate(groups):
        for choice in choices[1:]:
            yield [*first[:index], choice, *first[index + 1 :]]


def _member_problems(
    composer: Composer, groups: list[str], values: list[Override], faulty: set[str]
) -> list[str]:
    try:
        base = composer.compose(groups)
    except NotComposedError as error:
        return [f"{' '.join(groups)}: {error}"]
    take_beta(base, ((o.key_or_group, o.value()) for o in values))
    problems: list[str] = []
    good: list[str] = []
    # A misspelt loss may be in the module that is named.
    bad = ["loss.module"] if "loss" in faulty else []
    for override in values:
        key = override.key_or_group
        if faults := _override_problems(composer, override, base, groups):
            # The choice that was meant by a misspelt group may have this key.
            wanted = key.partition(".")[0] in faulty and choices_with(key)
            problems += [] if wanted else faults
            bad.append(key)
        else:
            good.append(str(override.input_line))
    # The last value of a key counts; in reverse order the first one is checked too.
    backwards = [good[::-1]] if len({line.partition("=")[0] for line in good}) < len(good) else []
    for lines in (good, *backwards):
        try:
            build_run(composer.compose([*groups, *lines]))
        except ConfigError as error:
            # A setting that was refused above is missing here, which is no further fault.
            problems += [p for p in error.problems if p.partition(":")[0] not in bad]
        except NotComposedError as error:
            problems.append(str(error))
        except OmegaConfBaseException as error:
            problems.append(fault_line(error))
    return problems


def _group_problem(composer: Composer, override: Override, others: list[str]) -> str | None:
    group, line, value = override.key_or_group, str(override.input_line), override.value()
    try:
        # A group may exist only with a certain choice of another.
        composer.compose([*others, line])
        return None
    except NotComposedError:
        pass
    try:
        composer.compose([line])
    except NotComposedError as error:
        if override.is_delete():
            return f"{group}: cannot be left out (leave out the ~)"
        choices = composer.choices(group)
        asked = {shown(item) for item in (value if isinstance(value, list) else [value])}
        if not asked <= set(choices):
            return no_such_choice(group, shown(value), choices)
        if override.is_add():
            return f"{group}: set already (leave out the +)"
        return f"{line}: {error}"
    return None


def _override_problems(
    composer: Composer, override: Override, base: DictConfig, groups: list[str]
) -> list[str]:
    key = override.key_or_group
    if not (override.is_add() or override.is_delete() or key.startswith("hydra")):
        return _value_problems(base, key, override.value())
    if not (key.startswith("hydra") or key in all_keys(base) or is_free(base, key)):
        value = shown(override.value()) if override.is_add() else None
        return [f"{key}: {unknown_key(base, key, value)}"]
    if problem := _sweeper_problem(composer, key, groups):
        return [problem]
    try:
        composed = composer.compose([*groups, str(override.input_line)])
    except NotComposedError as error:
        if override.is_delete():
            return [f"{key}: cannot be left out (leave out the ~)"]
        if override.is_add() and key in all_keys(base):
            return [f"{key}: set already (leave out the +)"]
        return [f"{key}: {error}"]
    if override.is_add():
        try:
            build_run(composed)
        except ConfigError as error:
            return [problem for problem in error.problems if problem.partition(":")[0] == key]
        except OmegaConfBaseException as error:
            return [fault_line(error)]
    return []


def _sweeper_problem(composer: Composer, key: str, groups: list[str]) -> str | None:
    """The fault of a setting of sweepers that the chosen one lacks."""
    name = key.removeprefix("hydra.sweeper.").partition(".")[0]

    def has_it(choice: Sequence[str]) -> bool:
        return name in composer.compose([*groups, *choice], with_hydra=True).hydra.sweeper

    if not key.startswith("hydra.sweeper.") or has_it([]):
        return None
    if has_it(["hydra/sweeper=optuna"]):
        return f"{key}: only a search by Optuna has it (hydra/sweeper=optuna)"
    return f"{key}: no sweeper has such a setting (see docs/sweeps.md)"


def _value_problems(base: DictConfig, key: str, value: Any) -> list[str]:
    """Faults of setting a key of a composed configuration to a value, item by item."""
    if is_free(base, key) and (isinstance(value, dict) or key not in all_keys(base)):
        named = not isinstance(value, dict) or all(isinstance(name, str) for name in value)
        return [] if named else [f"{key}: names must be text, got {shown(value)}"]
    if key not in all_keys(base):
        return [f"{key}: {unknown_key(base, key, shown(value))}"]
    node: Any = base
    for part in key.split("."):
        node = node._get_node(int(part) if isinstance(node, ListConfig) else part)
    if isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict:
        texts = isinstance(value, dict) and all(
            isinstance(k, str) and isinstance(v, (str, int, float)) for k, v in value.items()
        )
        return [] if texts else [f"{key}: must be {wanted(node)}, got {shown(value)}"]
    if isinstance(node, DictConfig) and isinstance(value, dict):
        return [p for k, item in value.items() for p in _value_problems(base, f"{key}.{k}", item)]
    schema = node._metadata.element_type if isinstance(node, ListConfig) else None
    if is_dataclass(schema) and isinstance(value, list):
        problems: list[str] = []
        for index, item in enumerate(value):
            if isinstance(item, dict):
                empty = OmegaConf.structured(schema)
                # Interpolations cannot be resolved here; they are checked in the composed run.
                plain = {str(k): v for k, v in item.items() if "${" not in shown(v)}
                faults = [p for k, v in plain.items() for p in _value_problems(empty, k, v)]
                problems += [f"{key}[{index}].{fault}" for fault in faults]
            else:
                problems.append(f"{key}[{index}]: must be {wanted(schema)}, got {shown(item)}")
        return problems
    changed = base.copy()
    try:
        OmegaConf.update(changed, key, value)
    except OmegaConfBaseException:
        return [f"{key}: must be {wanted(node)}, got {shown(value)}"]
    try:
        found = OmegaConf.select(changed, key)
        if "${" in shown(value) and OmegaConf.is_config(found):
            found = OmegaConf.to_container(found, resolve=True)
    except ValidationError:
        return [f"{key}: must be {wanted(node)}, got {shown(value)}"]
    except OmegaConfBaseException as error:
        return [f"{key}: {first_line(error)}"]
    # OmegaConf does not check the type of a section or list that an interpolation gives.
    if isinstance(found, (dict, list)):
        astray = isinstance(value, str) and bool(_value_problems(base, key, found))
    else:
        astray = isinstance(node, (DictConfig, ListConfig)) and isinstance(value, str)
    if astray:
        return [f"{key}: must be {wanted(node)}, got {shown(value)}"]
    return []
