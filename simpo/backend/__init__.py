"""Distributes a run over processes and devices with accelerate, FSDP2 or DeepSpeed.

`build_backend` chooses the backend. The rest of the project uses `Backend` only and imports none of
these libraries.
"""

from __future__ import annotations

from simpo.backend.base import Backend, not_written
from simpo.config.backends import BackendConfig, FsdpConfig, ZeroConfig
from simpo.config.choices import Precision


def build_backend(
    config: BackendConfig, precision: Precision, max_grad_norm: float = 0.0
) -> Backend:
    """Join the processes of a run.

    Args:
        precision: of the forward; auto is bf16 if the device is fast in bf16, else fp32.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.

    Raises:
        ConfigError: as `Backend`.
    """
    match config:
        case FsdpConfig():
            from simpo.backend.fsdp import FsdpBackend

            return FsdpBackend(config, precision, max_grad_norm)
        case ZeroConfig():
            from simpo.backend.zero import ZeroBackend

            return ZeroBackend(config, precision, max_grad_norm)
    return Backend(config, precision, max_grad_norm)


__all__ = ["Backend", "build_backend", "not_written"]
