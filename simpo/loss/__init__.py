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
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from omegaconf import MISSING

from simpo.loss.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

AVERAGE = "l = mean token log-prob of a response"
SUM = "s = summed token log-probs of a response"
REFERENCE = "of the policy over the model it starts from"
LOG_RATIO = f"h = summed token log-ratios of a response, {REFERENCE}"


class Compare(str, Enum):
    """The comparisons of the responses of a prompt."""

    all = "all"
    best_rest = "best_rest"


@dataclass(frozen=True)
class ResponseLogps:
    """Log-probabilities of all responses of the pairs of a row, [P, K] each: column 0 is chosen, 1
    rejected, and the others follow, the best first.

    Attributes:
        sums: float32, summed over the scored tokens of the response; 0 for one that a pair lacks.
        tokens: int64, number of scored tokens; 0 for a response that a pair lacks.
        scores: float32 of ranked responses, NaN for one that a pair lacks; None without.
        reference: float32, the sums under the reference model; None if the loss needs none.
        weighted, weights: float32, if the loss weighs tokens: sums of weight * log-prob and of the
            weights, which are detached; else None.
        log_squares: float32, detached, if the loss needs it: summed over the tokens the log of the
            sum over the vocabulary of p^2; else None.
        factors: float64, the gradient of a step's loss by `sums`, if the loss couples the pairs of
            a step; else None.
    """

    sums: Tensor
    tokens: Tensor
    scores: Tensor | None = None
    reference: Tensor | None = None
    weighted: Tensor | None = None
    weights: Tensor | None = None
    log_squares: Tensor | None = None
    factors: Tensor | None = None

    def pairs(self) -> PairLogps:
        """Chosen and rejected of each pair."""
        return self._pairs(self.sums, self.tokens)

    def weighted_pairs(self) -> PairLogps:
        """Chosen and rejected of each pair as the loss weighs their tokens; the numbers of tokens
        are sums of weights."""
        if self.weighted is None or self.weights is None:
            return self.pairs()
        return self._pairs(self.weighted, self.weights)

    def ranks(self) -> Ranks:
        """The order of the responses of each pair by their scores."""
        return Ranks.of(self.sums, self.tokens, self.scores)

    def each_two(self) -> PairLogps:
        """Each two responses of each pair, the better one as chosen, as P * K * K pairs.

        A response that a pair lacks is replaced by the chosen one, so that all numbers are those of
        a response.
        """
        from torch import nan, stack

        ranks = self.ranks()
        worse = ranks.better.transpose(1, 2)

        def ordered(values: Tensor) -> tuple[Tensor, Tensor]:
            own = values.where(ranks.present, values[:, :1].detach())
            first, second = own[:, :, None].expand_as(worse), own[:, None, :].expand_as(worse)
            chosen, rejected = second.where(worse, first), first.where(worse, second)
            return chosen.flatten(), rejected.flatten()

        reference = None
        if self.reference is not None:
            reference = stack(ordered(self.reference), dim=1).flatten()
        high, low = ordered(ranks.scores.where(ranks.known, nan))
        both = (*ordered(self.sums), *ordered(self.tokens))
        return PairLogps(*both, reference, margins=high - low)

    def _pairs(self, sums: Tensor, tokens: Tensor) -> PairLogps:
        reference = None if self.reference is None else self.reference[:, :2].flatten()
        both = sums[:, 0], sums[:, 1], tokens[:, 0], tokens[:, 1]
        margins = None if self.scores is None else self.scores[:, 0] - self.scores[:, 1]
        return PairLogps(*both, reference, self, margins)


@dataclass(frozen=True)
class TokenLogps:
    """What the weights of tokens may depend on, of all responses of some pairs.

    Attributes:
        logps: float32 [n], log-probs of their scored tokens, response after response, detached.
        targets: int64 [n], the tokens.
        lengths: scored tokens of each response; those of a pair follow one another.
        num_responses: responses of each pair, K; 0 tokens for one that a pair lacks.
    """

    logps: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    num_responses: int


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of both responses of each pair of a row, the input of a loss.

    Attributes:
        chosen, rejected: float32 [P], summed over the scored tokens of the response.
        chosen_tokens, rejected_tokens: int64 [P], number of scored tokens; 0 without a response.
        reference: float32 [2P], the sums under the reference model, chosen and rejected
            alternating; None if the loss needs no reference.
        responses: these and the other responses of each pair; None: there are no others.
        margins: float32 [P], score of chosen minus score of rejected, NaN where a pair has none;
            None without scores.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference: Tensor | None = None
    responses: ResponseLogps | None = None
    margins: Tensor | None = None

    def all_responses(self) -> ResponseLogps:
        """All responses of each pair."""
        from torch import stack

        if self.responses is not None:
            return self.responses
        reference = None if self.reference is None else self.reference.view(-1, 2)
        sums = stack([self.chosen, self.rejected], dim=1)
        tokens = stack([self.chosen_tokens, self.rejected_tokens], dim=1)
        return ResponseLogps(sums, tokens, reference=reference)

    @property
    def average_chosen(self) -> Tensor:
        """Mean token log-probability of the chosen responses, float32 [P]; 0 without one."""
        return self.chosen / self.chosen_tokens.where(self.chosen_tokens > 0, 1)

    @property
    def average_rejected(self) -> Tensor:
        """Mean token log-probability of the rejected responses, float32 [P]; 0 without one."""
        return self.rejected / self.rejected_tokens.where(self.rejected_tokens > 0, 1)

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


class Compared(NamedTuple):
    """The loss of each pair, and the rewards of Q comparisons of its responses.

    Attributes:
        losses: [P].
        chosen, rejected: [P, Q], reward of the better and of the worse response.
        valid: bool [P, Q], False for comparisons that a pair lacks; None if it lacks none.
        rewards: [P, K], reward of each response, if the loss ranks them.
    """

    losses: Tensor
    chosen: Tensor
    rejected: Tensor
    valid: Tensor | None = None
    rewards: Tensor | None = None

    @staticmethod
    def of_lists(losses: Tensor, rewards: Tensor, ranks: Ranks, best_only: bool) -> Compared:
        """Losses [P] of the rewards [P, K] of all responses; `best_only` as of `Ranks.compared`."""
        valid = ranks.compared(best_only)
        first, second = (x.expand_as(valid) for x in (rewards[:, :, None], rewards[:, None, :]))
        return Compared(losses, first.flatten(1), second.flatten(1), valid.flatten(1), rewards)


@dataclass(kw_only=True)
class LossConfig(ABC):
    """Settings and methods of every loss."""

    needs_rejected: ClassVar[bool] = True
    """Whether the loss uses the rejected responses; if not, the data may lack them."""
    needs_reference: ClassVar[bool] = False
    """Whether the loss uses log-probs under the model before the first step."""
    needs_mismatched: ClassVar[bool] = False
    """Whether each pair needs a response to another prompt, its third (`simpo.data.mismatched`)."""
    reads_labels: ClassVar[bool] = False
    """Whether the data may also have single responses with a label, desirable or not."""
    mean_over_responses: ClassVar[bool] = False
    """Whether the mean loss of pairs is that over their responses, of which some have one."""
    couples_step: ClassVar[bool] = False
    """Whether the loss of a pair depends on the other pairs of its step. `compared` then gets all
    of them, in float64, in the order of their indices."""
    weighs_tokens: ClassVar[bool] = False
    """Whether the loss weighs the tokens of a response by `token_weights`."""
    needs_squares: ClassVar[bool] = False
    """Whether the loss needs `ResponseLogps.log_squares`."""
    needs_scores: ClassVar[bool] = False
    """Whether the loss needs the scores of chosen and rejected; records without are refused."""
    needs_margins: ClassVar[bool] = False
    """Whether the loss needs `PairLogps.margins`, which only responses that are compared have."""
    above_zero: ClassVar[tuple[str, ...]] = ()
    from_zero: ClassVar[tuple[str, ...]] = ()
    """Settings that must be above 0, and settings that must be 0 or more."""
    hints: ClassVar[dict[str, str]] = {}
    """Text appended to the message about a wrong setting, by name."""

    name: str = MISSING
    """Name of the loss; set by the group (loss=sigmoid, loss=orpo)."""
    module: str | None = None
    """Python module that defines the loss (docs/extending.md); null: it comes with simpo."""
    compare: Compare | None = None
    """Compare the responses of a prompt on one row, ranked by their scores: all (each two of
    different scores) or best_rest (the best with each other one); the loss of a prompt is the mean
    over its comparisons. null compares the pairs that data.pairs makes."""
    margin_weights: bool = False
    """Weigh the comparisons of a prompt in proportion to the difference of their scores."""
    sft_weight: float = 0.0
    """Weight of the chosen responses' mean token NLL added to the loss; 0 is SimPO."""

    @property
    def ranks(self) -> bool:
        """Whether the loss uses all responses of a record, ranked by their scores."""
        return self.compare is not None

    @abstractmethod
    def preference(self, logps: PairLogps) -> Preference:
        """Loss and rewards of each pair, without the SFT term."""

    def compared(self, logps: PairLogps) -> Compared:
        """The loss of each pair and the rewards of the responses that it compares."""
        if self.compare is not None:
            return self._mean_over_pairs(logps.all_responses(), self.compare is Compare.best_rest)
        losses, chosen, rejected = self.preference(logps)
        return Compared(losses, chosen[:, None], rejected[:, None])

    def _mean_over_pairs(self, responses: ResponseLogps, best_only: bool) -> Compared:
        ranks, found = responses.ranks(), self.preference(responses.each_two())
        share, valid = ranks.shares(best_only, self.margin_weights), ranks.compared(best_only)
        losses, chosen, rejected = (numbers.view_as(share) for numbers in found)
        mean = (share * losses.where(valid, 0)).sum(dim=(1, 2))
        own = chosen.diagonal(dim1=1, dim2=2)  # of each response beside itself
        return Compared(mean, chosen.flatten(1), rejected.flatten(1), valid.flatten(1), own)

    def token_weights(self, tokens: TokenLogps) -> Tensor:
        """The weight of each token in the sums of its response, float32 [n]."""
        raise NotImplementedError

    def weighing(self) -> str:
        """What decides `token_weights`, for the name of what is computed with them."""
        return repr(self)

    @abstractmethod
    def terms(self) -> tuple[str, str]:
        """The preference loss of a pair as text, with its settings filled in, and its legend."""

    def formula(self) -> str:
        """The composed loss as one line of text."""
        preference, meaning = self.terms()
        if self.compare is not None:
            which = (
                "each two responses to a prompt whose scores differ"
                if self.compare is Compare.all
                else "the best response to a prompt with each of a lower score"
            )
            weighed = ", weighted by their margin" if self.margin_weights else ""
            meaning += f"; mean over {which}{weighed}"
        nll = f"{self.sft_weight:g} * NLL per chosen token" if self.sft_weight else ""
        return f"loss = {' + '.join(filter(None, (preference, nll))) or '0'},  {meaning}"

    def problems(self) -> Iterator[str]:
        """Yield a line for each wrong setting: its name and what it must be."""
        for key in self.above_zero:
            if getattr(self, key) <= 0:
                yield f"{key}: must be above 0, got {getattr(self, key)}{self.hints.get(key, '')}"
        if self.compare is not None and not self.needs_rejected:
            yield f"compare: loss={self.name} compares no responses"
        elif self.compare is not None and self.couples_step:
            yield f"compare: loss={self.name} couples the pairs of a step (leave it out)"
        elif self.compare is not None and (
            self.weighs_tokens or self.needs_squares or self.needs_scores
        ):
            yield f"compare: loss={self.name} weighs pairs of two responses (leave it out)"
        elif self.ranks and (self.weighs_tokens or self.needs_mismatched):
            what = "weigh tokens" if self.weighs_tokens else "need a response to another prompt"
            yield f"name: loss={self.name} compares all responses, so it cannot {what}"
        if self.couples_step and (self.weighs_tokens or self.needs_squares):
            yield f"name: loss={self.name} couples the pairs of a step, so it cannot weigh tokens"
        if self.needs_margins and self.compare is None:
            yield (
                f"compare: loss={self.name} takes labels from the scores of the responses that it "
                "compares (set loss.compare=all)"
            )
        if self.margin_weights and self.compare is None:
            at_once = f", and loss={self.name} has none: it compares all at once (leave it out)"
            remedy = at_once if self.ranks else " (set loss.compare=all)"
            yield f"margin_weights: weighs the comparisons of a prompt{remedy}"
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
    return compared(loss, logps).losses


def compared(loss: LossConfig, logps: PairLogps) -> Compared:
    """`LossConfig.compared` of the log-probs as the loss weighs their tokens."""
    if logps.responses is not None and logps.responses.weighted is not None:
        logps = logps.responses.weighted_pairs()
    return loss.compared(logps)


def log_sigmoid(z: Tensor) -> Tensor:
    """log(1 / (1 + exp(-z))), numerically stable for large z of either sign."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(z)
