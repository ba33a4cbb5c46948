"""Computes the loss of a row and its gradients from hidden states, without a [T, V] tensor.

Logits are computed only at positions that predict a response token, for a few pairs at a time. The
loss of a pair depends on that pair alone, so the gradient of its logits is known as soon as they
are. It is computed in the forward pass, in the buffer of the logits, which the next pairs reuse.
This takes three products with the head's weight (logits, gradient of the hidden states, gradient of
the weight), as many as an ordinary backward pass, and LOGITS_BYTES of memory for any length. A pair
with more logits than that is processed in parts, and its logits are computed twice; on a GPU only
if they would take more than a sixteenth of its memory.

Computing the gradient chunk by chunk in the forward pass follows Liger
(https://arxiv.org/abs/2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simpo.data.pairs import PackedPairs
from simpo.loss import LossConfig, PairLogps, ResponseLogps, TokenLogps

LOGITS_BYTES = 256 * 2**20

GPU_SHARE = 16
"""A pair's logits are computed at once where they take at most 1 / GPU_SHARE of a GPU's memory."""

PairLoss = Callable[[PairLogps], Tensor]
"""Maps the log-probabilities of some pairs to the loss of each, float32 [P]."""


def largest_logits_bytes(device: torch.device) -> int:
    """Bytes of logits up to which those of one pair are computed at once."""
    if device.type != "cuda":
        return LOGITS_BYTES
    return of_gpu(torch.cuda.get_device_properties(device).total_memory)


def of_gpu(memory_bytes: int) -> int:
    """The same on a GPU with so much memory."""
    return max(LOGITS_BYTES, memory_bytes // GPU_SHARE)


def no_loss(logps: PairLogps) -> Tensor:
    """The `PairLoss` of pairs that are only scored: 0 for each."""
    return 0.0 * logps.chosen


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: PackedPairs,
    pair_loss: PairLoss,
    softcap: float | None = None,
    largest_bytes: int | None = None,
    weigher: LossConfig | None = None,
) -> tuple[Tensor, PairLogps]:
    """Compute the loss of a row of pairs and the log-probabilities of their responses.

    Args:
        hidden: [T, D], the last hidden states after the final norm.
        weight, bias: of the head, [V, D] and [V]; logits are in their dtype, or in autocast's.
        row: its predictors and targets are the positions and tokens that are scored.
        pair_loss: called with consecutive pairs of the row; the loss of a pair must not depend on
            other pairs.
        softcap: logits z become softcap * tanh(z / softcap) (Gemma-2).
        largest_bytes: of logits up to which those of one pair are computed at once; None takes the
            device's.
        weigher: the loss whose weights of tokens are summed too, if it has such.

    Returns:
        The sum of the losses of the pairs, differentiable in hidden, weight and bias; and the
        summed token log-probabilities of each response, not differentiable. Softmax and sums are in
        float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    wanted = torch.is_grad_enabled()
    scored = hidden.index_select(0, row.predictors)
    with torch.autocast(device, enabled=False):
        largest = largest_bytes or largest_logits_bytes(hidden.device)
        loss, sums = _FusedLoss.apply(
            scored, weight, bias, row, pair_loss, softcap, dtype, wanted, largest, weigher
        )
    return loss, _pair_logps(dict(zip(_summed(weigher), sums, strict=True)), row, slice(None))


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: PackedPairs,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the scored tokens of a row, and the entropies of their distributions.

    Args:
        hidden, weight, bias, row, softcap: as of `fused_loss`.

    Returns:
        Both in nats, float32 [N], in the order of the row's targets.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    scored = hidden.index_select(0, row.predictors)
    chunk = max(1, LOGITS_BYTES // (4 * len(weight)))
    with torch.autocast(device, enabled=False):
        longest = min(chunk, len(scored))
        head = _Head(scored, weight, bias, row.targets, softcap, dtype, (False,) * 3, longest)
        parts = _parts(0, len(scored), chunk)
        found = [(head.logps(part), head.entropies(part)) for part in parts]
    logps, entropies = zip(*found, strict=True)
    return torch.cat(logps), torch.cat(entropies)


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
        largest_bytes: int,
        weigher: LossConfig | None,
    ) -> tuple[Tensor, Tensor]:
        needs = tuple(wanted and need for need in ctx.needs_input_grad[:3])
        chunk, largest = (
            max(1, size // (4 * len(weight))) for size in (LOGITS_BYTES, largest_bytes)
        )
        groups = list(_groups(row.response_tokens, row.num_responses, chunk, largest))
        longest = max(part.stop - part.start for _, parts in groups for part in parts)
        head = _Head(hidden, weight, bias, row.targets, softcap, dtype, needs, longest)
        losses, all_sums = [], []
        scored = 0
        for lengths, parts in groups:
            tokens = slice(parts[0].start, parts[-1].stop)
            found = _group_sums(head, parts, lengths, row, row.targets[tokens], weigher)
            all_sums.append(torch.stack(list(found.sums.values())))
            own = slice(scored, scored + len(lengths))
            scored = own.stop
            with torch.enable_grad():
                for name in found.differentiable:
                    found.sums[name] = found.sums[name].detach().requires_grad_()
                loss = pair_loss(_pair_logps(found.sums, row, own)).sum()
            losses.append(loss.detach())
            if not any(needs):
                continue
            factors = _token_factors(loss, found, row.response_lengths[own], tokens)
            for part, factor in zip(parts, factors.split(longest), strict=True):
                if len(parts) > 1:
                    head.logps(part)
                head.add_gradients(part, factor[:, None])
        ctx.gradients = (head.grad_hidden, head.grad_weight, head.grad_bias)
        sums = torch.cat(all_sums, dim=1)
        ctx.mark_non_differentiable(sums)
        return torch.stack(losses).sum(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g.mul_(grad_loss) for g in ctx.gradients]
        ctx.gradients = None
        return (*gradients, None, None, None, None, None, None, None)


class _Head:
    """Computes logits and gradients chunk by chunk in one reused buffer.

    Allocating memory for each chunk would cost a tenth of the time. Gradients are summed over
    chunks in float32, also if the product of a chunk is in bf16.
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
        """Log-probs of the targets of a part, [n]; leaves exp(logits - max) in the buffer."""
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

    def entropies(self, part: slice) -> Tensor:
        """Entropies of the distributions of a part, [n]; `logps` must have been called for it last.

        With e = exp(logits - max) and p = e / sum(e): -sum(p log p) = log sum(e) - sum(e log e) /
        sum(e).
        """
        e = self._memory[: part.stop - part.start]
        mean = torch.special.xlogy(e, e).sum(dim=-1, keepdim=True) / self._total
        return (self._total.log() - mean).squeeze(-1)

    def log_squares(self, part: slice) -> Tensor:
        """log(sum p^2) of the distributions of a part, [n]; `logps` must have been called for it
        last."""
        e = self._memory[: part.stop - part.start]
        return 2 * (torch.linalg.vector_norm(e, dim=-1) / self._total.squeeze(-1)).log()

    def add_gradients(self, part: slice, factor: Tensor) -> None:
        """Add the gradients of sum(factor * logps) of a part; factor is [n, 1].

        `logps` must have been called for this part last.
        """
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


@dataclass
class _GroupSums:
    """What is summed of the responses of consecutive pairs.

    Attributes:
        sums: by the names of `_summed`, [responses] each.
        weights: of the tokens, [n]; None if the loss weighs none.
    """

    sums: dict[str, Tensor]
    weights: Tensor | None

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The sums whose gradients reach the tokens."""
        return ("sums",) if self.weights is None else ("sums", "weighted")


def _summed(weigher: LossConfig | None) -> tuple[str, ...]:
    """Fields of `ResponseLogps` that are summed over tokens."""
    weighted = ("weighted", "weights") if weigher is not None and weigher.weighs_tokens else ()
    squares = ("log_squares",) if weigher is not None and weigher.needs_squares else ()
    return ("sums", *weighted, *squares)


def _group_sums(
    head: _Head,
    parts: list[slice],
    lengths: tuple[int, ...],
    row: PackedPairs,
    targets: Tensor,
    weigher: LossConfig | None,
) -> _GroupSums:
    """Compute a group's log-probs and sum them; the last part's are left in the head's buffer."""
    logps, squares = [], []
    for part in parts:
        logps.append(head.logps(part))
        if weigher is not None and weigher.needs_squares:
            squares.append(head.log_squares(part))
    of_tokens, weights = {"sums": torch.cat(logps)}, None
    if weigher is not None and weigher.weighs_tokens:
        own = TokenLogps(of_tokens["sums"], targets, lengths, row.num_responses)
        weights = weigher.token_weights(own)
        of_tokens |= {"weighted": weights * of_tokens["sums"], "weights": weights}
    if squares:
        of_tokens["log_squares"] = torch.cat(squares)
    sums = {
        name: torch.stack([response.sum() for response in values.split(lengths)])
        for name, values in of_tokens.items()
    }
    return _GroupSums(sums, weights)


def _token_factors(loss: Tensor, found: _GroupSums, counts: Tensor, tokens: slice) -> Tensor:
    """The gradient of a group's loss by the log-prob of each of its tokens, [n]."""
    size = tokens.stop - tokens.start
    leaves = [found.sums[name] for name in found.differentiable]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    of_sums, *weighted = (g.repeat_interleave(counts, output_size=size) for g in gradients)
    return of_sums if found.weights is None else of_sums + found.weights * weighted[0]


def _groups(
    response_tokens: tuple[int, ...], num_responses: int, chunk_tokens: int, largest_tokens: int
) -> Iterator[tuple[tuple[int, ...], list[slice]]]:
    """Group as many pairs as fit into a chunk; split a pair of more than `largest_tokens`.

    Yields:
        Scored tokens of each response of the group, and the slices of scored tokens to compute.
    """
    first = end = 0
    lengths: tuple[int, ...] = ()
    for start in range(0, len(response_tokens), num_responses):
        own = response_tokens[start : start + num_responses]
        if lengths and end + sum(own) - first > chunk_tokens:
            yield lengths, _parts(first, end, largest_tokens)
            first, lengths = end, ()
        lengths += own
        end += sum(own)
    yield lengths, _parts(first, end, largest_tokens)


def _parts(first: int, end: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, end)) for start in range(first, end, size)]


def _pair_logps(sums: Mapping[str, Tensor], row: PackedPairs, own: slice) -> PairLogps:
    """Log-probs of the pairs whose responses are at `own` in the row."""
    of_row = {
        "tokens": row.response_lengths,
        "scores": row.scores,
        "reference": row.reference_logps,
        "factors": row.factors,
    }
    known = {name: values[own] for name, values in of_row.items() if values is not None}
    columns = {n: x.view(-1, row.num_responses) for n, x in ({**sums, **known}).items()}
    return ResponseLogps(**columns).pairs()
