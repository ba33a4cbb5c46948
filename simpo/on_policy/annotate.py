"""Scores the replies of a model, and makes pairs of the replies to each prompt."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpo.config.choices import ReplyChoice
from simpo.config.errors import ConfigError, RunError
from simpo.config.on_policy import JUDGE, OnPolicyConfig
from simpo.config.schema import RunConfig
from simpo.loop.console import libraries_quiet
from simpo.on_policy.files import (
    Prompt,
    StoredReply,
    append_lines,
    content_hash,
    lacking_replies,
    on_policy_folder,
    read_lines,
    read_prompts,
    read_stored_replies,
    responses_files,
    working_in,
    write_lines,
)
from simpo.on_policy.measures import (
    LEFT_OUT,
    MEASURED,
    SPLITS,
    ReplyScores,
    measure,
    write_measures,
    write_reply_scores,
)
from simpo.on_policy.pairing import best_first, margin, pairs_of_replies, with_wide_margins
from simpo.on_policy.rewards import RULES, Rater, Reward, open_reward, reward_content, scores_of
from simpo.run.progress import bar
from simpo.run.tables import markdown_table

KEY = "on_policy.reward"
"""The setting that names the reward."""
TIES, FEWER, NARROW = "ties", "fewer than two different replies", "below margin_quantile"
UNRATED = "fewer than two readable ratings"
"""Why a prompt gives no pair."""

Texts = Mapping[str, Mapping[str, str]]
"""The different replies to each prompt: by prompt id, then by text without blanks around it."""
Scores = Mapping[str, Mapping[str, float]]
"""The score of each of them; those whose verdict the rater cannot read are not there."""


@libraries_quiet()
def annotate(run: RunConfig, rater: Rater | None = None, demanding: bool = True) -> Path:
    """Score every reply, and write train.jsonl, test.jsonl, measures.json and reply_scores.jsonl.

    A prompt gives records, by `on_policy.choice`, if its replies differ in text and in score. Of
    equal replies one is scored; empty replies are left out and, without `on_policy.keep_cut`, those
    that were cut off. A reply whose verdict the rater cannot read is in no pair and has no score.

    Args:
        rater: scores the replies with `on_policy.reward=judge`; see `simpo.judging.ratings`.
        demanding: raise if no reply can be scored, or no prompt to train on gives a pair.

    Returns:
        The folder; see `simpo.on_policy.files`.

    Raises:
        ConfigError: there are no replies, the reward cannot be used, or another process works in
            the folder.
        RunError: the reward failed on a prompt, or the judge cannot go on (scores so far are kept);
            or there are prompts to train on, but no pair of them (unless
            `on_policy.held_out_only`).
    """
    folder = on_policy_folder(run)
    name = run.on_policy.reward
    if not responses_files(folder):
        raise ConfigError([f"on_policy.folder: no replies in {folder} (run simpo.generate)"])
    if not name:
        raise ConfigError(["on_policy.reward: required, but not given"])
    assert (rater is not None) == (name == JUDGE), "on_policy.reward=judge comes with its rater"
    with working_in(folder):
        _annotate(run, folder, name, rater, demanding)
    return folder


def _annotate(
    run: RunConfig, folder: Path, name: str, rater: Rater | None, demanding: bool
) -> None:
    reward = reward_content(run, KEY, name) if rater is None else rater.content
    prompts = read_prompts(folder)
    stored = read_stored_replies(folder)
    texts, cut = _texts(folder, prompts, stored, run.on_policy.keep_cut)
    if demanding and not any(texts.values()):
        why = f": all {cut} are cut off (on_policy.keep_cut=true takes them)" if cut else ""
        raise ConfigError(
            [f"on_policy.folder: no replies in {folder}{why or ' (run simpo.generate)'}"]
        )
    _note_missing(folder, prompts, stored)
    if rater is None:
        scored = _score_all(run, folder, name, reward, prompts, texts)
    else:
        scored = _rate_all(rater, prompts, texts)
    unread = sum(map(len, texts.values())) - sum(map(len, scored.values()))
    written, counts = _pairs(run.on_policy, prompts, texts, scored)
    for split, lines in written.items():
        write_lines(folder / f"{split}.jsonl", lines)
    scores = _by_reply(stored, scored, run.on_policy.keep_cut)
    write_reply_scores(
        folder, stored, {prompt.id: prompt.split for prompt in prompts}, scores, reward
    )
    write_measures(
        folder, _measures(run.on_policy, prompts, stored, scores, written, counts), MEASURED
    )
    columns = ["prompts", "pairs", TIES, FEWER, *([UNRATED] if unread else ())]
    if run.on_policy.choice is ReplyChoice.margin:
        columns.append(NARROW)
    print(
        *markdown_table(
            [
                {"split": split, **{c: n[c] for c in columns}}
                for split, n in counts.items()
                if n["prompts"]
            ]
        ),
        *([f"{cut} replies left out: cut off by on_policy.max_new_tokens"] if cut else []),
        *([f"{unread} replies left out: the judge's verdict cannot be read"] if unread else []),
        sep="\n",
    )
    longer = "or take those cut off with on_policy.keep_cut=true, " if cut else ""
    wanted = demanding and counts["train"]["prompts"] and not run.on_policy.held_out_only
    if wanted and not written["train"]:
        raise RunError(
            f"{folder}: no train prompt has replies with different scores (generate with more "
            f"on_policy.seeds, {longer}or continue simpo.generate if it was stopped)"
        )


def _pairs(
    config: OnPolicyConfig, prompts: list[Prompt], texts: Texts, scored: Scores
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Counter[str]]]:
    """The lines of train.jsonl and test.jsonl, and what is told of each split."""
    written: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for prompt in prompts:
        own, scores = texts[prompt.id], scored[prompt.id]
        counts[prompt.split]["prompts"] += 1
        if len(scores) < 2:
            counts[prompt.split][FEWER if len(own) < 2 else UNRATED] += 1
            continue
        replies = [own[key] for key in scores]
        records = _records(config.choice, prompt, replies, list(scores.values()))
        counts[prompt.split][TIES] += not records
        written[prompt.split] += records
    for split, lines in written.items():
        if config.choice is ReplyChoice.margin:
            written[split] = with_wide_margins(lines, config.margin_quantile)
            counts[split][NARROW] = len(lines) - len(written[split])
        counts[split]["pairs"] = len(written[split])
    return written, counts


def _records(
    choice: ReplyChoice, prompt: Prompt, texts: list[str], scores: list[float]
) -> list[dict[str, Any]]:
    """The records of two different replies to a prompt or more; none if all scores are equal."""
    pairs = pairs_of_replies(scores, choice, prompt.id)
    tools = {"tools": prompt.tools} if prompt.tools else {}
    if choice is ReplyChoice.ranked and pairs:
        order = best_first(scores)
        replies = {"responses": [texts[i] for i in order], "scores": [scores[i] for i in order]}
        return [{"prompt": prompt.prompt, **replies, "rule": prompt.rule, **tools}]
    return [
        {
            "prompt": prompt.prompt,
            "chosen": texts[best],
            "rejected": texts[worst],
            "rule": prompt.rule,
            **tools,
            "chosen_score": scores[best],
            "rejected_score": scores[worst],
            "scores": scores,
        }
        for best, worst in pairs
    ]


def _by_reply(
    stored: list[StoredReply], scored: Scores, keep_cut: bool
) -> dict[tuple[str, int], float]:
    """The score of every reply by (prompt id, seed), of equal ones the same; of some none, since
    the judge's verdict cannot be read."""
    found: dict[tuple[str, int], float] = {}
    for one in stored:
        text = one.text.strip()
        if not _is_kept(one, keep_cut):
            found[one.id, one.seed] = LEFT_OUT
        elif text in scored[one.id]:
            found[one.id, one.seed] = scored[one.id][text]
    return found


def _measures(
    config: OnPolicyConfig,
    prompts: list[Prompt],
    stored: list[StoredReply],
    scores: ReplyScores,
    written: Mapping[str, list[dict[str, Any]]],
    counts: Mapping[str, Counter[str]],
) -> dict[str, dict[str, float | None]]:
    """What measures.json holds: of each split that has prompts."""
    pass_reward = config.pass_reward
    if pass_reward is None and config.reward == RULES:
        pass_reward = 1.0
    drawn: dict[str, list[StoredReply]] = {prompt.id: [] for prompt in prompts}
    for reply in stored:
        drawn[reply.id].append(reply)
    return {
        split: measure(
            {prompt.id: drawn[prompt.id] for prompt in prompts if prompt.split == split},
            scores,
            [margin(line) for line in written[split]],
            sum(counts[split][reason] for reason in (TIES, FEWER, UNRATED, NARROW)),
            pass_reward,
        )
        for split in SPLITS
        if counts[split]["prompts"]
    }


def _note_missing(folder: Path, prompts: list[Prompt], stored: list[StoredReply]) -> None:
    """Tell if some prompts lack replies to seeds that others have, or that were asked for."""
    lacking, seeds = lacking_replies(folder, prompts, stored)
    if lacking:
        print(
            f"note   {lacking} of {len(prompts)} prompts lack replies with some of the "
            f"on_policy.seeds {seeds}: simpo.generate was stopped (its command continues it)"
        )


def _texts(
    folder: Path, prompts: list[Prompt], stored: list[StoredReply], keep_cut: bool
) -> tuple[Texts, int]:
    """The different replies to each prompt, and the number of cut-off ones left out."""
    texts: dict[str, dict[str, str]] = {prompt.id: {} for prompt in prompts}
    cut = 0
    for reply in stored:
        if reply.id not in texts:
            raise ConfigError(
                [
                    f"on_policy.folder: {folder} has a reply to {reply.id}, which is not in its "
                    "prompts.jsonl (simpo.generate writes that again)"
                ]
            )
        cut += not reply.ended and not keep_cut
        if _is_kept(reply, keep_cut):
            texts[reply.id].setdefault(reply.text.strip(), reply.text)
    return texts, cut


def _is_kept(reply: StoredReply, keep_cut: bool) -> bool:
    """Whether a reply is scored: it has text and, without `keep_cut`, was not cut off."""
    return (reply.ended or keep_cut) and bool(reply.text.strip())


def _score_all(
    run: RunConfig,
    folder: Path,
    name: str,
    content: str,
    prompts: list[Prompt],
    texts: Texts,
) -> Scores:
    """Scores of the different replies to each prompt; known scores are reused.

    Args:
        content: hash of the reward.
    """
    safe_name = re.sub(r"[^\w.-]+", "_", name)
    file = folder / f"scores-{safe_name}.jsonl"
    lines = read_lines(file)
    known = {
        line["id"]: line
        for line in lines
        if line.get("reward") == content and isinstance(line.get("id"), str)
    }
    if lines and not known:
        print(f"note   {name} has changed since {file.name}: all replies are scored anew")
    reward: Reward | None = None
    scored: dict[str, Mapping[str, float]] = {prompt.id: {} for prompt in prompts}
    answered = [prompt for prompt in prompts if texts[prompt.id]]
    with bar("scoring replies to prompts", len(answered)) as shown:
        for prompt in answered:
            own = list(texts[prompt.id].values())
            # A reward may read the rule, which is no part of a prompt's id.
            wanted = content_hash([own, prompt.rule] if prompt.rule else own)
            line = known.get(prompt.id)
            if line is None or line.get("responses") != wanted or not _are_scores(line, len(own)):
                reward = reward or open_reward(run, KEY, name)
                place = f"prompt {prompt.id}"
                scores = scores_of(reward, KEY, name, place, prompt.prompt, own, prompt.rule)
                line = {"id": prompt.id, "responses": wanted, "reward": content, "scores": scores}
                append_lines(file, [line])
            scored[prompt.id] = dict(zip(texts[prompt.id], line["scores"], strict=True))
            shown.advance()
    return scored


def _rate_all(rater: Rater, prompts: list[Prompt], texts: Texts) -> Scores:
    """A judge's ratings of the different replies to each prompt."""
    items = [(prompt, key) for prompt in prompts for key in texts[prompt.id]]
    ratings = rater.rate([(prompt, texts[prompt.id][key]) for prompt, key in items])
    scored: dict[str, dict[str, float]] = {prompt.id: {} for prompt in prompts}
    for (prompt, key), rating in zip(items, ratings, strict=True):
        if rating is not None:
            scored[prompt.id][key] = rating
    return scored


def _are_scores(line: Mapping[str, Any], count: int) -> bool:
    scores = line.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        return False
    return all(isinstance(score, float) and math.isfinite(score) for score in scores)
