"""Updates the policy on packed rows, and measures the speed of a step.

The loss of a step is the sum over its pairs divided by their number, counted before the forward;
the sft term is the sum over chosen tokens divided by their number, and the router's auxiliary loss
is over all tokens of the step (`simpo.loop.router`). The distribution of pairs over rows therefore
changes only rounding. Of losses that couple the pairs of a step, see `simpo.loop.coupled`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simpo.backend import Backend
from simpo.config.errors import RunError
from simpo.config.schema import RunConfig
from simpo.data.pairs import PackedPairs
from simpo.loop.coupled import by_factors, first_phase
from simpo.loop.router import StepBalance, num_tokens
from simpo.loop.score import columns, pair_sums, pair_table
from simpo.loop.setup import Parts
from simpo.loss import LossConfig, PairLogps, pair_losses
from simpo.model import cost
from simpo.model.head import PairLoss, no_loss


class NonFiniteError(Exception):
    """Loss or gradient is not finite; nothing was updated. `pairs` are the pairs responsible."""

    def __init__(self, what: str, pairs: Sequence[int]) -> None:
        super().__init__(what)
        self.pairs = tuple(pairs)


def update(
    policy: nn.Module,
    optimizer: Optimizer,
    rows: Sequence[PackedPairs],
    loss: LossConfig,
    backend: Backend,
    router_aux_weight: float = 0.0,
) -> tuple[Tensor, float]:
    """One optimizer update on the pairs of all processes' rows.

    Args:
        policy: as `Backend.prepare` wrapped it.
        rows: this process's rows, the same number on every process. A row without `pairs` adds
            nothing; it keeps collective operations in step.
        router_aux_weight: weight of the auxiliary loss of a mixture of experts.

    Returns:
        `pair_sums` of all processes, and behind them the auxiliary loss if that has a weight; and
        the norm of all gradients before clipping. The device is waited for once, for these numbers.

    Raises:
        NonFiniteError: loss or gradient is not finite; weights are unchanged.
    """
    counted = [row for row in rows if row.pairs]
    counts = [
        sum(len(row.pairs) for row in counted),
        sum(row.chosen_tokens for row in counted),
        sum(num_tokens(row) for row in counted),
    ]
    num_pairs, num_chosen_tokens, tokens = backend.sum(torch.tensor(counts)).tolist()
    pair_loss = _share_of_step(loss, num_pairs, max(1, num_chosen_tokens))
    balance = StepBalance(router_aux_weight, tokens, backend) if router_aux_weight else None
    if balance is not None:
        balance.count(policy, rows[1:])
    table_of = partial(pair_table, loss)
    if loss.couples_step:
        rows, table = first_phase(policy, rows, pair_loss, table_of, backend, loss)
        _backward(policy, rows, loss, by_factors, backend, balance)
    else:
        found = _backward(policy, rows, loss, pair_loss, backend, balance)
        of_rows = zip(rows, map(table_of, found), strict=True)
        table = torch.cat([lines[: len(row.pairs)] for row, lines in of_rows])
    finite = table.isfinite().all(dim=1)
    norm = backend.clip(policy)
    # The norm is that of all processes already: it is counted once.
    mine = norm if norm is not None and backend.is_main else torch.zeros(())
    parts = [(~finite).sum(), mine, pair_sums(table), *([balance.aux_loss] if balance else [])]
    numbers = backend.sum(torch.cat([part.reshape(-1).to(table) for part in parts]))
    pairs = [pair for row in rows for pair in row.pairs]
    if numbers[0] > 0:
        raise NonFiniteError("the loss is not finite", _responsible(loss, pairs, table, backend))
    grad_norm = backend.step(policy, optimizer, float(numbers[1]))
    if not math.isfinite(grad_norm):
        raise NonFiniteError(f"the gradient's norm is {grad_norm}", backend.gather(pairs))
    return numbers[2:], grad_norm


def _backward(
    policy: nn.Module,
    rows: Sequence[PackedPairs],
    loss: LossConfig,
    pair_loss: PairLoss,
    backend: Backend,
    balance: StepBalance | None,
) -> list[PairLogps]:
    """Compute the gradients of rows, and return the log-probs of the pairs of each."""
    found = []
    policy.train()
    for index, row in enumerate(rows):
        with backend.micro_batch(policy, last=index == len(rows) - 1):
            value, logps = policy(
                row.to(backend.device),
                pair_loss if row.pairs else no_loss,
                balance and balance.of(row),
                loss,
            )
            backend.backward(value)
        found.append(logps)
    return found


def _share_of_step(loss: LossConfig, num_pairs: int, num_chosen_tokens: int) -> PairLoss:
    """The contribution of a pair to the loss of a step, given the step's counts."""

    def pair_loss(logps: PairLogps) -> Tensor:
        losses = pair_losses(loss, logps) / num_pairs
        if loss.sft_weight:
            losses = losses - loss.sft_weight * logps.chosen / num_chosen_tokens
        return losses

    return pair_loss


def _responsible(
    loss: LossConfig, pairs: Sequence[int], table: Tensor, backend: Backend
) -> list[int]:
    """The pairs of all processes with a number that is not finite; if a pair spoils others of its
    step, those of them whose log-probs are not."""
    own = [name.startswith("logps/") for name in columns(loss)]
    fine = table.isfinite()
    each = zip(pairs, fine.all(dim=1).tolist(), fine[:, own].all(dim=1).tolist(), strict=True)
    found = backend.gather([(pair, sound) for pair, whole, sound in each if not whole])
    spoilers = [pair for pair, sound in found if not sound] if loss.couples_step else []
    return spoilers or [pair for pair, _ in found]


def finite_update(
    run: RunConfig, parts: Parts, rows: Sequence[PackedPairs], step: int
) -> tuple[Tensor, float]:
    """Update number `step` (from 0) on this process's rows; see `simpo.loop.step.update`.

    Raises:
        RunError: loss or gradient is not finite; nothing was updated. It names the pairs.
    """
    try:
        return update(
            parts.wrapped,
            parts.optimizer,
            rows,
            run.loss,
            parts.backend,
            run.model.router_aux_weight,
        )
    except NonFiniteError as error:
        places = ", ".join(parts.train.data.places[i] for i in error.pairs[:8])
        raise RunError(f"step {step + 1}: {error}; not updated; pairs: {places}") from error


def speed(
    parts: Parts, indices: np.ndarray, rows: Sequence[PackedPairs], seconds: float
) -> dict[str, float]:
    """Speed of a step: pairs and tokens per second of all processes, FLOPs of this one.

    Args:
        indices: the pairs of the step.
        rows: this process's rows.
    """
    flops = sum(parts.flops.of_row(row) for row in rows)
    return {
        "pairs_per_s": len(indices) / seconds,
        "tokens_per_s": int(parts.train.num_tokens[indices].sum()) / seconds,
        **cost.speed(flops / seconds, parts.backend.device),
    }
