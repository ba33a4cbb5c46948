"""Parses a raw record into a `Pair`, or says what is wrong with the record.

A record is one of
    prompt + chosen + rejected   text, or OpenAI messages; a response may repeat the prompt's turns
    chosen + rejected            whole dialogues that differ in their last turn only
    messages                     a dialogue to imitate, for supervised fine-tuning only
A string `prompt` is ignored if chosen and rejected are whole dialogues, which contain the prompt.
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
    chosen_before, chosen = _split(record["chosen"], "chosen")
    rejected_before, rejected = _split(record["rejected"], "rejected")
    prompt = _prompt(record, record.get("prompt"), chosen_before, rejected_before)
    if chosen.strip() == rejected.strip():
        raise RecordFault("chosen and rejected are the same")
    return Pair(tuple(prompt), chosen, rejected, place, _rule(record))


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
    roles = [turn["role"] for turn in messages]
    if roles[-1] != "assistant":
        raise RecordFault(f"messages: the last turn must be the assistant's, got {roles[-1]}")
    first = roles.index("assistant")
    if first == 0:
        raise RecordFault("messages: begins with the assistant, whose reply answers nothing")
    for index, turn in enumerate(messages):
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise RecordFault(f"messages[{index}]: the response is empty")
    prompt = _prompt(record, messages[:first], [], [])
    if "system" in roles[first:]:
        raise RecordFault("messages: a system message may only come first")
    return Pair(
        tuple(prompt), messages[first]["content"], None, place, None, tuple(messages[first + 1 :])
    )


def to_prompt(record: Any, place: str) -> Pair:
    """Read the prompt of one record, which is `prompt` alone or a pair, whose replies are dropped.

    Args and Raises: as `to_pair`.
    """
    if not isinstance(record, Mapping) or record.get("chosen") is not None:
        return replace(to_pair(record, place), chosen="", rejected=None)
    _refuse_not_text(record)
    return Pair(
        tuple(_prompt(record, record.get("prompt"), [], [])), "", None, place, _rule(record)
    )


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
    contents = [turn["content"] for turn in (*pair.prompt, *pair.later)]
    prompt = record.get("prompt")
    if isinstance(prompt, str) and prompt.strip() not in map(str.strip, contents):
        yield "prompt is not in the dialogue (prompt is ignored)"
    texts = [*contents, pair.chosen, pair.rejected or ""]
    # The plain search is much faster than the pattern, and few texts get past it.
    if any("Human:" in text and _TURNS_IN_TEXT.search(text) for text in texts):
        yield "a text contains turns (Human: ...), which are read as one"


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


def _split(value: Any, key: str) -> tuple[list[Message], str]:
    """Split a response into the turns before its text, and the text."""
    if isinstance(value, str):
        turns, text = [], value
        _check_text(text, key)
    else:
        *turns, last = _messages(value, key)
        if last["role"] != "assistant":
            raise RecordFault(f"{key}: the last turn must be the assistant's, got {last['role']}")
        text = last["content"]
    if not text.strip():
        raise RecordFault(f"{key}: the response is empty")
    return turns, text


def _missing(record: Mapping[str, Any], key: str) -> RecordFault:
    """The fault of a record that lacks `key`, with the columns that it has."""
    columns = ", ".join(str(k) for k, v in record.items() if v is not None)
    return RecordFault(f"{key}: missing (the record has {columns or 'no value'})")


def _prompt(
    record: Mapping[str, Any], value: Any, chosen: list[Message], rejected: list[Message]
) -> list[Message]:
    """The turns of the prompt: from `value` or the turns before the responses, and `system`."""
    if chosen != rejected:
        raise RecordFault("chosen and rejected start from different prompts")
    if isinstance(value, str) and not chosen:
        _check_text(value, "prompt")
        prompt = [{"role": "user", "content": value}]
    elif value is None or isinstance(value, str):
        prompt = chosen
    else:
        prompt = _messages(value, "prompt")
        if chosen and chosen != prompt:
            raise RecordFault("chosen does not continue prompt: their turns differ")
    if not prompt:
        raise _missing(record, "prompt")
    if any(turn["role"] == "system" for turn in prompt[1:]):
        raise RecordFault("prompt: a system message may only come first")
    if prompt[-1]["role"] != "user":
        raise RecordFault(f"prompt: the last turn must be the user's, got {prompt[-1]['role']}")
    if not prompt[-1]["content"].strip():
        raise RecordFault("prompt: the last turn is empty")
    return _with_system(record, prompt)


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
