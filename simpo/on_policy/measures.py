"""What the replies of a folder are like: their scores, length and variety, by split.

<folder>/
    measures.json          by split ("train", "test"): what `measure` returns; of "test" also what
                           `simpo.on_policy.drift` measures
    reply_scores.jsonl     prompt id, seed, split, score (null: left out), hash of the reward
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev

from simpo.config.errors import ConfigError, DamagedError
from simpo.on_policy.files import StoredReply, damaged_line, read_lines, write_lines
from simpo.run.atomic import write_json
from simpo.run.files import read_json

SPLITS = ("train", "test")
MEASURED = (
    *("prompts", "replies", "reward", "reward_spread", "pass_rate", "reply_tokens", "cut", "empty"),
    *("repetition", "distinct", "without_pair", "margin", "unrated"),
)
"""Keys of measures.json that `simpo annotate` writes."""
LEFT_OUT = -math.inf
"""The score of a reply that was left out, since it is empty or cut off."""
REMEDY = "remove it, and run simpo annotate again"

ReplyScores = Mapping[tuple[str, int], float]
"""Scores by (prompt id, seed)."""


def measure(
    replies: Mapping[str, Sequence[StoredReply]],
    scores: ReplyScores,
    margins: Sequence[float],
    without_pair: int,
    pass_reward: float | None,
) -> dict[str, float | None]:
    """Measures of a split, which has a prompt. All replies drawn count, repeated texts too.

    Args:
        replies: to each prompt of the split, by its id.
        scores: of each of them; `LEFT_OUT` if it was left out, none if a judge's verdict cannot be
            read.
        margins: scores of the chosen above those of the rejected reply, of the pairs written.
        without_pair: number of prompts that gave no pair.
        pass_reward: the score from which a reply passes; None measures no pass_rate.

    Returns:
        prompts, replies: their numbers.
        reward: mean score of the replies that have one and were not left out.
        reward_spread: mean over prompts with two such replies or more of the standard deviation of
            their scores (of the population: divided by the number of replies).
        pass_rate: share of all replies that pass; those left out do not, those without a score do
            not count.
        reply_tokens: mean length in tokens, without the end token.
        cut, empty: shares of replies that were cut off, and that have no text.
        repetition: mean share of 4-grams of tokens that occurred in the reply before.
        distinct: mean over prompts of the share of replies with different texts.
        without_pair: share of prompts that gave no pair.
        margin: mean margin of the pairs.
        unrated: share of replies without a score, if there are any.
        A mean over nothing is None.
    """
    every = [reply for own in replies.values() for reply in own]
    scored = [_known(own, scores) for own in replies.values()]
    unrated = len(every) - sum(map(len, scored))
    kept = [[score for score in own if score > LEFT_OUT] for own in scored]
    return {
        "prompts": len(replies),
        "replies": len(every),
        "reward": _mean(score for own in kept for score in own),
        "reward_spread": _mean(pstdev(own) for own in kept if len(own) > 1),
        **(
            {"pass_rate": _mean(score >= pass_reward for own in scored for score in own)}
            if pass_reward is not None
            else {}
        ),
        "reply_tokens": _mean(one.tokens for one in every),
        "cut": _mean(not one.ended for one in every),
        "empty": _mean(not one.text.strip() for one in every),
        "repetition": _mean(one.repetition for one in every if one.repetition is not None),
        "distinct": _mean(
            len({one.text.strip() for one in own}) / len(own) for own in replies.values() if own
        ),
        "without_pair": without_pair / len(replies),
        "margin": _mean(margins),
        **({"unrated": unrated / len(every)} if unrated else {}),
    }


def _known(replies: Sequence[StoredReply], scores: ReplyScores) -> list[float]:
    return [scores[key] for one in replies if (key := (one.id, one.seed)) in scores]


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return fmean(numbers) if numbers else None


def read_measures(folder: Path) -> dict[str, dict[str, float | None]]:
    """What measures.json holds, by split; empty if there is none.

    Raises:
        DamagedError: it is not as it was written.
    """
    measures: dict[str, dict[str, float | None]] = read_json(folder / "measures.json", REMEDY)
    return measures


def write_measures(
    folder: Path, found: Mapping[str, Mapping[str, float | None]], keys: Iterable[str]
) -> None:
    """Replace some keys of measures.json; other keys of the same splits stay.

    Args:
        found: the new values by split; what a split lacks of `keys` is removed.
        keys: what is replaced.

    Raises:
        DamagedError: measures.json is not as it was written.
        RunError: it cannot be written.
    """
    old, replaced = read_measures(folder), set(keys)
    whole = {}
    for split, values in found.items():
        before = old.get(split, {})
        merged = {**{k: v for k, v in before.items() if k not in replaced}, **values}
        # In the same order, whoever wrote last.
        others = sorted(merged.keys() - set(MEASURED))
        whole[split] = {key: merged[key] for key in (*MEASURED, *others) if key in merged}
    write_json(folder / "measures.json", whole)


def write_reply_scores(
    folder: Path, replies: Iterable[StoredReply], splits: Mapping[str, str], scores: ReplyScores,
    reward: str,
) -> None:  # fmt: skip
    """Write reply_scores.jsonl: a line for each reply that has a score or was left out.

    Args:
        splits: of each prompt, by its id.
        reward: hash of the reward.
    """
    lines = [
        {
            "id": reply.id,
            "seed": reply.seed,
            "split": splits[reply.id],
            "score": None if (score := scores[reply.id, reply.seed]) == LEFT_OUT else score,
            "reward": reward,
        }
        for reply in replies
        if (reply.id, reply.seed) in scores
    ]
    write_lines(folder / "reply_scores.jsonl", lines)


def reply_scores(folder: Path, split: str = "test") -> dict[tuple[str, int], float]:
    """The score of each reply, as `simpo annotate` last gave it, by (prompt id, seed).

    Args:
        split: train or test (the held-out prompts).

    Returns:
        `LEFT_OUT`, minus infinity, for a reply that is empty or cut off. A reply whose rating could
        not be read is not there.

    Raises:
        ConfigError: the folder was not annotated.
        DamagedError: reply_scores.jsonl is not as it was written.
    """
    return _reply_scores(folder, split)[0]


def win_rate(folder: Path, base_folder: Path) -> float:
    """How often replies beat those of another folder: the share of held-out prompts and seeds,
    answered and scored in both, with the higher score; ties count half.

    A reply that was left out loses against one that was not, and ties with another.

    Raises:
        ConfigError: a folder was not annotated, they were scored by different rewards, or no prompt
            has replies of one seed in both.
        DamagedError: reply_scores.jsonl of one is not as it was written.
    """
    (own, reward), (base, other) = (_reply_scores(one, "test") for one in (folder, base_folder))
    if both := own.keys() & base.keys():
        if reward != other:
            raise ConfigError(
                [
                    f"on_policy.reward: {folder} and {base_folder} were scored by different "
                    "rewards (run simpo annotate in both with the same one)"
                ]
            )
        return fmean(0.5 * ((own[k] > base[k]) + (own[k] >= base[k])) for k in both)
    raise ConfigError(
        [
            f"on_policy.folder: {folder} and {base_folder} have no held-out prompt with replies of "
            "the same seed (generate both with the same data and on_policy.seeds)"
        ]
    )


def _reply_scores(folder: Path, split: str) -> tuple[dict[tuple[str, int], float], set[str]]:
    """Scores by (prompt id, seed), and the hashes of the rewards that gave them."""
    path = folder / "reply_scores.jsonl"
    if not path.is_file():
        raise ConfigError([f"on_policy.folder: no scores of replies in {folder} (simpo annotate)"])
    scores, rewards = {}, set()
    for number, line in enumerate(read_lines(path, mend=False), start=1):
        match line:
            case {
                "id": str(key),
                "seed": int(seed),
                "split": "train" | "test" as own,
                "score": float() | None as score,
                "reward": str(reward),
            }:
                if own == split:
                    scores[key, seed] = LEFT_OUT if score is None else score
                    rewards.add(reward)
            case _:
                raise damaged_line(path, number, "not a score of a reply")
    match read_measures(folder).get(split):
        case {"replies": int(replies), **others}:
            unrated = others.get("unrated")
            scored = replies - (round(replies * unrated) if isinstance(unrated, float) else 0)
            if scored != len(scores):
                fault = f"has {len(scores)} scores of {split} replies, measures.json counts "
                raise DamagedError(path, f"{fault}{scored}", "run simpo annotate again")
    return scores, rewards
