"""Packed rows in, an update or an evaluation out, with the metrics of the pairs.

The loss of a step is a sum over its pairs divided by their number, counted before the forward;
the sft term is a sum over the chosen tokens divided by theirs. How the pairs are shared out over
rows therefore changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from simpo.backend import Backend
from simpo.config import LossConfig
from simpo.logps import Objective
from simpo.loss import pair_losses
from simpo.model import Policy
from simpo.pairs import PackedPairs, PairLogps

COLUMNS = (
    "preference_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "chosen_nll",
    "chosen_tokens",
    "rejected_tokens",
)


class NonFiniteError(Exception):
    """Loss or gradient is not a number; nothing was updated. `pairs` are those of the row."""

    def __init__(self, what: str, pairs: Sequence[int]) -> None:
        super().__init__(what)
        self.pairs = tuple(pairs)


def update(
    policy: Policy,
    optimizer: Optimizer,
    rows: Sequence[PackedPairs],
    loss: LossConfig,
    backend: Backend,
    max_grad_norm: float,
) -> dict[str, float]:
    """One optimizer update on the pairs of `rows`.

    Returns:
        Metrics over the pairs, and `grad_norm` before clipping.

    Raises:
        NonFiniteError: before the update, the weights are untouched.
    """
    objective = _objective(
        loss,
        num_pairs=sum(len(row.pairs) for row in rows),
        num_chosen_tokens=sum(row.chosen_tokens for row in rows),
    )
    tables = []
    policy.train()
    for row in rows:
        value, logps = policy(row.to(backend.device), objective)
        if not math.isfinite(value.item()):
            raise NonFiniteError(f"the loss is {value.item()}", row.pairs)
        backend.backward(value)
        tables.append(pair_table(loss, logps))
    grad_norm = backend.clip_gradients(policy, max_grad_norm)
    if not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"the gradient's norm is {grad_norm}", [p for r in rows for p in r.pairs]
        )
    optimizer.step()
    optimizer.zero_grad()
    return summarise(loss, torch.cat(tables)) | {"grad_norm": grad_norm}


@torch.no_grad()
def evaluate(
    policy: Policy, rows: Iterable[PackedPairs], loss: LossConfig, backend: Backend
) -> dict[str, float]:
    """Metrics over the pairs of `rows`, without an update."""
    policy.eval()
    objective = partial(pair_losses, loss)
    tables = [pair_table(loss, policy(row.to(backend.device), objective)[1]) for row in rows]
    return summarise(loss, torch.cat(tables))


def _objective(loss: LossConfig, num_pairs: int, num_chosen_tokens: int) -> Objective:
    """What a pair adds to the loss of a step of so many pairs and chosen tokens."""

    def objective(logps: PairLogps) -> Tensor:
        losses = pair_losses(loss, logps) / num_pairs
        if loss.sft_weight:
            losses = losses - loss.sft_weight * logps.chosen / num_chosen_tokens
        return losses

    return objective


def pair_table(loss: LossConfig, logps: PairLogps) -> Tensor:
    """One line for each pair with the numbers in `COLUMNS`, float64 [P, columns] on the CPU.

    A reward is beta * average_logp; a tie counts as half accurate.
    """
    chosen, rejected = logps.average_chosen, logps.average_rejected
    columns = [
        pair_losses(loss, logps),
        loss.beta * chosen,
        loss.beta * rejected,
        0.5 * ((chosen > rejected).float() + (chosen >= rejected).float()),
        loss.beta * (chosen - rejected),
        chosen,
        rejected,
        -logps.chosen,
        logps.chosen_tokens,
        logps.rejected_tokens,
    ]
    return torch.stack([column.detach().double() for column in columns], dim=1).cpu()


def summarise(loss: LossConfig, table: Tensor) -> dict[str, float]:
    """Means over the pairs of a table; `loss` is the composed objective, sft term included."""
    means = dict(zip(COLUMNS, table.mean(dim=0).tolist(), strict=True))
    nll = means.pop("chosen_nll") / means["chosen_tokens"]
    value = means.pop("preference_loss") + loss.sft_weight * nll
    return {"loss": value, **means}
