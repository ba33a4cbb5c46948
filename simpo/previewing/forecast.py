"""Forecasts memory, time and cost of a run on GPUs, for `simpo plan`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from simpo.config.backends import BackendConfig, DistributedConfig, FsdpConfig, Zero3Config
from simpo.config.choices import Precision
from simpo.config.errors import ConfigError, first_line
from simpo.config.gpus import Gpu
from simpo.config.schema import RunConfig
from simpo.data.chats.chat import Chat
from simpo.data.flat_tokens import Tokens
from simpo.data.loader import load_data
from simpo.data.pairs import TokenizedPair
from simpo.data.plan import build_plan
from simpo.loop import console
from simpo.model.head import of_gpu
from simpo.model.host import host_memory
from simpo.model.memory import GIB, NOT_DRAWN, Estimate, Memory, Place, remedy
from simpo.model.pretrained import load_settings
from simpo.model.roofline import (
    EFFICIENCY,
    GPUS_PER_NODE,
    LINK_EFFICIENCY,
    NODE_GB_S,
    NUMBERS_OF_GPUS,
    RESERVED_GIB,
    Step,
    Workload,
    best_step,
    fits,
    predict,
    row_lengths,
    why,
)
from simpo.model.tokenizer import load_tokenizer
from simpo.run.folder import template_date
from simpo.run.tables import markdown_table

PROMPT_SHARE = 0.24
"""Share of a pair's tokens in its prompt, where pairs are assumed (UltraFeedback's)."""
TWO_ASSUMED = (
    "note   pairs=N assumes two responses to a prompt, and the loss compares all (leave it out to "
    "read the data, or count the tokens of all in tokens_per_pair)"
)


@console.libraries_quiet()
def forecast(
    run: RunConfig, gpu: Gpu, pairs: int | None, tokens_per_pair: int, price: float
) -> list[str]:
    """The lines of a plan.

    Args:
        pairs: number of pairs of `tokens_per_pair` tokens to assume; None reads the run's data.
        price: dollars for a GPU and hour; 0 shows no cost.

    Raises:
        ConfigError, DataError: the settings or the data cannot be used.
    """
    cfg, cache_dir = run.train, Path(run.cache_dir).expanduser()
    settings = load_settings(run.model, cache_dir)
    place = Place(
        torch.device("cuda"),
        bf16=cfg.precision is not Precision.fp32,
        logits_bytes=of_gpu(int(gpu.memory_gib * GIB)),
    )
    with _drawing(run):
        estimate = Estimate(run, settings, place)
    work = _workload(run, cache_dir, pairs, tokens_per_pair)

    def at(processes: int, tokens_per_row: int) -> Step:
        with _drawing(run):
            return predict(estimate, run.backend, work, gpu, processes, tokens_per_row)

    many = isinstance(run.backend, DistributedConfig)
    numbers = _numbers(run.backend)
    lengths = row_lengths(work.num_tokens())
    given = None if isinstance(cfg.tokens_per_row, str) else cfg.tokens_per_row
    smallest = next((n for n in numbers if fits(at(n, given or lengths[0]), gpu)), None)
    asked = getattr(run.backend, "processes", None)
    processes = asked or smallest or numbers[-1]
    if isinstance(run.backend, FsdpConfig):
        run.backend.check_groups(processes)
    steps = [at(processes, tokens) for tokens in lengths]
    best = best_step(steps, gpu)
    step = at(processes, given) if given else best or steps[0]
    whole = estimate.model.whole
    return [
        f"model  {run.model.path}: {whole.weights / 1e6:,.1f}M weights, "
        f"{whole.trained / 1e6:,.1f}M trained, {'bf16' if place.bf16 else 'fp32'}",
        f"plan   {processes} {gpu.name}, backend={run.backend.name}, "
        f"train.tokens_per_row={step.tokens_per_row}",
        "",
        *markdown_table(_memory_lines(run, estimate.on(processes), step)),
        "",
        *_fit_lines(run, step, gpu, smallest, many),
        _host_line(run, estimate.on(processes), processes),
        _best_line(best, why(best, steps, gpu)),
        *_time_lines(step, work, gpu, processes, price),
        f"note   assumed: {EFFICIENCY:.0%} of {gpu.bf16_tflops:g} TFLOP/s, {LINK_EFFICIENCY:.0%} "
        f"of {gpu.link_gb_s:g} GB/s within {GPUS_PER_NODE} GPUs and of {NODE_GB_S:g} GB/s between "
        "machines; nothing here was measured on a GPU",
        *([TWO_ASSUMED] if pairs is not None and run.loss.ranks else []),
    ]


@contextmanager
def _drawing(run: RunConfig) -> Iterator[None]:
    """Turn what a model raises that cannot be drawn into an error of the user's.

    Raises:
        ConfigError: in its place.
    """
    try:
        yield
    except NOT_DRAWN as error:
        raise ConfigError(
            [
                f"model.path: {run.model.path} cannot be planned: {first_line(error)} (simpo train "
                "needs no plan)"
            ]
        ) from error


def _numbers(backend: BackendConfig) -> list[int]:
    """Numbers of processes to try; with `shard_processes` those of whole copies."""
    if not isinstance(backend, DistributedConfig):
        return [1]
    copy = (backend.shard_processes or 1) if isinstance(backend, FsdpConfig) else 1
    return [copy * copies for copies in NUMBERS_OF_GPUS if copy * copies <= 1024] or [copy]


def _workload(run: RunConfig, cache_dir: Path, pairs: int | None, tokens_per_pair: int) -> Workload:
    """The run's tokens, or one assumed pair that stands for all."""
    cfg = run.train
    if pairs is None:
        tokenizer = load_tokenizer(run.model, cache_dir, run.data.compat)
        chat = Chat(tokenizer, template_date(run), run.model.chat_template_kwargs)
        tokens = load_data(run, chat, cache_dir).train.tokens
        pairs = len(tokens)
    else:
        prompt = int(tokens_per_pair * PROMPT_SHARE)
        chosen = (tokens_per_pair - prompt) // 2
        lengths = prompt, chosen, tokens_per_pair - prompt - chosen
        tokens = Tokens.of([TokenizedPair.of(*([0] * length for length in lengths))])
    plan = build_plan(pairs, cfg.pairs_per_step, cfg.epochs, cfg.max_steps, cfg.seed)
    return Workload.of(run, plan, tokens)


def _memory_lines(run: RunConfig, estimate: Estimate, step: Step) -> list[dict[str, str]]:
    """A line for each moment, GiB of one GPU by part."""
    states = estimate.between_steps()
    gathers = isinstance(run.backend, (FsdpConfig, Zero3Config))
    largest = max(estimate.model.root.plain_bytes, estimate.model.layers[0].plain_bytes) / GIB
    saved = Memory(
        states.weights,
        states.gradients,
        states.optimizer,
        communication=largest if gathers else 0.0,
    )
    return [
        {"GiB of a GPU": name}
        | {part: f"{value:.2f}" for part, value in vars(memory).items()}
        | {"total": f"{memory.total:.2f}"}
        for name, memory in (("load", step.load), ("step", step.memory), ("save", saved))
    ]


def _fit_lines(
    run: RunConfig, step: Step, gpu: Gpu, smallest: int | None, many: bool
) -> Iterator[str]:
    needed = f"{step.largest.total:.1f} GiB and {RESERVED_GIB} for CUDA and NCCL"
    room = f"{gpu.memory_gib:.1f} GiB of a {gpu.name}, 5 % of them fragmented"
    if fits(step, gpu):
        yield f"fits   {needed}, of {room}"
    else:
        yield f"fits   no: {needed}, of {room} ({remedy(step.largest, run)})"
    if smallest is not None and many:
        verb = "is" if smallest == 1 else "are"
        yield f"GPUs   {smallest} {gpu.name} {verb} the smallest number that fits"
    elif smallest is None and many:
        yield "GPUs   no number up to 1,024 fits"


def _host_line(run: RunConfig, estimate: Estimate, processes: int) -> str:
    here = min(processes, GPUS_PER_NODE)
    host = host_memory(run, estimate, here)
    return (
        f"host   {here} {'process' if here == 1 else 'processes'} of a machine: "
        f"{host.load:.1f} GiB of host memory while loading, {host.step:.1f} in a step, "
        f"{host.save:.1f} while saving"
    )


def _best_line(best: Step | None, reason: str) -> str:
    if best is None:
        return "rows   no train.tokens_per_row fits"
    return (
        f"rows   train.tokens_per_row={best.tokens_per_row} is best: {best.seconds:.2f} s a "
        f"step in {best.memory.total:.1f} GiB; {reason}"
    )


def _time_lines(
    step: Step, work: Workload, gpu: Gpu, processes: int, price: float
) -> Iterator[str]:
    steps, kind = work.plan.total_steps, work.tokens.kind
    pairs = min(work.plan.pairs_per_step, work.plan.num_pairs)
    tokens = float(work.num_tokens().mean()) * pairs
    hours = steps * step.seconds / 3600
    yield (
        f"work   {steps} steps of {pairs} {kind}: {tokens:,.0f} tokens, "
        f"{step.flops / 1e15:,.2f} PFLOP, {step.bytes_moved / 1e9:,.1f} GB received by each "
        "process, a step"
    )
    yield (
        f"time   {step.seconds:.2f} s a step (compute {step.compute_s:.2f}, communication "
        f"{step.communication_s:.2f}, optimizer {step.optimizer_s:.2f}), "
        f"{pairs / step.seconds:,.1f} {kind}/s, {hours:.2f} hours"
    )
    if step.communication_s > step.compute_s:
        yield (
            "note   communication takes longer than computing (longer rows: more "
            "train.pairs_per_step, train.tokens_per_row=auto)"
        )
    if price:
        yield f"cost   {hours * processes:,.1f} GPU hours, {hours * processes * price:,.0f} USD"
