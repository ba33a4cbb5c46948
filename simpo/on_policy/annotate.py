"""Scores the replies of a model, and makes pairs of the replies to each prompt."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpo.config.choices import ReplyChoice
from simpo.config.errors import ConfigError, RunError
from simpo.config.schema import RunConfig
from simpo.loop.console import libraries_quiet
from simpo.on_policy.files import (
    SEEDS,
    Prompt,
    StoredReply,
    append_lines,
    content_hash,
    on_policy_folder,
    read_lines,
    read_prompts,
    read_stored_replies,
    responses_files,
    working_in,
)
from simpo.on_policy.pairing import pairs_of_replies, with_wide_margins
from simpo.on_policy.rewards import Reward, open_reward, reward_content, scores_of
from simpo.run.atomic import write_text
from simpo.run.progress import bar
from simpo.run.tables import markdown_table

KEY = "on_policy.reward"
"""The setting that names the reward."""
NARROW = "below margin_quantile"


@libraries_quiet()
def annotate(run: RunConfig) -> Path:
    """Score every reply and write train.jsonl and test.jsonl.

    A prompt gives pairs, by `on_policy.choice`, if its replies differ in text and in score. Of
    equal replies one is
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
    if not responses_files(folder):
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
    print(*_missing_note(folder, prompts, stored), sep="", end="")
    scored = _score_all(run, folder, name, prompts, replies)
    written: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    counts: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    choice = run.on_policy.choice
    for prompt in prompts:
        texts = [reply.text for reply in replies[prompt.id].values()]
        counts[prompt.split]["prompts"] += 1
        if len(texts) < 2:
            counts[prompt.split]["fewer than two different replies"] += 1
            continue
        scores = scored[prompt.id]
        pairs = pairs_of_replies(scores, choice, prompt.id)
        counts[prompt.split]["ties"] += not pairs
        written[prompt.split] += [
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
            for best, worst in pairs
        ]
    columns = ["prompts", "pairs", "ties", "fewer than two different replies"]
    if choice is ReplyChoice.margin:
        columns.append(NARROW)
        for split, lines in written.items():
            written[split] = with_wide_margins(lines, run.on_policy.margin_quantile)
            counts[split][NARROW] = len(lines) - len(written[split])
    for split, lines in written.items():
        counts[split]["pairs"] = len(lines)
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
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


def _missing_note(folder: Path, prompts: list[Prompt], stored: list[StoredReply]) -> list[str]:
    """A note if some prompts lack replies to seeds that others have, or that were asked for."""
    settings = next(iter(read_lines(folder / "settings.json")), {})
    seeds = sorted({*(reply.seed for reply in stored), *settings.get(SEEDS, ())})
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
    content = reward_content(run, KEY, name)
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
                reward = reward or open_reward(run, KEY, name)
                place = f"prompt {prompt.id}"
                scores = scores_of(
                    reward, f"{KEY}: {name}", place, prompt.prompt, texts, prompt.rule
                )
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
