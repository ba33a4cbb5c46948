"""Settings of the objectives. Each tells its own formula; the mathematics is in `simpo.loss`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from omegaconf import MISSING

AVERAGE = "l = mean token log-prob of a response"
SUM = "s = summed token log-probs of a response"
REFERENCE = "of the policy over the model it starts from"


@dataclass(kw_only=True)
class LossConfig:
    """What every objective takes."""

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
    """Objective; set by the group (loss=sigmoid, loss=orpo)."""
    sft_weight: float = 0.0
    """Weight of the chosen responses' mean token NLL added to the loss; 0 is SimPO."""

    def problems(self) -> Iterator[str]:
        for key in self.above_zero:
            if getattr(self, key) <= 0:
                yield f"{key}: must be above 0, got {getattr(self, key)}{self.hints.get(key, '')}"
        for key in (*self.from_zero, "sft_weight"):
            if getattr(self, key) < 0:
                yield f"{key}: must be 0 or more, got {getattr(self, key)}{self.hints.get(key, '')}"

    def formula(self) -> str:
        """The composed objective as one line of text, with its numbers."""
        preference, meaning = self._formula()
        nll = f"{self.sft_weight:g} * NLL per chosen token" if self.sft_weight else ""
        return f"loss = {' + '.join(filter(None, (preference, nll))) or '0'},  {meaning}"

    def _formula(self) -> tuple[str, str]:
        """The preference loss of a pair, and what its letters mean."""
        raise NotImplementedError


@dataclass(kw_only=True)
class SimpoConfig(LossConfig):
    """SimPO on average log-probabilities; what both forms of it take."""

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

    def _margin(self) -> tuple[str, str]:
        letter, meaning = ("l", AVERAGE) if self.length_normalized else ("s", SUM)
        gamma = self.beta * self.gamma_beta_ratio
        return f"{self.beta:g}*({letter}_w - {letter}_l) - {gamma:g}", meaning


@dataclass(kw_only=True)
class SigmoidConfig(SimpoConfig):
    """-log sigmoid(beta * (average_logp chosen - average_logp rejected) - gamma)."""

    name: str = "sigmoid"
    label_smoothing: float = 0.0
    """Assumed share of pairs whose labels are swapped; below 0.5."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.label_smoothing < 0.5:
            yield f"label_smoothing: must be from 0 to below 0.5, got {self.label_smoothing}"

    def _formula(self) -> tuple[str, str]:
        z, meaning = self._margin()
        wrong = self.label_smoothing
        if wrong:
            return f"-{1 - wrong:g}*log sigmoid({z}) - {wrong:g}*log sigmoid(-({z}))", meaning
        return f"-log sigmoid({z})", meaning


@dataclass(kw_only=True)
class HingeConfig(SimpoConfig):
    """max(0, 1 - (beta * (average_logp chosen - average_logp rejected) - gamma))."""

    name: str = "hinge"

    def _formula(self) -> tuple[str, str]:
        z, meaning = self._margin()
        return f"max(0, 1 - ({z}))", meaning


@dataclass(kw_only=True)
class AlphaPoConfig(LossConfig):
    """-log sigmoid(r(chosen) - r(rejected) - gamma), r = beta * (1 - exp(-alpha * l)) / alpha."""

    above_zero: ClassVar[tuple[str, ...]] = ("beta",)
    from_zero: ClassVar[tuple[str, ...]] = ("gamma_beta_ratio",)

    name: str = "alphapo"
    beta: float = 2.5
    """Scale of the reward."""
    gamma_beta_ratio: float = 0.1
    """Target margin over beta: gamma = beta * gamma_beta_ratio."""
    alpha: float = 0.25
    """Bend of the reward: 0 is SimPO's logarithm, -1 the probability, above 0 steeper for rare
    responses."""

    def _formula(self) -> tuple[str, str]:
        gamma = self.beta * self.gamma_beta_ratio
        reward = f"r = (1 - exp(-{self.alpha:g}*l))/{self.alpha:g}" if self.alpha else "r = l"
        return f"-log sigmoid({self.beta:g}*(r_w - r_l) - {gamma:g})", f"{reward}, {AVERAGE}"


@dataclass(kw_only=True)
class OrpoConfig(LossConfig):
    """NLL of the chosen - lambda * log sigmoid(log odds(chosen) - log odds(rejected))."""

    above_zero: ClassVar[tuple[str, ...]] = ("odds_weight",)

    name: str = "orpo"
    odds_weight: float = 0.1
    """Weight of the odds ratio: lambda in the paper, beta in TRL."""
    sft_weight: float = 1.0
    """Weight of the chosen responses' mean token NLL (the paper: 1)."""

    def _formula(self) -> tuple[str, str]:
        odds = f"log odds = l - log(1 - exp(l)), {AVERAGE}"
        return f"-{self.odds_weight:g}*log sigmoid(log odds_w - log odds_l)", odds


@dataclass(kw_only=True)
class CpoConfig(LossConfig):
    """-log sigmoid(beta * (logp chosen - logp rejected)) + NLL of the chosen."""

    above_zero: ClassVar[tuple[str, ...]] = ("beta",)

    name: str = "cpo"
    beta: float = 0.1
    """Scale of the summed log-probabilities."""
    sft_weight: float = 1.0
    """Weight of the chosen responses' mean token NLL (the paper: 1)."""

    def _formula(self) -> tuple[str, str]:
        return f"-log sigmoid({self.beta:g}*(s_w - s_l))", SUM


@dataclass(kw_only=True)
class SlicConfig(LossConfig):
    """max(0, delta - (logp chosen - logp rejected)) + lambda * NLL of the chosen."""

    from_zero: ClassVar[tuple[str, ...]] = ("delta",)

    name: str = "slic"
    delta: float = 1.0
    """Margin in nats (the SimPO paper searches 0.1 to 2)."""
    sft_weight: float = 1.0
    """Weight of the chosen responses' mean token NLL, lambda of the paper."""

    def _formula(self) -> tuple[str, str]:
        return f"max(0, {self.delta:g} - (s_w - s_l))", SUM


@dataclass(kw_only=True)
class RrhfConfig(LossConfig):
    """max(0, average_logp rejected - average_logp chosen) + NLL of the chosen."""

    name: str = "rrhf"
    sft_weight: float = 1.0
    """Weight of the chosen responses' mean token NLL (the paper: 1)."""

    def _formula(self) -> tuple[str, str]:
        return "max(0, l_l - l_w)", AVERAGE


@dataclass(kw_only=True)
class IpoFreeConfig(LossConfig):
    """(average_logp chosen - average_logp rejected - 1 / (2 * tau))^2."""

    above_zero: ClassVar[tuple[str, ...]] = ("tau",)

    name: str = "ipo_free"
    tau: float = 0.5
    """The margin aimed at is 1 / (2 * tau) nats."""

    def _formula(self) -> tuple[str, str]:
        return f"(l_w - l_l - {1 / (2 * self.tau):g})^2", AVERAGE


@dataclass(kw_only=True)
class SimperConfig(LossConfig):
    """exp(average_logp rejected) - exp(average_logp chosen), which has nothing to tune."""

    name: str = "simper"

    def _formula(self) -> tuple[str, str]:
        return "exp(l_l) - exp(l_w)", AVERAGE


@dataclass(kw_only=True)
class RepoConfig(LossConfig):
    """max(0, margin - (average_logp chosen - average_logp rejected))."""

    from_zero: ClassVar[tuple[str, ...]] = ("margin",)

    name: str = "repo"
    margin: float = 0.5
    """Target margin in nats of a token, gamma of the paper (there 0.4 to 0.6)."""

    def _formula(self) -> tuple[str, str]:
        return f"max(0, {self.margin:g} - (l_w - l_l))", AVERAGE


@dataclass(kw_only=True)
class DpoConfig(LossConfig):
    """-log sigmoid(beta * (log-ratio chosen - log-ratio rejected))."""

    needs_reference: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("beta",)

    name: str = "dpo"
    beta: float = 0.01
    """Scale of the log-ratio (the SimPO paper searches 0.01 to 0.1, and chose 0.01)."""

    def _formula(self) -> tuple[str, str]:
        meaning = f"h = summed token log-ratios of a response, {REFERENCE}"
        return f"-log sigmoid({self.beta:g}*(h_w - h_l))", meaning


@dataclass(kw_only=True)
class LnDpoConfig(DpoConfig):
    """-log sigmoid(beta * (mean log-ratio chosen - mean log-ratio rejected)): DPO, normalised."""

    name: str = "ln_dpo"
    beta: float = 5.0
    """Scale of the mean token log-ratio (Tulu 3: 5)."""

    def _formula(self) -> tuple[str, str]:
        meaning = f"h = mean token log-ratio of a response, {REFERENCE}"
        return f"-log sigmoid({self.beta:g}*(h_w - h_l))", meaning


@dataclass(kw_only=True)
class RDpoConfig(DpoConfig):
    """-log sigmoid(beta * (log-ratio chosen - rejected) + alpha * (length chosen - rejected))."""

    from_zero: ClassVar[tuple[str, ...]] = ("alpha",)

    name: str = "r_dpo"
    alpha: float = 0.05
    """Price of a response token (the SimPO paper searches 0.05 to 1)."""

    def _formula(self) -> tuple[str, str]:
        meaning = f"h = summed token log-ratios of a response of n tokens, {REFERENCE}"
        return f"-log sigmoid({self.beta:g}*(h_w - h_l) + {self.alpha:g}*(n_w - n_l))", meaning


@dataclass(kw_only=True)
class IpoConfig(LossConfig):
    """(mean log-ratio chosen - mean log-ratio rejected - 1 / (2 * tau))^2."""

    needs_reference: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("tau",)

    name: str = "ipo"
    tau: float = 0.1
    """The margin aimed at is 1 / (2 * tau) nats (the SimPO paper searches 0.01 to 1)."""

    def _formula(self) -> tuple[str, str]:
        meaning = f"h = mean token log-ratio of a response, {REFERENCE}"
        return f"(h_w - h_l - {1 / (2 * self.tau):g})^2", meaning


@dataclass(kw_only=True)
class SftConfig(LossConfig):
    """NLL of the chosen responses: supervised fine-tuning, the stage before preferences."""

    needs_rejected: ClassVar[bool] = False

    name: str = "sft"
    sft_weight: float = 1.0
    """Weight of the chosen responses' mean token NLL, here all of the loss."""

    def problems(self) -> Iterator[str]:
        if self.sft_weight != 1:
            yield f"sft_weight: is all of the loss, got {self.sft_weight} (leave it at 1)"

    def _formula(self) -> tuple[str, str]:
        return "", AVERAGE


LOSSES: dict[str, type[LossConfig]] = {
    kind.name: kind
    for kind in (
        SigmoidConfig, HingeConfig, AlphaPoConfig, OrpoConfig, CpoConfig, SlicConfig, RrhfConfig,
        IpoFreeConfig, SimperConfig, RepoConfig, DpoConfig, LnDpoConfig, RDpoConfig, IpoConfig,
        SftConfig,
    )
}  # fmt: skip
"""The objectives of the group `loss` by name."""
