"""The losses that `loss=` chooses from: those of `simpo/loss`, found by their classes."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from inspect import isabstract
from types import ModuleType

from simpo import loss
from simpo.loss import LossConfig


def losses_of(module: ModuleType) -> dict[str, type[LossConfig]]:
    """The losses that a module defines, by name, in its order."""
    own = [x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__]
    kinds = [x for x in own if isinstance(x, type) and issubclass(x, LossConfig)]
    return {kind.name: kind for kind in kinds if not isabstract(kind)}


LOSSES: dict[str, type[LossConfig]] = {
    name: kind
    for file in pkgutil.iter_modules(loss.__path__)
    for name, kind in losses_of(import_module(f"{loss.__name__}.{file.name}")).items()
}
"""The losses by name."""
