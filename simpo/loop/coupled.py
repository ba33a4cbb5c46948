"""Losses that couple the pairs of a step, computed exactly over the step in two phases.

First a forward without gradients gives the log-probabilities of all pairs of all processes, from
which each process computes the loss of the step and its gradient by them, in float64. Then each
row is computed as that of any other loss, with these factors in place of a loss: the gradients are
those of the whole step, whatever the rows and processes. It costs one more forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simpo.backend import Backend
from simpo.data.pairs import PackedPairs, padded
from simpo.loss import LossConfig, PairLogps, ResponseLogps
from simpo.model.head import PairLoss, no_loss

PairNumbers = list[list[float]]
"""Of a pair, its rows of sums, tokens, scores and reference in `ResponseLogps`."""


class FirstPhase(NamedTuple):
    """The rows of this process with their factors, and the table of their pairs."""

    rows: list[PackedPairs]
    table: Tensor


def first_phase(
    policy: nn.Module,
    rows: Sequence[PackedPairs],
    share: PairLoss,
    table: Callable[[PairLogps], Tensor],
    backend: Backend,
    loss: LossConfig,
) -> FirstPhase:
    """Compute the factors of the responses of this process's rows; all processes call it.

    Args:
        policy: as `Backend.prepare` wrapped it.
        rows: of this process; one without pairs is computed, but does not count.
        share: maps the pairs of the whole step to their shares of its loss, [P].
        table: maps them to the numbers of each, [P, numbers].
        loss: of the step.
    """
    policy.train()
    device = backend.device
    known: list[tuple[int, PairNumbers]] = []
    # Both forwards draw the same dropout.
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for row in rows:
            logps = policy(row.to(device), no_loss, None, loss)[1]
            known += zip(row.pairs, numbers_of(logps)[: len(row.pairs)].tolist(), strict=True)
    of_step = dict(sorted(backend.gather(known)))
    responses = all_pairs(list(of_step.values())).responses
    assert responses is not None
    leaf = replace(responses, sums=responses.sums.requires_grad_()).pairs()
    (factors,) = torch.autograd.grad(share(leaf).sum(), responses.sums)
    places = {pair: at for at, pair in enumerate(of_step)}
    of_rows = [[places[pair] for pair in row.pairs] for row in rows]
    return FirstPhase(
        [_with_factors(row, factors[own]) for row, own in zip(rows, of_rows, strict=True)],
        table(leaf)[[place for own in of_rows for place in own]],
    )


def by_factors(logps: PairLogps) -> Tensor:
    """The `PairLoss` of the second phase: its gradients are those of the loss of the step."""
    responses = logps.responses
    assert responses is not None and responses.factors is not None
    return (responses.factors.to(responses.sums) * responses.sums).sum(dim=1)


def numbers_of(logps: PairLogps) -> Tensor:
    """What `all_pairs` needs of each pair, float64 [P, 4, K]; NaN for what there is none of."""
    responses = logps.responses
    assert responses is not None
    columns = (responses.sums, responses.tokens, responses.scores, responses.reference)
    missing = torch.full_like(responses.sums, math.nan)
    return torch.stack([(missing if c is None else c).double() for c in columns], dim=1)


def all_pairs(numbers: Sequence[PairNumbers]) -> PairLogps:
    """The log-probabilities of pairs of any rows, in float64, from the `numbers_of` each."""
    most = max(len(rows[0]) for rows in numbers)
    empty = (0.0, 0.0, math.nan, 0.0)
    whole = [
        [padded(row, most, value) for row, value in zip(rows, empty, strict=True)]
        for rows in numbers
    ]
    sums, tokens, scores, reference = torch.tensor(whole, dtype=torch.float64).unbind(dim=1)
    return ResponseLogps(
        sums,
        tokens.long(),
        None if scores.isnan().all() else scores,
        None if reference[:, 0].isnan().all() else reference,
    ).pairs()


def _with_factors(row: PackedPairs, factors: Tensor) -> PackedPairs:
    """A row with the factors of its pairs, [P, at least K]; 0 in a placeholder row."""
    if not row.pairs:
        return replace(row, factors=torch.zeros(len(row.response_tokens)))
    return replace(row, factors=factors[:, : row.num_responses].flatten())
