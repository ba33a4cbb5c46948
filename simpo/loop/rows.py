"""Chooses the tokens of a row for `train.tokens_per_row=auto`."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from simpo.backend import Backend
from simpo.config.choices import AUTO
from simpo.config.errors import first_line
from simpo.config.gpus import gpu_like
from simpo.config.schema import RunConfig
from simpo.data.flat_tokens import Tokens
from simpo.data.plan import TrainPlan
from simpo.model.head import of_gpu
from simpo.model.memory import GIB, NOT_DRAWN, Estimate, Place
from simpo.model.roofline import Workload, best_step, predict, row_lengths, why
from simpo.run.folder import RunFolder


def choose_rows(
    run: RunConfig,
    backend: Backend,
    settings: PreTrainedConfig,
    plan: TrainPlan,
    tokens: Tokens,
    folder: RunFolder,
) -> tuple[int, list[str]]:
    """Tokens of a row of a run, and with `auto` a line that says why.

    A run that has begun keeps its number. Rank 0 decides; all processes call this.

    Args:
        settings: result of `load_settings`.
        tokens: of the train pairs.

    Raises:
        ConfigError: the adapters do not fit the model.
        DamagedError: what the run began with cannot be read.
    """
    given = run.train.tokens_per_row
    if isinstance(given, int):
        return given, []
    decided = (0, "")
    if backend.is_main:
        begun = folder.tokens_per_row()
        decided = (
            (begun, "as this run began") if begun else _choose(run, backend, settings, plan, tokens)
        )
    number, reason = backend.broadcast(decided)
    return number, [f"rows   train.tokens_per_row={number} ({AUTO}): {reason}"]


def _choose(
    run: RunConfig,
    backend: Backend,
    settings: PreTrainedConfig,
    plan: TrainPlan,
    tokens: Tokens,
) -> tuple[int, str]:
    """The best length of a row on the device of this process, as `simpo plan` finds it, and why."""
    work = Workload.of(run, plan, tokens)
    lengths = row_lengths(work.num_tokens())
    if not backend.on_gpu:
        return lengths[0], "longer rows save no time on a CPU"
    device, processes = backend.device, backend.processes
    gpu = gpu_like(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_properties(device).total_memory / GIB,
    )
    place = Place(device, processes, backend.bf16, of_gpu(int(gpu.memory_gib * GIB)))
    try:
        estimate = Estimate(run, settings, place)
        steps = [predict(estimate, run.backend, work, gpu, processes, n) for n in lengths]
    except NOT_DRAWN as error:
        return lengths[0], f"the shortest, as memory is not estimated: {first_line(error)}"
    best = best_step(steps, gpu)
    return (best or steps[0]).tokens_per_row, why(best, steps, gpu)
