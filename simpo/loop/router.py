"""Sums the routing of rows for the router's auxiliary loss of a step or of all held-out pairs.

The auxiliary loss is E * sum(load * probs), where both are means over all tokens of the step. Its
gradient flows through the probabilities, but each is multiplied by the load, so the backward of any
row needs the load of all rows of all processes. It is counted in a forward without gradients. The
first row is left out there: its own forward completes the load before its backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simpo.backend import Backend
from simpo.data.pairs import PackedPairs
from simpo.model.head import no_loss
from simpo.model.router import RouterLoss, aux_loss


class Routing:
    """Sums load and probability of each expert over the tokens of rows.

    Attributes:
        sums: of load and probability, float64 [2, E]; a number, 0, before the first row.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros((), dtype=torch.float64)

    def of(self, row: PackedPairs) -> RouterLoss:
        """For the forward of a row: adds its routing to the sums, and nothing to its loss."""
        tokens = num_tokens(row)

        def add(load: Tensor, probs: Tensor) -> Tensor:
            self.sums = self.sums + tokens * torch.stack([load, probs]).detach().double()
            return 0.0 * probs.sum()

        return add

    def aux_loss(self, backend: Backend) -> Tensor:
        """The auxiliary loss over the tokens of all processes, float64 [1] on the CPU."""
        load, probs = backend.sum(self.sums)
        tokens = probs.sum()  # the probabilities of a token sum to 1
        return aux_loss(load / tokens, probs / tokens)[None]


class StepBalance:
    """Computes the auxiliary loss of a step, row by row; see the top of this file.

    Attributes:
        aux_loss: of the rows so far, float64 [1]; those of all processes sum to that of the step.
    """

    def __init__(self, weight: float, tokens: int, backend: Backend) -> None:
        """
        Args:
            weight: of the auxiliary loss in the loss of the step.
            tokens: of all rows of all processes, without placeholder rows.
        """
        self._weight, self._tokens, self._backend = weight, tokens, backend
        self._counted = Routing()
        self._load: Tensor | None = None
        self.aux_loss = torch.zeros(1, dtype=torch.float64, device=backend.device)

    @torch.no_grad()
    def count(self, policy: nn.Module, rows: Sequence[PackedPairs]) -> None:
        """Count the load of all rows but the first of this process."""
        policy.eval()
        for row in rows:
            policy(row.to(self._backend.device), no_loss, self._counted.of(row))

    def of(self, row: PackedPairs) -> RouterLoss:
        """For the forward of a row, from the first to the last: its part of the weighted loss."""
        share = num_tokens(row) / self._tokens

        def loss(load: Tensor, probs: Tensor) -> Tensor:
            if self._load is None:
                self._counted.of(row)(load, probs)
                sums = self._backend.sum(self._counted.sums[0])
                self._load = (sums / self._tokens).to(load)
            part = share * aux_loss(self._load, probs)
            self.aux_loss = self.aux_loss + part.detach()
            return self._weight * part

        return loss


def num_tokens(row: PackedPairs) -> int:
    """Computed tokens of a row; 0 for a placeholder row, which is not counted."""
    return row.input_ids.numel() if row.pairs else 0
