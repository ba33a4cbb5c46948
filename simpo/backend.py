"""Devices, precision and the backward pass: the only module that names accelerate."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.optim import Optimizer

from simpo.config import BackendConfig, ConfigError, Device, Precision
from simpo.model import Policy


class Backend:
    """One process on one device.

    Attributes:
        device: where rows and weights live.
        half: the forward computes in bf16 (autocast; weights keep their own dtype), else in fp32.
    """

    def __init__(self, config: BackendConfig, precision: Precision) -> None:
        cuda = torch.cuda.is_available()
        if config.device is Device.cuda and not cuda:
            raise ConfigError(["backend.device: cuda asked for, but torch sees no GPU here"])
        on_gpu = cuda and config.device is not Device.cpu
        if precision is Precision.auto:
            fast_bf16 = on_gpu or _cpu_multiplies_bf16()
            precision = Precision.bf16 if fast_bf16 else Precision.fp32
        self.half = precision is Precision.bf16
        # accelerate's state is global: the next member of a sweep may ask for another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
        self._accelerator = Accelerator(
            cpu=not on_gpu, mixed_precision="bf16" if self.half else "no"
        )
        if self._accelerator.num_processes != 1:
            raise ConfigError(
                [f"backend: single runs in 1 process, got {self._accelerator.num_processes}"]
            )
        self.device: torch.device = self._accelerator.device

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{'bf16' if self.half else 'fp32'} on 1 {name}"

    def prepare(self, policy: Policy, optimizer: Optimizer) -> tuple[Policy, Optimizer]:
        """Wrap the policy's forward and the optimizer for this device and precision."""
        return cast(tuple[Policy, Optimizer], self._accelerator.prepare(policy, optimizer))

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to those already there."""
        self._accelerator.backward(loss)

    def clip_gradients(self, policy: Policy, max_norm: float) -> float:
        """Scale gradients down to `max_norm` (0: leave them); their norm before that."""
        norm: Any = self._accelerator.clip_grad_norm_(policy.parameters(), max_norm or float("inf"))
        return float(norm)


def _cpu_multiplies_bf16() -> bool:
    """Without instructions of its own for bf16 a CPU would emulate it, slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
