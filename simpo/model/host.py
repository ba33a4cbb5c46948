"""Estimates the host memory of a machine's processes, each of which has a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from simpo.config.backends import BackendConfig, Zero3Config, ZeroConfig
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
        load=processes * PROCESS_GIB + _loaded(estimate, processes) / GIB,
        step=step,
        save=step + max(processes * _checkpoint(run.backend, estimate), _export(estimate)) / GIB,
    )


def _loaded(estimate: Estimate, processes: int) -> float:
    """Bytes of weights in host memory, of all processes, on their way to the GPUs.

    A weight that keeps its dtype is copied to the GPU from the pages of its file, which are no
    process's own. One that is converted is so in host memory.
    """
    largest = estimate.model.largest_bytes
    if estimate.reads_shards:
        # Each reads its shard of one weight after the other; then rank 0 looks at whole weights.
        return max(processes / estimate.shards, 1) * largest[0]
    if not estimate.converts:
        return 0.0
    # One at a time is quantised.
    return processes * (largest[0] if estimate.model.largest_packed else sum(largest))


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
