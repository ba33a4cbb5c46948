"""Shards weights, gradients and optimizer state with torch's FSDP2 through accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ParallelismConfig,
)
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from simpo.backend.base import Backend
from simpo.config.backends import BackendConfig, FsdpConfig
from simpo.config.errors import ConfigError
from simpo.model.policy import Policy
from simpo.model.pretrained import not_finite, refuse_not_finite
from simpo.model.shards import not_loaded, weights_in_files


class FsdpBackend(Backend):
    """One process that holds a shard of every layer and gathers a layer to compute it."""

    reads_shards = True

    def _start(self, config: BackendConfig) -> Accelerator:
        assert isinstance(config, FsdpConfig)
        if config.cpu_offload and not self.on_gpu:
            raise ConfigError(["backend.cpu_offload: needs a GPU to offload from (leave it out)"])
        started = int(os.environ.get("WORLD_SIZE", "1"))
        config.check_groups(started)
        shards = config.shard_processes or started
        copies = None
        if shards < started:
            copies = ParallelismConfig(dp_replicate_size=started // shards, dp_shard_size=shards)
        # accelerate's own policy would round the loss to bf16.
        bf16 = MixedPrecisionPolicy(torch.bfloat16, getattr(torch, config.reduce_dtype.value))
        self._plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=config.reshard_after_forward,
            auto_wrap_policy="transformer_based_wrap",
            cpu_offload=CPUOffloadPolicy() if config.cpu_offload else False,
            mixed_precision_policy=bf16 if self.bf16 else MixedPrecisionPolicy(),
            cpu_ram_efficient_loading=False,
        )
        group = InitProcessGroupKwargs(backend=self._communication())
        if not self.on_gpu:
            # On CPUs accelerate would silently run DDP instead of FSDP. Told that these are GPUs,
            # it runs the same code as there.
            PartialState(cpu=True, backend=group.backend)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return Accelerator(
            mixed_precision=self._precision(),
            fsdp_plugin=self._plugin,
            parallelism_config=copies,
            kwargs_handlers=[group] if self.on_gpu else [],
        )

    def prepare(self, policy: Policy, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        self._plugin.transformer_cls_names_to_wrap = sorted(policy.base._no_split_modules or ())
        wrapped, optimizer = super().prepare(policy, optimizer)
        if not isinstance(wrapped, FSDPModule):
            raise RuntimeError(f"accelerate made {type(wrapped).__name__} where FSDP was asked for")
        if policy.unread is not None:
            self._read(policy, policy.unread)
            policy.unread = None
        return wrapped, optimizer

    def _read(self, policy: Policy, folder: Path) -> None:
        """Fill this process's shards from the files of the weights.

        Raises:
            ConfigError: a file cannot be read, or a weight is NaN or infinite.
        """
        source = str(policy.base.name_or_path)
        weights: dict[str, Any] = {n: w.detach() for n, w in weights_in_files(policy).items()}
        try:
            reader = HuggingFaceStorageReader(str(folder))
            dcp.load(dict(weights), storage_reader=reader, **self._checkpoint_group())
        except CheckpointException as error:
            raise not_loaded(source, next(iter(error.failures.values()))[0]) from error
        bad = self.gather(not_finite((name, w.to_local()) for name, w in weights.items()))
        refuse_not_finite("model.path", source, list(dict.fromkeys(bad)))

    def micro_batch(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        # Gradients are reduced after every row; without that each would be held unsharded.
        return nullcontext()

    @contextmanager
    def unsharded(self, policy: Policy) -> Iterator[None]:
        assert isinstance(policy, FSDPModule)
        # Generation calls the model directly; embeddings and head are sharded with the policy.
        policy.unshard()
        yield
        policy.reshard()

    def whole(
        self, wrapped: nn.Module, weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        _reshard(wrapped)
        return super().whole(wrapped, weights)

    def _whole(self, weight: Tensor) -> Tensor:
        if isinstance(weight, DTensor):  # not so a buffer
            sharded: Any = weight.to(self.device)
            weight = sharded.full_tensor()
        return super()._whole(weight)

    def _state(self, wrapped: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        _reshard(wrapped)
        return super()._state(wrapped, optimizer)


def _reshard(wrapped: nn.Module) -> None:
    """Reshard every layer: a forward without a backward leaves some of them gathered, but the
    optimizer's parameters are the shards.
    """
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
