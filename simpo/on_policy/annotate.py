"""Scores the replies of a model, and pairs the best with the worst reply to each prompt."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from simpo.backend import build_backend
from simpo.config.errors import ConfigError, RunError, first_line
from simpo.config.own_code import is_function, load
from simpo.config.schema import RunConfig
from simpo.data import rules
from simpo.data.pairs import Message
from simpo.data.rules import obeys
from simpo.loop.console import libraries_quiet
from simpo.model.pretrained import load_pretrained, load_weights
from simpo.on_policy.files import (
    Prompt,
    StoredReply,
    append_lines,
    content_hash,
    model_content,
    on_policy_folder,
    read_lines,
    read_prompts,
    read_stored_replies,
    working_in,
)
from simpo.run.atomic import write_text
from simpo.run.cache import sha256
from simpo.run.progress import bar
from simpo.run.tables import markdown_table

Reward = Callable[[Sequence[Message], Sequence[str], Mapping[str, Any] | None], Sequence[float]]
"""Maps a prompt, replies to it and its rule to a score per reply; higher is better."""


@libraries_quiet()
def annotate(run: RunConfig) -> Path:
    """Score every reply and write train.jsonl and test.jsonl.

    A prompt gives a pair if its replies differ in text and in score. Of equal replies one is
    scored; empty replies are left out and, without `on_policy.keep_cut`, those that were cut off.

    Returns:
        The folder; see `simpo.on_policy.files`.

    Raises:
        ConfigError: there are no replies, the reward cannot be used, or another process works in
            the folder.
        RunError: the reward failed on a prompt (scores so far are kept), or there is no pair.
    """
    folder = on_policy_folder(run)
    name = run.on_policy.reward
    if not (folder / "responses.jsonl").is_file():
        raise ConfigError([f"on_policy.folder: no replies in {folder} (run simpo.generate)"])
    if not name:
        raise ConfigError(["on_policy.reward: required, but not given"])
    with working_in(folder):
        _annotate(run, folder, name)
    return folder


def _annotate(run: RunConfig, folder: Path, name: str) -> None:
    prompts = read_prompts(folder)
    stored = read_stored_replies(folder)
    replies, cut = _replies(folder, prompts, stored, run.on_policy.keep_cut)
    print(*_missing_note(prompts, stored), sep="", end="")
    scored = _score_all(run, folder, name, prompts, replies)
    written: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    counts: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    for prompt in prompts:
        texts = [reply.text for reply in replies[prompt.id].values()]
        counts[prompt.split]["prompts"] += 1
        if len(texts) < 2:
            counts[prompt.split]["fewer than two different replies"] += 1
            continue
        scores = scored[prompt.id]
        best, worst = (scores.index(pick(scores)) for pick in (max, min))
        if scores[best] == scores[worst]:
            counts[prompt.split]["ties"] += 1
            continue
        counts[prompt.split]["pairs"] += 1
        written[prompt.split].append(
            {
                "prompt": prompt.prompt,
                "chosen": texts[best],
                "rejected": texts[worst],
                "rule": prompt.rule,
                **({"tools": prompt.tools} if prompt.tools else {}),
                "chosen_score": scores[best],
                "rejected_score": scores[worst],
                "scores": scores,
            }
        )
    for split, lines in written.items():
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    columns = ("prompts", "pairs", "ties", "fewer than two different replies")
    print(
        *markdown_table(
            [{"split": split, **{c: n[c] for c in columns}} for split, n in counts.items()]
        ),
        *([f"{cut} replies left out: cut off by on_policy.max_new_tokens"] if cut else []),
        sep="\n",
    )
    if not written["train"]:
        raise RunError(
            f"{folder}: no train prompt has replies with different scores (generate with more "
            "on_policy.seeds, or continue simpo.generate if it was stopped)"
        )


def _missing_note(prompts: list[Prompt], stored: list[StoredReply]) -> list[str]:
    """A note if some prompts lack replies to seeds that others have."""
    seeds = sorted({reply.seed for reply in stored})
    there = Counter(key for key, _ in {(reply.id, reply.seed) for reply in stored})
    lacking = sum(there[prompt.id] < len(seeds) for prompt in prompts)
    if not lacking:
        return []
    return [
        f"note   {lacking} of {len(prompts)} prompts lack replies with some of the "
        f"on_policy.seeds {seeds}: simpo.generate was stopped (its command continues it)\n"
    ]


def _replies(
    folder: Path, prompts: list[Prompt], stored: list[StoredReply], keep_cut: bool
) -> tuple[dict[str, dict[str, StoredReply]], int]:
    """The different replies to each prompt by text, and the number of cut-off ones left out."""
    replies: dict[str, dict[str, StoredReply]] = {prompt.id: {} for prompt in prompts}
    cut = 0
    for reply in stored:
        if reply.id not in replies:
            raise ConfigError(
                [
                    f"on_policy.folder: {folder} has a reply to {reply.id}, which is not in its "
                    "prompts.jsonl (simpo.generate writes that again)"
                ]
            )
        if not reply.ended and not keep_cut:
            cut += 1
        elif reply.text.strip():
            replies[reply.id].setdefault(reply.text.strip(), reply)
    if not any(replies.values()):
        why = f": all {cut} are cut off (on_policy.keep_cut=true takes them)" if cut else ""
        raise ConfigError(
            [f"on_policy.folder: no replies in {folder}{why or ' (run simpo.generate)'}"]
        )
    return replies, cut


def _score_all(
    run: RunConfig,
    folder: Path,
    name: str,
    prompts: list[Prompt],
    replies: Mapping[str, Mapping[str, StoredReply]],
) -> dict[str, list[float]]:
    """Scores of the replies to each prompt with several different ones; known scores are reused."""
    safe_name = re.sub(r"[^\w.-]+", "_", name)
    file = folder / f"scores-{safe_name}.jsonl"
    content = _reward_content(run, name)
    lines = read_lines(file)
    known = {
        line["id"]: line
        for line in lines
        if line.get("reward") == content and isinstance(line.get("id"), str)
    }
    if lines and not known:
        print(f"note   {name} has changed since {file.name}: all replies are scored anew")
    reward: Reward | None = None
    scored: dict[str, list[float]] = {}
    several = {
        prompt.id: texts
        for prompt in prompts
        if len(texts := [reply.text for reply in replies[prompt.id].values()]) > 1
    }
    with bar("scoring replies to prompts", len(several)) as shown:
        for prompt in prompts:
            if prompt.id not in several:
                continue
            texts = several[prompt.id]
            wanted = content_hash(texts)
            line = known.get(prompt.id)
            if line is None or line.get("responses") != wanted or not _are_scores(line, len(texts)):
                reward = reward or _reward(run, name)
                scores = _scores(reward, name, prompt, texts)
                line = {"id": prompt.id, "responses": wanted, "reward": content, "scores": scores}
                append_lines(file, [line])
            scored[prompt.id] = line["scores"]
            shown.advance()
    return scored


def _are_scores(line: Mapping[str, Any], count: int) -> bool:
    scores = line.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        return False
    return all(isinstance(score, float) and math.isfinite(score) for score in scores)


def _reward_content(run: RunConfig, name: str) -> str:
    """Hash of what decides the scores of a reward: its name, its code or weights, its settings.

    The code of a function is the file of its module, and its own file if that is another.
    """
    if name == "rules" or is_function(name):
        reward = _reward(run, name)
        module = rules if name == "rules" else sys.modules[name.partition(":")[0]]
        files = {getattr(module, "__file__", None)}
        with suppress(TypeError):  # a callable that is not a function
            files.add(inspect.getsourcefile(reward))
        return content_hash([name, sorted(sha256(Path(file)) for file in files if file)])
    if name.endswith(".py") or Path(name).is_file():
        raise ConfigError(
            [f"on_policy.reward: must not be a file, got {name} (a function is module:function)"]
        )
    if name.startswith((".", "~", os.sep)) and not Path(name).is_dir():
        raise ConfigError([f"on_policy.reward: no such folder, got {name}"])
    trust, precision = run.model.trust_remote_code, run.train.precision.value
    return content_hash([name, model_content("on_policy.reward", name, None), trust, precision])


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
    if is_function(name):
        function: Reward = load("on_policy.reward", name)
        return function
    return _model(run, name)


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


def _model(run: RunConfig, name: str) -> Reward:
    """A reward from a sequence classifier with one score, which reads its own chat template."""
    backend = build_backend(run.backend, run.train.precision)
    trust = run.model.trust_remote_code
    named: dict[str, Any] = {"key": "on_policy.reward", "source": name, "trust_remote_code": trust}
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
