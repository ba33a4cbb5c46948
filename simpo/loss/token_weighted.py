"""Losses that weigh tokens before they are summed, or pairs by what the model or their scores say.

The weights are constants: no gradient goes through them. The SFT term weighs every token alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from simpo.loss import (
    REFERENCE,
    LogisticLoss,
    PairLogps,
    Preference,
    ResponseLogps,
    TokenLogps,
    log_sigmoid,
)
from simpo.loss.with_reference import DpoConfig

if TYPE_CHECKING:
    from torch import Tensor

_MASK = 2**32 - 1


@dataclass(kw_only=True)
class WpoConfig(DpoConfig):
    """WPO (https://arxiv.org/abs/2406.11827, sampling alignment): w times the loss of DPO,
    w = min(1, exp(a_w + a_l)), a = mean over the tokens of log p - log(sum of p^2 over the
    vocabulary). Pairs that the policy itself would write count more.

    The paper has no maximum; the authors' code has it.
    """

    needs_squares: ClassVar[bool] = True

    name: str = "wpo"

    def preference(self, logps: PairLogps) -> Preference:
        losses, chosen, rejected = super().preference(logps)
        return Preference(pair_weights(_responses(logps)) * losses, chosen, rejected)

    def terms(self) -> tuple[str, str]:
        loss, ratio = super().terms()
        weight = "w = min(1, exp(a_w + a_l)), a = mean of log p - log(sum of p^2) over the tokens"
        return f"w*({loss})", f"{weight}, {ratio}"


def pair_weights(responses: ResponseLogps) -> Tensor:
    """The weights of WPO, [P], without gradient: how likely the policy writes both responses of a
    pair, over how likely it writes what it expects to write; at most 1."""
    assert responses.log_squares is not None, "scored without log_squares"
    aligned = (responses.sums.detach() - responses.log_squares)[:, :2] / responses.tokens[:, :2]
    return aligned.sum(dim=1).exp().clamp(max=1)


@dataclass(kw_only=True)
class LdDpoConfig(DpoConfig):
    """LD-DPO (https://arxiv.org/abs/2409.06411): DPO whose log-probs of a response are summed with
    weight alpha behind as many tokens as the shorter response has, also under the reference.
    Responses then gain less by length.
    """

    weighs_tokens: ClassVar[bool] = True

    name: str = "ld_dpo"
    alpha: float = 0.5
    """Weight of the tokens behind the length of the shorter response, from 0 to 1; 1 is DPO. The
    paper finds its best one for each model."""

    def token_weights(self, tokens: TokenLogps) -> Tensor:
        weights = tokens.logps.new_ones(len(tokens.logps))
        for chosen, rejected in _of_pairs(weights, tokens):
            common = min(len(chosen), len(rejected))
            chosen[common:] = self.alpha
            rejected[common:] = self.alpha
        return weights

    def terms(self) -> tuple[str, str]:
        loss, _ = super().terms()
        behind = f"those behind min(n_w, n_l) tokens times {self.alpha:g}"
        return loss, f"h = summed token log-ratios, {behind}, {REFERENCE}"

    def weighing(self) -> str:
        return f"{self.name} {self.alpha}"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.alpha <= 1:
            yield f"alpha: must be from 0 to 1, got {self.alpha}"


@dataclass(kw_only=True)
class SampoConfig(DpoConfig):
    """SamPO (https://arxiv.org/abs/2406.10957): DPO on as many tokens of the longer response as the
    shorter one has, drawn at random. Both log-ratios are then sums of equally many tokens.

    The authors draw anew in each forward, and other tokens for the reference. Here the token ids of
    the pair and `draw_seed` decide which are drawn, the same ones in all epochs and for the
    reference, whose sums are computed once.
    """

    weighs_tokens: ClassVar[bool] = True

    name: str = "sampo"
    beta: float = 0.1
    """Scale of the log-ratio (the authors: 0.1 for 8B models)."""
    draw_seed: int = 0
    """Seed of the tokens drawn of the longer response of each pair."""

    def token_weights(self, tokens: TokenLogps) -> Tensor:
        weights = tokens.logps.new_ones(len(tokens.logps))
        pairs = zip(_of_pairs(weights, tokens), _of_pairs(tokens.targets, tokens), strict=True)
        for both, targets in pairs:
            shorter, longer = sorted(both, key=len)
            if len(shorter) < len(longer):
                drawn = draw(targets, len(longer), len(shorter), self.draw_seed)
                longer.zero_()[drawn] = 1
        return weights

    def terms(self) -> tuple[str, str]:
        loss, _ = super().terms()
        drawn = "over min(n_w, n_l) tokens, drawn of the longer response"
        return loss, f"h = log-ratios summed {drawn}, {REFERENCE}"

    def weighing(self) -> str:
        return f"{self.name} {self.draw_seed}"


def draw(responses: tuple[Tensor, Tensor], length: int, number: int, seed: int) -> Tensor:
    """Draw `number` of `length` positions by the token ids of both responses and a seed.

    The positions are ranked by a hash, which is a bijection of 32-bit numbers, so none has the hash
    of another. It is computed where the tokens are: a GPU is not waited for.

    Returns:
        int64 [number], the positions, in no order.
    """
    from torch import arange, cat

    ids = cat(responses)
    places = arange(len(ids), device=ids.device)
    key = _hash(_hash(ids + seed & _MASK) + places & _MASK).sum()
    ranks = _hash(_hash(places[:length]) + key & _MASK)
    return ranks.topk(number, largest=False, sorted=False).indices


def _hash(numbers: Tensor) -> Tensor:
    """A number for each number from 0 to 2^32 - 1, of the same range and each another."""
    for _ in range(2):
        numbers = (numbers >> 16 ^ numbers) * 0x45D9F3B & _MASK
    return numbers >> 16 ^ numbers


@dataclass(kw_only=True)
class ConfpoConfig(LogisticLoss):
    """ConfPO (https://arxiv.org/abs/2506.08712): SimPO on the tokens of each response whose
    probability is below the mean probability of its tokens, those of low confidence:
    -log sigmoid(beta * (l_w - l_l) - gamma), l = their mean log-prob. A pair with a response that
    has no such token has no loss, as in the authors' code.
    """

    weighs_tokens: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("beta",)
    from_zero: ClassVar[tuple[str, ...]] = ("gamma_beta_ratio",)

    name: str = "confpo"
    beta: float = 2.0
    """Scale of the reward (the authors: 1.5)."""
    gamma_beta_ratio: float = 0.5
    """Target margin over beta: gamma = beta * gamma_beta_ratio (the authors: 1.07)."""

    def token_weights(self, tokens: TokenLogps) -> Tensor:
        from torch import cat

        return cat([unconfident(logps) for logps in tokens.logps.split(tokens.lengths)])

    def preference(self, logps: PairLogps) -> Preference:
        present = (logps.chosen_tokens > 0) & (logps.rejected_tokens > 0)
        chosen = self.beta * logps.chosen / logps.chosen_tokens.clamp(min=1)
        rejected = self.beta * logps.rejected / logps.rejected_tokens.clamp(min=1)
        losses = self.logistic(chosen - rejected - self.beta * self.gamma_beta_ratio)
        return Preference(losses * present, chosen, rejected)

    def terms(self) -> tuple[str, str]:
        z = f"{self.beta:g}*(l_w - l_l) - {self.beta * self.gamma_beta_ratio:g}"
        less = "l = mean log-prob of a response's tokens of less than its mean probability"
        return self.logistic_text(z), less


def unconfident(logps: Tensor) -> Tensor:
    """1 for each token of a response, [n], whose probability is below their mean, else 0."""
    if not len(logps):
        return logps
    # Over the largest one, as probabilities of all tokens may be 0 in float32.
    probabilities = (logps - logps.max()).exp()
    return (probabilities < probabilities.mean()).to(logps.dtype)


@dataclass(kw_only=True)
class MadpoConfig(DpoConfig):
    """MADPO (https://arxiv.org/abs/2510.05342): w times the loss of DPO, w = sigmoid(c * m) /
    sigmoid(m), of the margin m, the score of chosen minus that of rejected: log-odds, as reward
    models give. The coefficient c, a sigmoid between `largest` and `smallest`, falls with |m| and
    is 1 at |m| = tau: hard pairs count more and easy ones less. w is 1 for m <= -tau.
    """

    needs_scores: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("beta", "sharpness", "tau", "score_scale")

    name: str = "madpo"
    beta: float = 0.1
    """Scale of the log-ratio (the author: 0.1)."""
    tau: float = 2.0
    """Margin at which the weight is 1 (the author's code: 2, and 6.9 in its runs)."""
    sharpness: float = 1.0
    """How fast the coefficient falls there, lambda of the paper (the author: 1)."""
    largest: float = 2.0
    """Bound of the coefficient for hard pairs, above 1 (the author: 2 and 4)."""
    smallest: float = 0.5
    """Bound of the coefficient for easy pairs, from 0 to below 1 (the author: 1 / largest)."""
    score_scale: float = 1.0
    """Multiplies the scores, for scores that are no log-odds, such as ratings."""

    def preference(self, logps: PairLogps) -> Preference:
        losses, chosen, rejected = super().preference(logps)
        scores = _responses(logps).scores
        assert scores is not None, "scored without scores"
        scores = self.score_scale * scores.to(losses.dtype)
        margins = scores[:, 0] - scores[:, 1]
        return Preference(self.pair_weights(margins) * losses, chosen, rejected)

    def pair_weights(self, margins: Tensor) -> Tensor:
        """The weight of each pair, [P], from its margin of scores [P]."""
        fall = (self.sharpness * (margins.abs() - self.tau)).exp()
        odds = (self.largest - 1) / (1 - self.smallest)
        coefficient = self.smallest + (self.largest - self.smallest) / (1 + odds * fall)
        # Of logarithms: both sigmoids are 0 in float32 below -103.
        weights = (log_sigmoid(coefficient * margins) - log_sigmoid(margins)).exp()
        return weights.where(margins > -self.tau, 1)

    def terms(self) -> tuple[str, str]:
        loss, ratio = super().terms()
        between = f"c falling to {self.smallest:g}, 1 at m = {self.tau:g}"
        weight = f"w = sigmoid(c*m)/sigmoid(m), m = margin of scores, {between}"
        return f"w*({loss})", f"{weight}, {ratio}"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.largest <= 1:
            yield f"largest: must be above 1, got {self.largest}"
        if not 0 <= self.smallest < 1:
            yield f"smallest: must be from 0 to below 1, got {self.smallest}"


def _responses(logps: PairLogps) -> ResponseLogps:
    assert logps.responses is not None, "of pairs without their responses"
    return logps.responses


def _of_pairs(values: Tensor, tokens: TokenLogps) -> Iterator[tuple[Tensor, Tensor]]:
    """The values of the tokens of chosen and of rejected, pair by pair, as views."""
    parts = values.split(tokens.lengths)
    number = tokens.num_responses
    return zip(parts[0::number], parts[1::number], strict=True)
