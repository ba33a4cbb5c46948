"""Builds and checks everything that a run needs before its first step.

Cheap parts come first: the data before the run's folder, the folder before the weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from simpo.backend import Backend
from simpo.config.backends import BackgroundSaveConfig
from simpo.config.check import check_training
from simpo.config.errors import ConfigError, first_line
from simpo.config.own_code import source_sha256
from simpo.config.schema import RunConfig
from simpo.data.chats.chat import Chat
from simpo.data.chats.checks import placed_ids, refuse_unknown_ids
from simpo.data.loader import LoadedData, PackedSet, load_data
from simpo.data.packing import pack
from simpo.data.plan import TrainPlan, build_plan
from simpo.loop import console
from simpo.loop.checkpoint import CheckpointStore
from simpo.loop.optim import (
    build_optimizer,
    check_rates,
    check_updates,
    rate_notes,
    sampled_weights,
)
from simpo.loop.publish import check_end
from simpo.loop.reference import model_fingerprint, with_reference
from simpo.loop.rows import choose_rows
from simpo.loop.score import check_loss, metric_names
from simpo.model import cost, memory
from simpo.model.check import check_packing, check_router
from simpo.model.head import largest_logits_bytes
from simpo.model.load import load_policy, load_probe
from simpo.model.policy import Policy
from simpo.model.pretrained import load_settings, num_embeddings
from simpo.model.tokenizer import load_tokenizer
from simpo.run.best import check_monitor
from simpo.run.folder import RunFolder, template_date
from simpo.run.progress import say
from simpo.run.provenance import environment, git_diff
from simpo.run.pruning import may_be_pruned


@dataclass(frozen=True)
class Parts:
    """The parts that `train` uses.

    Attributes:
        train, test: the pairs to train on, and the held-out ones.
        policy: the model inside `wrapped`, for its names, settings and replies.
        wrapped: the module to call instead of the policy (see `Backend.prepare`).
        sampled_before: some weights of each trained tensor before the first step.
        origin: hash of the model before the first step, if the loss needs a reference; on rank 0.
        start_lines: lines to print before the first step.
    """

    backend: Backend
    chat: Chat
    train: PackedSet
    test: PackedSet
    plan: TrainPlan
    folder: RunFolder
    policy: Policy
    wrapped: nn.Module
    optimizer: Optimizer
    store: CheckpointStore
    flops: cost.Flops
    sampled_before: dict[str, Tensor]
    origin: str
    start_lines: tuple[str, ...]


def set_up(run: RunConfig, backend: Backend) -> Parts:
    """Load data and model, find the run's folder, and refuse runs that could not train or save.

    Raises:
        ConfigError, DataError: the settings or the data cannot be used.
    """
    cfg, cache_dir = run.train, Path(run.cache_dir).expanduser()
    check_training(run, backend.bf16)
    check_loss(run.loss)
    today = backend.broadcast(template_date(run) if backend.is_main else None)
    with backend.main_first("read and tokenised the data"):
        tokenizer = load_tokenizer(run.model, cache_dir, run.data.compat)
        chat = Chat(tokenizer, today, run.model.chat_template_kwargs)
        data = load_data(run, chat, cache_dir)
    if cfg.keep_best or cfg.patience_evals or may_be_pruned(run):
        check_monitor(run.monitor, metric_names(run, data.test))
    settings = load_settings(run.model, cache_dir)
    known = num_embeddings(settings)
    refuse_unknown_ids(chat, placed_ids((data.train, data.test), known), known)
    plan = build_plan(len(data.train), cfg.pairs_per_step, cfg.epochs, cfg.max_steps, cfg.seed)
    check_rates(cfg, plan)
    folder = _find_folder(run, backend)
    tokens_per_row, chosen = choose_rows(run, backend, settings, plan, data.train.tokens, folder)
    _write_records(run, folder, chat, data, str(backend), tokens_per_row)
    share = (tokens_per_row, cfg.share_prefix, backend.rank, backend.processes)
    train, test = (PackedSet(tokens, *share) for tokens in (data.train, data.test))
    costs = [*chosen, *_plan_costs(run, backend, settings, plan, train, tokens_per_row)]
    policy, probe = _load_policy(run, backend, settings)
    longest = max(data.train.tokens.longest_sequence(), data.test.tokens.longest_sequence())
    check_packing(probe, backend.bf16, longest, tokens_per_row)
    if probe.left_to_transformers:
        policy.leave_attention_to_transformers()
    check_router(probe, backend.bf16, run.model.router_aux_weight)
    unread = policy.unread is not None
    if not unread:
        sampled, origin = _look_at_weights(run, backend, policy)
    start_lines = (
        *console.start_lines(run, policy, str(backend), data.table, data.train, plan),
        *costs,
        *rate_notes(cfg, plan),
        *console.token_notes(run, chat, data.table, data.train),
        *check_end(run, backend, policy, chat, folder.path),
        *folder.notes,
        *data.notes,
    )
    flops = cost.Flops(policy)
    del probe  # frees it
    wrapped, optimizer = backend.prepare(policy, build_optimizer(policy, cfg))
    if unread:
        sampled, origin = _look_at_weights(run, backend, policy, wrapped)
    store = CheckpointStore(
        folder.path / "checkpoints",
        cfg.keep_checkpoints,
        backend,
        background=isinstance(run.backend, BackgroundSaveConfig) and run.backend.async_save,
    )
    return Parts(
        backend, chat, train, test, plan, folder, policy, wrapped, optimizer, store, flops,
        sampled, origin, start_lines,
    )  # fmt: skip


def _look_at_weights(
    run: RunConfig, backend: Backend, policy: Policy, wrapped: nn.Module | None = None
) -> tuple[dict[str, Tensor], str]:
    """`sampled_before` and `origin` of `Parts`; all processes call it before the first step.

    Args:
        wrapped: the module that `Backend.prepare` has made of the policy, which gathers sharded
            weights; None before that, when every process holds them whole.

    Raises:
        ConfigError: as `check_updates`.
    """

    def whole(weights: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        return weights.items() if wrapped is None else backend.whole(wrapped, weights)

    trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    sampled = sampled_weights(whole(trained))
    check_updates(run.train, sampled)
    if not run.loss.needs_reference:
        return sampled, ""
    weights = iter(whole(dict(sorted(policy.state_dict(keep_vars=True).items()))))
    origin = model_fingerprint(policy, weights) if backend.is_main else ""
    deque(weights, maxlen=0)  # gathers on the other processes
    return sampled, origin


def _load_policy(
    run: RunConfig, backend: Backend, settings: PreTrainedConfig
) -> tuple[Policy, Policy]:
    """The policy, and what to check of it: a small copy if its weights are unread, else itself."""
    say(f"loading the weights of {run.model.path} ...")
    computed: Any = {"bf16": backend.bf16, "share_prefix": run.train.share_prefix}
    probe = None
    if backend.reads_shards:
        probe = load_probe(run.model, settings, backend.device, **computed)
    policy = load_policy(
        run.model,
        Path(run.cache_dir).expanduser(),
        backend.device,
        run.train.seed,
        settings=settings,
        sharded=probe is not None,
        **computed,
    )
    return policy, policy if policy.unread is None or probe is None else probe


def _find_folder(run: RunConfig, backend: Backend) -> RunFolder:
    """The folder that rank 0 finds or makes, for all processes."""
    own = RunFolder(run) if backend.is_main else None
    path = backend.broadcast(own.path if own else None)
    folder = own or RunFolder(run, followed=path)
    if folder.finished:
        raise ConfigError([f"run_dir: {folder.path} holds a finished run{_finished(folder.path)}"])
    return folder


def _finished(path: Path) -> str:
    """The rest of the message about a finished run: what is missing and what to do."""
    if (path / "model").is_dir():
        return " (choose another)"
    if not any((path / "checkpoints").glob("step-*")):
        return ", but neither its model nor a checkpoint (choose another)"
    return (
        f", but no model (choose another; or remove {path / 'status.json'}, and the same command "
        "writes the model from the last checkpoint)"
    )


def _write_records(
    run: RunConfig,
    folder: RunFolder,
    chat: Chat,
    data: LoadedData,
    machine: str,
    tokens_per_row: int,
) -> None:
    folder.write_data(
        {
            "mixture": console.mixture_lines(data.table),
            "notes": data.notes,
            "train_tokens": asdict(data.train.report),
            "test_tokens": asdict(data.test.report),
            "train_fingerprint": data.train.text_fingerprint,
            "test_fingerprint": data.test.text_fingerprint,
            "template_sha256": chat.template_sha256,
            "template_date": chat.template.date and chat.template.date.isoformat(),
            "kept_as_the_original": data.train.kept_by_paper,
            "tokens_fingerprint": data.train.fingerprint,
            "tokens_per_row": tokens_per_row,
            "loss_sha256": run.loss.module and source_sha256(run.loss.module),
        }
    )
    folder.write_json("environment.json", environment(machine))
    folder.write_bytes("git.diff", git_diff())


def _plan_costs(
    run: RunConfig,
    backend: Backend,
    settings: PreTrainedConfig,
    plan: TrainPlan,
    train: PackedSet,
    tokens_per_row: int,
) -> list[str]:
    """Lines about the rows and the memory of a step, which must fit the device."""
    cfg = run.train
    planned = cost.layout(plan, train.num_tokens, tokens_per_row, backend.processes)
    lines = [console.layout_line(planned)]
    if cfg.check_memory:
        pairs = [train.data.tokens[i] for i in planned.largest_row]
        row = pack(pairs, planned.largest_row, cfg.share_prefix)
        logits_bytes = largest_logits_bytes(backend.device)
        place = memory.Place(backend.device, backend.processes, backend.bf16, logits_bytes)
        try:
            estimate = memory.Estimate(run, settings, place)
            needed = max(estimate.step(row), estimate.load(), key=lambda part: part.total)
        except memory.NOT_DRAWN as error:
            return [*lines, f"note   memory not estimated: {first_line(error)}"]
        memory.check_memory(needed, run, backend.device, backend.processes_here)
        lines.append(f"memory about {needed}")
    return lines


def with_references(run: RunConfig, parts: Parts) -> Parts:
    """Score all pairs under the reference: the policy before a checkpoint is loaded."""
    cache_dir = Path(run.cache_dir).expanduser()

    def scored(packed: PackedSet) -> PackedSet:
        data, rows = packed.data, packed.rows()
        known = with_reference(
            parts.wrapped, data, rows, parts.origin, cache_dir, parts.backend, run.loss
        )
        return replace(packed, data=known)

    return replace(parts, train=scored(parts.train), test=scored(parts.test))
