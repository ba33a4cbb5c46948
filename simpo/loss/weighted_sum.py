"""Weighted mixes of losses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from inspect import isabstract
from types import NoneType
from typing import Any, get_args, get_type_hints

from simpo.loss import Compare, LossConfig, PairLogps, Preference

WEIGHT = "weight"


def any_part(flag: str) -> Any:
    """A property of a mix: whether one of its losses has the flag."""
    return property(lambda mix: any(getattr(loss, flag) for _, loss in mix.losses()))


@dataclass(kw_only=True)
class MixConfig(LossConfig):
    """A weighted sum of losses (https://arxiv.org/abs/2411.10442: 0.8 dpo + 0.2 bco + 1 sft). A
    pair's rewards are the same sum of those of the losses.
    """

    name: str = "mix"
    parts: dict[str, Any] = field(default_factory=dict)
    """Weight of each loss by its name, or its weight and settings: {sigmoid: {weight: 0.8, beta:
    2.5}, bco: 0.2}. `sft_weight` is the mix's own; those of the parts do not count."""

    needs_rejected = any_part("needs_rejected")
    needs_reference = any_part("needs_reference")
    couples_step = any_part("couples_step")
    needs_mismatched = any_part("needs_mismatched")
    needs_scores = any_part("needs_scores")
    needs_margins = any_part("needs_margins")

    def losses(self) -> list[tuple[float, LossConfig]]:
        """The weight of each loss, and the loss."""
        return [self._part(name, given) for name, given in self.parts.items()]

    def _part(self, name: str, given: Any) -> tuple[float, LossConfig]:
        settings = dict(given) if isinstance(given, dict) else {WEIGHT: given}
        weight = float(settings.pop(WEIGHT))
        return weight, _known()[name](**settings)

    def preference(self, logps: PairLogps) -> Preference:
        found = [(weight, loss.preference(logps)) for weight, loss in self.losses()]
        weighted = [[weight * tensor for tensor in one] for weight, one in found]
        columns = zip(*weighted, strict=True)
        losses, chosen, rejected = (sum(column[1:], column[0]) for column in columns)
        return Preference(losses, chosen, rejected)

    def terms(self) -> tuple[str, str]:
        each = [(weight, *loss.terms()) for weight, loss in self.losses()]
        text = " + ".join(f"{weight:g}*({formula})" for weight, formula, _ in each)
        return text, "; ".join(dict.fromkeys(meaning for *_, meaning in each))

    def problems(self) -> Iterator[str]:
        if len(self.parts) < 2:
            example = "{sigmoid: 0.8, bco: 0.2}"
            yield f"parts: must name two losses or more, got {self.parts} (such as {example})"
        known = _known()
        faults = [text for part in self.parts.items() for text in _problems(*part, known)]
        yield from faults
        if not faults:  # what the mix needs is known by its parts
            yield from super().problems()


def _known() -> dict[str, type[LossConfig]]:
    """The losses that are imported, by name: those of simpo, and of a user's module."""
    kinds: list[type[LossConfig]] = LossConfig.__subclasses__()
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {kind.name: kind for kind in kinds if not isabstract(kind)}


def _problems(name: str, given: Any, known: dict[str, type[LossConfig]]) -> Iterator[str]:
    """Faults of a part of a mix."""
    kind, key = known.get(name), f"parts.{name}"
    if kind is None or kind in (MixConfig, known["sft"]):
        others = ", ".join(sorted(known.keys() - {"mix", "sft"}))
        yield f"parts: no loss {name} to mix (sft_weight adds the NLL; losses: {others})"
        return
    if kind.weighs_tokens or kind.needs_squares:
        yield f"parts: {name} cannot be mixed, as it weighs tokens"
        return
    settings = given if isinstance(given, dict) else {WEIGHT: given}
    weight: Any = settings.get(WEIGHT)
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not (is_number and 0 < weight < math.inf):
        yield f"{key}: must have a weight above 0, got {given}"
        return
    own = {item.name for item in fields(kind)} - {"name", "module", "sft_weight"}
    own -= {"compare", "margin_weights"}
    if unknown := sorted(settings.keys() - own - {WEIGHT}):
        keys = ", ".join(sorted(own)) or "it has none"
        yield f"{key}.{unknown[0]}: no such key of {name} ({keys})"
        return
    types = get_type_hints(kind)
    wrong = [name for name in own & settings.keys() if not _fits(settings[name], types[name])]
    flags = sorted(name for name in wrong if types[name] is bool)
    yield from (f"{key}.{name}: must be true or false, got {settings[name]}" for name in flags)
    if len(flags) < len(wrong):
        yield f"{key}: settings must be numbers, got {given}"
    if wrong:
        return
    compare = Compare.all if kind.needs_margins else None
    part = kind(**{k: v for k, v in settings.items() if k != WEIGHT}, compare=compare)
    if part.ranks and not kind.needs_margins:
        why = "as it compares all responses at once (mix losses of pairs, with loss.compare)"
        yield f"{key}: cannot be mixed, {why}"
        return
    yield from (f"{key}.{fault}" for fault in part.problems())


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has the type of its setting, which OmegaConf does not check in a dict."""
    kinds = get_args(kind) or (kind,)
    if not {bool, int, float, NoneType}.issuperset(kinds):  # of a user's loss
        return True
    return type(value) in kinds or (type(value) is int and float in kinds)
