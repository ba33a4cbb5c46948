"""Other losses without a reference model, and supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from simpo.loss import AVERAGE, SUM, LogisticLoss, LossConfig, PairLogps, Preference

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class OrpoConfig(LogisticLoss):
    """ORPO (https://arxiv.org/abs/2403.07691, eq. 6 and 7): -lambda * log sigmoid(log odds ratio),
    log odds = log(p / (1 - p)), p = exp(l). The paper adds the NLL of the chosen response.
    """

    above_zero: ClassVar[tuple[str, ...]] = ("odds_weight",)

    name: str = "orpo"
    odds_weight: float = 0.1
    """Weight of the odds ratio: lambda in the paper, beta in TRL."""
    sft_weight: float = 1.0
    """Weight of the chosen responses' mean token NLL (the paper: 1)."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = map(self._log_odds, (logps.average_chosen, logps.average_rejected))
        return Preference(self.odds_weight * self.logistic(chosen - rejected), chosen, rejected)

    def _log_odds(self, average: Tensor) -> Tensor:
        from torch import finfo

        # At p = 1 the odds are infinite and the gradient would be 0 * infinity.
        average = average.clamp(max=-finfo(average.dtype).eps)
        return average - (-average.expm1()).log()

    def terms(self) -> tuple[str, str]:
        odds = f"log odds = l - log(1 - exp(l)), {AVERAGE}"
        return self.logistic_text("log odds_w - log odds_l", self.odds_weight), odds


@dataclass(kw_only=True)
class CpoConfig(LogisticLoss):
    """CPO (https://arxiv.org/abs/2401.08417): -log sigmoid(beta * (s_w - s_l)). The paper adds the
    NLL of the chosen response.
    """

    above_zero: ClassVar[tuple[str, ...]] = ("beta",)

    name: str = "cpo"
    beta: float = 0.1
    """Scale of the summed log-probabilities."""
    sft_weight: float = 1.0
    """Weight of the chosen responses' mean token NLL (the paper: 1)."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = self.beta * logps.chosen, self.beta * logps.rejected
        return Preference(self.logistic(chosen - rejected), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        return self.logistic_text(f"{self.beta:g}*(s_w - s_l)"), SUM


@dataclass(kw_only=True)
class SlicConfig(LossConfig):
    """SLiC-HF (https://arxiv.org/abs/2305.10425, eq. 1): max(0, delta - (s_w - s_l)). The paper
    adds lambda times the NLL of a target, here the chosen response.
    """

    from_zero: ClassVar[tuple[str, ...]] = ("delta",)

    name: str = "slic"
    delta: float = 1.0
    """Margin in nats (the SimPO paper searches 0.1 to 2)."""
    sft_weight: float = 1.0
    """Weight of the chosen responses' mean token NLL, lambda of the paper."""

    def preference(self, logps: PairLogps) -> Preference:
        losses = (self.delta - logps.chosen + logps.rejected).relu()
        return Preference(losses, logps.chosen, logps.rejected)

    def terms(self) -> tuple[str, str]:
        return f"max(0, {self.delta:g} - (s_w - s_l))", SUM


@dataclass(kw_only=True)
class RrhfConfig(LossConfig):
    """RRHF (https://arxiv.org/abs/2304.05302, eq. 2 and 3, two responses): max(0, l_l - l_w). The
    paper adds the NLL of the chosen response.
    """

    name: str = "rrhf"
    sft_weight: float = 1.0
    """Weight of the chosen responses' mean token NLL (the paper: 1)."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = logps.average_chosen, logps.average_rejected
        return Preference((rejected - chosen).relu(), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        return "max(0, l_l - l_w)", AVERAGE


@dataclass(kw_only=True)
class IpoFreeConfig(LossConfig):
    """IPO without a reference model (https://arxiv.org/abs/2310.12036, eq. 17):
    (l_w - l_l - 1 / (2 tau))^2.
    """

    above_zero: ClassVar[tuple[str, ...]] = ("tau",)

    name: str = "ipo_free"
    tau: float = 0.5
    """Sets the target margin, 1 / (2 * tau) nats."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = logps.average_chosen, logps.average_rejected
        return Preference((chosen - rejected - 1 / (2 * self.tau)).square(), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        return f"(l_w - l_l - {1 / (2 * self.tau):g})^2", AVERAGE


@dataclass(kw_only=True)
class SftConfig(LossConfig):
    """Supervised fine-tuning on the chosen responses. The loss is the SFT term alone; rewards are
    the mean log-probabilities.
    """

    needs_rejected: ClassVar[bool] = False

    name: str = "sft"
    sft_weight: float = 1.0
    """Weight of the chosen responses' mean token NLL, which is the whole loss here."""

    def preference(self, logps: PairLogps) -> Preference:
        zeros = logps.chosen.new_zeros(logps.chosen.shape)
        return Preference(zeros, logps.average_chosen, logps.average_rejected)

    def terms(self) -> tuple[str, str]:
        return "", AVERAGE

    def problems(self) -> Iterator[str]:
        if self.sft_weight != 1:
            yield f"sft_weight: must be 1 with loss=sft, got {self.sft_weight} (leave it out)"
