"""Estimates the memory of a step before training, and counts its floating-point operations."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simpo.config.choices import Checkpointing
from simpo.config.errors import ConfigError
from simpo.data.packing import pack
from simpo.data.pairs import PackedPairs, TokenizedPair
from simpo.data.plan import TrainPlan, pairs_of_step, rows_of_pairs
from simpo.model.checkpointing import is_kept
from simpo.model.head import largest_logits_bytes
from simpo.model.policy import Policy
from simpo.model.router import experts_per_token

GIB = 2**30
STEPS_LOOKED_AT = 64

# Dense bf16 peak of one GPU in TFLOP/s, from the vendor's data sheets.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "B200": 2250}


@dataclass(frozen=True)
class Layout:
    """How the pairs of a run's first steps (at most 64) fill their rows.

    Attributes:
        tokens_per_step: mean number of tokens computed in a step.
        fill: tokens divided by the budget of all rows (above 1 if pairs are longer than a row).
        largest_row_tokens: tokens of the largest row.
    """

    tokens_per_step: float
    fill: float
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
        largest_row_tokens=max(sizes),
    )


@dataclass(frozen=True)
class Memory:
    """Estimated peak memory of a step on one device, by part, in GiB."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Sum of all parts, in GiB."""
        return float(sum(astuple(self)))

    def __str__(self) -> str:
        parts = ", ".join(f"{f.name} {getattr(self, f.name):.2f}" for f in fields(self))
        return f"{self.total:.2f} GiB ({parts})"


def estimate_memory(
    policy: Policy,
    row_tokens: int,
    bf16: bool,
    checkpointing: Checkpointing,
    weight_shards: int = 1,
    state_shards: int = 1,
    probe: Policy | None = None,
) -> Memory:
    """Estimate the peak memory of a step in one process.

    The activations that autograd keeps are measured on two short rows and extrapolated; with
    checkpointing they are the input of each layer and everything in one layer, and where it is
    selective the outputs that it keeps.

    Args:
        row_tokens: tokens of the largest row.
        bf16: whether the forward computes in bf16.
        checkpointing: of the layers.
        weight_shards: number of processes that the weights are sharded over. The weights of a
            gathered layer are not counted.
        state_shards: number of processes that gradients and optimizer state are sharded over.
        probe: if the policy's weights are unread, a model with some of its layers. Its activations
            are measured and multiplied.
    """
    parameters = list(policy.parameters())
    trained = [p for p in parameters if p.requires_grad]
    sizes = 64, 128
    layers = policy.base.config.get_text_config().num_hidden_layers
    probe = probe or policy
    times = layers / probe.base.config.get_text_config().num_hidden_layers
    measured = zip(*(_kept_bytes(probe, size, bf16) for size in sizes), strict=True)
    kept, products = (_drawn_out(pair, sizes, row_tokens) * times for pair in measured)
    head: Any = policy.base.get_output_embeddings()
    if checkpointing is not Checkpointing.none:
        # Inputs of layers have the dtype of the embeddings; that of adapters is always fp32.
        stream: Any = policy.base.get_input_embeddings().weight
        kept = kept / layers + row_tokens * layers * stream.shape[1] * stream.element_size()
        kept += products if checkpointing is Checkpointing.selective else 0
    # Logits in fp32, and a copy in the dtype of the head or the gradient of the soft-cap.
    logits = 2 * min(largest_logits_bytes(head.weight.device), 4 * row_tokens * len(head.weight))
    # Gradient of the whole weight in fp32, also if only adapters on it are trained.
    if any(p.requires_grad for p in head.parameters()):
        logits += 4 * head.weight.numel()
    return Memory(
        weights=sum(_bytes(p) for p in parameters) / weight_shards / GIB,
        gradients=sum(_bytes(p) for p in trained) / state_shards / GIB,
        optimizer=2 * sum(_bytes(p) for p in trained) / state_shards / GIB,
        activations=kept / GIB,
        logits=logits / GIB,
    )


def check_memory(memory: Memory, device: torch.device, processes: int = 1) -> None:
    """Compare an estimate with the memory of the device, including the loaded weights.

    Args:
        processes: number of processes that share this machine's memory, if on a CPU.

    Raises:
        ConfigError: the step does not fit; the message says which setting reduces its memory.
    """
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        available = psutil.virtual_memory().available / processes + memory.weights * GIB
    if memory.total * GIB > available:
        state = memory.gradients + memory.optimizer
        remedy = (
            "model.lora.rank=16 trains adapters only"
            if state > memory.activations
            else "lower train.tokens_per_row, or model.gradient_checkpointing=selective or full"
        )
        raise ConfigError(
            [
                f"train.check_memory: a step needs about {memory}, there are "
                f"{available / GIB:.2f} GiB ({remedy}; train.check_memory=false tries all the same)"
            ]
        )


def _drawn_out(measured: tuple[int, ...], sizes: tuple[int, int], tokens: int) -> float:
    """Bytes of a row, linear in its tokens, from those measured on rows of two sizes."""
    per_token = (measured[1] - measured[0]) / (sizes[1] - sizes[0])
    return max(0.0, measured[0] - per_token * sizes[0]) + per_token * tokens


class _Products(TorchDispatchMode):
    """Counts the bytes that selective checkpointing keeps."""

    num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if is_kept(func, args):
            outputs = output if isinstance(output, tuple) else (output,)
            self.num_bytes += sum(_bytes(x) for x in outputs if isinstance(x, Tensor))
        return output


def _kept_bytes(policy: Policy, num_tokens: int, bf16: bool) -> tuple[int, int]:
    """Bytes that autograd saves in the forward of a row, and those that selective checkpointing
    keeps; both without the head and without weights.
    """
    response = np.ones(num_tokens // 4, dtype=np.int32)
    pair = TokenizedPair(np.ones(num_tokens // 2, dtype=np.int32), response, response)
    device = next(policy.parameters()).device
    row = pack([pair], [0], share_prefix=policy.share_prefix).to(device)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        # The output of an operation would hold the graph that holds it, and neither be freed.
        return tensor.detach()

    training = policy.training
    policy.eval()  # transformers' layers do not checkpoint in eval mode
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        _Products() as products,
    ):
        hidden = policy.hidden(row)
    policy.train(training)
    del hidden
    return sum(kept.values()), products.num_bytes


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def num_weights(parameter: Tensor) -> int:
    """Number of weights of a parameter; 4-bit weights are packed several to an element."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else parameter.numel()


class Flops:
    """Counts the floating-point operations of a step.

    A matrix product is counted once in the forward pass, once for the gradient of its input and, if
    its weight is trained, once for the gradient of the weight. Of the experts only those that a
    token is routed to are counted. Recomputation by gradient checkpointing is not, nor is the pass
    that counts the routing of a step, so the fraction of a GPU's peak is model FLOPs utilisation
    (MFU) as in https://arxiv.org/abs/2204.02311.
    """

    def __init__(self, policy: Policy) -> None:
        head = policy.base.get_output_embeddings().weight
        tables = {id(head), id(policy.base.get_input_embeddings().weight)}
        config = policy.base.config.get_text_config()
        chosen, experts = experts_per_token(config)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
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
        self._per_score = 3 * 4 * config.num_attention_heads * size * config.num_hidden_layers

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
