"""Measures how a mixture of experts routes its tokens, and the auxiliary loss that balances it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Config keys for the number of experts of a layer, and for the number that a token is routed to.
ALL_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k")

RouterLoss = Callable[[Tensor, Tensor], Tensor]
"""Maps load and probability of each expert in a row (see `routing`) to a loss of the row."""


def experts_per_token(config: Any) -> tuple[int, int]:
    """Number of experts that a token is routed to, and of all experts; (1, 1) without experts."""
    chosen, experts = (
        next((value for name in names if (value := getattr(config, name, None))), None)
        for names in (CHOSEN_EXPERTS, ALL_EXPERTS)
    )
    return (chosen, experts) if chosen and experts else (1, 1)


def routing(router_logits: Sequence[Tensor], chosen: int) -> tuple[Tensor, Tensor]:
    """Load and probability of each expert, as means over the tokens of a row and over its layers.

    Args:
        router_logits: of each layer with experts, [T, E] or [B, T, E].
        chosen: number of experts that a token is routed to.

    Returns:
        The share of tokens that each expert gets, [E], not differentiable, with the sum `chosen`;
        and its mean probability, [E], differentiable. Both are at least float32.
    """
    loads, means = [], []
    for logits in router_logits:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        probs = logits.flatten(0, -2).softmax(dim=-1, dtype=dtype)
        routed = torch.zeros_like(probs).scatter_(-1, probs.topk(chosen).indices, 1.0)
        loads.append(routed.mean(dim=0))
        means.append(probs.mean(dim=0))
    return torch.stack(loads).mean(dim=0), torch.stack(means).mean(dim=0)


def aux_loss(load: Tensor, probs: Tensor) -> Tensor:
    """E * sum(load * probs), from `routing` over all tokens that are to be balanced together.

    This is the load-balancing loss of Switch Transformer (https://arxiv.org/abs/2101.03961, eq. 4)
    with the load summed over the chosen experts, as transformers computes it: with equal loads it
    is the number of experts that a token is routed to.
    """
    return len(load) * (load * probs).sum()
