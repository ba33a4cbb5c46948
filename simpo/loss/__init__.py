"""Defines the base class of all losses, and the log-probabilities they are computed from.

A loss is one class with its settings, its formula as text and a pure function. The losses of simpo
are in the files of this folder and are found by their class; put your own loss beside them or in a
module outside (docs/extending.md). Letters, of the chosen (w) and the rejected (l) response:

    s  summed token log-probabilities         n  tokens
    l  their mean, s / n                      h  s minus s of the model before the first step

`simpo.loop.step` adds `loss.sft_weight` * NLL of the chosen responses to any loss. This folder
imports torch only when it computes, so that wrong settings are reported in under a second.
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
    """Log-probabilities of both responses of each pair of a row, the input of a loss.

    Attributes:
        chosen, rejected: float32 [P], summed over the scored tokens of the response.
        chosen_tokens, rejected_tokens: int64 [P], number of scored tokens; 0 without a response.
        reference: float32 [2P], the sums under the reference model, chosen and rejected
            alternating; None if the loss needs no reference.
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
        """Mean token log-probability of the rejected responses, float32 [P]; 0 without one."""
        return self.rejected / self.rejected_tokens.clamp(min=1)

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of policy to reference for chosen and rejected, summed over tokens, float32
        [P] each."""
        assert self.reference is not None, "scored without a reference"
        return self.chosen - self.reference[0::2], self.rejected - self.reference[1::2]

    def average_log_ratios(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of policy to reference for chosen and rejected, averaged over tokens, float32
        [P] each."""
        chosen, rejected = self.log_ratios()
        return chosen / self.chosen_tokens, rejected / self.rejected_tokens


class Preference(NamedTuple):
    """The loss of each pair and the rewards that it compares, float32 [P] each."""

    losses: Tensor
    chosen: Tensor
    rejected: Tensor


@dataclass(kw_only=True)
class LossConfig(ABC):
    """Settings and methods of every loss."""

    needs_rejected: ClassVar[bool] = True
    """Whether the loss uses the rejected responses; if not, the data may lack them."""
    needs_reference: ClassVar[bool] = False
    """Whether the loss uses log-probs under the model before the first step."""
    above_zero: ClassVar[tuple[str, ...]] = ()
    from_zero: ClassVar[tuple[str, ...]] = ()
    """Settings that must be above 0, and settings that must be 0 or more."""
    hints: ClassVar[dict[str, str]] = {}
    """Text appended to the message about a wrong setting, by name."""

    name: str = MISSING
    """Name of the loss; set by the group (loss=sigmoid, loss=orpo)."""
    module: str | None = None
    """Python module that defines the loss (docs/extending.md); null: it comes with simpo."""
    sft_weight: float = 0.0
    """Weight of the chosen responses' mean token NLL added to the loss; 0 is SimPO."""

    @abstractmethod
    def preference(self, logps: PairLogps) -> Preference:
        """Loss and rewards of each pair, without the SFT term."""

    @abstractmethod
    def terms(self) -> tuple[str, str]:
        """The preference loss of a pair as text, with its settings filled in, and its legend."""

    def formula(self) -> str:
        """The composed loss as one line of text."""
        preference, meaning = self.terms()
        nll = f"{self.sft_weight:g} * NLL per chosen token" if self.sft_weight else ""
        return f"loss = {' + '.join(filter(None, (preference, nll))) or '0'},  {meaning}"

    def problems(self) -> Iterator[str]:
        """Yield a line for each wrong setting: its name and what it must be."""
        for key in self.above_zero:
            if getattr(self, key) <= 0:
                yield f"{key}: must be above 0, got {getattr(self, key)}{self.hints.get(key, '')}"
        for key in (*self.from_zero, "sft_weight"):
            if getattr(self, key) < 0:
                yield f"{key}: must be 0 or more, got {getattr(self, key)}{self.hints.get(key, '')}"


@dataclass(kw_only=True)
class LogisticLoss(LossConfig):
    """A loss -log sigmoid(z) of how much the chosen response is preferred.

    With label smoothing e, which assumes that a share e of the pairs has swapped labels:
    -(1 - e) log sigmoid(z) - e log sigmoid(-z) (https://ericmitchell.ai/cdpo.pdf).
    """

    label_smoothing: float = 0.0
    """Assumed share of pairs whose labels are swapped; below 0.5."""

    def logistic(self, z: Tensor) -> Tensor:
        """The loss of each pair, float32 [P], from z [P]."""
        wrong = self.label_smoothing
        return -(1 - wrong) * log_sigmoid(z) - wrong * log_sigmoid(-z)

    def logistic_text(self, z: str, weight: float = 1.0) -> str:
        """The loss as text, times a weight, from z as text."""
        wrong, times = self.label_smoothing, f"{weight:g}*" * (weight != 1)
        if not wrong:
            return f"-{times}log sigmoid({z})"
        return (
            f"-{weight * (1 - wrong):g}*log sigmoid({z}) - {weight * wrong:g}*log sigmoid(-({z}))"
        )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.label_smoothing < 0.5:
            yield f"label_smoothing: must be from 0 to below 0.5, got {self.label_smoothing}"


def pair_losses(loss: LossConfig, logps: PairLogps) -> Tensor:
    """Preference loss of each pair, float32 [P], without the SFT term."""
    return loss.preference(logps).losses


def log_sigmoid(z: Tensor) -> Tensor:
    """log(1 / (1 + exp(-z))), numerically stable for large z of either sign."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(z)
