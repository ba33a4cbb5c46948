"""Which of the responses to a prompt are better, and in what pairs they are compared.

All is computed on [P, K] and [P, K, K] without waiting for the device. Sums run over a dimension,
never by index, so that their rounding is the same each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Ranks(NamedTuple):
    """The order of the responses of each prompt by their scores.

    Attributes:
        scores: [P, K], in the dtype of the log-probs; -inf for a response that a prompt lacks. A
            prompt without scores has 1 for chosen and 0 for rejected.
        known: bool [P, 1], whether these are scores of the data.
    """

    scores: Tensor
    known: Tensor

    @staticmethod
    def of(sums: Tensor, tokens: Tensor, scores: Tensor | None) -> Ranks:
        """Rank the responses of each prompt by their scores.

        Args:
            sums, tokens, scores: as in `simpo.loss.ResponseLogps`.
        """
        import torch

        present = tokens > 0
        placed = torch.zeros_like(sums, requires_grad=False)
        placed[:, 0] = 1
        if scores is None:
            scores = torch.full_like(placed, torch.nan)
        known = (~scores.isnan() | ~present).all(dim=1, keepdim=True)
        return Ranks(torch.where(known, scores, placed).masked_fill(~present, -torch.inf), known)

    @property
    def present(self) -> Tensor:
        """Whether a prompt has the response, bool [P, K]."""
        return self.scores.isfinite()

    @property
    def better(self) -> Tensor:
        """Whether the first response has a higher score than the second, bool [P, K, K]."""
        return (self.scores[:, :, None] > self.scores[:, None, :]) & self.present[:, None, :]

    @property
    def best(self) -> Tensor:
        """Whether no response has a higher score, bool [P, K]; several are the best if they tie."""
        return self.scores == self.scores.amax(dim=1, keepdim=True)

    def compared(self, best_only: bool) -> Tensor:
        """Whether the first response is compared with the second, worse one, bool [P, K, K].

        Args:
            best_only: compare only the best, with each of the others.
        """
        return self.better & self.best[:, :, None] if best_only else self.better

    def shares(self, best_only: bool, by_margin: bool) -> Tensor:
        """The share of each two responses in the mean of their prompt, [P, K, K].

        Args:
            best_only: as of `compared`.
            by_margin: in proportion to the difference of their scores; else equal.

        Returns:
            Shares that add up to 1, and 0 for two that are not compared; all are 0 where all scores
            are equal.
        """
        compared = self.compared(best_only)
        weights = compared.to(self.scores.dtype)
        if by_margin:
            margins = self.scores[:, :, None] - self.scores[:, None, :]
            # Over the largest one, as the sum of margins may be too large for float32.
            margins = margins.where(compared, weights)
            largest = margins.amax(dim=(1, 2), keepdim=True)
            weights = margins / largest.where(largest > 0, 1)
        total = weights.sum(dim=(1, 2), keepdim=True)
        return weights / total.where(total > 0, 1)

    def targets(self, alpha: float) -> Tensor:
        """The softmax of the scores / alpha of each prompt, [P, K]; 1 for chosen without scores."""
        below = self.scores - self.scores.amax(dim=1, keepdim=True)
        return (below / alpha).softmax(dim=1).where(self.known, self.scores.clamp(min=0))


def rank_correlation(ranks: Ranks, rewards: Tensor) -> Tensor:
    """Kendall's correlation of rewards [P, K] with scores over pairs of different scores, [P].

    A pair counts 1 if its rewards are in the order of its scores, -1 if they are in the other, and
    0 if they are equal. Without such pairs it is 0.
    """
    right = (rewards[:, :, None] - rewards[:, None, :]).sign().where(ranks.better, 0)
    return right.sum(dim=(1, 2)) / ranks.better.sum(dim=(1, 2)).clamp(min=1)


def best_accuracy(ranks: Ranks, rewards: Tensor) -> Tensor:
    """Whether a response with the highest score has the highest reward, [P].

    Of several with the highest reward, the share that has the highest score.
    """
    from torch import inf

    rewards = rewards.masked_fill(~ranks.present, -inf)
    highest = rewards == rewards.amax(dim=1, keepdim=True)
    return (highest & ranks.best).sum(dim=1) / highest.sum(dim=1).clamp(min=1)
