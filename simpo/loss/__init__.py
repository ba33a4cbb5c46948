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

if TYPE_CHECKING:
    from torch import Tensor

AVERAGE = "l = mean token log-prob of a response"
SUM = "s = summed token log-probs of a response"
REFERENCE = "of the policy over the model it starts from"


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
        factors: float32, the gradient of a step's loss by `sums`, if the loss couples the pairs of
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

    def comparisons(self, compare: Compare) -> tuple[PairLogps, Tensor]:
        """Each two responses of a pair of different scores, the better one as chosen.

        Returns:
            Q comparisons of each of the P pairs, one pair after the other; and bool [P, Q], False
            for one of responses that the pair lacks, or of equal scores, in whose place are chosen
            and rejected.
        """
        from torch import stack

        ranked = [0, *range(2, self.sums.shape[1]), 1]
        couples = [(i, j) for at, i in enumerate(ranked) for j in ranked[at + 1 :]]
        if compare is Compare.best_rest:
            couples = [(i, j) for i, j in couples if i == 0]
        present = self.tokens > 0
        valid = stack([present[:, i] & present[:, j] for i, j in couples], dim=1)
        if self.scores is not None:
            better = [self.scores[:, i] > self.scores[:, j] for i, j in couples]
            valid = valid & stack(better, dim=1)

        def of(values: Tensor) -> tuple[Tensor, Tensor]:
            both = zip(*couples, strict=True)
            chosen, rejected = (stack([values[:, i] for i in side], dim=1) for side in both)
            first, second = (values[:, i : i + 1] for i in (0, 1))
            return chosen.where(valid, first).flatten(), rejected.where(valid, second).flatten()

        reference = None
        if self.reference is not None:
            reference = stack(of(self.reference), dim=1).flatten()
        sums, tokens = of(self.sums), of(self.tokens)
        return PairLogps(*sums, *tokens, reference), valid

    def _pairs(self, sums: Tensor, tokens: Tensor) -> PairLogps:
        reference = None if self.reference is None else self.reference[:, :2].flatten()
        both = sums[:, 0], sums[:, 1], tokens[:, 0], tokens[:, 1]
        return PairLogps(*both, reference, responses=self)


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
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference: Tensor | None = None
    responses: ResponseLogps | None = None

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


class Compared(NamedTuple):
    """The loss of each pair, and the rewards of Q comparisons of its responses.

    Attributes:
        losses: [P].
        chosen, rejected: [P, Q], reward of the better and of the worse response.
        valid: bool [P, Q], False for comparisons that a pair lacks; None if it lacks none.
    """

    losses: Tensor
    chosen: Tensor
    rejected: Tensor
    valid: Tensor | None = None


@dataclass(kw_only=True)
class LossConfig(ABC):
    """Settings and methods of every loss."""

    needs_rejected: ClassVar[bool] = True
    """Whether the loss uses the rejected responses; if not, the data may lack them."""
    needs_reference: ClassVar[bool] = False
    """Whether the loss uses log-probs under the model before the first step."""
    couples_step: ClassVar[bool] = False
    """Whether the loss of a pair depends on the other pairs of its step. `compared` then gets all
    of them, in float64, in the order of their indices."""
    weighs_tokens: ClassVar[bool] = False
    """Whether the loss weighs the tokens of a response by `token_weights`."""
    needs_squares: ClassVar[bool] = False
    """Whether the loss needs `ResponseLogps.log_squares`."""
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
        responses = logps.responses
        if self.compare is None or responses is None or responses.sums.shape[1] == 2:
            losses, chosen, rejected = self.preference(logps)
            return Compared(losses, chosen[:, None], rejected[:, None])
        pairs, valid = responses.comparisons(self.compare)
        losses, chosen, rejected = (x.view(valid.shape) for x in self.preference(pairs))
        mean = losses.where(valid, 0).sum(dim=1) / valid.sum(dim=1)
        return Compared(mean, chosen, rejected, valid)

    def token_weights(self, tokens: TokenLogps) -> Tensor:
        """The weight of each token in the sums of its response, float32 [n]."""
        raise NotImplementedError

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
        if self.compare is not None and not self.needs_rejected:
            yield f"compare: loss={self.name} compares no responses"
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
