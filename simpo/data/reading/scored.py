"""Reads several replies to one prompt with what says how good they are, and makes pairs of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simpo.config.choices import PairChoice
from simpo.data.reading.records import RecordFault
from simpo.data.reading.turns import asked_of, is_message, turns

REPLIES = ("responses", "completions", "answers", "generations", "replies")
SCORES = ("scores", "ratings", "rewards", "ranks")
"""Columns with a number for each reply; the lower a rank, the better."""
TWO_REPLIES = (
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_a", "response_b"),
    ("response_A", "response_B"),
)
SIGNED = ("overall_preference", "preference_strength")
"""HelpSteer's columns: below 0 the first reply is better, above 0 the second one."""
NAMED = ("better_response_id", "safer_response_id", "preference", "winner", "preferred", "chosen")
"""Columns that name the better of two replies."""
_SCORE_KEYS = ("score", "overall_score", "rating", "reward", "rank")
_TEXT_KEYS = ("text", "response", "content", "answer", "completion", "generated_text")
_TIES = ("tie", "both", "neither", "equal", "same", "draw")


@dataclass(frozen=True)
class Scored:
    """All replies to one prompt as (reply, score); the higher the score, the better."""

    prompt: Any
    replies: list[tuple[Any, float]]


class WrongShape(Exception):
    """The records of a split mean something else than their shape; none of them can be used."""


@dataclass(frozen=True)
class LeftOut:
    """A pair that is not made, with the reason. It is counted and is no fault."""

    reason: str


def scored_pairs(
    scored: Scored, choice: PairChoice, min_margin: float, rng: np.random.Generator
) -> Iterator[dict[str, Any] | LeftOut]:
    """Yield records with prompt, chosen, rejected and their scores.

    best_worst gives one pair. best_random rejects any reply that is worse than the best one by
    `min_margin`. all gives each two replies of different scores. Equal scores make no pair.
    """
    ranked = sorted(scored.replies, key=lambda reply: -reply[1])
    rest = range(1, len(ranked))
    couples = [(0, worse) for worse in rest]
    if choice is PairChoice.all:
        couples = [(i, j) for j in rest for i in range(j)]
    elif choice is PairChoice.best_random:
        able = [pair for pair in couples if not _reason(ranked, pair, min_margin)]
        couples = [able[rng.integers(len(able))]] if able else couples[-1:]
    else:
        couples = couples[-1:]
    for better, worse in sorted(couples):
        if reason := _reason(ranked, (better, worse), min_margin):
            yield LeftOut(reason)
            continue
        yield {
            "prompt": scored.prompt,
            "chosen": ranked[better][0],
            "rejected": ranked[worse][0],
            "score_chosen": ranked[better][1],
            "score_rejected": ranked[worse][1],
        }


def _reason(
    ranked: list[tuple[Any, float]], couple: tuple[int, int], min_margin: float
) -> str | None:
    margin = ranked[couple[0]][1] - ranked[couple[1]][1]
    if margin == 0:
        return "equal scores or a tie"
    return f"scores closer than min_margin {min_margin:g}" if margin < min_margin else None


def comparison(rest: dict[str, Any]) -> Scored:
    """Two replies, and a column that names the better one or has the sign of the preference."""
    both = next(
        (names for names in TWO_REPLIES if all(rest.get(name) is not None for name in names)), None
    )
    if both is None:
        raise RecordFault("must have two replies, such as response_0 and response_1")
    verdict = next(name for name in (*SIGNED, *NAMED) if rest.get(name) is not None)
    value = rest.pop(verdict)
    if verdict in SIGNED:
        preference = _number(value, verdict)
        scores = (max(-preference, 0.0), max(preference, 0.0))
    else:
        scores = _named_scores(value, verdict, both)
    replies = [(turns(rest.pop(name), name), s) for name, s in zip(both, scores, strict=True)]
    return Scored(asked_of(rest), replies)


def _named_scores(value: Any, verdict: str, both: tuple[str, str]) -> tuple[float, float]:
    """1 for the reply that a value such as 0, "b" or "response_1" names, 0 for the other one."""
    word = str(value).strip().lower().removesuffix(".0")
    if re.fullmatch(r"-\d+", word):
        raise WrongShape(
            f"{verdict}: {word} names no reply (if below 0 means that {both[0]} is better, set "
            f"columns: {{{verdict}: overall_preference}})"
        )
    if word.startswith(_TIES):
        return 0.0, 0.0
    ends = [name[-1].lower() for name in both]
    named = re.fullmatch(r"(?:(?:response|model|reply|answer|option)[_ ]?)?([0-9a-z])", word)
    if named is None or named[1] not in ends:
        raise RecordFault(f"{verdict}: must be {ends[0]}, {ends[1]} or tie, got {value}")
    return (1.0, 0.0) if named[1] == ends[0] else (0.0, 1.0)


def replies(rest: dict[str, Any]) -> Scored:
    name = next(name for name in REPLIES if rest.get(name) is not None)
    replies = rest.pop(name)
    if not isinstance(replies, list) or len(replies) < 2:
        raise RecordFault(f"{name}: must list two replies or more")
    beside = next((column for column in SCORES if rest.get(column) is not None), None)
    if beside is None:
        scored = [_scored_reply(item, f"{name}[{i}]") for i, item in enumerate(replies)]
        return Scored(asked_of(rest), scored)
    scores = rest.pop(beside)
    if not isinstance(scores, list) or len(scores) != len(replies):
        raise RecordFault(f"{beside}: must list a number for each of the {len(replies)} {name}")
    sign = -1 if beside == "ranks" else 1
    scored = [
        (_reply_text(reply), sign * _number(score, f"{beside}[{index}]"))
        for index, (reply, score) in enumerate(zip(replies, scores, strict=True))
    ]
    return Scored(asked_of(rest), scored)


def _scored_reply(item: Any, place: str) -> tuple[Any, float]:
    key = _score_key(item)
    if key is None:
        raise RecordFault(f"{place}: must be an object with a score ({', '.join(_SCORE_KEYS)})")
    score = _number(item[key], f"{place}.{key}")
    return _reply_text(item), -score if key == "rank" else score


def _score_key(item: Any) -> str | None:
    if not isinstance(item, Mapping):
        return None
    return next((key for key in _SCORE_KEYS if item.get(key) is not None), None)


def _reply_text(item: Any) -> Any:
    """The text of a reply, or its messages."""
    if not isinstance(item, Mapping) or is_message(item):
        return turns(item, "reply")
    return next((item[key] for key in _TEXT_KEYS if item.get(key) is not None), item)


def has_scores(record: Mapping[str, Any]) -> bool:
    replies = next(record[name] for name in REPLIES if record.get(name) is not None)
    if not isinstance(replies, list) or not replies:
        return False
    beside = any(isinstance(record.get(name), list) for name in SCORES)
    return beside or _score_key(replies[0]) is not None


def _number(value: Any, place: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RecordFault(f"{place}: must be a number, got {value}")
    return number
