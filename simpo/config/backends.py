"""Settings of the processes and devices that share a run's work."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

from simpo.config.choices import Device, Offload, ReduceDtype
from simpo.config.errors import ConfigError
from simpo.config.ranges import at_least

LONGEST_S = 7 * 24 * 3600


@dataclass(kw_only=True)
class BackendConfig:
    """Settings that every backend has."""

    name: str = "single"
    """Kind of backend; set by the group. single: one process."""
    device: Device = Device.auto
    """auto: the GPU if there is one, else the CPU."""


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
    """Number of processes on this machine. null: as many as torchrun, accelerate launch or Slurm
    started, else one per GPU."""
    timeout_s: int = 600
    """Seconds that a process waits for the others within a step; must be longer than the slowest
    step. Tokenising, evaluating and saving are not limited."""

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 1, "processes", "timeout_s")
        if self.timeout_s > LONGEST_S:
            yield f"timeout_s: must be {LONGEST_S} (a week) or less, got {self.timeout_s}"


@dataclass(kw_only=True)
class DdpConfig(DistributedConfig, BackgroundSaveConfig):
    """Every process holds the whole model (torch DistributedDataParallel)."""

    name: str = "ddp"
    bucket_cap_mb: int = 25
    """Size of the buckets in which gradients are reduced."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from at_least(self, 1, "bucket_cap_mb")


@dataclass(kw_only=True)
class FsdpConfig(DistributedConfig, BackgroundSaveConfig):
    """Shards weights, gradients and optimizer state (torch FSDP2, `fully_shard`)."""

    name: str = "fsdp"
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward: less memory, but gathered twice."""
    reduce_dtype: ReduceDtype = ReduceDtype.float32
    """Dtype in which gradients are summed over processes; with train.precision=bf16 weights are
    gathered in bf16."""
    shard_processes: int | None = None
    """Processes that share one copy of the weights (HSDP), such as those of a node: between such
    groups only gradients travel. null: all processes share one copy."""
    cpu_offload: bool = False
    """Keep the shards of weights and optimizer state in host memory; needs a GPU."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from at_least(self, 2, "shard_processes")

    def check_groups(self, processes: int) -> None:
        """Refuse a number of processes in all that `shard_processes` does not divide.

        Raises:
            ConfigError: it does not.
        """
        if processes % (self.shard_processes or 1):
            raise ConfigError(
                [
                    f"backend.shard_processes: {processes} processes do not make groups of "
                    f"{self.shard_processes} (a number that divides {processes})"
                ]
            )


@dataclass(kw_only=True)
class ZeroConfig(DistributedConfig):
    """Settings that both stages of DeepSpeed ZeRO have."""

    offload_optimizer: Offload = Offload.none
    """Where optimizer state and fp32 weights are kept; none: on the device."""
    communication_data_type: ReduceDtype = ReduceDtype.float32
    """Dtype in which gradients are summed over processes; with train.precision=bf16 weights are in
    bf16, with fp32 copies in the optimizer."""
    overlap_comm: bool = True
    """Reduce gradients during the backward pass; only on a GPU."""
    reduce_bucket_size: int = 500_000_000
    """Elements reduced at a time."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from at_least(self, 1, "reduce_bucket_size")
        if importlib.util.find_spec("deepspeed") is None:
            yield "name: deepspeed is not installed (pip install 'simpo[deepspeed]')"


@dataclass(kw_only=True)
class Zero2Config(ZeroConfig):
    """Shards gradients and optimizer state (DeepSpeed ZeRO-2)."""

    name: str = "zero2"


@dataclass(kw_only=True)
class Zero3Config(ZeroConfig):
    """Shards weights, gradients and optimizer state (DeepSpeed ZeRO-3)."""

    name: str = "zero3"
    offload_param: Offload = Offload.none
    """Where shards of the weights are kept; none: on the device."""
    stage3_prefetch_bucket_size: int = 50_000_000
    """Elements gathered ahead of their use."""
    stage3_param_persistence_threshold: int = 100_000
    """Weights with fewer elements are never sharded."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from at_least(
            self, 0, "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"
        )
