"""Rewards, which score replies: rules, a function of a user's, or a sequence classifier."""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from simpo.backend import build_backend
from simpo.config.errors import ConfigError, RunError
from simpo.config.own_code import RAISED, fault_of, is_function, load_function
from simpo.config.paths import looks_local
from simpo.config.schema import RunConfig
from simpo.data import rules
from simpo.data.pairs import Message
from simpo.data.rules import obeys
from simpo.model.pretrained import load_pretrained, load_weights
from simpo.on_policy.files import Prompt, content_hash, model_content
from simpo.run.cache import sha256
from simpo.run.signals import check_stopped

RULES = "rules"
"""Names the reward that checks the rules of prompts."""
Reward = Callable[[Sequence[Message], Sequence[str], Mapping[str, Any] | None], Sequence[float]]
"""Maps a prompt, replies to it and its rule to a score per reply; higher is better."""


class Rater(Protocol):
    """A judge that rates replies to all prompts at once; `simpo.judging.ratings` opens one."""

    content: str
    """Hash of all that decides its ratings."""

    def rate(self, replies: Sequence[tuple[Prompt, str]]) -> list[float | None]:
        """A finite rating of each reply, higher is better; None if its verdict cannot be read.

        Raises:
            RunError: it cannot go on; the same call continues.
        """


def open_reward(run: RunConfig, key: str, name: str) -> Reward:
    """The reward of a name.

    Args:
        key: the setting that names it, for messages.
        name: `rules`, `module:function`, or the folder or hub id of a classifier with one score.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if name == RULES:
        return by_rule
    if is_function(name):
        function: Reward = load_function(key, name)
        return function
    return _model(run, key, name)


def reward_content(run: RunConfig, key: str, name: str) -> str:
    """Hash of what decides the scores of a reward: its name, its code or weights, its settings.

    The code of a function is the file of its module, and its own file if that is another.

    Args:
        key, name: as of `open_reward`.

    Raises:
        ConfigError: there is no such reward.
    """
    if name == RULES or is_function(name):
        reward = open_reward(run, key, name)
        module = rules if name == RULES else sys.modules[name.partition(":")[0]]
        files = {getattr(module, "__file__", None)}
        with suppress(TypeError):  # a callable that is not a function
            files.add(inspect.getsourcefile(reward))
        return content_hash([name, sorted(sha256(Path(file)) for file in files if file)])
    start, dot, last = name.rpartition(".")
    if dot and Path(f"{start.replace('.', os.sep)}.py").is_file():
        raise ConfigError([f"{key}: must be {start}:{last}, got {name}"])
    folder = Path(name).expanduser()
    if name.endswith(".py") or folder.is_file():
        raise ConfigError(
            [f"{key}: must not be a file, got {name} (a function is module:function)"]
        )
    if looks_local(name) and not folder.is_dir():
        raise ConfigError([f"{key}: no such folder, got {name}"])
    trust, precision = run.model.trust_remote_code, run.train.precision.value
    return content_hash([name, model_content(key, name, None), trust, precision])


def scores_of(
    reward: Reward,
    key: str,
    name: str,
    place: str,
    prompt: Sequence[Message],
    texts: Sequence[str],
    rule: Mapping[str, Any] | None,
) -> list[float]:
    """A score of each reply to a prompt.

    Args:
        key: the setting that names the reward, for messages.
        place: of the prompt, for messages.

    Raises:
        RunError: the reward failed, or gave something else than a finite score for each.
    """
    named = f"{key}: {name}"
    try:
        # Copies: a function of a user's may change what it is given.
        given = deepcopy((list(prompt), list(texts), rule))
        try:
            found: object = reward(*given)
            scores = [float(score) for score in found] if isinstance(found, Iterable) else found
        finally:
            check_stopped()
    except RAISED as error:
        raise RunError(f"{named} failed on {place}: {fault_of(error, name)}") from error
    if (
        not isinstance(scores, list)
        or len(scores) != len(texts)
        or not all(map(math.isfinite, scores))
    ):
        raise RunError(f"{named} must give {len(texts)} finite scores for {place}, gave {scores}")
    return scores


def by_rule(
    prompt: Sequence[Message], replies: Sequence[str], rule: Mapping[str, Any] | None
) -> list[float]:
    """1 for a reply that obeys the prompt's rule, 0 for another.

    Raises:
        ValueError: the prompt has no rule.
    """
    if rule is None:
        raise ValueError("the prompt has no rule")
    return [float(obeys(rule, text)) for text in replies]


def _model(run: RunConfig, key: str, name: str) -> Reward:
    """A reward from a sequence classifier with one score, which reads its own chat template."""
    backend = build_backend(run.backend, run.train.precision)
    trust = run.model.trust_remote_code
    source = os.path.expanduser(name)
    named: dict[str, Any] = {"key": key, "source": source, "trust_remote_code": trust}
    tokenizer = load_pretrained(loader=AutoTokenizer, **named)
    dtype = torch.bfloat16 if backend.bf16 else torch.float32
    model = load_weights(loader=AutoModelForSequenceClassification, dtype=dtype, **named)
    model.to(backend.device).eval()

    @torch.no_grad()
    def reward(
        prompt: Sequence[Message], replies: Sequence[str], rule: Mapping[str, Any] | None
    ) -> list[float]:
        scores = []
        for text in replies:
            ids = tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": text}], return_dict=False
            )
            output = model(torch.tensor([ids], device=backend.device))
            # Some models on the hub return it as `score`.
            score = getattr(output, "score", None)
            score = output.logits if score is None else score
            if score.numel() != 1:
                raise ValueError(f"it gives {score.numel()} numbers for a reply, not one")
            scores.append(score.float().item())
        return scores

    return reward
