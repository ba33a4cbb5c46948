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

from simpo.data.pairs import PackedPairs
from simpo.loss import PairLogps

LOGITS_BYTES = 256 * 2**20

PairLoss = Callable[[PairLogps], Tensor]
"""From the log-probabilities of some pairs to what each adds to the loss, float32 [P]."""


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: PackedPairs,
    pair_loss: PairLoss,
    softcap: float | None = None,
) -> tuple[Tensor, PairLogps]:
    """Loss of a row of pairs, and the log-probabilities of their responses.

    Args:
        hidden: [T, D], the last hidden states, normalised as the head wants them.
        weight, bias: of the head, [V, D] and [V]; logits are in their type, or in autocast's.
        row: says which position predicts which token.
        pair_loss: takes any of the row's pairs, in order; each pair's loss is its own.
        softcap: logits z become softcap * tanh(z / softcap) (Gemma-2).

    Returns:
        The sum of the losses of the pairs, with gradients for hidden, weight and bias; sums
        of token log-probabilities over each response, without. Softmax and sums are in float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    wanted = torch.is_grad_enabled()
    scored = hidden.index_select(0, row.predictors)
    with torch.autocast(device, enabled=False):
        loss, sums = _FusedLoss.apply(scored, weight, bias, row, pair_loss, softcap, dtype, wanted)
    return loss, _pair_logps(sums, row.response_tokens, row.reference_logps)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row: PackedPairs,
        pair_loss: PairLoss,
        softcap: float | None,
        dtype: torch.dtype,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        needs = tuple(wanted and need for need in ctx.needs_input_grad[:3])
        groups = list(_groups(row.response_tokens, max(1, LOGITS_BYTES // (4 * len(weight)))))
        longest = max(part.stop - part.start for _, parts in groups for part in parts)
        head = _Head(hidden, weight, bias, row.targets, softcap, dtype, needs, longest)
        losses, all_sums = [], []
        scored = 0
        for lengths, parts in groups:
            logps = torch.cat([head.logps(part) for part in parts])
            sums = torch.stack([response.sum() for response in logps.split(lengths)])
            all_sums.append(sums)
            reference = row.reference_logps
            if reference is not None:
                reference = reference[scored : scored + len(lengths)]
            scored += len(lengths)
            with torch.enable_grad():
                leaf = sums.detach().requires_grad_()
                loss = pair_loss(_pair_logps(leaf, lengths, reference)).sum()
            losses.append(loss.detach())
            if not any(needs):
                continue
            (factors,) = torch.autograd.grad(loss, leaf)
            counts = torch.tensor(lengths, device=factors.device)
            factors = factors.repeat_interleave(counts, output_size=len(logps))
            for part, factor in zip(parts, factors.split(longest), strict=True):
                if len(parts) > 1:
                    head.logps(part)
                head.add_gradients(part, factor[:, None])
        ctx.gradients = (head.grad_hidden, head.grad_weight, head.grad_bias)
        sums = torch.cat(all_sums)
        ctx.mark_non_differentiable(sums)
        return torch.stack(losses).sum(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g.mul_(grad_loss) for g in ctx.gradients]
        ctx.gradients = None
        return (*gradients, None, None, None, None, None)


class _Head:
    """Meets the vocabulary with a chunk of positions at a time, in one piece of memory.

    Fresh pages for each chunk would cost the system a tenth of the time. Sums over chunks are in
    float32 even where a chunk's own product is in bf16.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        dtype: torch.dtype,
        needs: tuple[bool, ...],
        longest: int,
    ) -> None:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        self._hidden = hidden.to(dtype)
        self._weight, self._bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self._targets, self._softcap = targets[:, None], softcap
        self._memory = torch.empty(longest, len(weight), dtype=wide, device=hidden.device)
        self._total = self._slope = torch.empty(0)
        self.grad_hidden = torch.empty_like(hidden) if needs[0] else None
        self.grad_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        self.grad_bias = torch.zeros_like(weight[:, 0], dtype=wide) if needs[2] else None

    def logps(self, part: slice) -> Tensor:
        """Log-probability of each target of a part, [n]; leaves exp(logits - largest) in memory."""
        logits = self._memory[: part.stop - part.start]
        if self._weight.dtype is logits.dtype:
            torch.mm(self._hidden[part], self._weight.T, out=logits)
        else:
            logits.copy_(self._hidden[part] @ self._weight.T)
        if self._bias is not None:
            logits += self._bias
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_()
            self._slope = 1 - logits.square()
            logits.mul_(self._softcap)
        largest = logits.amax(dim=-1, keepdim=True)
        own = logits.gather(-1, self._targets[part])
        self._total = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
        return (own - largest - self._total.log()).squeeze(-1)

    def add_gradients(self, part: slice, factor: Tensor) -> None:
        """Add factor [n, 1] times the gradient of the part that `logps` was last called for."""
        gradient = self._memory[: part.stop - part.start]
        # d logp / d logits = one-hot of the target - softmax
        gradient.mul_(-factor / self._total).scatter_add_(-1, self._targets[part], factor)
        if self._softcap is not None:
            gradient.mul_(self._slope)
        product = gradient.to(self._weight.dtype)
        if self.grad_hidden is not None:
            self.grad_hidden[part] = product @ self._weight
        if self.grad_weight is not None and product.dtype is self.grad_weight.dtype:
            self.grad_weight.addmm_(product.T, self._hidden[part])
        elif self.grad_weight is not None:
            self.grad_weight += product.T @ self._hidden[part]
        if self.grad_bias is not None:
            self.grad_bias += gradient.sum(dim=0)


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


def _pair_logps(sums: Tensor, lengths: tuple[int, ...], reference: Tensor | None) -> PairLogps:
    counts = torch.tensor(lengths, device=sums.device)
    return PairLogps(sums[0::2], sums[1::2], counts[0::2], counts[1::2], reference)
