"""Finds losses by their classes: those of simpo, and those of a user's module."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, make_dataclass
from importlib import import_module
from inspect import isabstract
from typing import Any

from simpo import loss
from simpo.config.own_code import RAISED, OwnCodeError, fault_of, load, raised_at
from simpo.config.paths import config_dir
from simpo.loss import LossConfig


def losses_of(module: str) -> dict[str, type[LossConfig]]:
    """The losses that an imported module defines, by name, in its order."""
    kinds = _kinds(module)
    return {kind.name: kind for kind in kinds if not (isabstract(kind) or _is_base(kind, kinds))}


def is_of(kind: type[LossConfig], module: str) -> bool:
    """Whether a module, or one below it, defines a loss."""
    return f"{kind.__module__}.".startswith(f"{module}.")


def _kinds(module: str) -> list[type[LossConfig]]:
    values = vars(import_module(module)).values()
    kinds = (x for x in values if isinstance(x, type) and issubclass(x, LossConfig))
    return [kind for kind in kinds if is_of(kind, module)]


def _is_base(kind: type[LossConfig], kinds: list[type[LossConfig]]) -> bool:
    """Whether it has no name, and others of the module derive from it."""
    return kind.name == LossConfig.name and any(kind in other.__mro__[1:] for other in kinds)


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
    files = (file.stem for file in (config_dir("conf") / "loss").glob("*.yaml"))
    owners = dict.fromkeys((*LOSSES, *files), "simpo")
    for kind in kinds:
        place = f":{kind.__name__}"
        if "__dataclass_fields__" not in vars(kind):
            yield f"{place} is not a dataclass (put @dataclass(kw_only=True) above it)"
        elif isabstract(kind) and not any(kind in other.__mro__[1:] for other in kinds):
            yield f"{place} lacks {', '.join(sorted(kind.__abstractmethods__))}"
        elif isabstract(kind) or _is_base(kind, kinds):
            continue
        elif kind.name == LossConfig.name:
            yield f'{place} has no name (write name: str = "..." in it)'
        elif not _is_plain(kind.name):
            yield (
                f"{place} must have a name of letters, digits and _, got {kind.name!r} (write "
                'name: str = "..." in it)'
            )
        elif owner := owners.get(kind.name):
            yield (
                f"{place} must have a name of its own, got {kind.name}, which {owner} has (write "
                'name: str = "..." in it)'
            )
        else:
            owners[kind.name] = kind.__name__


def _is_plain(name: object) -> bool:
    """Whether `loss=NAME` means the name."""
    plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z_][\w-]*", name)
    return bool(plain) and name not in ("null", "true", "false")


def problems_of(loss: LossConfig) -> list[str]:
    """What a loss says of its settings.

    Raises:
        OwnCodeError: the method is a user's, and fails.
    """
    if loss.module is None:
        return list(loss.problems())
    found = _asked(
        loss, "problems", lambda found: [found] if isinstance(found, str) else list(found)
    )
    if not all(isinstance(text, str) and ": " in text for text in found):
        rule = 'must return a list of texts such as "alpha: must be above 0"'
        raise OwnCodeError([f"{_place(loss, 'problems')} {rule}, got {found}"])
    return found


def terms_problems(loss: LossConfig) -> Iterator[str]:
    """What is wrong with the formula of a user's loss.

    Raises:
        OwnCodeError: its method fails.
    """
    terms = _asked(loss, "terms", lambda found: found)
    two = isinstance(terms, tuple) and len(terms) == 2
    if not two or not all(isinstance(text, str) for text in terms):
        yield f"{_place(loss, 'terms')} must return two texts, formula and legend, got {terms!r}"


def _place(loss: LossConfig, method: str) -> str:
    return f"loss.module: {loss.module}:{type(loss).__name__}.{method}"


def _asked(loss: LossConfig, method: str, taken: Callable[[Any], Any]) -> Any:
    place = _place(loss, method)
    try:
        return taken(getattr(loss, method)())
    except RAISED as error:
        raise OwnCodeError([f"{place} fails: {fault_of(error, type(loss).__module__)}"]) from error


@contextmanager
def made_of(kind: type[LossConfig]) -> Iterator[None]:
    """Entered where settings are made into a loss, which a user's class may refuse.

    Raises:
        OwnCodeError: it does, or fails.
    """
    try:
        yield
    except RAISED as error:
        if not raised_at(error, kind.__module__):
            raise
        place = f"loss.module: {kind.__module__}:{kind.__name__}"
        raise OwnCodeError([f"{place} fails: {fault_of(error, kind.__module__)}"]) from error


def read_only(values: Mapping[str, Any]) -> type[LossConfig]:
    """A stand-in for a loss whose module is not imported, as its settings are only read."""
    base = {item.name for item in fields(LossConfig)}
    own = [(key, Any) for key in values if key not in base]
    nothing = dict.fromkeys(LossConfig.__abstractmethods__)
    return make_dataclass("OwnLoss", own, bases=(LossConfig,), kw_only=True, namespace=nothing)
