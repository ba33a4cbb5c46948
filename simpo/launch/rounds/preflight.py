"""Checks, before the first round, what a later one needs."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig

from simpo.backend import build_backend
from simpo.config.backends import DistributedConfig
from simpo.config.benchmarks import FIGURES
from simpo.config.check import check_training
from simpo.config.choices import BenchmarkKind, Engine, ReplyChoice
from simpo.config.errors import ConfigError, first_line
from simpo.config.launchers import SlurmConfig
from simpo.config.on_policy import JUDGE
from simpo.config.schema import RunConfig
from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.judging import judge
from simpo.judging.ratings import open_ratings
from simpo.launch.rounds.phases import slices_of, static_sources
from simpo.launch.rounds.record import AT_ZERO, MEASURES, plan_of
from simpo.launch.rounds.unchanged import (
    FIRST,
    PROMPTS,
    STATIC,
    content_of_first,
    content_of_static,
)
from simpo.loop.console import libraries_quiet
from simpo.loop.rates import changes_weights
from simpo.loop.score import columns
from simpo.loop.sinks import check_login
from simpo.model import memory
from simpo.model.available import available_bytes
from simpo.model.cost import heads_of_layers
from simpo.model.head import largest_logits_bytes
from simpo.model.pretrained import load_settings
from simpo.on_policy.annotate import KEY
from simpo.on_policy.engines import engine_of
from simpo.on_policy.files import Prompt
from simpo.on_policy.generate import content_of_prompts, prompts_of
from simpo.on_policy.rewards import RULES, reward_content
from simpo.run.best import check_monitor
from simpo.run.progress import say

IN_TRAINING = ("loss", "aux_loss", "reply_tokens", "reply_repetition", "rule_pass_rate")
"""Held-out metrics of a round's training beside those of its loss."""


@libraries_quiet()
def check_rounds(run: RunConfig, first: RunConfig) -> tuple[str, dict[str, str]]:
    """Check that rounds have a reward, prompts, memory and disk until their end.

    Args:
        run: the settings of all rounds.
        first: those of the first phase.

    Returns:
        The numbers of prompts, in words; and hashes of what later rounds must find the same, as
        check.json has them.

    Raises:
        ConfigError: with what a phase would miss.
        DataError: the prompts, or the static pairs, cannot be read.
    """
    check_training(run)
    check_login(run.tracker)
    _, found = prompts_of(first)
    prompts = [prompt for prompt, _ in found]
    problems = [*_prompt_problems(run, prompts), *_monitor_problems(run)]
    name = run.on_policy.reward
    assert name is not None
    if name == JUDGE:
        open_ratings(first)
    elif name != RULES:
        reward_content(first, KEY, name)
    elif lacking := sum(prompt.rule is None for prompt in prompts):
        problems.append(
            f"{KEY}: {RULES} needs a rule, {lacking} of {len(prompts)} prompts have none (name "
            "another)"
        )
    if problems:
        raise ConfigError(problems)
    content = {PROMPTS: content_of_prompts(found), FIRST: content_of_first(run)}
    if static_sources(run):
        content[STATIC] = content_of_static(run)
    if run.benchmark.kind is not BenchmarkKind.none:
        judge.check(run)
    settings = load_settings(run.model, Path(run.cache_dir).expanduser())
    backend = build_backend(first.backend, run.train.precision)
    try:
        place = memory.Place(
            backend.device, _processes(run), backend.bf16, largest_logits_bytes(backend.device)
        )
        estimate = memory.Estimate(run, settings, place)
        _check_memory(run, settings, estimate, backend.device)
    except memory.NOT_DRAWN as error:
        say(f"note   memory not estimated: {first_line(error)}")
    else:
        _check_disk(run, estimate)
    number = Counter(prompt.split for prompt in prompts)
    dealt = f"in {slices} slices" if (slices := slices_of(run)) > 1 else "in each round"
    told = f"{number['train']} prompts to train on {dealt}, {number['test']} held out"
    return told, content


def _prompt_problems(run: RunConfig, prompts: list[Prompt]) -> list[str]:
    """Faults of the number of prompts."""
    number = Counter(prompt.split for prompt in prompts)
    slices = slices_of(run)
    found = []
    if number["train"] < slices:
        found.append(
            f"rounds.prompts: {slices} slices need as many train prompts, there are "
            f"{number['train']} (more data, fewer rounds, or rounds.prompts=all)"
        )
    else:
        found += _step_problems(run, number["train"] // slices)
    if not number["test"]:
        found.append(
            "data.sources: no prompt is held out, and rounds are compared by held-out replies "
            "(test_split or test_path)"
        )
    return found


def _step_problems(run: RunConfig, prompts: int) -> list[str]:
    """The fault of rounds that cannot change a weight, with so many train prompts in a round."""
    pairs = _most_pairs(run, prompts)
    if not pairs or changes_weights(run.train, plan_of(run, pairs)):
        return []
    return [
        f"train.pairs_per_step: a round gives at most {pairs} pairs (train prompts: {prompts}), "
        f"{AT_ZERO}"
    ]


def _most_pairs(run: RunConfig, prompts: int) -> int:
    """The pairs that a round trains on if each of its prompts gives all it can; 0: not known."""
    if run.rounds.static_weight:
        return 0
    replies = len(run.on_policy.seeds)
    choice = run.rounds.choice or run.on_policy.choice
    return prompts * (math.comb(replies, 2) if choice is ReplyChoice.all else 1)


def _monitor_problems(run: RunConfig) -> list[str]:
    """The fault of a metric that no round's model will have."""
    figures = FIGURES if run.benchmark.kind is not BenchmarkKind.none else ()
    known = [*dict.fromkeys((*MEASURES.values(), *columns(run.loss), *IN_TRAINING, *figures))]
    metric = run.monitor.metric
    if metric.partition("/")[2] in known:  # of one held-out set
        return []
    try:
        check_monitor(run.monitor, known)
    except ConfigError as error:
        return error.problems
    return []


def _processes(run: RunConfig) -> int:
    """The number of processes that train."""
    if not isinstance(run.backend, DistributedConfig):
        return 1
    if isinstance(run.launcher, SlurmConfig) and run.rounds.chain:
        return run.launcher.tasks()
    return run.backend.processes or torch.cuda.device_count() or 1


def _check_memory(
    run: RunConfig, settings: PreTrainedConfig, estimate: memory.Estimate, device: torch.device
) -> None:
    """Compare the memory of a step, and of a batch of replies, with the device's.

    Raises:
        ConfigError: one of them does not fit.
    """
    if not run.train.check_memory:
        return
    response = min(run.on_policy.max_new_tokens, run.data.max_length_tokens // 2)
    prompt = run.data.max_length_tokens - response
    prompt_ids, response_ids = (np.ones(length, np.int32) for length in (prompt, response))
    replies = len(run.on_policy.seeds) if run.loss.ranks else 2
    pair = TokenizedPair.of(prompt_ids, *[response_ids] * replies)
    row_tokens, pair_tokens = run.train.tokens_per_row, pair.num_tokens(run.train.share_prefix)
    count = max(1, row_tokens // pair_tokens) if isinstance(row_tokens, int) else 1
    row = pack([pair] * count, range(count), run.train.share_prefix)
    here = 1 if device.type == "cuda" else _processes(run)
    largest = max(estimate.step(row), estimate.load(), key=lambda needed: needed.total)
    memory.check_memory(largest, run, device, here)
    if engine_of(run.on_policy.engine) is Engine.vllm:
        return  # it divides the device's memory itself
    needed = estimate.model.whole.bytes_in(bf16=False)
    needed += run.on_policy.batch_prompts * (prompt + response) * _cache_bytes(settings)
    available = available_bytes(device, run.rounds.generate_jobs)
    if needed > available:
        raise ConfigError(
            [
                f"on_policy.batch_prompts: {run.on_policy.batch_prompts} replies at a time need "
                f"about {needed / memory.GIB:.2f} GiB, there are {available / memory.GIB:.2f} GiB "
                "(lower it; train.check_memory=false tries all the same)"
            ]
        )


def _cache_bytes(settings: PreTrainedConfig) -> int:
    """Bytes of keys and values of one token, in fp32."""
    return 2 * 4 * sum(own.keys * own.size for own in heads_of_layers(settings.get_text_config()))


def _check_disk(run: RunConfig, estimate: memory.Estimate) -> None:
    """Check that the disk has room for the models of all rounds and the checkpoints of one.

    Raises:
        ConfigError: it has not.
    """
    assert run.run_dir is not None
    trained = 4 * estimate.model.whole.trained
    # Weights and the two moments of AdamW; one checkpoint is written before an old one is removed.
    needed = run.rounds.number * trained + 3 * trained * (run.train.keep_checkpoints + 1)
    if (free := shutil.disk_usage(run.run_dir).free) < needed:
        raise ConfigError(
            [
                f"run_dir: models of {run.rounds.number} rounds and checkpoints of one take "
                f"{needed / memory.GIB:.2f} GiB, but {run.run_dir} has "
                f"{free / memory.GIB:.2f} GiB free (make room, or choose another output_dir)"
            ]
        )
