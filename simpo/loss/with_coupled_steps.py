"""Losses of a pair that depend on the other pairs of its step.

Their authors compute them over the few pairs that one process holds at a time, so that the size of
a micro-batch and the number of processes change what is learned. Here they are computed over all
pairs of a step, those of all processes, and in evaluation over all held-out pairs. What the pairs
have in common is detached: it is part of the target, and no gradient goes through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from simpo.loss import (
    AVERAGE,
    LOG_RATIO,
    REFERENCE,
    SUM,
    LogisticLoss,
    LossConfig,
    PairLogps,
    Preference,
)

if TYPE_CHECKING:
    from torch import Tensor

MARGIN_ROUNDS = 200
"""Rounds in which gamma-PO finds its margins: to rounding with its authors' settings."""
SMALLEST_SHARE = 1e-10
"""The smallest margin over the mean one of which gamma-PO takes a logarithm."""
LOWEST_BETA = 1e-3
"""The smallest beta of beta-DPO, as its authors have it."""
ROUNDING = 1e-12
"""Equal differences may be so far from their mean, in nats."""


@dataclass(kw_only=True)
class AotConfig(LogisticLoss):
    """AOT (https://arxiv.org/abs/2406.05882, paired): -log sigmoid(beta * (d - t)), d = s_w - s_l,
    which has rank k among the pairs of the step; t is the k-th smallest of the same differences of
    the reference. The whole distribution of d is moved above that of the reference, not each pair.

    The authors sort a micro-batch.
    """

    couples_step: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("beta",)

    name: str = "aot"
    beta: float = 0.1
    """Scale of the log-ratio (TRL: 0.1)."""

    def preference(self, logps: PairLogps) -> Preference:
        assert logps.reference is not None, "scored without a reference"
        differences = logps.chosen - logps.rejected
        targets = (logps.reference[0::2] - logps.reference[1::2]).sort().values
        ranks = differences.argsort(stable=True).argsort()
        chosen, rejected = (self.beta * ratio for ratio in logps.log_ratios())
        return Preference(
            self.logistic(self.beta * (differences - targets[ranks])), chosen, rejected
        )

    def terms(self) -> tuple[str, str]:
        meaning = f"d = s_w - s_l, {SUM}; t = d of the same rank in the step, of the reference"
        return self.logistic_text(f"{self.beta:g}*(d - t)"), meaning


@dataclass(kw_only=True)
class AmapoConfig(LogisticLoss):
    """AMaPO (https://arxiv.org/abs/2511.09385): -log sigmoid(beta * (d - m)), d = l_w - l_l. A pair
    with d below the mean of the step has the margin m = exp(z * mean), z = (mean - d) / standard
    deviation; another has none. The margin takes the place of SimPO's gamma.

    The authors have the mean and the deviation of one micro-batch of each process.
    """

    couples_step: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("beta",)

    name: str = "amapo"
    beta: float = 2.0
    """Scale of the reward (the authors: 2 to 3)."""

    def preference(self, logps: PairLogps) -> Preference:
        differences = logps.average_chosen - logps.average_rejected
        z = self.beta * (differences - adaptive_margins(differences.detach()))
        chosen, rejected = self.beta * logps.average_chosen, self.beta * logps.average_rejected
        return Preference(self.logistic(z), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        margin = "m = exp((mean - d)/deviation*mean) of the step where d < mean, else 0"
        return self.logistic_text(f"{self.beta:g}*(d - m)"), f"d = l_w - l_l, {AVERAGE}; {margin}"


def adaptive_margins(differences: Tensor) -> Tensor:
    """Margins of AMaPO in nats, from the differences of all pairs of a step, [P] each."""
    from torch import where

    below = differences.mean() - differences
    deviation = (below.square().sum() / max(len(below) - 1, 1)).sqrt()
    z = below / deviation.clamp(min=ROUNDING)
    return where(below > ROUNDING, (z * differences.mean()).exp(), 0)


@dataclass(kw_only=True)
class GammaPoConfig(LogisticLoss):
    """gamma-PO (https://arxiv.org/abs/2506.03690, with SimPO's reward): -log sigmoid(d - g),
    d = beta * (l_w - l_l). The margins g of a step, with mean beta * gamma_beta_ratio, minimise
    mean(-log sigmoid(d - g)) + tau * KL(g / sum of g, uniform): a pair that is clearly right has a
    larger one, a pair that may be noise a smaller one.

    The authors find the margins among 256 of the last 2,048 differences of one process, drawn anew
    each time, in 20 rounds.
    """

    couples_step: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("beta", "gamma_beta_ratio", "tau")

    name: str = "gamma_po"
    beta: float = 10.0
    """Scale of the reward (the authors: 2.5 to 10)."""
    gamma_beta_ratio: float = 0.4
    """Mean target margin over beta (the authors: 0.15 to 0.5)."""
    tau: float = 10.0
    """How much the margins of a step are alike (the authors: 3 to 20); SimPO for large tau."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = self.beta * logps.average_chosen, self.beta * logps.average_rejected
        gamma = self.beta * self.gamma_beta_ratio
        margins = shared_margins((chosen - rejected).detach(), gamma, self.tau)
        return Preference(self.logistic(chosen - rejected - margins), chosen, rejected)

    def terms(self) -> tuple[str, str]:
        gamma = self.beta * self.gamma_beta_ratio
        margin = f"mean of g = {gamma:g} in the step, more of it for larger margins"
        return self.logistic_text(f"{self.beta:g}*(l_w - l_l) - g"), f"{AVERAGE}; {margin}"


def shared_margins(differences: Tensor, mean: float, tau: float) -> Tensor:
    """Margins of gamma-PO from the reward differences of all pairs of a step, [P] each.

    Exponentiated gradient descent on the margin of each pair over the mean one, from equal ones.
    The rate is one at which no round leads uphill: tau and mean^2 * shares / 4 bound the curvature.
    """
    shares = differences.new_ones(differences.shape)
    for _ in range(MARGIN_ROUNDS):
        slope = tau * shares.clamp(min=SMALLEST_SHARE).log()
        slope = slope + mean * (mean * shares - differences).sigmoid()
        rate = 1 / (tau + mean**2 * shares.max() / 4)
        shares = shares * (-rate * (slope - slope.min())).exp()
        shares = shares / shares.mean()
    return mean * shares


@dataclass(kw_only=True)
class BetaDpoConfig(LogisticLoss):
    """beta-DPO (https://arxiv.org/abs/2407.08639): -log sigmoid(b * (h_w - h_l)) of the pairs of
    the step that are left when a share `drop` is dropped, those whose h_w - h_l is farthest from
    the mean. b = beta * (1 + alpha * (mean of those left - mean of all)), at least 0.001.

    The authors keep a running mean over steps instead of the step's, by which a step would depend
    on those before it; and they draw the pairs that are left by a normal distribution around it.
    """

    couples_step: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("beta",)
    from_zero: ClassVar[tuple[str, ...]] = ("alpha", "drop")

    name: str = "beta_dpo"
    beta: float = 0.1
    """Scale of the log-ratio before it is adapted (the authors: 0.1)."""
    alpha: float = 0.6
    """Change of beta for each nat by which the mean of the pairs left is above that of all."""
    drop: float = 0.2
    """Share of the pairs of a step that is dropped; below 1. 0 is DPO."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = logps.log_ratios()
        ratios = chosen - rejected
        left = nearest_the_mean(ratios.detach(), self.drop)
        shift = ratios.detach()[left].mean() - ratios.detach().mean()
        beta = (self.beta * (1 + self.alpha * shift)).clamp(min=LOWEST_BETA)
        # The mean over all pairs of the step is that over the pairs left.
        counted = ratios.new_zeros(ratios.shape)
        counted[left] = len(ratios) / len(left)
        losses = counted * self.logistic(beta * ratios)
        return Preference(losses, self.beta * chosen, self.beta * rejected)

    def terms(self) -> tuple[str, str]:
        share = f"{1 - self.drop:g} of the step's pairs, nearest to its mean h_w - h_l"
        beta = f"b = {self.beta:g}*(1 + {self.alpha:g}*(mean of these - mean of all))"
        meaning = f"of {share}; {beta}, h = summed token log-ratios, {REFERENCE}"
        return self.logistic_text("b*(h_w - h_l)"), meaning

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.drop >= 1:
            yield f"drop: must be below 1, got {self.drop}"


def nearest_the_mean(values: Tensor, drop: float) -> Tensor:
    """Indices of the values that are left without a share of those farthest from the mean; of equal
    ones the first, and at least one value."""
    # Of 10 values and 0.8 this is 2, where 10 * (1 - 0.8) is below it.
    left = max(1, int(round(len(values) * (1 - drop), 9)))
    return (values - values.mean()).abs().argsort(stable=True)[:left]


@dataclass(kw_only=True)
class KtoConfig(LossConfig):
    """KTO (https://arxiv.org/abs/2402.01306): 1 - sigmoid(beta * (h_w - z)) of desirable responses,
    1 - sigmoid(beta * (z - h_l)) of undesirable ones, z = max(0, mean h of mismatched responses).
    The mean over all responses of a step; a pair has one of each.

    A mismatched response is that of the next pair in the data set with another prompt, the chosen
    one if it has two. So it is the same in every epoch, and scored by the reference once. The
    authors take the next one of a micro-batch.
    """

    couples_step: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    needs_mismatched: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True
    mean_over_responses: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("beta",)
    from_zero: ClassVar[tuple[str, ...]] = ("desirable_weight", "undesirable_weight")

    name: str = "kto"
    beta: float = 0.1
    """Scale of the log-ratio (the authors: 0.1)."""
    desirable_weight: float = 1.0
    """Weight of desirable responses."""
    undesirable_weight: float = 1.0
    """Weight of undesirable responses. The authors advise that weight * number of the desirable is
    1 to 1.33 times that of the undesirable."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = logps.log_ratios()
        z = self.reference_point(logps)
        desirable = self.desirable_weight * (1 - (self.beta * (chosen - z)).sigmoid())
        undesirable = self.undesirable_weight * (1 - (self.beta * (z - rejected)).sigmoid())
        has_chosen, has_rejected = logps.chosen_tokens > 0, logps.rejected_tokens > 0
        # The mean over the pairs of the step is that over its responses.
        share = len(chosen) / (has_chosen.sum() + has_rejected.sum())
        losses = share * (has_chosen * desirable + has_rejected * undesirable)
        return Preference(losses, self.beta * chosen, self.beta * rejected)

    def reference_point(self, logps: PairLogps) -> Tensor:
        """The mean log-ratio of the mismatched responses of the step, detached, at least 0."""
        responses = logps.responses
        assert responses is not None and responses.reference is not None
        ratios = (responses.sums - responses.reference)[:, 2].detach()
        there = responses.tokens[:, 2] > 0
        mean: Tensor = (there * ratios).sum() / there.sum().clamp(min=1)
        return mean.clamp(min=0)

    def terms(self) -> tuple[str, str]:
        weights = (self.desirable_weight, self.undesirable_weight)
        good, bad = (f"{weight:g}*" * (weight != 1) for weight in weights)
        desirable = f"{good}(1 - sigmoid({self.beta:g}*(h_w - z)))"
        undesirable = f"{bad}(1 - sigmoid({self.beta:g}*(z - h_l)))"
        z = "z = max(0, mean h of mismatched responses)"
        return f"mean of {desirable} and {undesirable}", f"{z}, {LOG_RATIO}"
