"""What a loss is: settings, a formula in words and a pure function, in one class.

`LossConfig` is the base of all. The losses of simpo are in the files of this folder, found by
their classes: your own goes beside them, or stays outside (docs/extending.md). Letters, of the
chosen (w) and the rejected (l) response:

    s  summed token log-probabilities         n  tokens
    l  their mean, s / n                      h  s - that of the model before the first step

`simpo.loop.step` adds `loss.sft_weight` * NLL of the chosen to any loss. Nothing here imports torch
before it computes, so that a mistake in the settings is answered in well under a second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from omegaconf import MISSING

if TYPE_CHECKING:
    from torch import Tensor

AVERAGE = "l = mean token log-prob of a response"
SUM = "s = summed token log-probs of a response"
REFERENCE = "of the policy over the model it starts from"


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of both responses of each pair of a row: what a loss is computed from.

    Attributes:
        chosen, rejected: float32 [P], summed over the scored tokens of the response.
        chosen_tokens, rejected_tokens: int64 [P], how many that were; 0 where there is no response.
        reference: float32 [2P], the sums under the reference, chosen and rejected in turn; only
            where the loss needs one.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference: Tensor | None = None

    @property
    def average_chosen(self) -> Tensor:
        """Mean token log-probability of the chosen responses, float32 [P]."""
        return self.chosen / self.chosen_tokens

    @property
    def average_rejected(self) -> Tensor:
        """Mean token log-probability of the rejected responses, float32 [P]; 0 of none."""
        return self.rejected / self.rejected_tokens.clamp(min=1)

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Policy over reference, summed over tokens, of both responses, float32 [P] each."""
        assert self.reference is not None, "scored without a reference"
        return self.chosen - self.reference[0::2], self.rejected - self.reference[1::2]

    def average_log_ratios(self) -> tuple[Tensor, Tensor]:
        """Policy over reference, mean of tokens, of both responses, float32 [P] each."""
        chosen, rejected = self.log_ratios()
        return chosen / self.chosen_tokens, rejected / self.rejected_tokens


class Preference(NamedTuple):
    """What a loss makes of pairs, float32 [P] each.

    `chosen` and `rejected` are the rewards that it compares, `losses` the loss of each pair.
    """

    losses: Tensor
    chosen: Tensor
    rejected: Tensor


@dataclass(kw_only=True)
class LossConfig(ABC):
    """What every loss takes."""

    needs_rejected: ClassVar[bool] = True
    """Whether the rejected responses are looked at; without, data may lack them."""
    needs_reference: ClassVar[bool] = False
    """Whether log-probs under the model before the first step are."""
    above_zero: ClassVar[tuple[str, ...]] = ()
    from_zero: ClassVar[tuple[str, ...]] = ()
    """Settings that must be above 0, and those that may be 0 too."""
    hints: ClassVar[dict[str, str]] = {}
    """What is added to the message about a setting."""

    name: str = MISSING
    """Name of the loss; set by the group (loss=sigmoid, loss=orpo)."""
    module: str | None = None
    """Python module that defines the loss (docs/extending.md); null: it comes with simpo."""
    sft_weight: float = 0.0
    """Weight of the chosen responses' mean token NLL added to the loss; 0 is SimPO."""

    @abstractmethod
    def preference(self, logps: PairLogps) -> Preference:
        """Loss and rewards of each pair; the sft term is not in it."""

    @abstractmethod
    def terms(self) -> tuple[str, str]:
        """The preference loss of a pair as text, with its numbers, and what its letters mean."""

    def formula(self) -> str:
        """The composed loss as one line of text."""
        preference, meaning = self.terms()
        nll = f"{self.sft_weight:g} * NLL per chosen token" if self.sft_weight else ""
        return f"loss = {' + '.join(filter(None, (preference, nll))) or '0'},  {meaning}"

    def problems(self) -> Iterator[str]:
        for key in self.above_zero:
            if getattr(self, key) <= 0:
                yield f"{key}: must be above 0, got {getattr(self, key)}{self.hints.get(key, '')}"
        for key in (*self.from_zero, "sft_weight"):
            if getattr(self, key) < 0:
                yield f"{key}: must be 0 or more, got {getattr(self, key)}{self.hints.get(key, '')}"


def pair_losses(loss: LossConfig, logps: PairLogps) -> Tensor:
    """Preference loss of each pair, float32 [P]; the sft term is not in it."""
    return loss.preference(logps).losses


def log_sigmoid(z: Tensor) -> Tensor:
    """log(1 / (1 + exp(-z))), exact for large z of either sign."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(z)
