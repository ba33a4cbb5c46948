"""Replies of a model in, a pair of the best and the worst to each prompt out."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from simpo.backend import build_backend
from simpo.config import RunConfig
from simpo.console import quiet_libraries
from simpo.data.rules import obeys
from simpo.errors import ConfigError, RunError, first_line
from simpo.model import load_pretrained
from simpo.on_policy.files import (
    Prompt,
    Response,
    append_lines,
    content_hash,
    on_policy_folder,
    read_lines,
    read_prompts,
    read_responses,
)
from simpo.pairs import Message
from simpo.run_folder import write_text
from simpo.tables import markdown_table

Reward = Callable[[Sequence[Message], Sequence[str], Mapping[str, Any] | None], Sequence[float]]
"""From a prompt, some replies to it and its rule to a score for each reply, more being better."""


def annotate(run: RunConfig) -> Path:
    """Score every reply and write train.jsonl and test.jsonl.

    A prompt gives a pair where its replies differ, in text and in score. Of equal replies one is
    scored; empty ones and, without `on_policy.keep_cut`, those that were cut off are left out.

    Returns:
        The folder; see `simpo.on_policy.files`.

    Raises:
        ConfigError: there are no replies, or the reward cannot be used.
        RunError: the reward failed on a prompt (scores so far are kept), or no pair came out.
    """
    quiet_libraries()
    folder = on_policy_folder(run)
    prompts = read_prompts(folder)
    replies: dict[str, dict[str, Response]] = {prompt.id: {} for prompt in prompts}
    cut = 0
    for response in read_responses(folder):
        if not response.ended and not run.on_policy.keep_cut:
            cut += 1
        elif response.response.strip():
            replies[response.id].setdefault(response.response.strip(), response)
    if not any(replies.values()):
        why = f": all {cut} are cut off (on_policy.keep_cut=true takes them)" if cut else ""
        raise ConfigError([f"on_policy.folder: no replies in {folder}{why or ' (simpo.generate)'}"])
    name = run.on_policy.reward
    if name is None:
        raise ConfigError(["on_policy.reward: required, but not given"])
    safe_name = re.sub(r"[^\w.-]+", "_", name)
    file = folder / f"scores-{safe_name}.jsonl"
    known = {row["id"]: row for row in read_lines(file)}
    reward: Reward | None = None
    written: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    counts: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    for prompt in tqdm(prompts, desc="score", unit="prompt"):
        texts = [response.response for response in replies[prompt.id].values()]
        counts[prompt.split]["prompts"] += 1
        if len(texts) < 2:
            counts[prompt.split]["fewer than two different replies"] += 1
            continue
        wanted = content_hash(texts)
        row = known.get(prompt.id)
        if row is None or row["responses"] != wanted:
            reward = reward or _reward(run, name)
            scores = _scores(reward, name, prompt, texts)
            row = {"id": prompt.id, "responses": wanted, "scores": scores}
            append_lines(file, [row])
        best, worst = (row["scores"].index(pick(row["scores"])) for pick in (max, min))
        if row["scores"][best] == row["scores"][worst]:
            counts[prompt.split]["ties"] += 1
            continue
        counts[prompt.split]["pairs"] += 1
        written[prompt.split].append(
            {
                "prompt": prompt.prompt,
                "chosen": texts[best],
                "rejected": texts[worst],
                "rule": prompt.rule,
                "chosen_score": row["scores"][best],
                "rejected_score": row["scores"][worst],
                "scores": row["scores"],
            }
        )
    for split, rows in written.items():
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    columns = ("prompts", "pairs", "ties", "fewer than two different replies")
    print(
        *markdown_table(
            [{"split": split, **{c: n[c] for c in columns}} for split, n in counts.items()]
        ),
        *([f"{cut} replies left out: cut off by on_policy.max_new_tokens"] if cut else []),
        sep="\n",
    )
    if not written["train"]:
        raise RunError(f"{folder}: no prompt to train on has replies of different scores")
    return folder


def _scores(reward: Reward, name: str, prompt: Prompt, texts: list[str]) -> list[float]:
    try:
        scores = [float(score) for score in reward(prompt.prompt, texts, prompt.rule)]
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        place = f"on_policy.reward: {name} failed on prompt {prompt.id}"
        raise RunError(f"{place}: {reason}") from error
    if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
        raise RunError(
            f"on_policy.reward: {name} must give {len(texts)} finite scores for prompt "
            f"{prompt.id}, gave {scores}"
        )
    return scores


def _reward(run: RunConfig, name: str) -> Reward:
    if name == "rules":
        return by_rule
    if re.fullmatch(r"[\w.]+:\w+", name):
        return _function(name)
    return _model(run, name)


def by_rule(
    prompt: Sequence[Message], responses: Sequence[str], rule: Mapping[str, Any] | None
) -> list[float]:
    """1 for a reply that obeys the prompt's rule, 0 for another.

    Raises:
        ValueError: the prompt has no rule.
    """
    if rule is None:
        raise ValueError("the prompt has no rule")
    return [float(obeys(rule, text)) for text in responses]


def _function(name: str) -> Reward:
    module, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        found: Reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError([f"on_policy.reward: {name} cannot be imported: {error}"]) from error
    return found


def _model(run: RunConfig, name: str) -> Reward:
    """A sequence classifier with one score, asked in its own chat template."""
    backend = build_backend(run.backend, run.train.precision)
    trust = run.model.trust_remote_code
    load = partial(load_pretrained, "on_policy.reward", name, trust_remote_code=trust)
    tokenizer = load(AutoTokenizer)
    dtype = torch.bfloat16 if backend.half else torch.float32
    model = load(AutoModelForSequenceClassification, dtype=dtype)
    model.to(backend.device).eval()

    @torch.no_grad()
    def reward(
        prompt: Sequence[Message], responses: Sequence[str], rule: Mapping[str, Any] | None
    ) -> list[float]:
        scores = []
        for text in responses:
            ids = tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": text}], return_dict=False
            )
            output = model(torch.tensor([ids], device=backend.device))
            # Some models of the hub give it a name of its own.
            score = getattr(output, "score", None)
            score = output.logits if score is None else score
            if score.numel() != 1:
                raise ValueError(f"it gives {score.numel()} numbers for a reply, not one")
            scores.append(score.float().item())
        return scores

    return reward
