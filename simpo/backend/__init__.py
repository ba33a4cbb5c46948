"""How processes and devices share a run's work: the only place that names accelerate, torch's FSDP
and DeepSpeed. `build_backend` chooses; everything above knows `Backend` alone.
"""

from __future__ import annotations

from simpo.backend.base import Backend, not_written
from simpo.config.backends import BackendConfig, FsdpConfig, ZeroConfig
from simpo.config.choices import Precision


def build_backend(
    config: BackendConfig, precision: Precision, max_grad_norm: float = 0.0
) -> Backend:
    """Join the processes of a run; see `Backend`."""
    match config:
        case FsdpConfig():
            from simpo.backend.fsdp import FsdpBackend

            return FsdpBackend(config, precision, max_grad_norm)
        case ZeroConfig():
            from simpo.backend.zero import ZeroBackend

            return ZeroBackend(config, precision, max_grad_norm)
    return Backend(config, precision, max_grad_norm)


__all__ = ["Backend", "build_backend", "not_written"]
