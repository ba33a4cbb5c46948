"""Finds losses by their classes: those of simpo, and those of a user's module."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, make_dataclass
from importlib import import_module
from inspect import isabstract
from typing import Any

from simpo import loss
from simpo.config.own_code import OwnCodeError, load
from simpo.loss import LossConfig


def losses_of(module: str) -> dict[str, type[LossConfig]]:
    """The losses that an imported module defines, by name, in its order."""
    return {kind.name: kind for kind in _kinds(module) if not isabstract(kind)}


def is_of(kind: type[LossConfig], module: str) -> bool:
    """Whether a module, or one below it, defines a loss."""
    return f"{kind.__module__}.".startswith(f"{module}.")


def _kinds(module: str) -> list[type[LossConfig]]:
    values = vars(import_module(module)).values()
    kinds = (x for x in values if isinstance(x, type) and issubclass(x, LossConfig))
    return [kind for kind in kinds if is_of(kind, module)]


LOSSES: dict[str, type[LossConfig]] = {
    name: kind
    for file in pkgutil.iter_modules(loss.__path__)
    for name, kind in losses_of(f"{loss.__name__}.{file.name}").items()
}
"""The losses of simpo by name."""


def own_losses(module: str) -> dict[str, type[LossConfig]]:
    """Import a user's module and return the losses that it defines.

    Raises:
        OwnCodeError: it cannot be imported, or defines no loss or an incomplete one.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module) or module.endswith(".py"):
        raise OwnCodeError(
            [f"loss.module: must name a Python module such as my_losses, got {module or 'nothing'}"]
        )
    load("loss.module", module)
    if problems := list(_problems(module)):
        raise OwnCodeError([f"loss.module: {module}{problem}" for problem in problems])
    return losses_of(module)


def _problems(module: str) -> Iterator[str]:
    kinds = _kinds(module)
    if not kinds:
        yield " defines no loss (a dataclass derived from simpo.loss.LossConfig)"
    for kind in kinds:
        place = f":{kind.__name__}"
        if "__dataclass_fields__" not in vars(kind):
            yield f"{place} is not a dataclass (put @dataclass(kw_only=True) above it)"
        elif isabstract(kind) and not any(kind in other.__mro__[1:] for other in kinds):
            yield f"{place} lacks {', '.join(sorted(kind.__abstractmethods__))}"
        elif not isabstract(kind) and kind.name in (*LOSSES, LossConfig.name):
            yield f"{place} must have a name of its own, got {kind.name}"


def read_only(values: Mapping[str, Any]) -> type[LossConfig]:
    """A stand-in for a loss whose module is not imported, as its settings are only read."""
    base = {item.name for item in fields(LossConfig)}
    own = [(key, Any) for key in values if key not in base]
    nothing = dict.fromkeys(LossConfig.__abstractmethods__)
    return make_dataclass("OwnLoss", own, bases=(LossConfig,), kw_only=True, namespace=nothing)
