"""How the pairs of a run fill rows, and the floating-point operations of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from simpo.data.pairs import PackedPairs
from simpo.data.plan import TrainPlan, pairs_of_step, rows_of_pairs
from simpo.model.policy import Policy
from simpo.model.router import experts_per_token

STEPS_LOOKED_AT = 64

# Dense bf16 peak of one GPU in TFLOP/s, from the vendor's data sheets.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "B200": 2250}


@dataclass(frozen=True)
class Layout:
    """How the pairs of a run's first steps (at most 64) fill their rows.

    Attributes:
        tokens_per_step: mean number of tokens computed in a step.
        fill: tokens divided by the budget of all rows (above 1 if pairs are longer than a row).
        largest_row: indices of the pairs in the row with most tokens.
        largest_row_tokens: its tokens.
    """

    tokens_per_step: float
    fill: float
    largest_row: tuple[int, ...]
    largest_row_tokens: int


def layout(
    plan: TrainPlan, num_tokens: np.ndarray, tokens_per_row: int, processes: int = 1
) -> Layout:
    """Lay out the first steps of a plan.

    Args:
        num_tokens: tokens computed for each pair, int64 [num_pairs].
        processes: number of processes that share the rows.
    """
    steps = [pairs_of_step(plan, step) for step in range(min(plan.total_steps, STEPS_LOOKED_AT))]
    rows = [
        row for step in steps for row in rows_of_pairs(step, num_tokens, tokens_per_row, processes)
    ]
    sizes = [int(num_tokens[row].sum()) for row in rows]
    return Layout(
        tokens_per_step=sum(sizes) / len(steps),
        fill=sum(sizes) / (len(rows) * tokens_per_row),
        largest_row=tuple(rows[sizes.index(max(sizes))]),
        largest_row_tokens=max(sizes),
    )


def num_weights(parameter: Tensor) -> int:
    """Number of weights of a parameter; 4-bit weights are packed several to an element."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else parameter.numel()


class Heads(NamedTuple):
    """Numbers of query heads and key heads of a layer, and the size of each."""

    queries: int
    keys: int
    size: int


def heads_of_layers(config: Any) -> list[Heads]:
    """The heads of each layer; in some models, such as Gemma 4, layers differ.

    Args:
        config: settings of a text model.
    """
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    return [
        Heads(
            own.num_attention_heads,
            getattr(own, "num_key_value_heads", None) or own.num_attention_heads,
            getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads,
        )
        for own in layers
    ]


class Flops:
    """Counts the floating-point operations of a step.

    A matrix product is counted once in the forward pass, once for the gradient of its input and, if
    its weight is trained, once for the gradient of the weight. Of the experts only those that a
    token is routed to are counted. Recomputation by gradient checkpointing is not, nor are the
    passes that count the routing of a step or couple its pairs, so the fraction of a GPU's peak is
    model FLOPs utilisation (MFU) as in https://arxiv.org/abs/2204.02311.
    """

    def __init__(self, policy: Policy) -> None:
        head = policy.base.get_output_embeddings().weight
        lookups = [module for module in policy.modules() if isinstance(module, nn.Embedding)]
        tables = {id(head), *(id(module.weight) for module in lookups)}
        config = policy.base.config.get_text_config()
        chosen, experts = experts_per_token(config)
        self._per_token = 0
        for name, p in policy.named_parameters():
            # Experts may be stacked into one 3-D weight, and their biases into one 2-D tensor.
            if p.ndim > 1 and id(p) not in tables and not name.endswith("bias"):
                operations = 2 * num_weights(p) * (2 + p.requires_grad)
                stacked = p.ndim == 3 and len(p) == experts
                of_expert = stacked or (".experts." in name and ".router." not in name)
                self._per_token += operations * chosen // experts if of_expert else operations
        self._per_target = 2 * head.numel() * (2 + head.requires_grad)
        # Scores and their product with the values in the forward pass; twice that in the backward.
        self._per_score = 3 * 4 * sum(own.queries * own.size for own in heads_of_layers(config))

    def of_row(self, row: PackedPairs) -> int:
        """Operations of the forward and backward pass of a row."""
        queries, keys = (t.diff().long() for t in (row.keys.query_ends, row.keys.key_ends))
        scores = int((queries * (keys - queries) + queries * queries // 2).sum())
        return (
            row.input_ids.shape[1] * self._per_token
            + len(row.targets) * self._per_target
            + scores * self._per_score
        )


def speed(flops_per_s: float, device: torch.device) -> dict[str, float]:
    """Metrics of speed: `gflops_per_s`, and `mfu` (0 to 1) on a GPU whose peak is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    metrics = {"gflops_per_s": flops_per_s / 1e9}
    return metrics if peak is None else {**metrics, "mfu": flops_per_s / (peak * 1e12)}
