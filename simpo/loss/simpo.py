"""SimPO with its sigmoid and its hinge loss, and later variants of SimPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from simpo.loss import AVERAGE, SUM, LogisticLoss, LossConfig, PairLogps, Preference

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class SimpoConfig(LossConfig):
    """Settings shared by the sigmoid and the hinge form of SimPO."""

    above_zero: ClassVar[tuple[str, ...]] = ("beta",)
    from_zero: ClassVar[tuple[str, ...]] = ("gamma_beta_ratio",)
    hints: ClassVar[dict[str, str]] = {"beta": " (the paper uses 2.0 to 10)"}

    beta: float = 2.0
    """Scale of the reward, beta * average_logp (the paper uses 2.0 to 10)."""
    gamma_beta_ratio: float = 0.5
    """Target margin over beta: gamma = beta * gamma_beta_ratio (the paper uses 0.1 to 0.8)."""
    length_normalized: bool = True
    """Compare mean token log-probabilities, as SimPO does; False compares their sums, which favours
    long responses (the paper's ablation, Table 5)."""

    def margin(self, logps: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards of chosen and rejected, and z = their difference - gamma, float32 [P] each."""
        if self.length_normalized:
            chosen, rejected = self.beta * logps.average_chosen, self.beta * logps.average_rejected
        else:
            chosen, rejected = self.beta * logps.chosen, self.beta * logps.rejected
        return chosen, rejected, chosen - rejected - self.beta * self.gamma_beta_ratio

    def margin_terms(self) -> tuple[str, str]:
        """z as text, and its legend."""
        letter, meaning = ("l", AVERAGE) if self.length_normalized else ("s", SUM)
        gamma = self.beta * self.gamma_beta_ratio
        return f"{self.beta:g}*({letter}_w - {letter}_l) - {gamma:g}", meaning


@dataclass(kw_only=True)
class SigmoidConfig(LogisticLoss, SimpoConfig):
    """SimPO (https://arxiv.org/abs/2405.14734, eq. 4 and 6): -log sigmoid(z),
    z = beta * (l_w - l_l) - gamma, gamma = beta * gamma_beta_ratio.
    """

    name: str = "sigmoid"

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected, z = self.margin(logps)
        return Preference(self.logistic(z), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        z, meaning = self.margin_terms()
        return self.logistic_text(z), meaning


@dataclass(kw_only=True)
class HingeConfig(SimpoConfig):
    """SimPO with a hinge (https://github.com/princeton-nlp/SimPO): max(0, 1 - z)."""

    name: str = "hinge"

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected, z = self.margin(logps)
        return Preference((1 - z).relu(), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        z, meaning = self.margin_terms()
        return f"max(0, 1 - ({z}))", meaning


@dataclass(kw_only=True)
class AlphaPoConfig(LogisticLoss):
    """AlphaPO (https://arxiv.org/abs/2501.03884): -log sigmoid(r_w - r_l - gamma) with
    r = beta * (1 - p^-alpha) / alpha, p = exp(l); for alpha = 0 its limit, SimPO.

    Computed from l, since p underflows to 0 in float32 below l = -104.
    """

    above_zero: ClassVar[tuple[str, ...]] = ("beta",)
    from_zero: ClassVar[tuple[str, ...]] = ("gamma_beta_ratio",)

    name: str = "alphapo"
    beta: float = 2.5
    """Scale of the reward."""
    gamma_beta_ratio: float = 0.1
    """Target margin over beta: gamma = beta * gamma_beta_ratio."""
    alpha: float = 0.25
    """Shape of the reward: 0 is SimPO's logarithm, -1 the probability, above 0 steeper for rare
    responses."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = map(self._reward, (logps.average_chosen, logps.average_rejected))
        gamma = self.beta * self.gamma_beta_ratio
        return Preference(self.logistic(chosen - rejected - gamma), chosen, rejected)

    def _reward(self, average: Tensor) -> Tensor:
        bent = -(-self.alpha * average).expm1() / self.alpha if self.alpha else average
        return self.beta * bent

    def terms(self) -> tuple[str, str]:
        gamma = self.beta * self.gamma_beta_ratio
        reward = f"r = (1 - exp(-{self.alpha:g}*l))/{self.alpha:g}" if self.alpha else "r = l"
        z = f"{self.beta:g}*(r_w - r_l) - {gamma:g}"
        return self.logistic_text(z), f"{reward}, {AVERAGE}"


@dataclass(kw_only=True)
class RepoConfig(LossConfig):
    """RePO (https://arxiv.org/abs/2503.07426): max(0, margin - (l_w - l_l)), SimPO's limit for
    large beta.
    """

    from_zero: ClassVar[tuple[str, ...]] = ("margin",)

    name: str = "repo"
    margin: float = 0.5
    """Target margin in nats of a token, gamma of the paper (there 0.4 to 0.6)."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = logps.average_chosen, logps.average_rejected
        return Preference((self.margin - (chosen - rejected)).relu(), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        return f"max(0, {self.margin:g} - (l_w - l_l))", AVERAGE


@dataclass(kw_only=True)
class SimperConfig(LossConfig):
    """SimPER (https://arxiv.org/abs/2502.00883): exp(l_l) - exp(l_w), the difference of the inverse
    perplexities of both responses. It has no hyperparameter.
    """

    name: str = "simper"

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = logps.average_chosen.exp(), logps.average_rejected.exp()
        return Preference(rejected - chosen, chosen, rejected)

    def terms(self) -> tuple[str, str]:
        return "exp(l_l) - exp(l_w)", AVERAGE
