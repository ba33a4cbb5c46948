"""Estimates the memory of a run before its weights are loaded, and refuses what cannot fit.

Activations and logits are followed on fake tensors (`simpo.model.sketch`). Weights, gradients,
optimizer state and what a sharding backend gathers are arithmetic on the sizes of the weights.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import astuple, dataclass, fields, replace
from heapq import nlargest
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from simpo.config.backends import BackendConfig, FsdpConfig, Zero3Config, ZeroConfig
from simpo.config.choices import Checkpointing, Offload, Quantization, ReduceDtype
from simpo.config.errors import ConfigError
from simpo.config.schema import RunConfig
from simpo.data.pairs import PackedPairs
from simpo.model.available import available_bytes
from simpo.model.head import LOGITS_BYTES
from simpo.model.load import READ_AT_A_TIME, weights_dtype
from simpo.model.sketch import Peaks, Sketch, follow, sketch

GIB = 2**30
NOT_DRAWN = (RuntimeError, TypeError, ValueError, AttributeError)
"""What a model raises that does not compute on tensors without values."""
LIVE_WEIGHTS = 1_000_000_000
"""`stage3_max_live_parameters` of DeepSpeed."""


@dataclass(frozen=True)
class Memory:
    """Estimated memory of one process by part, in GiB.

    Attributes:
        optimizer: AdamW's two means, and with DeepSpeed in bf16 the fp32 weights.
        communication: gathered weights, whole gradients of a layer, and buffers.
    """

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    communication: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts, in GiB."""
        return float(sum(astuple(self)))

    def __str__(self) -> str:
        found = ((f.name, getattr(self, f.name)) for f in fields(self))
        shown = ((name, gib) for name, gib in found if gib or name != "communication")
        parts = ", ".join(f"{name} {gib:.2f}" for name, gib in shown)
        return f"{self.total:.2f} GiB ({parts})"


@dataclass(frozen=True)
class Group:
    """Sizes of some weights, such as those of a layer.

    Attributes:
        weights, plain, trained: numbers of all weights, of those that are not packed by
            quantisation, and of those that are trained.
        plain_bytes, packed_bytes, trained_bytes: bytes of each as they are loaded.
        scales_bytes: bytes of what unpacks the packed ones, which is never sharded.
    """

    weights: int = 0
    plain: int = 0
    trained: int = 0
    plain_bytes: int = 0
    packed_bytes: int = 0
    trained_bytes: int = 0
    scales_bytes: int = 0

    def __add__(self, other: Group) -> Group:
        return Group(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def bytes_in(self, bf16: bool) -> int:
        """Bytes of the weights without scales, as loaded or cast to bf16."""
        return self.packed_bytes + (2 * self.plain if bf16 else self.plain_bytes)


@dataclass(frozen=True)
class Model:
    """Sizes of a model's weights.

    Attributes:
        layers: the decoder's layers, the largest first.
        root: all other weights.
        head: those of them that make logits.
        largest_packed: number of weights in the largest layer that quantisation packs.
        largest_bytes: of the largest `READ_AT_A_TIME` weights before quantisation, falling.
    """

    layers: tuple[Group, ...]
    root: Group
    head: Group
    largest_packed: int
    largest_bytes: tuple[int, ...]

    @staticmethod
    def of(drawn: Sketch, quantization: Quantization) -> Model:
        """Measure a sketch."""
        policy = drawn.policy
        packed = {id(p) for n, p in policy.named_parameters() if n in drawn.quantised}

        def group(module: nn.Module, without: Collection[int] = ()) -> Group:
            found = (p for p in module.parameters() if id(p) not in without)
            sizes = (_sizes(p, quantization if id(p) in packed else None) for p in found)
            return sum(sizes, Group())

        decoder: Any = policy.base.get_decoder()
        inside = {id(p) for p in decoder.layers.parameters()}
        head: Any = policy.base.get_output_embeddings()
        return Model(
            layers=tuple(sorted(map(group, decoder.layers), key=lambda g: -g.weights)),
            root=group(policy, inside),
            head=group(head),
            largest_packed=max(
                (p.numel() for p in policy.parameters() if id(p) in packed), default=0
            ),
            largest_bytes=tuple(nlargest(READ_AT_A_TIME, (p.nbytes for p in policy.parameters()))),
        )

    @property
    def whole(self) -> Group:
        """All weights."""
        return sum(self.layers, self.root)


def _sizes(parameter: nn.Parameter, packed: Quantization | None) -> Group:
    number = parameter.numel()
    if packed is Quantization.nf4:
        return Group(number, packed_bytes=-(-number // 2), scales_bytes=nf4_scales_bytes(number))
    if packed is Quantization.int8:
        return Group(number, packed_bytes=number, scales_bytes=4 * len(parameter))
    if parameter.requires_grad:
        return Group(number, number, number, parameter.nbytes, trained_bytes=parameter.nbytes)
    return Group(number, number, plain_bytes=parameter.nbytes)


def nf4_scales_bytes(number: int) -> int:
    """Bytes beside `number` weights in nf4 whose scales are quantised too.

    One for each block of 64 weights, four for 256 blocks, and tables of 16 and 256 values and a
    mean in fp32.
    """
    blocks = -(-number // 64)
    return blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


@dataclass(frozen=True)
class Place:
    """Where a process computes.

    Attributes:
        device: its type decides kernels and buffers; it need not be there.
        processes: number of processes of the run.
        bf16: whether the forward computes in bf16.
        logits_bytes: of logits up to which those of one pair are computed at once.
    """

    device: torch.device
    processes: int = 1
    bf16: bool = False
    logits_bytes: int = LOGITS_BYTES


class Estimate:
    """The memory of one process of a run, for rows of any length.

    Attributes:
        model: sizes of the weights.
        policy: the policy, of fake tensors.
        reads_shards: whether a process reads its shard of the weights, else all of them.
        converts: whether weights are loaded in another dtype than config.json tells of their files.
    """

    def __init__(self, run: RunConfig, settings: PreTrainedConfig, place: Place) -> None:
        """Draw the model.

        Args:
            settings: result of `load_settings`.

        Raises:
            ConfigError: the adapters do not fit the model.
        """
        self._backend, self._place = run.backend, place
        self.converts = settings.dtype is not weights_dtype(run.model, place.device)
        self._drawn = sketch(
            run.model, settings, place.device, bf16=place.bf16, share_prefix=run.train.share_prefix
        )
        self.policy = self._drawn.policy
        self.model = Model.of(self._drawn, run.model.quantization)
        sharded = isinstance(run.backend, (FsdpConfig, Zero3Config)) and not run.model.lora.dora
        self.reads_shards = sharded and not self.model.largest_packed
        if isinstance(run.backend, (FsdpConfig, ZeroConfig)) and place.bf16:
            self._drawn.compute_in(torch.bfloat16)
        self._peaks: dict[tuple[int, ...], Peaks] = {}

    def on(self, processes: int) -> Estimate:
        """The same for another number of processes; nothing is drawn anew."""
        other = copy(self)
        other._place = replace(self._place, processes=processes)
        return other

    @property
    def shards(self) -> int:
        """Number of processes that share one copy of what the backend shards."""
        return shards_of(self._backend, self._place.processes)

    def load(self) -> Memory:
        """Weights of a process while they are loaded.

        FSDP and ZeRO-3 read a shard of them, and hold one layer, or the root, whole; with other
        backends, where weights are quantised and with DoRA, each process loads the whole model.
        """
        model, shards = self.model, self.shards if self.reads_shards else 1
        whole = model.whole.bytes_in(bf16=False) + model.whole.scales_bytes
        parts = (*model.layers[:1], model.root)
        largest = max(part.bytes_in(bf16=False) for part in parts) if shards > 1 else 0
        return Memory(whole / shards / GIB, communication=largest / GIB)

    def between_steps(self) -> Memory:
        """Weights, gradients and optimizer state on the device."""
        states, host = self._states(), self.offloaded()
        return Memory(
            states.weights - host.weights,
            states.gradients - host.gradients,
            states.optimizer - host.optimizer,
        )

    def offloaded(self) -> Memory:
        """Weights, gradients and optimizer state in host memory."""
        states, backend = self._states(), self._backend
        all_of_it = isinstance(backend, FsdpConfig) and backend.cpu_offload
        weights = all_of_it or getattr(backend, "offload_param", None) is Offload.cpu
        others = all_of_it or getattr(backend, "offload_optimizer", None) is Offload.cpu
        return Memory(
            states.weights - self.model.whole.scales_bytes / GIB if weights else 0.0,
            states.gradients if others else 0.0,
            states.optimizer if others else 0.0,
        )

    def _states(self) -> Memory:
        """Weights, gradients and optimizer state, wherever they are."""
        bf16, shards, whole = self._place.bf16, self.shards, self.model.whole
        if isinstance(self._backend, ZeroConfig):
            split = shards if isinstance(self._backend, Zero3Config) else 1
            weights = whole.bytes_in(bf16) / split + whole.scales_bytes
            gradients = 4 * whole.trained / shards
            # fp32 weights and two means, all in fp32.
            optimizer = 12 * whole.trained / shards
        else:
            split = shards if isinstance(self._backend, FsdpConfig) else 1
            weights = whole.bytes_in(bf16=False) / split + whole.scales_bytes
            gradients = whole.trained_bytes / split
            optimizer = 2 * gradients
        return Memory(weights / GIB, gradients / GIB, optimizer / GIB)

    def step(self, row: PackedPairs) -> Memory:
        """The moment of a step that takes most: in the head, in the layers, or at its end.

        Args:
            row: the largest row.
        """
        # DeepSpeed computes in bf16 without autocast.
        autocast = self._place.bf16 and not isinstance(self._backend, ZeroConfig)
        key = (row.input_ids.shape[1], *row.response_tokens)
        if key not in self._peaks:
            self._peaks[key] = follow(self._drawn, row, autocast, self._place.logits_bytes)
        peaks = self._peaks[key]
        buffers = _communication(self._backend, self._place, self.model)
        # A packed weight is unpacked while its layer computes.
        unpacked = (2 if self._place.bf16 else 4) * self.model.largest_packed
        states = self.between_steps()
        moments = (
            (peaks.kept, peaks.head, buffers.head),
            (max(peaks.forward, peaks.backward) + unpacked, 0, buffers.layers),
            (0, 0, buffers.end),
        )
        found = (
            replace(states, activations=a / GIB, logits=b / GIB, communication=c / GIB)
            for a, b, c in moments
        )
        return max(found, key=lambda memory: memory.total)


def shards_of(backend: BackendConfig, processes: int) -> int:
    """Number of processes that share one copy of what the backend shards."""
    within = backend.shard_processes if isinstance(backend, FsdpConfig) else None
    return min(within or processes, processes)


def num_bytes(dtype: ReduceDtype) -> int:
    """Bytes of a gradient in the sum over processes."""
    return 4 if dtype is ReduceDtype.float32 else 2


class _Buffers(NamedTuple):
    """Bytes of gathered weights, whole gradients and buffers at three moments of a step."""

    head: float = 0
    layers: float = 0
    end: float = 0


def _communication(backend: BackendConfig, place: Place, model: Model) -> _Buffers:
    if isinstance(backend, FsdpConfig):
        return _fsdp(backend, model, place.bf16)
    if not isinstance(backend, ZeroConfig):
        return _Buffers()
    summed = num_bytes(backend.communication_data_type)
    computed = 2 if place.bf16 else 4
    whole, on_gpu = model.whole, place.device.type == "cuda"
    bucket = min(backend.reduce_bucket_size, whole.trained)
    if isinstance(backend, Zero3Config):
        # DeepSpeed keeps what it needs again within a billion weights.
        gathered = computed * min(whole.plain, LIVE_WEIGHTS) + whole.packed_bytes
        reduced = summed * (backend.reduce_bucket_size if on_gpu else bucket)
        return _Buffers(gathered + reduced, gathered + reduced, reduced)
    if on_gpu:
        buffers = 2 if backend.overlap_comm else 1
        reduced = buffers * computed * backend.reduce_bucket_size + summed * bucket
    else:
        reduced = (computed + summed) * bucket
    return _Buffers(0, reduced, reduced)


def _fsdp(backend: FsdpConfig, model: Model, bf16: bool) -> _Buffers:
    """Buffers of FSDP2, which gathers a layer while it computes the one before.

    The root (embeddings, last norm and head) stays gathered, and its gradient whole to the end.
    """
    computed, summed = 2 if bf16 else 4, num_bytes(backend.reduce_dtype)
    reshards = backend.reshard_after_forward
    layer, root = model.layers[0], model.root.bytes_in(bf16)
    every = sum(group.bytes_in(bf16) for group in model.layers)
    gathered = min(2 * layer.bytes_in(bf16), every) if reshards else every
    gradient = (computed + summed) * layer.trained
    return _Buffers(
        head=root + (0 if reshards else every),
        layers=root + gathered + gradient + computed * model.head.trained,
        end=root + (computed + summed) * model.root.trained,
    )


def check_memory(memory: Memory, run: RunConfig, device: torch.device, processes: int = 1) -> None:
    """Compare an estimate with the memory of the device that is free before the model is loaded.

    Args:
        processes: number of processes that share this machine's memory, if on a CPU.

    Raises:
        ConfigError: the step does not fit; the message says which setting reduces its memory.
    """
    available = available_bytes(device, processes)
    if memory.total * GIB > available:
        raise ConfigError(
            [
                f"train.check_memory: a step needs about {memory}, there are "
                f"{available / GIB:.2f} GiB ({remedy(memory, run)}; train.check_memory=false tries "
                "all the same)"
            ]
        )


def remedy(memory: Memory, run: RunConfig) -> str:
    """What reduces the largest part of an estimate, of what the run does not do yet."""
    backend, recomputed = run.backend, run.model.gradient_checkpointing
    state = memory.gradients + memory.optimizer
    moving = memory.activations + memory.logits
    sharded = isinstance(backend, (FsdpConfig, Zero3Config))
    more = "more GPUs" if sharded else "backend=fsdp on more GPUs"
    if getattr(backend, "shard_processes", None):
        more = "a larger backend.shard_processes"
    if memory.communication > max(memory.weights, state, moving):
        if isinstance(backend, ZeroConfig):
            return "lower backend.reduce_bucket_size"
        return "GPUs with more memory: layers are gathered whole"
    if memory.weights > state + moving:
        packed = run.model.quantization is Quantization.nf4
        return more if packed else f"{more}, or model.quantization=nf4 with model.lora.rank=16"
    if state > moving:
        adapted = run.model.lora.used
        return more if adapted else f"model.lora.rank=16 trains adapters only, or {more}"
    if recomputed is Checkpointing.full:
        return "lower train.tokens_per_row"
    kinds = "selective or full" if recomputed is Checkpointing.none else "full"
    return f"lower train.tokens_per_row, or model.gradient_checkpointing={kinds}"
