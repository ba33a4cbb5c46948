"""Hidden states in, loss and gradients out, without a [T, V] tensor.

Only positions that predict a response token meet the vocabulary, a few pairs at a time. As soon as
the log-probabilities of a pair are known, so is what the loss wants of its logits: their gradient
is taken there and then, in the memory that held them, and they are dropped. The vocabulary is met
three times (logits, gradient of the hidden states, gradient of the weight), as in a backward pass
that had kept everything, and memory is LOGITS_BYTES, whatever the length. A pair above that is
taken in parts whose logits are computed twice.

That a loss on top of a vocabulary can be differentiated chunk by chunk in the forward pass is the
idea of https://arxiv.org/abs/2410.10989 (Liger).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simpo.pairs import PackedPairs, PairLogps

LOGITS_BYTES = 256 * 2**20

Objective = Callable[[PairLogps], Tensor]
"""From the log-probabilities of some pairs to what each adds to the loss, float32 [P]."""


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: PackedPairs,
    objective: Objective,
    softcap: float | None = None,
) -> tuple[Tensor, PairLogps]:
    """Loss of a row of pairs, and the log-probabilities of their responses.

    Args:
        hidden: [T, D], the last hidden states, normalised as the head wants them.
        weight, bias: of the head, [V, D] and [V]; logits are in their type, or in autocast's.
        row: says which position predicts which token.
        objective: takes any of the row's pairs, in order; each pair's loss is its own.
        softcap: logits z become softcap * tanh(z / softcap) (Gemma-2).

    Returns:
        The sum of the objective over the pairs, with gradients for hidden, weight and bias; sums
        of token log-probabilities over each response, without. Softmax and sums are in float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    wanted = torch.is_grad_enabled()
    scored = hidden.index_select(0, row.predictors)
    with torch.autocast(device, enabled=False):
        loss, sums = _FusedLoss.apply(
            scored,
            weight,
            bias,
            row,
            objective,
            softcap,
            dtype,
            wanted,
        )
    return loss, _pair_logps(sums, row.response_tokens)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row: PackedPairs,
        objective: Objective,
        softcap: float | None,
        dtype: torch.dtype,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight, of_bias = (wanted and need for need in ctx.needs_input_grad[:3])
        wanted = of_hidden or of_weight or of_bias
        cast_weight, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        # Sums over chunks are in float32 even where a chunk's own product is in bf16.
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(dtype)) if of_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=_wide(dtype)) if of_bias else None
        groups = list(_groups(row.response_tokens, max(1, LOGITS_BYTES // (4 * len(weight)))))
        longest = max(part.stop - part.start for _, parts in groups for part in parts)
        # One piece of memory for all chunks: the system hands out fresh pages slowly.
        memory = torch.empty(longest, len(weight), dtype=_wide(dtype), device=hidden.device)

        def logits_of(part: slice) -> Tensor:
            logits = memory[: part.stop - part.start]
            if dtype is logits.dtype:
                torch.mm(hidden[part].to(dtype), cast_weight.T, out=logits)
            else:
                logits.copy_(hidden[part].to(dtype) @ cast_weight.T)
            if cast_bias is not None:
                logits += cast_bias
            return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)

        loss = torch.zeros((), dtype=_wide(dtype), device=hidden.device)
        sums = []
        for lengths, parts in groups:
            scored = []
            for part in parts:
                logits = logits_of(part)
                targets = row.targets[part, None]
                peak = logits.amax(dim=-1, keepdim=True)
                own = logits.gather(-1, targets)
                slope = 1 - (logits / softcap) ** 2 if softcap is not None and wanted else None
                # From here on `logits` holds exp(logits - peak).
                total = logits.sub_(peak).exp_().sum(dim=-1, keepdim=True)
                scored.append((own - peak - total.log()).squeeze(-1))
            response_sums = torch.stack([s.sum() for s in torch.cat(scored).split(lengths)])
            with torch.enable_grad():
                response_sums.requires_grad_(wanted)
                value = objective(_pair_logps(response_sums, lengths)).sum()
            sums.append(response_sums.detach())
            loss += value.detach()
            if not wanted:
                continue
            (factors,) = torch.autograd.grad(value, response_sums)
            counts = torch.tensor(lengths, device=factors.device)
            factors = factors.repeat_interleave(counts, output_size=sum(lengths))[:, None]
            first = parts[0].start
            for part in parts:
                if len(parts) > 1:
                    logits = logits_of(part)
                    slope = 1 - (logits / softcap) ** 2 if softcap is not None else None
                    targets = row.targets[part, None]
                    peak = logits.amax(dim=-1, keepdim=True)
                    total = logits.sub_(peak).exp_().sum(dim=-1, keepdim=True)
                factor = factors[part.start - first : part.stop - first]
                # d logp / d logits = one-hot of the target - softmax
                logits.mul_(-factor / total).scatter_add_(-1, targets, factor)
                if slope is not None:
                    logits.mul_(slope)
                gradient = logits.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = gradient @ cast_weight
                if grad_weight is not None:
                    own_hidden = hidden[part].to(dtype)
                    if dtype == grad_weight.dtype:
                        grad_weight.addmm_(gradient.T, own_hidden)
                    else:
                        grad_weight += gradient.T @ own_hidden
                if grad_bias is not None:
                    grad_bias += logits.sum(dim=0)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        all_sums = torch.cat(sums)
        ctx.mark_non_differentiable(all_sums)
        return loss, all_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g.mul_(grad_loss) for g in ctx.gradients]
        ctx.gradients = None
        return (*gradients, None, None, None, None, None)


def _groups(
    response_tokens: tuple[int, ...], chunk_tokens: int
) -> Iterator[tuple[tuple[int, ...], list[slice]]]:
    """Take as many pairs together as fit a chunk; a pair above one alone, in several parts."""
    first = end = 0
    lengths: tuple[int, ...] = ()
    for both in zip(response_tokens[0::2], response_tokens[1::2], strict=True):
        if lengths and end + sum(both) - first > chunk_tokens:
            yield lengths, _parts(first, end, chunk_tokens)
            first, lengths = end, ()
        lengths += both
        end += sum(both)
    yield lengths, _parts(first, end, chunk_tokens)


def _parts(first: int, end: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, end)) for start in range(first, end, size)]


def _pair_logps(sums: Tensor, lengths: tuple[int, ...]) -> PairLogps:
    counts = torch.tensor(lengths, device=sums.device)
    return PairLogps(sums[0::2], sums[1::2], counts[0::2], counts[1::2])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
