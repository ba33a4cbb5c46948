"""Rules that cross the sections of a run."""

from __future__ import annotations

from collections.abc import Iterator

from simpo.config.backends import DistributedConfig, FsdpConfig
from simpo.config.benchmarks import FIGURES
from simpo.config.choices import (
    BenchmarkKind,
    Compat,
    Mode,
    PairChoice,
    Quantization,
    ReplyChoice,
)
from simpo.config.data import MAX_WEIGHT
from simpo.config.errors import ConfigError
from simpo.config.launchers import SlurmConfig
from simpo.config.on_policy import JUDGE, OnPolicyConfig
from simpo.config.rounds import REWARD, launcher_of_replies
from simpo.config.schema import RunConfig

MORE_IS_BETTER = (
    *(REWARD, "reply_pass_rate", "reply_win_rate", "reply_gain_rate"),
    *FIGURES,
)
"""Metrics of a round's model, higher is better."""
COMPARES_ALL = "the loss compares all replies to a prompt"
RATERS = "set judge.endpoint or judge.local"


def cross_problems(run: RunConfig) -> Iterator[str]:
    """Faults of settings that are right by themselves, but not beside others."""
    if run.data.compat is Compat.paper and (not run.loss.needs_rejected or run.loss.reads_labels):
        yield (
            "data.compat: paper applies to preference pairs only "
            f"(with loss={run.loss.name} set data.compat=none)"
        )
    if isinstance(run.backend, FsdpConfig) and run.model.quantization is Quantization.int8:
        yield (
            "model.quantization: backend=fsdp cannot shard int8 layers, it would lose their scales "
            "(set nf4, or backend=ddp, zero2 or zero3)"
        )
    yield from _judged_problems(run)
    yield from _rating_problems(run)
    if run.loss.ranks:
        yield from _ranking_problems(run)
    if run.rounds.number:
        yield from _rounds_problems(run)
    if isinstance(run.launcher, SlurmConfig) and run.launcher.tasks() > 1:
        if not isinstance(run.backend, DistributedConfig):
            yield (
                f"backend: {run.backend.name} is one process, but the launcher's nodes and GPUs "
                f"make {run.launcher.tasks()} (backend=fsdp, or launcher.tasks_per_node=1)"
            )
        elif run.backend.processes is not None:
            yield (
                f"backend.processes: Slurm starts the {run.launcher.tasks()} processes, got "
                f"{run.backend.processes} (leave it out)"
            )


def _judged_problems(run: RunConfig) -> Iterator[str]:
    """Faults of a `monitor.metric` that a judge finds at the end of a run."""
    if (metric := run.monitor.metric) not in FIGURES:
        return
    if run.benchmark.kind is BenchmarkKind.none:
        yield f"monitor.metric: {metric} is of a benchmark, but none is set (benchmark=pairs)"
    for key in ("keep_best", "patience_evals"):
        if getattr(run.train, key):
            yield (
                f"train.{key}: needs a held-out metric, got monitor.metric={metric}, which is "
                "known at the end of a run only (choose another metric)"
            )


def _rating_problems(run: RunConfig) -> Iterator[str]:
    """Faults of a judge that is to rate replies."""
    judge = run.judge
    if run.on_policy.reward != JUDGE or judge.asks("endpoint") or judge.asks("local"):
        return
    scoring = [key for key in ("reward", "annotations") if judge.asks(key)]
    for key in scoring:
        yield f"judge.{key}: rates no replies for on_policy.reward=judge ({RATERS})"
    if not scoring:
        yield f"on_policy.reward: judge needs a judge, but none is set ({RATERS})"


def _ranking_problems(run: RunConfig) -> Iterator[str]:
    """Faults of settings that only a loss of all replies to a prompt makes one."""
    for index, source in enumerate(run.data.sources):
        if source.pairs is not PairChoice.best_worst:
            got = source.pairs.value
            yield f"data.sources[{index}].pairs: {COMPARES_ALL}, got {got} (leave it out)"
    if run.data.compat is Compat.paper:
        yield f"data.compat: paper has pairs only, and {COMPARES_ALL} (set data.compat=none)"
    key = "on_policy.choice" if run.rounds.choice is None else "rounds.choice"
    choice = run.rounds.choice or run.on_policy.choice
    if run.rounds.number and choice is not ReplyChoice.ranked:
        yield f"{key}: {COMPARES_ALL}, got {choice.value} (set {key}=ranked)"


def _rounds_problems(run: RunConfig) -> Iterator[str]:
    """Faults of settings that only rounds make one."""
    if not run.on_policy.reward:
        yield "on_policy.reward: required for rounds, but not given"
    blank = OnPolicyConfig()
    for key in ("folder", "slices", "slice", "held_out_only", "parts", "part"):
        if (value := getattr(run.on_policy, key)) != getattr(blank, key):
            yield f"on_policy.{key}: rounds set it themselves, got {value} (leave it out)"
    if run.monitor.metric in MORE_IS_BETTER and run.monitor.mode is Mode.min:
        yield f"monitor.mode: more {run.monitor.metric} is better, got min (monitor.mode=max)"
    unknown = run.on_policy.pass_reward is None and run.on_policy.reward != "rules"
    if run.monitor.metric == "reply_pass_rate" and unknown:
        yield (
            "monitor.metric: reply_pass_rate needs the score from which a reply passes "
            "(on_policy.pass_reward)"
        )
    if run.export.push_to_hub:
        yield (
            "export.push_to_hub: rounds keep one of several models, when they have ended (leave it "
            "out, then simpo export RUN push_to_hub=OWNER/NAME)"
        )
    share = run.rounds.static_weight
    for index, source in enumerate(run.data.sources):
        if source.num_pairs is None and source.weight * share > MAX_WEIGHT >= source.weight:
            yield (
                f"rounds.static_weight: times data.sources[{index}].weight must be at most "
                f"{MAX_WEIGHT}, got {share} times {source.weight}"
            )
    if not isinstance(run.launcher, SlurmConfig):
        if run.rounds.chain:
            yield (
                "rounds.chain: needs launcher=slurm (leave it out: here phases follow one another)"
            )
    elif run.rounds.chain:
        try:
            launcher_of_replies(run.launcher, run.rounds)
        except ConfigError as error:
            yield from error.problems
    elif run.launcher.tasks() > 1:
        yield (
            f"launcher.tasks_per_node: each phase starts its own processes, got "
            f"{run.launcher.tasks()} tasks (launcher.nodes=1 launcher.tasks_per_node=1 "
            "backend.processes=GPUS, or rounds.chain=true)"
        )
