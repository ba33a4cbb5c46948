"""Composes the members of a sweep: one of those that differ in values of settings alone.

Hydra needs 0.2 s for a composition. A member with the same overrides but for some values is made
from the run of the first such member instead, where nothing else depends on these values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from simpo.config.check import build_run, check_run
from simpo.config.plain import NotPlain, field_types, plain_value
from simpo.config.schema import RunConfig


@dataclass(frozen=True)
class _Composed:
    """A composed member; `references` are the settings that values of others refer to."""

    overrides: list[Override]
    run: RunConfig
    references: list[str]


def compose_alike(
    compose: Callable[[list[str]], DictConfig], members: Sequence[Sequence[str]]
) -> Iterator[RunConfig]:
    """Yield the checked run of each member.

    Args:
        compose: composes overrides, without the section `hydra` in the result.
        members: the overrides of each member.

    Raises:
        ConfigError, OmegaConfBaseException, HydraException: as `compose` and `build_run`.
    """
    parse = cache(OverridesParser.create().parse_override)
    composed: dict[tuple[str, ...], _Composed] = {}
    for words in members:
        overrides = [parse(word) for word in words]
        shape = tuple(
            one.get_key_element() if _sets_value(one) else word
            for one, word in zip(overrides, words, strict=True)
        )
        try:
            run = _changed(composed[shape], overrides)
        except (NotPlain, KeyError, AttributeError, TypeError):
            config = compose(list(words))
            run = build_run(config)
            composed.setdefault(shape, _Composed(overrides, run, list(_references(config))))
        else:
            check_run(run)
        yield run


def _sets_value(override: Override) -> bool:
    """Whether it is `section.key=value` with a single value, so that it chooses no file."""
    key = override.get_key_element()
    single = isinstance(override.value(), bool | int | float | str | None)
    return re.fullmatch(r"\w+(\.\w+)+", key) is not None and single


def _changed(like: _Composed, overrides: Sequence[Override]) -> RunConfig:
    """The run of a composed member, with the values of other overrides of the same shape.

    Raises:
        NotPlain, KeyError, AttributeError, TypeError: only composing tells what the values mean.
    """
    run = like.run
    for index, (before, now) in enumerate(zip(like.overrides, overrides, strict=True)):
        if before.input_line == now.input_line:
            continue
        key = now.get_key_element()
        others = [one for one in (*overrides[:index], *overrides[index + 1 :]) if _may_set(one)]
        named = [one.get_key_element().lstrip("+~") for one in others]
        if any(_overlap(key, other) for other in (*named, *like.references)):
            raise NotPlain
        run = _with_value(run, key.split("."), now.value())
    return run


def _may_set(override: Override) -> bool:
    """Whether it sets keys, and not only chooses a file, whose values come before all others."""
    return "." in override.get_key_element() or not isinstance(override.value(), str)


def _overlap(one: str, other: str) -> bool:
    """Whether a key is the other, or a section around it."""
    return not other or f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _with_value(section: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    if rest:
        return replace(section, **{name: _with_value(getattr(section, name), rest, value)})
    return replace(section, **{name: plain_value(field_types(section.__class__)[name], value)})


def _references(config: DictConfig) -> Iterator[str]:
    """The keys in interpolations; an empty key, which overlaps with all, for other expressions."""
    for text in _texts(OmegaConf.to_container(config)):
        keys = re.findall(r"\$\{(\w+(?:\.\w+)*)\}", text)
        yield from keys if len(keys) == text.count("${") else [""]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value
