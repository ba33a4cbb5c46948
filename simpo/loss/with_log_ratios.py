"""Further losses with a reference model, of log-ratios summed over the tokens of a response."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from simpo.loss import (
    LOG_RATIO,
    REFERENCE,
    Compared,
    LossConfig,
    PairLogps,
    Preference,
    log_sigmoid,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class LogRatioLoss(LossConfig):
    """A loss of r = beta * h of both responses."""

    needs_reference: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("beta",)
    text: ClassVar[str] = ""
    """The formula, with r_w and r_l."""

    beta: float = 0.1
    """Scale of the log-ratio."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = (self.beta * ratio for ratio in logps.log_ratios())
        return Preference(self.losses(chosen, rejected), chosen, rejected)

    @abstractmethod
    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair, float32 [P], from r of both responses, [P] each."""

    def terms(self) -> tuple[str, str]:
        ratio = f"r = {self.beta:g} * summed token log-ratios of a response, {REFERENCE}"
        return self.text, ratio


@dataclass(kw_only=True)
class ApoZeroConfig(LogRatioLoss):
    """APO-zero (https://arxiv.org/abs/2408.06266): 1 - sigmoid(r_w) + sigmoid(r_l). Makes the
    chosen response likelier and the rejected one less likely than under the reference.
    """

    text: ClassVar[str] = "1 - sigmoid(r_w) + sigmoid(r_l)"

    name: str = "apo_zero"

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return 1 - chosen.sigmoid() + rejected.sigmoid()


@dataclass(kw_only=True)
class ApoDownConfig(LogRatioLoss):
    """APO-down (https://arxiv.org/abs/2408.06266): sigmoid(r_w) + 1 - sigmoid(r_w - r_l).
    Makes both less likely, the rejected one more so, for a model that is better than its data.
    """

    text: ClassVar[str] = "sigmoid(r_w) + 1 - sigmoid(r_w - r_l)"

    name: str = "apo_down"

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


@dataclass(kw_only=True)
class NcaConfig(LogRatioLoss):
    """NCA for pairs (https://arxiv.org/abs/2402.05369, two responses of which the chosen has all
    the reward): -log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2.

    With `alpha` of all K responses of a prompt, p the softmax of their scores / alpha:
    -sum_i (p_i log sigmoid(r_i) + log sigmoid(-r_i) / K).
    """

    above_zero: ClassVar[tuple[str, ...]] = ("beta",)
    text: ClassVar[str] = "-log sigmoid(r_w) - 0.5*(log sigmoid(-r_w) + log sigmoid(-r_l))"

    name: str = "nca"
    beta: float = 0.01
    """Scale of the log-ratio (the authors: 0.01)."""
    alpha: float | None = None
    """Temperature of the scores of all responses of a prompt, in their units (the authors' code:
    0.0001, which leaves all to the best); null: pairs."""

    @property
    def ranks(self) -> bool:
        """Whether the loss uses all responses of a record."""
        return self.alpha is not None or super().ranks

    def compared(self, logps: PairLogps) -> Compared:
        if self.alpha is None:
            return super().compared(logps)
        responses = logps.all_responses()
        assert responses.reference is not None, "scored without a reference"
        ranks, rewards = responses.ranks(), self.beta * (responses.sums - responses.reference)
        noise = log_sigmoid(-rewards).where(ranks.present, 0).sum(dim=1)
        data = (ranks.targets(self.alpha) * log_sigmoid(rewards)).sum(dim=1)
        losses = -data - noise / ranks.present.sum(dim=1)
        return Compared.of_lists(losses, rewards, ranks, best_only=False)

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        noise = log_sigmoid(-chosen) + log_sigmoid(-rejected)
        return -log_sigmoid(chosen) - 0.5 * noise

    def terms(self) -> tuple[str, str]:
        text, ratio = super().terms()
        if self.alpha is None:
            return text, ratio
        each = "-sum_i (p_i*log sigmoid(r_i) + log sigmoid(-r_i)/K)"
        return each, f"p = softmax(scores/{self.alpha:g}), {ratio}"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.alpha is not None and self.alpha <= 0:
            yield f"alpha: must be above 0, got {self.alpha}"
        if self.alpha is not None and self.compare is not None:
            yield "compare: with alpha all responses are compared at once (leave one out)"


@dataclass(kw_only=True)
class BcoConfig(LogRatioLoss):
    """BCO for pairs (https://arxiv.org/abs/2404.04656): -log sigmoid(r_w) - log sigmoid(-r_l).

    Without the authors' reward shift, a running mean of rewards, by which the loss of a pair would
    depend on the pairs before it.
    """

    text: ClassVar[str] = "-log sigmoid(r_w) - log sigmoid(-r_l)"

    name: str = "bco"

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -log_sigmoid(chosen) - log_sigmoid(-rejected)


@dataclass(kw_only=True)
class ExoConfig(LogRatioLoss):
    """EXO for pairs (https://arxiv.org/abs/2402.00856): the reverse KL of sigmoid(z),
    z = r_w - r_l, from labels that are right with probability 1 - e:
    sigmoid(z) * (log sigmoid(z) - log(1 - e)) + sigmoid(-z) * (log sigmoid(-z) - log e).
    """

    name: str = "exo"
    label_smoothing: float = 1e-3
    """Assumed share of pairs whose labels are swapped, e; above 0 and below 0.5."""

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        z, wrong = chosen - rejected, self.label_smoothing
        right = z.sigmoid() * (log_sigmoid(z) - math.log(1 - wrong))
        return right + (-z).sigmoid() * (log_sigmoid(-z) - math.log(wrong))

    def terms(self) -> tuple[str, str]:
        wrong, (_, ratio) = self.label_smoothing, super().terms()
        return f"KL(sigmoid(r_w - r_l), {1 - wrong:g})", ratio

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 < self.label_smoothing < 0.5:
            yield f"label_smoothing: must be above 0 and below 0.5, got {self.label_smoothing}"


@dataclass(kw_only=True)
class RobustConfig(LogRatioLoss):
    """Robust DPO (https://arxiv.org/abs/2403.00409), unbiased under a share e of swapped
    labels: (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e), z = r_w - r_l.
    """

    name: str = "robust"
    label_smoothing: float = 0.1
    """Assumed share of pairs whose labels are swapped, e; below 0.5. 0 is DPO."""

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        z, wrong = chosen - rejected, self.label_smoothing
        return (-(1 - wrong) * log_sigmoid(z) + wrong * log_sigmoid(-z)) / (1 - 2 * wrong)

    def terms(self) -> tuple[str, str]:
        (_, ratio), scale = super().terms(), 1 - 2 * self.label_smoothing
        right, wrong = (1 - self.label_smoothing) / scale, self.label_smoothing / scale
        return f"-{right:g}*log sigmoid(r_w - r_l) + {wrong:g}*log sigmoid(r_l - r_w)", ratio

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.label_smoothing < 0.5:
            yield f"label_smoothing: must be from 0 to below 0.5, got {self.label_smoothing}"


@dataclass(kw_only=True)
class SppoConfig(LossConfig):
    """SPPO with hard labels (https://arxiv.org/abs/2405.00675): (h_w - 1 / (2 beta))^2 +
    (h_l + 1 / (2 beta))^2. The authors draw both responses from the model, in rounds.
    """

    needs_reference: ClassVar[bool] = True
    above_zero: ClassVar[tuple[str, ...]] = ("beta",)

    name: str = "sppo"
    beta: float = 0.01
    """Sets the target log-ratios, 1 / (2 * beta) and its negative (the authors: 0.001)."""

    def preference(self, logps: PairLogps) -> Preference:
        chosen, rejected = logps.log_ratios()
        target = 1 / (2 * self.beta)
        losses = (chosen - target).square() + (rejected + target).square()
        return Preference(losses, self.beta * chosen, self.beta * rejected)

    def terms(self) -> tuple[str, str]:
        target = f"{1 / (2 * self.beta):g}"
        return f"(h_w - {target})^2 + (h_l + {target})^2", LOG_RATIO
