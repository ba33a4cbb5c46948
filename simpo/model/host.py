"""Estimates the host memory of a machine's processes, each of which has a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from simpo.config.backends import BackendConfig, FsdpConfig, Zero3Config, ZeroConfig
from simpo.config.choices import Quantization
from simpo.config.schema import RunConfig
from simpo.model.export import LARGEST_FILE_BYTES
from simpo.model.memory import GIB, LIVE_WEIGHTS, Estimate

PROCESS_GIB = 2.0
"""Host memory of a process beside what is counted here: libraries, CUDA, data, a pinned row."""


@dataclass(frozen=True)
class Host:
    """Host memory of a machine's processes in GiB: while they load, in a step, and at a save."""

    load: float
    step: float
    save: float


def host_memory(run: RunConfig, estimate: Estimate, processes: int) -> Host:
    """Estimate the host memory of `processes` processes of a run on one machine.

    Args:
        estimate: for the number of all processes of the run.
    """
    step = processes * (PROCESS_GIB + estimate.offloaded().total)
    return Host(
        load=processes * (PROCESS_GIB + _loaded(run, estimate) / GIB),
        step=step,
        save=step + max(processes * _checkpoint(run.backend, estimate), _export(estimate)) / GIB,
    )


def _loaded(run: RunConfig, estimate: Estimate) -> float:
    """Bytes of weights in a process's host memory on their way to the GPU."""
    reads_shards = isinstance(run.backend, (FsdpConfig, Zero3Config)) and not run.model.lora.dora
    if reads_shards or run.model.quantization is not Quantization.none:
        return estimate.model.largest_bytes
    return estimate.model.whole.bytes_in(bf16=False)


def _checkpoint(backend: BackendConfig, estimate: Estimate) -> float:
    """Bytes of a process's part of a checkpoint that are in host memory while it is written."""
    states, trained = estimate.between_steps(), estimate.model.whole.trained
    if isinstance(backend, ZeroConfig):
        # It writes a tensor at a time. Stage 3 divides its flat ones.
        flat = states.optimizer * GIB / 3
        return min(flat, 4 * LIVE_WEIGHTS) if isinstance(backend, Zero3Config) else flat
    if getattr(backend, "async_save", False) and trained:
        # Trained weights, as large as their gradients, and two means.
        return (states.gradients + states.optimizer) * GIB
    return 0.0


def _export(estimate: Estimate) -> float:
    """Bytes that rank 0 holds to write the model: a file of it and the layer after that."""
    model = estimate.model
    if model.whole.trained < model.whole.weights:
        return model.whole.trained_bytes
    whole, layer = model.whole.plain_bytes, model.layers[0].plain_bytes
    return min(whole, LARGEST_FILE_BYTES + layer)
