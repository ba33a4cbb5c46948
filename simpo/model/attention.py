"""Computes attention over packed rows in which the responses of a pair share one prompt.

A pair has a segment for each response: prompt + chosen attends causally to itself, and rejected (or
any further response) attends to prompt + rejected. Without shared prompts each sequence attends to
itself. Pairs do not attend to each other, and no [T, T] mask is built. There are three kernels:

    sdpa     one scaled-dot-product call per segment; any device, any dtype
    varlen   torch.nn.attention.varlen, all segments in one call; CUDA, bf16
    flash    flash-attn's varlen function, all segments in one call, with soft-cap; CUDA, bf16

The variable-length kernels need the keys of a segment to be contiguous, so a prompt's keys are
copied for each further response, as in https://github.com/li-plus/flash-preference.

`register` adds the kernels to transformers' attention implementations. The model must be *loaded*
with one: if it were set around the forward only, gradient checkpointing would recompute with
another. Without `segments` (generation) each kernel is transformers' own SDPA attention.
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from simpo.data.pairs import KeyTable, Segment, segment_lengths

BLOCK_QUERIES = 2048
"""Queries that the sdpa kernel masks at once: the mask of a long response would be quadratic."""

# transformers would treat a name that contains "sdpa" or "flash" as one of its own kernels.
NAMES = {"sdpa": "simpo", "varlen": "simpo_varlen", "flash": "simpo_fa"}


class Form(NamedTuple):
    """The form of a layer's attention.

    Attributes:
        scaling: factor on the scores; None is 1 / sqrt(head size).
        window: a query sees only keys less than this many positions before it; None: all of them.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma-2).
    """

    scaling: float | None
    window: int | None
    softcap: float | None


def register() -> None:
    """Register the kernels with transformers under `NAMES`."""
    for kernel, name in NAMES.items():
        AttentionInterface.register(name, partial(attend, kernel))
        AttentionMaskInterface.register(name, _mask)


def unusable(kernel: str, device: torch.device, bf16: bool, softcap: bool) -> str | None:
    """Why a kernel cannot be used, or None if it can.

    Args:
        device: device of the model.
        bf16: whether the forward computes in bf16.
        softcap: whether the model caps its attention scores.
    """
    if kernel == "sdpa":
        return None
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if not bf16:
        return "needs bf16 (train.precision=bf16)"
    if kernel == "flash":
        return None if find_spec("flash_attn") else 'needs flash-attn (pip install "simpo[gpu]")'
    return "cannot cap attention scores, as this model does" if softcap else None


def best(device: torch.device, bf16: bool, softcap: bool) -> str:
    """The fastest usable kernel; arguments as `unusable`."""
    kernels = ("flash", "varlen", "sdpa")
    return next(k for k in kernels if not unusable(k, device, bf16, softcap))


def attend(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: tuple[Segment, ...] | None = None,
    keys: KeyTable | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer; transformers calls this.

    Args:
        kernel: sdpa, varlen or flash.
        module: the layer, for transformers' own SDPA path.
        query: [B, heads, T, head size].
        key, value: [B, key heads, T, head size].
        attention_mask: for generation only (no segments): bool, True for visible keys.
        scaling, sliding_window, softcap: see `Form`.
        segments, keys: positions of the pairs in the row; B must be 1.

    Returns:
        ([B, T, heads, head size], None).
    """
    form = Form(scaling, sliding_window, softcap)
    if segments is None or keys is None:
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
        if attention_mask is None:
            position = torch.arange(key.shape[2], device=key.device)
            attention_mask = position <= position[-query.shape[2] :, None]
        return _attend(query, key, value, attention_mask, form).transpose(1, 2), None
    if kernel == "sdpa":
        output = _by_segment(query, key, value, segments, keys, form)
        return output.transpose(1, 2), None
    # Rotary embeddings may have left float32 under autocast; the kernels take bf16 only.
    query, key, value = (x[0].transpose(0, 1).to(torch.bfloat16) for x in (query, key, value))
    key, value = key.index_select(0, keys.index), value.index_select(0, keys.index)
    return _variable_length(kernel, query, key, value, keys, form)[None], None


def _variable_length(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, table: KeyTable, form: Form
) -> Tensor:
    """All segments in one call: queries [T, heads, head size], keys and values [K, ...]."""
    ends = table.query_ends, table.key_ends, table.longest_queries, table.longest_keys
    # Visible keys left and right of a query, -1 for all. The last query is at the last key.
    window = (-1 if form.window is None else form.window - 1, 0)
    if kernel == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        assert form.softcap is None, "this kernel has no soft-cap"
        output: Any = varlen_attn(
            query, key, value, *ends, scale=form.scaling, window_size=window, **_gqa_option()
        )
        return output
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, *ends,
        softmax_scale=form.scaling, causal=True, window_size=window, softcap=form.softcap or 0.0,
    )  # fmt: skip


@cache
def _gqa_option() -> dict[str, Any]:
    """The option that allows fewer key heads than query heads; torch before 2.12 needs none."""
    from torch.nn.attention.varlen import varlen_attn

    asked = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if asked else {}


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[Segment, ...],
    table: KeyTable,
    form: Form,
) -> Tensor:
    if value.device.type == "cpu" and value.dtype is torch.bfloat16:
        # On short segments the CPU's backward kernel is three times slower in bf16.
        with torch.autocast("cpu", enabled=False):
            q, k, v = query.float(), key.float(), value.float()
            return _by_segment(q, k, v, segments, table, form).to(value.dtype)
    # Split once: the backward pass of each slice would allocate a zero gradient of the whole row.
    lengths = segment_lengths(segments)
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    outputs = []
    first = 0
    for start, prompt, *ends in segments:
        shared_key, shared_value = (x[first][:, :, : prompt - start] for x in (keys, values))
        for index in range(first, first + len(ends)):
            key, value = keys[index], values[index]
            if index > first:
                key = torch.cat([shared_key, key], dim=2)
                value = torch.cat([shared_value, value], dim=2)
            outputs.append(_causal_attend(queries[index], key, value, table, form))
        first += len(ends)
    return torch.cat(outputs, dim=2)


def _causal_attend(
    query: Tensor, key: Tensor, value: Tensor, table: KeyTable, form: Form
) -> Tensor:
    """Causal attention whose queries are the *last* positions of its keys."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    window = None if form.window is None or num_keys <= form.window else form.window
    if form.softcap is None and window is None and num_queries == num_keys:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=form.scaling, enable_gqa=True
        )
    # is_causal aligns unequal lengths top-left, which would hide keys from the queries.
    mask = _mask_of_row(table, query, window)
    end, outputs = num_keys - num_queries, []
    for block in query.split(BLOCK_QUERIES, dim=2):
        size = block.shape[2]
        end += size
        seen = key[:, :, :end], value[:, :, :end]
        outputs.append(_attend(block, *seen, mask[-size:, -end:], form))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _mask_of_row(table: KeyTable, query: Tensor, window: int | None) -> Tensor:
    """What a row's layers add to scores, 0 or -inf, for the last queries of its longest segment.

    Whether a query sees a key depends on their distance alone, so the last q rows and k columns are
    the mask of the last q queries of any segment with k keys.
    """
    name = window, query.dtype
    if name not in table.masks:
        position = torch.arange(table.longest_keys, device=query.device)
        own = position[-min(table.longest_queries, BLOCK_QUERIES) :, None]
        hidden = position > own
        if window is not None:
            hidden |= position <= own - window
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        table.masks[name] = mask.masked_fill_(hidden, float("-inf"))
    return table.masks[name]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, form: Form) -> Tensor:
    """Attention under a mask: bool, True for visible keys, or what is added to the scores."""
    if form.softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=form.scaling, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if form.scaling is None else form.scaling
    scores = form.softcap * torch.tanh((query @ key.transpose(2, 3)) * scale / form.softcap)
    # Padding sees no key: of nothing but -inf the softmax would be NaN, also in layers above.
    least = torch.finfo(scores.dtype).min
    is_bool = mask.dtype is torch.bool
    scores = scores.masked_fill(~mask, least) if is_bool else scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Build no mask for a packed row, and transformers' usual mask for generation.

    Otherwise transformers would detect several sequences from the row's positions and build a dense
    [T, T] mask that ignores shared prompts.
    """
    if kwargs.get("attention_mask") is None:
        return None
    return sdpa_mask(*args, **kwargs)
