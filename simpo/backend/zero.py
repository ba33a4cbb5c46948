"""Shards optimizer state, gradients and, in stage 3, weights with DeepSpeed through accelerate."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from simpo.backend.base import Backend, not_written
from simpo.config.backends import BackendConfig, Zero3Config, ZeroConfig
from simpo.config.choices import Precision
from simpo.model.policy import Policy
from simpo.model.pretrained import not_finite, refuse_not_finite
from simpo.model.shards import files_by_weight, not_loaded, read_weight, weights_in_files


class ZeroBackend(Backend):
    """One process that holds a shard of the optimizer state, and in stage 3 of every weight."""

    def __init__(
        self, config: ZeroConfig, precision: Precision, max_grad_norm: float = 0.0
    ) -> None:
        self.stage = 3 if isinstance(config, Zero3Config) else 2
        self.reads_shards = self.stage == 3
        self.checkpoint_format = config.name
        super().__init__(config, precision, max_grad_norm)

    def _start(self, config: BackendConfig) -> Accelerator:
        if not self.on_gpu:
            # Otherwise it warns that it found no GPU.
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        assert isinstance(config, ZeroConfig)
        if not self.on_gpu:
            # Compiling it takes two minutes at the first start; gloo gives the same numbers.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._deepspeed = self._settings(config)
        plugin = DeepSpeedPlugin(hf_ds_config=self._deepspeed, zero3_init_flag=False)
        accelerator = Accelerator(
            deepspeed_plugin=plugin,
            # Without an explicit communication backend each process would run alone.
            kwargs_handlers=[InitProcessGroupKwargs(backend=self._communication())],
            mixed_precision=self._precision(),
        )
        # With this set transformers would load sharded weights, which could not be checked.
        plugin.dschf = None
        return accelerator

    def _settings(self, config: ZeroConfig) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": config.overlap_comm and self.on_gpu,
            "contiguous_gradients": self.on_gpu,
            "reduce_bucket_size": config.reduce_bucket_size,
            "offload_optimizer": {"device": config.offload_optimizer.value},
        }
        if isinstance(config, Zero3Config):
            zero |= {
                "offload_param": {"device": config.offload_param.value},
                "stage3_prefetch_bucket_size": config.stage3_prefetch_bucket_size,
                "stage3_param_persistence_threshold": config.stage3_param_persistence_threshold,
                "stage3_gather_16bit_weights_on_model_save": True,
            }
        short = {"float32": "fp32", "bfloat16": "bf16"}
        return {
            # The number of rows differs from step to step; `micro_batch` marks the last one.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.bf16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": short[config.communication_data_type.value],
        }

    def prepare(self, policy: Policy, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        if policy.unread is not None:
            self.wait()  # a process may have built the policy from a slower disk
            self._read(policy, policy.unread)
            policy.unread = None
        engine, optimizer = super().prepare(policy, optimizer)
        self._engine: Any = engine
        return engine, optimizer

    def _read(self, policy: Policy, folder: Path) -> None:
        """Shard the weights as they are read from their files.

        Raises:
            ConfigError: a file cannot be read, or a weight is NaN or infinite.
        """
        source = str(policy.base.name_or_path)
        try:
            bad = self._shard(policy, folder)
        except (OSError, SafetensorError) as error:
            raise not_loaded(source, error) from error
        refuse_not_finite("model.path", source, self.gather(bad))
        for buffer in policy.buffers():
            buffer.data = buffer.to(self.device)

    def _shard(self, policy: Policy, folder: Path) -> list[str]:
        """Shard one weight after the other: rank 0 reads it whole, and DeepSpeed broadcasts it.

        Returns:
            On rank 0 the names of weights that are NaN or infinite somewhere.

        Raises:
            OSError, SafetensorError: a file cannot be read.
        """
        import deepspeed

        files = files_by_weight(folder)
        names = {id(weight): name for name, weight in weights_in_files(policy).items()}
        bad: list[str] = []
        first: Any = None
        for weight in policy.parameters():
            dtype = torch.bfloat16 if self.bf16 else weight.dtype
            name = names.get(id(weight))  # None: of an adapter, which is not in the files
            if name is not None and self.is_main:
                weight.data = read_weight(files[name], name)
                bad += not_finite([(name, weight)])
            elif name is not None:
                weight.data = torch.empty_like(weight, dtype=dtype, device=self.device)
            weight.data = weight.to(self.device, dtype)
            self.wait()  # reading may take longer than a collective operation
            if first is None:
                first = weight
                deepspeed.zero.Init(nn.ParameterList([weight]), config_dict_or_path=self._deepspeed)
            else:
                first.convert_to_zero_parameters([weight])
        return bad

    @contextmanager
    def micro_batch(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self.processes)

    def _communication(self) -> str:
        return "nccl" if self.on_gpu else "gloo"

    def clip(self, wrapped: nn.Module) -> None:
        return None

    def step(self, wrapped: nn.Module, optimizer: Optimizer, norm: float) -> float:
        self._engine.step()
        # DeepSpeed skips the update if the norm is not finite.
        if self._engine.optimizer.overflow:
            return float("nan")
        return float(self._engine.get_global_grad_norm())

    def _whole(self, weight: Tensor) -> Tensor:
        import deepspeed

        if self.bf16 and weight.requires_grad:
            return super()._whole(deepspeed.utils.safe_get_full_fp32_param(weight))
        with deepspeed.zero.GatheredParameters([weight]):
            return super()._whole(weight.clone())

    def save_state(
        self, folder: Path, wrapped: nn.Module, optimizer: Optimizer, background: bool = False
    ) -> Future[Any] | None:
        try:
            self._engine.save_checkpoint(
                str(folder), tag="state", save_latest=False, exclude_frozen_parameters=True
            )
        except RuntimeError as error:
            if not_written(error):
                raise OSError(str(error)) from error
            raise
        return None

    def load_state(
        self, folder: Path, wrapped: nn.Module, optimizer: Optimizer, processes: int
    ) -> None:
        if processes == self.processes:
            self._load(folder)
            return
        # DeepSpeed reads shards of another number of processes in its universal format only.
        whole = folder.parent.with_name(f".{folder.parent.name}-universal")
        if self.is_main:
            _convert(folder / "state", whole / "state")
        self.wait()
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        self._engine._config.load_universal_checkpoint = True
        self._load(whole)
        self._engine._config.load_universal_checkpoint = False
        # From this format stage 3 loads the first group's settings into all groups, and one shared
        # step counter into all parameters, each of which would increment it.
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for state in self._engine.optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()
        self.wait()
        if self.is_main:
            shutil.rmtree(whole)

    def _load(self, folder: Path) -> None:
        self._engine.load_checkpoint(
            str(folder), tag="state", load_lr_scheduler_states=False, custom_load_fn=_load_trained
        )


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load trained weights only: quantised ones, which are frozen, cannot be loaded twice."""
    trained = {name for name, p in dst.named_parameters() if p.requires_grad}
    dst.load_state_dict({n: t for n, t in src.items() if n in trained}, strict=False)


def _convert(shards: Path, whole: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    arguments = [f"--input_folder={shards}", f"--output_folder={whole}", "--inject_missing_state"]
    subprocess.run([*command, *arguments], check=True, capture_output=True)
