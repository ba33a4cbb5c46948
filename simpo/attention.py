"""Attention over packed rows in which two responses share one prompt.

A pair is two segments: prompt + chosen, causal; and rejected over prompt + rejected. Each is its
own scaled-dot-product call, so no mask of the whole row exists and a pair never sees another.

`register` makes this the attention implementation `simpo` of transformers. A model is *loaded*
with it: switched on only around the forward, gradient checkpointing would recompute with another
one. Without `segments` (generation) it is transformers' own SDPA attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from simpo.pairs import Segment

NAME = "simpo"


def register() -> None:
    """Make the attention known to transformers under `NAME`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)


def attend(
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the layer, for transformers' own SDPA path.
        query: [B, heads, T, head size].
        key, value: [B, key heads, T, head size].
        attention_mask: only for generation (no segments): bool, True where a key is seen.
        scaling: factor on the scores; None is 1 / sqrt(head size).
        sliding_window: a query sees only keys less than this many positions before it.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma-2).
        segments: where the pairs lie in the row; B must be 1.

    Returns:
        ([B, T, heads, head size], None).
    """
    if segments is None:
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
        visible = _causal(query, key, None) if attention_mask is None else attention_mask
        return _attend(query, key, value, visible, scaling, softcap).transpose(1, 2), None
    # Split once: the backward pass of a slice would fill a gradient of the whole row with zeros.
    lengths = [n for s in segments for n in (s.rejected - s.start, s.end - s.rejected)]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    outputs = []
    for index, (start, chosen, _, _) in enumerate(segments):
        first, second, prompt = 2 * index, 2 * index + 1, slice(0, chosen - start)
        shared_key = torch.cat([keys[first][:, :, prompt], keys[second]], dim=2)
        shared_value = torch.cat([values[first][:, :, prompt], values[second]], dim=2)
        for q, k, v in (
            (queries[first], keys[first], values[first]),
            (queries[second], shared_key, shared_value),
        ):
            outputs.append(_causal_attend(q, k, v, scaling, sliding_window, softcap))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _causal_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention whose queries are the *last* positions of its keys."""
    windowed = sliding_window is not None and key.shape[2] > sliding_window
    if softcap is None and not windowed and query.shape[2] == key.shape[2]:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
    # is_causal would align unequal lengths top-left, which lets a query see too little.
    visible = _causal(query, key, sliding_window if windowed else None)
    return _attend(query, key, value, visible, scaling, softcap)


def _causal(query: Tensor, key: Tensor, sliding_window: int | None) -> Tensor:
    """Which keys each query sees, bool [queries, keys], the last query at the last key."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    position = torch.arange(num_keys, device=query.device)
    distance = position[num_keys - num_queries :, None] - position[None]
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh((query @ key.transpose(2, 3)) * scale / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for a packed row; generation passes its padding mask and gets the usual one.

    Without this, transformers would see several sequences in the row's positions and build a
    dense [T, T] mask that does not know of shared prompts.
    """
    if kwargs.get("attention_mask") is None:
        return None
    return sdpa_mask(*args, **kwargs)
