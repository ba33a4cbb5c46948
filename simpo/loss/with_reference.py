"""Losses with a reference model, which is the model before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simpo.loss import LOG_RATIO, REFERENCE, LogisticLoss, LossConfig, PairLogps, Preference


@dataclass(kw_only=True)
class DpoConfig(LogisticLoss):
    """DPO (https://arxiv.org/abs/2305.18290, eq. 7): -log sigmoid(beta * (h_w - h_l))."""

    needs_reference: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("beta",)

    name: str = "dpo"
    beta: float = 0.01
    """Scale of the log-ratio (the SimPO paper searches 0.01 to 0.1, and chose 0.01)."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = (self.beta * ratio for ratio in logps.log_ratios())
        return Preference(self.logistic(chosen - rejected), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        return self.logistic_text(f"{self.beta:g}*(h_w - h_l)"), LOG_RATIO


@dataclass(kw_only=True)
class LnDpoConfig(DpoConfig):
    """Length-normalised DPO (https://arxiv.org/abs/2411.15124, Tulu 3; `sigmoid_norm` of TRL):
    -log sigmoid(beta * (h_w / n_w - h_l / n_l)).
    """

    name: str = "ln_dpo"
    beta: float = 5.0
    """Scale of the mean token log-ratio (Tulu 3: 5)."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = (self.beta * ratio for ratio in logps.average_log_ratios())
        return Preference(self.logistic(chosen - rejected), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        meaning = f"h = mean token log-ratio of a response, {REFERENCE}"
        return self.logistic_text(f"{self.beta:g}*(h_w - h_l)"), meaning


@dataclass(kw_only=True)
class RDpoConfig(DpoConfig):
    """R-DPO (https://arxiv.org/abs/2403.19159; written as in Table 3 of the SimPO paper):
    -log sigmoid(beta * (h_w - h_l) + alpha * (n_w - n_l)). A longer chosen response gets a margin
    for its length, so it is reinforced less.
    """

    from_zero: ClassVar[tuple[str, ...]] = ("alpha",)

    name: str = "r_dpo"
    alpha: float = 0.05
    """Margin per response token (the SimPO paper searches 0.05 to 1)."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = logps.log_ratios()
        chosen = self.beta * chosen + self.alpha * logps.chosen_tokens
        rejected = self.beta * rejected + self.alpha * logps.rejected_tokens
        return Preference(self.logistic(chosen - rejected), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        meaning = f"h = summed token log-ratios of a response of n tokens, {REFERENCE}"
        z = f"{self.beta:g}*(h_w - h_l) + {self.alpha:g}*(n_w - n_l)"
        return self.logistic_text(z), meaning


@dataclass(kw_only=True)
class DpoShiftConfig(DpoConfig):
    """DPO-Shift (https://arxiv.org/abs/2502.07599): -log sigmoid(beta * (h_w - shift *
    h_l)). With less weight on the rejected response, the chosen one loses less probability.
    """

    above_zero: ClassVar[tuple[str, ...]] = ("beta", "shift")

    name: str = "dpo_shift"
    shift: float = 0.75
    """Weight of the rejected response's log-ratio, lambda of the paper (there 0.5 to 0.95); 1 is
    DPO."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = (self.beta * ratio for ratio in logps.log_ratios())
        rejected = self.shift * rejected
        return Preference(self.logistic(chosen - rejected), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        return self.logistic_text(f"{self.beta:g}*(h_w - {self.shift:g}*h_l)"), LOG_RATIO


@dataclass(kw_only=True)
class IpoConfig(LossConfig):
    """IPO (https://arxiv.org/abs/2310.12036, eq. 17): (h_w / n_w - h_l / n_l - 1 / (2 tau))^2.

    Averaged over tokens, as the authors ran it (according to TRL, which asked them).
    """

    needs_reference: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("tau",)

    name: str = "ipo"
    tau: float = 0.1
    """Sets the target margin, 1 / (2 * tau) nats (the SimPO paper searches 0.01 to 1)."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = logps.average_log_ratios()
        return Preference((chosen - rejected - 1 / (2 * self.tau)).square(), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        meaning = f"h = mean token log-ratio of a response, {REFERENCE}"
        return f"(h_w - h_l - {1 / (2 * self.tau):g})^2", meaning
