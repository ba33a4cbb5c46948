"""Weighted mixes of losses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from inspect import isabstract
from typing import Any

from simpo.loss import Compare, LossConfig, PairLogps, Preference

WEIGHT = "weight"


@dataclass(kw_only=True)
class MixConfig(LossConfig):
    """A weighted sum of losses (https://arxiv.org/abs/2411.10442: 0.8 dpo + 0.2 bco + 1 sft). A
    pair's rewards are the same sum of those of the losses.
    """

    name: str = "mix"
    parts: dict[str, Any] = field(default_factory=dict)
    """Weight of each loss by its name, or its weight and settings: {sigmoid: {weight: 0.8, beta:
    2.5}, bco: 0.2}. `sft_weight` is the mix's own; those of the parts do not count."""

    @property
    def needs_rejected(self) -> bool:  # type: ignore[override]
        """Whether one of the losses uses the rejected responses."""
        return any(loss.needs_rejected for _, loss in self.losses())

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether one of the losses uses log-probs under the model before the first step."""
        return any(loss.needs_reference for _, loss in self.losses())

    @property
    def couples_step(self) -> bool:  # type: ignore[override]
        """Whether the loss of a pair of one of them depends on the other pairs of its step."""
        return any(loss.couples_step for _, loss in self.losses())

    @property
    def needs_mismatched(self) -> bool:  # type: ignore[override]
        """Whether one of the losses needs a response to another prompt."""
        return any(loss.needs_mismatched for _, loss in self.losses())

    @property
    def needs_scores(self) -> bool:  # type: ignore[override]
        """Whether one of the losses needs the scores of chosen and rejected."""
        return any(loss.needs_scores for _, loss in self.losses())

    @property
    def needs_margins(self) -> bool:  # type: ignore[override]
        """Whether one of the losses needs the scores of the responses that it compares."""
        return any(loss.needs_margins for _, loss in self.losses())

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
    compare = Compare.all if kind.needs_margins else None
    part = kind(**{k: v for k, v in settings.items() if k != WEIGHT}, compare=compare)
    if part.ranks and not kind.needs_margins:
        why = "as it compares all responses at once (mix losses of pairs, with loss.compare)"
        yield f"{key}: cannot be mixed, {why}"
        return
    try:
        faults = list(part.problems())
    except TypeError:  # a text where a number belongs
        yield f"{key}: settings must be numbers, got {given}"
        return
    yield from (f"{key}.{fault}" for fault in faults)
