"""Settings of the processes and devices that share a run's work."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

from simpo.config.choices import Device, Offload, ReduceDtype

LONGEST_S = 7 * 24 * 3600


@dataclass(kw_only=True)
class BackendConfig:
    """How processes and devices share the work; what every kind of it takes."""

    name: str = "single"
    """Kind of backend; set by the group. single: one process."""
    device: Device = Device.auto
    """auto: the GPU where there is one, else the CPU."""


@dataclass(kw_only=True)
class BackgroundSaveConfig(BackendConfig):
    """A backend that can write checkpoints while it trains."""

    async_save: bool = False
    """Write checkpoints in the background, from a copy of the state in host memory."""


@dataclass(kw_only=True)
class SingleConfig(BackgroundSaveConfig):
    """One process."""


@dataclass(kw_only=True)
class DistributedConfig(BackendConfig):
    """Several processes, one for each device."""

    processes: int | None = None
    """Processes on this machine. null: those that torchrun, accelerate launch or Slurm started,
    else one for each GPU."""
    timeout_s: int = 600
    """How long a process waits for the others in an operation of a step; it must be longer than the
    slowest step. Tokenising, evaluating and saving take as long as they take."""

    def problems(self) -> Iterator[str]:
        if self.processes is not None and self.processes < 1:
            yield f"processes: must be 1 or more, or null, got {self.processes}"
        if self.timeout_s < 1:
            yield f"timeout_s: must be 1 or more, got {self.timeout_s}"
        if self.timeout_s > LONGEST_S:
            yield f"timeout_s: must be {LONGEST_S} (a week) or less, got {self.timeout_s}"


@dataclass(kw_only=True)
class DdpConfig(DistributedConfig, BackgroundSaveConfig):
    """Every process holds the whole model (torch DistributedDataParallel)."""

    name: str = "ddp"
    bucket_cap_mb: int = 25
    """Gradients are reduced in buckets of this size."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.bucket_cap_mb < 1:
            yield f"bucket_cap_mb: must be 1 or more, got {self.bucket_cap_mb}"


@dataclass(kw_only=True)
class FsdpConfig(DistributedConfig, BackgroundSaveConfig):
    """Weights, gradients and optimizer state in shards (torch FSDP2, `fully_shard`)."""

    name: str = "fsdp"
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward: less memory, gathered twice."""
    reduce_dtype: ReduceDtype = ReduceDtype.float32
    """Type in which gradients are summed over processes; with train.precision=bf16 weights are
    gathered in bfloat16."""
    cpu_offload: bool = False
    """Keep shards and optimizer state in host memory; needs a GPU."""


@dataclass(kw_only=True)
class ZeroConfig(DistributedConfig):
    """DeepSpeed; what stages 2 and 3 both take."""

    offload_optimizer: Offload = Offload.none
    """Where optimizer state and its fp32 weights are kept."""
    communication_data_type: ReduceDtype = ReduceDtype.float32
    """Type in which gradients are summed over processes; with train.precision=bf16 weights are in
    bfloat16, with fp32 copies in the optimizer."""
    overlap_comm: bool = True
    """Reduce gradients while the backward pass goes on; on a GPU only."""
    reduce_bucket_size: int = 500_000_000
    """Elements reduced at a time."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.reduce_bucket_size < 1:
            yield f"reduce_bucket_size: must be 1 or more, got {self.reduce_bucket_size}"
        if importlib.util.find_spec("deepspeed") is None:
            yield "name: deepspeed is not installed (pip install 'simpo[deepspeed]')"


@dataclass(kw_only=True)
class Zero2Config(ZeroConfig):
    """Gradients and optimizer state in shards (DeepSpeed ZeRO-2)."""

    name: str = "zero2"


@dataclass(kw_only=True)
class Zero3Config(ZeroConfig):
    """Weights, gradients and optimizer state in shards (DeepSpeed ZeRO-3)."""

    name: str = "zero3"
    offload_param: Offload = Offload.none
    """Where shards of the weights are kept."""
    stage3_prefetch_bucket_size: int = 50_000_000
    """Elements gathered ahead of their use."""
    stage3_param_persistence_threshold: int = 100_000
    """Weights with fewer elements are never sharded."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for key in ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"):
            if getattr(self, key) < 0:
                yield f"{key}: must be 0 or more, got {getattr(self, key)}"
