"""Losses of all responses to a prompt as one list, and a pair loss with soft labels.

In formulas i is each response, j those of a lower score, K the number of responses, and p the
softmax of the scores. The chosen response of a pair without scores has all of p.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from simpo.loss import (
    AVERAGE,
    REFERENCE,
    Compare,
    Compared,
    LossConfig,
    PairLogps,
    Preference,
    ResponseLogps,
    log_sigmoid,
)
from simpo.loss.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

NO_REWARD = -1e30
"""Reward of a response that takes no part: exp of it is 0, and it is finite."""


@dataclass(kw_only=True)
class ListLoss(LossConfig):
    """A loss of the rewards and scores of all responses of a prompt."""

    above_zero: ClassVar[tuple[str, ...]] = ("beta",)
    best_only: ClassVar[bool] = False
    """Whether metrics of rewards are means over pairs with the best response alone."""

    beta: float = 0.01
    """Scale of the log-ratio."""

    @property
    def ranks(self) -> bool:
        """Whether the loss uses all responses of a record; it always does."""
        return True

    @abstractmethod
    def rewards(self, logps: ResponseLogps) -> Tensor:
        """The reward of each response, [P, K]."""

    @abstractmethod
    def losses(self, rewards: Tensor, ranks: Ranks) -> Tensor:
        """The loss of each prompt, [P], from rewards [P, K]."""

    def compared(self, logps: PairLogps) -> Compared:
        responses = logps.all_responses()
        ranks, rewards = responses.ranks(), self.rewards(responses)
        return Compared.of_lists(self.losses(rewards, ranks), rewards, ranks, self.best_only)

    def preference(self, logps: PairLogps) -> Preference:
        losses, *_, rewards = self.compared(logps)
        assert rewards is not None
        return Preference(losses, rewards[:, 0], rewards[:, 1])

    def problems(self) -> Iterator[str]:
        if self.compare is not None:
            yield f"compare: loss={self.name} compares all responses at once (leave it out)"
        yield from super().problems()


def above_worse(rewards: Tensor, ranks: Ranks) -> Tensor:
    """How far the reward of each response is above those of lower scores together, [P, K].

    It is r_i - log(sum_j exp(r_j)), and large where no response has a lower score.
    """
    worse = rewards[:, None, :].where(ranks.better, NO_REWARD)
    return rewards - worse.logsumexp(dim=2)


@dataclass(kw_only=True)
class PlackettLuceConfig(ListLoss):
    """Plackett-Luce (https://arxiv.org/abs/2305.18290, appendix A.3) with SimPO's reward: the
    probability that responses are drawn in the order of their scores, r = beta * l,
    -sum_i log(exp(r_i) / (exp(r_i) + sum_j exp(r_j))).

    Departs from the authors: their reward is a log-ratio to a reference; and responses of equal
    scores, whose order says nothing, are drawn from themselves and those of lower scores, not from
    each other. With `gamma_beta_ratio` two responses have SimPO's loss.
    """

    from_zero: ClassVar[tuple[str, ...]] = ("gamma_beta_ratio",)

    name: str = "plackett_luce"
    beta: float = 2.0
    """Scale of the reward, beta * average_logp."""
    gamma_beta_ratio: float = 0.0
    """SimPO's target margin at each draw, over beta: r_i counts beta * gamma_beta_ratio less."""

    def rewards(self, logps: ResponseLogps) -> Tensor:
        return self.beta * (logps.sums / logps.tokens.clamp(min=1))

    def losses(self, rewards: Tensor, ranks: Ranks) -> Tensor:
        z = above_worse(rewards, ranks) - self.beta * self.gamma_beta_ratio
        return -log_sigmoid(z).sum(dim=1)

    def terms(self) -> tuple[str, str]:
        gamma = self.beta * self.gamma_beta_ratio
        z = f"r_i - log sum_j exp(r_j){f' - {gamma:g}' if gamma else ''}"
        return (
            f"-sum_i log sigmoid({z})",
            f"r = {self.beta:g}*l, j of lower score than i, {AVERAGE}",
        )


@dataclass(kw_only=True)
class LogRatioListLoss(ListLoss):
    """A loss of r = beta * h of all responses."""

    needs_reference: ClassVar[bool] = True
    text: ClassVar[str] = ""
    """The formula, with r and p."""

    def rewards(self, logps: ResponseLogps) -> Tensor:
        assert logps.reference is not None, "scored without a reference"
        return self.beta * (logps.sums - logps.reference)

    def terms(self) -> tuple[str, str]:
        ratio = f"r = {self.beta:g} * summed token log-ratios of a response, {REFERENCE}"
        return self.text, ratio


@dataclass(kw_only=True)
class SDpoConfig(LogRatioListLoss):
    """S-DPO (https://arxiv.org/abs/2406.09215): the best response against all others at
    once, -log sigmoid(-log(sum_j exp(r_j - r_w))), w the best; with two responses it is DPO. The
    mean over the best if several have the highest score; these are not compared with each other.
    """

    best_only: ClassVar[bool] = True
    text: ClassVar[str] = "-log sigmoid(-log sum_j exp(r_j - r_w))"

    name: str = "s_dpo"
    beta: float = 0.1
    """Scale of the log-ratio."""

    def losses(self, rewards: Tensor, ranks: Ranks) -> Tensor:
        losses = -log_sigmoid(above_worse(rewards, ranks)).where(ranks.best, 0)
        return losses.sum(dim=1) / ranks.best.sum(dim=1)


@dataclass(kw_only=True)
class InfoNcaConfig(LogRatioListLoss):
    """InfoNCA (https://arxiv.org/abs/2402.05369): the cross-entropy of the softmax of the rewards
    with that of the scores, -sum_i p_i log(softmax_i(r)), p = softmax(scores / alpha).
    """

    above_zero: ClassVar[tuple[str, ...]] = ("beta", "alpha")
    text: ClassVar[str] = "-sum_i p_i*log softmax_i(r)"

    name: str = "infonca"
    alpha: float = 1.0
    """Temperature of the scores, in their units; small values leave all to the best response (the
    authors' code: 0.0001)."""

    def losses(self, rewards: Tensor, ranks: Ranks) -> Tensor:
        logs = rewards.where(ranks.present, NO_REWARD).log_softmax(dim=1)
        return -(ranks.targets(self.alpha) * logs).sum(dim=1)

    def terms(self) -> tuple[str, str]:
        text, ratio = super().terms()
        return text, f"p = softmax(scores/{self.alpha:g}), {ratio}"


@dataclass(kw_only=True)
class SoftLabelsConfig(LossConfig):
    """Soft labels (https://arxiv.org/abs/2410.03145, MMPO) for SimPO: with the probability
    p = sigmoid(tau * score margin) that the chosen response is better, the cross-entropy
    -p log sigmoid(z) - (1 - p) log sigmoid(-z), z = beta * (l_w - l_l) - gamma. p is 1 for pairs
    without scores.

    Departs from the authors, who have DPO's z. gamma is 0 by default, as p sets the margin.
    """

    needs_margins: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("beta", "tau")
    from_zero: ClassVar[tuple[str, ...]] = ("gamma_beta_ratio",)

    name: str = "soft_labels"
    compare: Compare | None = Compare.all
    beta: float = 2.0
    """Scale of the reward, beta * average_logp."""
    gamma_beta_ratio: float = 0.0
    """Target margin over beta: gamma = beta * gamma_beta_ratio."""
    tau: float = 1.0
    """Scale of the score margin: p = sigmoid(tau * margin)."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = self.beta * logps.average_chosen, self.beta * logps.average_rejected
        z = chosen - rejected - self.beta * self.gamma_beta_ratio
        if logps.margins is None:
            return Preference(-log_sigmoid(z), chosen, rejected)
        label = (self.tau * logps.margins).sigmoid().nan_to_num(1.0)
        losses = -label * log_sigmoid(z) - (1 - label) * log_sigmoid(-z)
        return Preference(losses, chosen, rejected)

    def terms(self) -> tuple[str, str]:
        gamma = self.beta * self.gamma_beta_ratio
        z = f"z = {self.beta:g}*(l_w - l_l){f' - {gamma:g}' if gamma else ''}"
        label = f"p = sigmoid({self.tau:g}*score margin)"
        return "-p*log sigmoid(z) - (1 - p)*log sigmoid(-z)", f"{z}, {label}, {AVERAGE}"
