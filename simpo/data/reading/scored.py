"""Reads several replies to one prompt with what says how good they are, and makes pairs of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simpo.config.choices import PairChoice
from simpo.data.reading.messages import RecordFault
from simpo.data.reading.turns import asked_of, is_message, turns

REPLIES = ("responses", "completions", "answers", "generations", "replies", "output")
SCORES = ("scores", "ratings", "rewards", "ranks", "score", "rating", "reward", "rank")
"""Columns with a number for each reply; the lower a rank, the better."""
TWO_REPLIES = (
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_a", "response_b"),
    ("response_A", "response_B"),
    ("output_1", "output_2"),
)
SIGNED = ("overall_preference", "preference_strength")
"""HelpSteer's columns: below 0 the first reply is better, above 0 the second one."""
NAMED = ("better_response_id", "safer_response_id", "preference", "winner", "preferred", "chosen")
"""Columns that name the better of two replies."""
TIED = "equal scores or a tie"
TOO_FEW = "fewer than two replies have a score"
_SCORE_KEYS = ("score", "overall_score", "rating", "reward", "rank")
_TEXT_KEYS = ("text", "response", "content", "answer", "completion", "generated_text")
_TIES = {
    "tie",
    "tied",
    "both",
    "bothbad",
    "bothgood",
    "neither",
    "equal",
    "equally",
    "same",
    "draw",
}
_REPLY_NAME = re.compile(r"(?:(?:response|model|reply|answer|option|output)[_ ]?)?([0-9a-z])")
_MIN_VERDICTS = 10
"""So many preferences of one sign are no chance: they are sizes."""


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
    `min_margin`. all gives each two replies of different scores. Equal scores make no pair; nor do
    equal texts.
    """
    if len(scored.replies) < 2:
        yield LeftOut(TOO_FEW)
        return
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


def ranked_record(scored: Scored, min_margin: float) -> dict[str, Any] | LeftOut:
    """One record with the prompt and all responses with their scores, for `records.to_ranking`.

    Of replies of the same text the best one counts. Replies may have equal scores, but the best one
    is better than the worst one by `min_margin`.
    """
    if len(scored.replies) < 2:
        return LeftOut(TOO_FEW)
    ranked = sorted(scored.replies, key=lambda reply: -reply[1])
    kept: list[tuple[Any, float]] = []
    for reply in ranked:
        if not any(_said(reply) == _said(other) for other in kept):
            kept.append(reply)
    if reason := _reason(kept if len(kept) > 1 else ranked, (0, -1), min_margin):
        return LeftOut(reason)
    best, *between, worst = kept
    if not above(best[1], worst[1]):
        return LeftOut(TIED)
    found = [best, worst, *between]
    return {
        "prompt": scored.prompt,
        **dict.fromkeys(("chosen", "rejected")),
        "responses": [reply for reply, _ in found],
        "scores": [score for _, score in found],
    }


def above(score: float, other: float) -> bool:
    """Whether a score is above another one as a loss gets them, in float32."""
    with np.errstate(over="ignore"):
        return bool(np.float32(score) > np.float32(other))


def _said(reply: tuple[Any, float]) -> Any:
    """What a reply says: texts without white space around them, messages without null keys."""
    text, _ = reply
    if isinstance(text, list) and all(isinstance(turn, Mapping) for turn in text):
        return [
            {k: _stripped(v) if k == "content" else v for k, v in turn.items() if v is not None}
            for turn in text
        ]
    return _stripped(text)


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _reason(
    ranked: list[tuple[Any, float]], couple: tuple[int, int], min_margin: float
) -> str | None:
    margin = ranked[couple[0]][1] - ranked[couple[1]][1]
    if margin == 0:
        return TIED
    if _said(ranked[couple[0]]) == _said(ranked[couple[1]]):
        return "two replies of the same text"
    return f"scores closer than min_margin {min_margin:g}" if margin < min_margin else None


@dataclass
class Verdict:
    """The column of a split that says which of two replies is better, and what it said so far.

    The first record decides which column it is: others may judge something else.
    """

    column: str | None = None
    signed: int = 0
    lowest: float = math.inf

    def problem(self) -> str | None:
        """What is wrong with the column, once all records of the split are read."""
        if self.signed < _MIN_VERDICTS or self.lowest <= 0:
            return None
        return (
            f"{self.column} is never below 0, so it does not tell which reply is better (name the "
            "column that does, such as columns: {label: preference})"
        )


def comparison(rest: dict[str, Any], verdict: Verdict | None = None) -> Scored:
    """Two replies, and a column that names the better one or has the sign of the preference.

    Beside a column that names the better one, a preference is a size, and is not read.

    Raises:
        RecordFault: there are no two replies, or nothing says which is better.
        WrongShape: the column counts from another number than the replies, or has a sign.
    """
    verdict = verdict or Verdict()
    both = two_replies(rest)
    if both is None:
        raise RecordFault("must have two replies, such as response_0 and response_1")
    first = next((name for name in (*NAMED, *SIGNED) if rest.get(name) is not None), None)
    column = verdict.column = verdict.column or first
    value = rest.pop(column, None) if column else None
    if column is None or value is None:
        raise RecordFault(f"{column}: missing (it says which reply is better in other records)")
    if column in SIGNED:
        if first in NAMED:
            raise WrongShape(
                f"{first} names the better reply, but an earlier record has {column} alone (leave "
                "such records out)"
            )
        preference = _number(value, column)
        verdict.signed += 1
        verdict.lowest = min(verdict.lowest, preference)
        scores = (max(-preference, 0.0), max(preference, 0.0))
    else:
        scores = _named_scores(value, column, both)
    replies = [(turns(rest.pop(name), name), s) for name, s in zip(both, scores, strict=True)]
    return Scored(asked_of(rest), replies)


def two_replies(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns with two replies to compare."""
    return next(
        (names for names in TWO_REPLIES if all(record.get(name) is not None for name in names)),
        None,
    )


def chosen_names_a_reply(record: Mapping[str, Any]) -> bool:
    """Whether `chosen` is a name or an index of one of two replies, and no reply of its own."""
    both, value = two_replies(record), record.get("chosen")
    if both is None or not isinstance(value, (str, int, float)):
        return False
    if value in (record[both[0]], record[both[1]]):
        return False
    end = _ending(value)
    return _is_tie(value) or (end is not None and (end.isdigit() or end in _endings(both)))


def _word(value: Any) -> str:
    return str(value).strip().lower().removesuffix(".0")


def _ending(value: Any) -> str | None:
    """The letter or digit in a name of a reply such as 0, "b" or "response_1"."""
    named = _REPLY_NAME.fullmatch(_word(value))
    return named[1] if named else None


def _endings(both: tuple[str, str]) -> tuple[str, str]:
    return both[0][-1].lower(), both[1][-1].lower()


def _is_tie(value: Any) -> bool:
    words = set(re.findall("[a-z0-9]+", _word(value)))
    return bool(words & _TIES) and words <= {*_TIES, "are", "good", "bad"}


def _named_scores(value: Any, verdict: str, both: tuple[str, str]) -> tuple[float, float]:
    """1 for the reply that a value such as 0, "b" or "response_1" names, 0 for the other one."""
    word = _word(value)
    if re.fullmatch(r"-\d+", word):
        raise WrongShape(
            f"{verdict}: {word} names no reply (if below 0 means that {both[0]} is better, set "
            f"columns: {{{verdict}: overall_preference}})"
        )
    if _is_tie(value):
        return 0.0, 0.0
    ends, end = _endings(both), _ending(value)
    if end in ends:
        return (1.0, 0.0) if end == ends[0] else (0.0, 1.0)
    if end is not None and end.isdigit():
        remedies = [
            f"columns: {{{both[0]}: response_{base}, {both[1]}: response_{base + 1}}} if it counts "
            f"from {base}"
            for base in (0, 1)
            if int(end) in (base, base + 1) and ends != (str(base), str(base + 1))
        ]
        remedy = f"set {', or '.join(remedies)}" if remedies else f"must be {ends[0]} or {ends[1]}"
        raise WrongShape(
            f"{verdict}: {value} is neither {both[0]} nor {both[1]}, so other records may be the "
            f"wrong way round ({remedy})"
        )
    raise RecordFault(f"{verdict}: must be {ends[0]}, {ends[1]} or tie, got {value}")


def replies(rest: dict[str, Any]) -> Scored:
    name = next(name for name in REPLIES if rest.get(name) is not None)
    replies = rest.pop(name)
    if not isinstance(replies, list) or len(replies) < 2:
        raise RecordFault(f"{name}: must list two replies or more")
    beside = _score_column(rest)
    if beside is None:
        scored = [
            _scored_reply(item, f"{name}[{index}]")
            for index, item in enumerate(replies)
            if not _has_null_score(item)
        ]
        return Scored(asked_of(rest), scored)
    scores = rest.pop(beside)
    if not isinstance(scores, list) or len(scores) != len(replies):
        raise RecordFault(f"{beside}: must list a number for each of the {len(replies)} {name}")
    sign = -1 if beside.startswith("rank") else 1
    scored = [
        (_reply_text(reply), sign * _number(score, f"{beside}[{index}]"))
        for index, (reply, score) in enumerate(zip(replies, scores, strict=True))
        if score is not None
    ]
    return Scored(asked_of(rest), scored)


def _scored_reply(item: Any, place: str) -> tuple[Any, float]:
    key = _score_key(item)
    if key is None:
        raise RecordFault(f"{place}: must be an object with a score ({', '.join(_SCORE_KEYS)})")
    score = _number(item[key], f"{place}.{key}")
    return _reply_text(item), -score if key == "rank" else score


def _score_column(record: Mapping[str, Any]) -> str | None:
    """The column with the scores; a name such as `score` may also hold one number of its own."""
    return next(
        (
            name
            for name in SCORES
            if record.get(name) is not None
            and (name.endswith("s") or isinstance(record[name], list))
        ),
        None,
    )


def lists_scores(record: Mapping[str, Any]) -> bool:
    return any(isinstance(record.get(name), list) for name in SCORES)


def _has_null_score(item: Any) -> bool:
    return (
        isinstance(item, Mapping)
        and _score_key(item) is None
        and any(key in item for key in _SCORE_KEYS)
    )


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
    return lists_scores(record) or any(_score_key(reply) is not None for reply in replies)


def _number(value: Any, place: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RecordFault(f"{place}: must be a number, got {value}")
    return number
