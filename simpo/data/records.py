"""Parses a raw record into a `Pair`, or says what is wrong with the record.

A record is one of
    prompt + chosen + rejected   text, or OpenAI messages; a response may repeat the prompt's turns
    chosen + rejected            whole dialogues that start from the same turns
    messages                     a dialogue to imitate, for supervised fine-tuning only
All turns that chosen and rejected start with are their prompt. A string `prompt` is ignored if they
are whole dialogues, which contain it.
Optional columns: `system` (or `system_prompt`) is the text of a system turn before the prompt;
`rule` is a check that a program can run on a reply (see `simpo.data.rules`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from simpo.data.pairs import Message, Pair
from simpo.data.rules import rule_fault

ROLES = ("system", "user", "assistant")
SYSTEM_COLUMNS = ("system", "system_prompt")
SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
LARGEST_SCORE = 1e300
NOT_TEXT = {
    *("tools", "functions", "tool_calls", "function_call", "tool_call_id"),
    *("image", "images", "video", "videos", "audio", "audios"),
}
"""Columns of a record and keys of a message that change its meaning but are not text. A record with
a value for one of them is refused."""

_TURNS_IN_TEXT = re.compile(r"(?:\A|\n\n)(?:### ?)?Human:")


class RecordFault(Exception):
    """What is wrong with one record, without its place."""


def to_pair(record: Any, place: str) -> Pair:
    """Read one record.

    Args:
        record: the record as its source gave it.
        place: source, split and record, for messages.

    Raises:
        RecordFault: the record has none of the forms above, or chosen and rejected are the same.
    """
    if not isinstance(record, Mapping):
        raise RecordFault(f"must be an object with chosen and rejected, got {_kind(record)}")
    _refuse_not_text(record)
    for key in ("chosen", "rejected"):
        if record.get(key) is None:
            raise _missing(record, key)
    prompt, chosen, rejected = _parts(record)
    if [_said(turn) for turn in chosen] == [_said(turn) for turn in rejected]:
        raise RecordFault("chosen and rejected are the same")
    return Pair(
        _prompt(record, prompt), _response(chosen, "chosen"), _response(rejected, "rejected"),
        place, _rule(record), score_margin=_score_margin(record),
    )  # fmt: skip


def to_dialogue(record: Any, place: str) -> Pair:
    """Read one record for supervised fine-tuning: `messages`, or a pair without its rejected reply.

    Args and Raises: as `to_pair`.
    """
    if not isinstance(record, Mapping) or record.get("messages") is None:
        pair = replace(to_pair(record, place), rejected=None)
        if next(turn["role"] for turn in pair.prompt if turn["role"] != "system") != "user":
            raise RecordFault("prompt: begins with the assistant, whose reply answers nothing")
        return pair
    _refuse_not_text(record)
    messages = _messages(record["messages"], "messages")
    first = next((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), 0)
    if messages[first]["role"] == "assistant" and first == 0:
        raise RecordFault("messages: begins with the assistant, whose reply answers nothing")
    chosen = _response(messages[first:], "messages", first)
    return Pair(_prompt(record, messages[:first]), chosen, None, place)


def to_prompt(record: Any, place: str) -> Pair:
    """Read the prompt of one record, which is `prompt` alone or a pair, whose replies are dropped.

    Args and Raises: as `to_pair`.
    """
    if not isinstance(record, Mapping) or record.get("chosen") is not None:
        return replace(to_pair(record, place), chosen=(), rejected=None)
    _refuse_not_text(record)
    if record.get("prompt") is None:
        raise _missing(record, "prompt")
    return Pair(_prompt(record, _given(record["prompt"])), (), None, place, _rule(record))


COLUMNS: dict[Callable[[Any, str], Pair], frozenset[str]] = {
    reader: frozenset(
        [*columns, "rule", *SYSTEM_COLUMNS, *(name for names in SCORE_COLUMNS for name in names)]
    )
    for reader, columns in (
        (to_pair, ("prompt", "chosen", "rejected")),
        (to_dialogue, ("prompt", "chosen", "rejected", "messages")),
        (to_prompt, ("prompt", "chosen", "rejected")),
    )
}
"""The columns that each reader uses."""


def unread_columns(record: Mapping[str, Any], read: frozenset[str]) -> Iterator[str]:
    """Names of unused columns that have a value, and unused keys of messages (`chosen[].name`)."""
    for column, value in record.items():
        if column not in read:
            if value is not None:
                yield str(column)
        elif isinstance(value, list):
            for message in value:
                if isinstance(message, Mapping) and len(message) > 2:
                    yield from (
                        f"{column}[].{key}"
                        for key, part in message.items()
                        if key not in ("role", "content") and part
                    )


def remarks(record: Mapping[str, Any], pair: Pair) -> Iterator[str]:
    """Yield what looks wrong in a record that is still used."""
    for keys in SCORE_COLUMNS:
        scores = [record[key] for key in keys if isinstance(record.get(key), (int, float))]
        if len(scores) == 2 and scores[0] <= scores[1]:
            yield f"{keys[0]} {'equals' if scores[0] == scores[1] else 'is below'} {keys[1]}"
    texts = [turn["content"] for part in (pair.prompt, *pair.responses) for turn in part]
    prompt = record.get("prompt")
    if isinstance(prompt, str) and prompt.strip() not in map(str.strip, texts):
        yield "prompt is not in the dialogue (prompt is ignored)"
    # The plain search is much faster than the pattern, and few texts get past it.
    if any("Human:" in text and _TURNS_IN_TEXT.search(text) for text in texts):
        yield "a text contains turns (Human: ...), which are read as one"


def _score_margin(record: Mapping[str, Any]) -> float | None:
    for keys in SCORE_COLUMNS:
        scores = [record[key] for key in keys if isinstance(record.get(key), (int, float))]
        # False for nan too; a larger integer cannot become a float.
        if len(scores) == 2 and all(abs(score) < LARGEST_SCORE for score in scores):
            return float(scores[0] - scores[1])
    return None


def _refuse_not_text(item: Mapping[str, Any], place: str = "") -> None:
    for key, value in item.items():
        if key in NOT_TEXT and value and value not in ("[]", "{}", "null"):
            raise RecordFault(f"{place}{key}: has a value, and only text can be trained on")


def _rule(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    rule = record.get("rule")
    if rule is None:
        return None
    # In a columnar file each rule has the arguments of all other rules, as None.
    rule = {k: v for k, v in rule.items() if v is not None} if hasattr(rule, "items") else rule
    if fault := rule_fault(rule):
        raise RecordFault(f"rule: {fault}")
    _check_text(json.dumps(rule, ensure_ascii=False), "rule")
    return rule


def _parts(record: Mapping[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """The turns of the prompt, of chosen and of rejected; the prompt is all that both start with.

    Raises:
        RecordFault: there is no prompt, or a response does not continue it.
    """
    prompt = record.get("prompt")
    dialogues = []
    for key in ("chosen", "rejected"):
        value = record[key]
        turns = [_reply(value, key)] if isinstance(value, str) else _messages(value, key)
        if turns[-1]["role"] != "assistant":
            raise RecordFault(f"{key}: the last turn must be the assistant's, got {_last(turns)}")
        if turns[0]["role"] == "assistant":
            if prompt is None:
                raise _missing(record, "prompt")
            turns = [*_given(prompt), *turns]
        elif prompt is not None and not isinstance(prompt, str):
            given = _given(prompt)
            if turns[: len(given)] != given:
                raise RecordFault(f"{key} does not continue prompt: their turns differ")
        dialogues.append(turns)
    chosen, rejected = dialogues
    both = zip(chosen, rejected, strict=False)
    shortest = min(len(chosen), len(rejected))
    same = next((i for i, (one, other) in enumerate(both) if one != other), shortest)
    if same == len(chosen) == len(rejected):
        raise RecordFault("chosen and rejected are the same")
    if same == shortest:
        longer, other = ("rejected", "chosen") if same == len(chosen) else ("chosen", "rejected")
        raise RecordFault(f"{longer} is {other} with more turns, so they are no two replies")
    if same == 0 or not chosen[same]["role"] == rejected[same]["role"] == "assistant":
        raise RecordFault("chosen and rejected start from different prompts")
    return chosen[:same], chosen[same:], rejected[same:]


def _given(prompt: Any) -> list[Message]:
    """The turns of the column `prompt`."""
    if not isinstance(prompt, str):
        return _messages(prompt, "prompt")
    _check_text(prompt, "prompt")
    return [{"role": "user", "content": prompt}]


def _reply(text: str, key: str) -> Message:
    _check_text(text, key)
    return {"role": "assistant", "content": text}


def _response(turns: list[Message], key: str, first: int | None = None) -> tuple[Message, ...]:
    """The turns of a response, checked; `first` is the index of the first one in column `key`."""
    if turns[-1]["role"] != "assistant":
        raise RecordFault(f"{key}: the last turn must be the assistant's, got {_last(turns)}")
    for index, turn in enumerate(turns, start=first or 0):
        if turn["role"] == "system":
            raise RecordFault(f"{key}: a system message may only come first")
        if turn["role"] == "assistant" and not turn["content"].strip():
            place = key if first is None else f"{key}[{index}]"
            raise RecordFault(f"{place}: the response is empty")
    return tuple(turns)


def _last(turns: list[Message]) -> str:
    return str(turns[-1]["role"])


def _said(turn: Message) -> Message:
    return turn | {"content": turn["content"].strip()}


def _missing(record: Mapping[str, Any], key: str) -> RecordFault:
    """The fault of a record that lacks `key`, with the columns that it has."""
    columns = ", ".join(str(k) for k, v in record.items() if v is not None)
    return RecordFault(f"{key}: missing (the record has {columns or 'no value'})")


def _prompt(record: Mapping[str, Any], turns: list[Message]) -> tuple[Message, ...]:
    """The turns of a prompt, checked, with the text of a column `system` before them."""
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise RecordFault("prompt: a system message may only come first")
    if turns[-1]["role"] != "user":
        raise RecordFault(f"prompt: the last turn must be the user's, got {_last(turns)}")
    if not turns[-1]["content"].strip():
        raise RecordFault("prompt: the last turn is empty")
    return tuple(_with_system(record, turns))


def _with_system(record: Mapping[str, Any], prompt: list[Message]) -> list[Message]:
    for column in SYSTEM_COLUMNS:
        text = record.get(column)
        if text is None:
            continue
        if not isinstance(text, str):
            raise RecordFault(f"{column}: must be text, got {_kind(text)}")
        if not text.strip():
            continue
        _check_text(text, column)
        if prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": text}, *prompt]
        elif prompt[0]["content"] != text:
            raise RecordFault(f"{column}: the prompt has another system message of its own")
    return prompt


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list):
        text = "" if key == "messages" else "text or "
        raise RecordFault(f"{key}: must be {text}a list of messages, got {_kind(value)}")
    if not value:
        raise RecordFault(f"{key}: holds no message")
    messages = []
    for index, item in enumerate(value):
        place = f"{key}[{index}]"
        if not isinstance(item, Mapping):
            raise RecordFault(
                f"{place}: must be an object with role and content, got {_kind(item)}"
            )
        if "role" not in item or "content" not in item:
            has = ", ".join(map(str, item)) or "nothing"
            raise RecordFault(f"{place}: must have role and content, has {has}")
        _refuse_not_text(item, f"{place}.")
        role, content = item["role"], item["content"]
        if role not in ROLES:
            raise RecordFault(f"{place}.role: must be one of {', '.join(ROLES)}, got {role}")
        if not isinstance(content, str):
            raise RecordFault(f"{place}.content: must be text, got {_kind(content)}")
        _check_text(content, f"{place}.content")
        messages.append({"role": role, "content": content})
    return messages


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise RecordFault(
            f"{place}: holds {half}, half of a character (a lone surrogate)"
        ) from error


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", type(None): "null", bool: "a boolean"}
    return names.get(
        type(value), "a number" if isinstance(value, (int, float)) else "something else"
    )
