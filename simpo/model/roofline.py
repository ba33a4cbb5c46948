"""Predicts the time of a step from operations and bytes, and chooses the length of a row.

No figure of this module has been measured on a GPU. What is assumed are its constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simpo.config.backends import BackendConfig, FsdpConfig, Zero3Config, ZeroConfig
from simpo.config.choices import Checkpointing
from simpo.config.gpus import Gpu
from simpo.config.schema import RunConfig
from simpo.data.flat_tokens import Tokens
from simpo.data.packing import pack
from simpo.data.pairs import PackedPairs
from simpo.data.plan import TrainPlan, pairs_of_step, rows_of_pairs
from simpo.model import cost
from simpo.model.memory import GIB, Estimate, Memory, Model, num_bytes, shards_of

EFFICIENCY = 0.45
"""Share of the bf16 peak that a long row reaches."""
HALF_EFFICIENT_TOKENS = 512
"""Tokens of a row that reaches half of that."""
LINK_EFFICIENCY = 0.7
"""Share of a link's bandwidth that a collective operation reaches."""
GPUS_PER_NODE = 8
NODE_GB_S = 50.0
"""Bandwidth of a GPU's share of the network between machines, in one direction (400 Gb/s)."""
RESERVED_GIB = 1.5
"""Memory of a GPU that CUDA's context and NCCL's buffers take."""
FRAGMENTED = 0.05
"""Share of a GPU's memory that torch's allocator cannot use."""
NUMBERS_OF_GPUS = tuple(2**power for power in range(11))
"""Numbers of processes to try."""
ROW_LENGTHS_TOKENS = tuple(2**power for power in range(10, 17))
"""Lengths of rows to choose from."""
AS_GOOD = 0.02
"""A shorter row that takes this much longer is as good: it leaves more memory."""
STEPS_LOOKED_AT = 4


@dataclass(frozen=True)
class Step:
    """A predicted step of a run.

    Attributes:
        tokens_per_row: budget of a row.
        load, memory: of one GPU while the weights are loaded, and in the step's largest moment.
        flops: operations of all processes, without those computed again by checkpointing.
        bytes_moved: bytes that one process receives from others.
        compute_s, communication_s, optimizer_s: seconds of each; the first two overlap.
    """

    tokens_per_row: int
    load: Memory
    memory: Memory
    flops: float
    bytes_moved: float
    compute_s: float
    communication_s: float
    optimizer_s: float

    @property
    def largest(self) -> Memory:
        """The larger one of `load` and `memory`."""
        return max(self.memory, self.load, key=lambda memory: memory.total)

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return max(self.compute_s, self.communication_s) + self.optimizer_s


@dataclass(frozen=True)
class Workload:
    """The pairs of a run.

    Attributes:
        plan: the run's steps.
        tokens: its pairs, or one that stands for all.
        share_prefix: whether a prompt is computed once.
        recomputes: whether layers compute their whole forward again in the backward pass.
        couples_step: whether the loss takes one forward more (`simpo.loop.coupled`).
    """

    plan: TrainPlan
    tokens: Tokens
    share_prefix: bool
    recomputes: bool
    couples_step: bool = False

    @staticmethod
    def of(run: RunConfig, plan: TrainPlan, tokens: Tokens) -> Workload:
        """The pairs of a run with its settings."""
        recomputes = run.model.gradient_checkpointing is Checkpointing.full
        return Workload(plan, tokens, run.train.share_prefix, recomputes, run.loss.couples_step)

    def row(self, indices: Sequence[int]) -> PackedPairs:
        """The packed row of some pairs."""
        return pack(
            [self.tokens[i % len(self.tokens)] for i in indices], indices, self.share_prefix
        )

    def num_tokens(self) -> np.ndarray:
        """Tokens computed for each pair, int64 [pairs]."""
        return np.resize(self.tokens.num_tokens(self.share_prefix), self.plan.num_pairs)


def fits(step: Step, gpu: Gpu) -> bool:
    """Whether loading and a step fit a GPU beside what libraries take."""
    return step.largest.total + RESERVED_GIB <= gpu.memory_gib * (1 - FRAGMENTED)


def row_lengths(num_tokens: np.ndarray) -> list[int]:
    """Lengths of rows to choose from, ascending; none is shorter than the longest pair.

    Args:
        num_tokens: tokens computed for each pair, int64 [pairs].
    """
    longest = int(num_tokens.max())
    return sorted({max(tokens, longest) for tokens in ROW_LENGTHS_TOKENS})


def predict(
    estimate: Estimate,
    backend: BackendConfig,
    work: Workload,
    gpu: Gpu,
    processes: int,
    tokens_per_row: int,
) -> Step:
    """Predict a step, as the mean of the run's first ones.

    Args:
        estimate: of the run, for any number of processes.
    """
    num_tokens, counted = work.num_tokens(), cost.Flops(estimate.policy)
    steps = range(min(work.plan.total_steps, STEPS_LOOKED_AT))
    flops = seconds = 0.0
    # The longest pair of all may be in a later step.
    rounds, largest = 0, work.row([int(num_tokens.argmax())])
    for step in steps:
        rows = rows_of_pairs(pairs_of_step(work.plan, step), num_tokens, tokens_per_row, processes)
        rounds += len(rows) // processes
        for begin in range(0, len(rows), processes):
            # Rows are sorted by size: the first of a round takes longest.
            first = work.row(rows[begin])
            seconds += _row_seconds(counted.of_row(first), first, gpu, work)
            largest = max(largest, first, key=lambda row: row.input_ids.shape[1])
        flops += sum(counted.of_row(work.row(row)) for row in rows if row)
    own = estimate.on(processes)
    memory = own.step(largest)
    forwards = 2 if work.couples_step else 1
    within, between = _bytes_moved(
        backend, estimate.model, processes, rounds / len(steps), forwards
    )
    moved_s = within / _link_bytes_s(gpu, shards_of(backend, processes))
    moved_s += between / _link_bytes_s(gpu, processes)
    # AdamW reads weights, gradients and two means, and writes all but the gradients.
    updated = 7 / 4 * GIB * (memory.optimizer * 2)
    return Step(
        tokens_per_row,
        own.load(),
        memory,
        flops / len(steps),
        within + between,
        seconds / len(steps),
        moved_s,
        updated / (gpu.hbm_gb_s * 1e9),
    )


def _row_seconds(flops: float, row: PackedPairs, gpu: Gpu, work: Workload) -> float:
    tokens = row.input_ids.shape[1]
    reached = EFFICIENCY * tokens / (tokens + HALF_EFFICIENT_TOKENS)
    # A forward is a third of a step's operations.
    flops *= (3 + work.recomputes + work.couples_step) / 3
    return flops / (gpu.bf16_tflops * 1e12 * reached)


def _link_bytes_s(gpu: Gpu, processes: int) -> float:
    """Bytes that a process receives in a second from the others of a group."""
    between_nodes = processes > GPUS_PER_NODE
    link = min(gpu.link_gb_s, NODE_GB_S) if between_nodes else gpu.link_gb_s
    return link * 1e9 * LINK_EFFICIENCY


def _bytes_moved(
    backend: BackendConfig, model: Model, processes: int, rows: float, forwards: int
) -> tuple[float, float]:
    """Bytes that a process receives in a step of `rows` rows, with ring collectives in bf16.

    Args:
        forwards: of each row.

    Returns:
        Bytes from the processes that it shares a copy of the weights with, and from those that hold
        other copies; where nothing is sharded, all are of the first kind.
    """
    whole, others = model.whole, (processes - 1) / processes
    if isinstance(backend, FsdpConfig):
        summed = num_bytes(backend.reduce_dtype)
        gathers = 1 + forwards if backend.reshard_after_forward else 1
        shards = shards_of(backend, processes)
        copies = processes / shards
        within = gathers * whole.bytes_in(bf16=True) + summed * whole.trained
        # Shards of gradients are summed over copies after each row.
        between = 2 * (copies - 1) / copies * summed * whole.trained / shards
        return rows * within * (shards - 1) / shards, rows * between
    if isinstance(backend, ZeroConfig):
        summed = num_bytes(backend.communication_data_type)
        if isinstance(backend, Zero3Config):
            gathered = (1 + forwards) * whole.bytes_in(bf16=True)
            return others * rows * (gathered + summed * whole.trained), 0.0
        return others * (rows * summed + 2) * whole.trained, 0.0
    return 2 * others * whole.trained_bytes, 0.0


def best_step(steps: Sequence[Step], gpu: Gpu) -> Step | None:
    """The step with the shortest rows among those as good as the fastest that fits, if any fits."""
    fitting = [step for step in steps if fits(step, gpu)]
    if not fitting:
        return None
    fastest = min(step.seconds for step in fitting)
    return next(step for step in fitting if step.seconds <= fastest * (1 + AS_GOOD))


def why(best: Step | None, steps: Sequence[Step], gpu: Gpu) -> str:
    """What keeps the rows of `best_step` from being longer."""
    if best is None:
        return f"none fits the memory of a {gpu.name}"
    longer = next((step for step in steps if step.tokens_per_row > best.tokens_per_row), None)
    if longer is None:
        return "the longest that is planned"
    if not fits(longer, gpu):
        return f"{longer.tokens_per_row} do not fit the memory of a {gpu.name}"
    return f"longer rows save less than {AS_GOOD:.0%} of a step"
