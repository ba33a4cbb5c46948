"""Parses a raw record into a `Pair`, or says what is wrong with the record.

A record is one of
    prompt + chosen + rejected   text, or OpenAI messages; a response may repeat the prompt's turns
    chosen + rejected            whole dialogues that start from the same turns
    messages                     a dialogue to imitate, for supervised fine-tuning only
    prompt + completion + label  one reply that is desirable or not, for KTO only
All turns that chosen and rejected start with are their prompt. A string `prompt` is ignored if they
are whole dialogues, which contain it.
Optional columns: `system` (or `system_prompt`) is the text of a system turn before the prompt;
`tools` (or `functions`) are the JSON schemas of the tools that the assistant may call; `rule` is a
check that a program can run on a reply (see `simpo.data.rules`). What a message may hold:
`simpo.data.reading.messages`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from simpo.data.pairs import Message, Pair
from simpo.data.reading.messages import RecordFault as RecordFault
from simpo.data.reading.messages import (
    check_reasoning_ends,
    check_text,
    has_value,
    kind,
    read_messages,
    read_tools,
    refuse_not_text,
    unread_keys,
    without_reasoning,
)
from simpo.data.rules import rule_fault

SYSTEM_COLUMNS = ("system", "system_prompt")
REFERENCE_ANSWER = "reference_answer"
SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
LABELS = {"true": True, "1": True, "false": False, "0": False}
"""Whether a reply is desirable, by its label."""
MESSAGE_KEYS = ("tool_calls", "function_call", "tool_call_id")
"""Keys of messages that say something else than meant as columns of a record."""

_OTHER_KEY = {"role": "content", "content": "role", "from": "value", "value": "from"}
_MESSAGES_AS_TEXT = re.compile(
    r"""\s*(?:array\()?\[?\s*\{\s*["'](role|content|from|value)["']\s*:"""
)
_TURNS_IN_TEXT = re.compile(r"(?:\A|\n\n)(?:### ?)?Human:")


def to_pair(record: Any, place: str) -> Pair:
    """Read one record.

    Args:
        record: the record as its source gave it.
        place: source, split and record, for messages.

    Raises:
        RecordFault: the record has none of the forms above, or chosen and rejected are the same.
    """
    if not isinstance(record, Mapping):
        raise RecordFault(f"must be an object with chosen and rejected, got {kind(record)}")
    _refuse(record)
    for key in ("chosen", "rejected"):
        if record.get(key) is None:
            raise _missing(record, key)
    prompt, chosen, rejected = _parts(record)
    if [_said(turn) for turn in chosen] == [_said(turn) for turn in rejected]:
        raise RecordFault("chosen and rejected are the same")
    return Pair(
        _prompt(record, prompt), _response(chosen, "chosen"), _response(rejected, "rejected"),
        place, _rule(record), score_margin=_score_margin(record), tools=read_tools(record),
    )  # fmt: skip


def to_dialogue(record: Any, place: str) -> Pair:
    """Read one record for supervised fine-tuning: `messages`, or a pair without its rejected reply.

    Args and Raises: as `to_pair`.
    """
    if not isinstance(record, Mapping) or record.get("messages") is None:
        pair = replace(to_pair(record, place), rejected=None)
        if next(turn["role"] for turn in pair.prompt if not _is_system(turn)) != "user":
            raise RecordFault("prompt: begins with the assistant, whose reply answers nothing")
        return pair
    _refuse(record)
    messages = read_messages(record["messages"], "messages")
    first = next((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), 0)
    if messages[first]["role"] == "assistant" and first == 0:
        raise RecordFault("messages: begins with the assistant, whose reply answers nothing")
    chosen = _response(messages[first:], "messages", first)
    return Pair(_prompt(record, messages[:first]), chosen, None, place, tools=read_tools(record))


def to_labelled(record: Any, place: str) -> Pair:
    """Read a pair, or `prompt`, `completion` and `label`: a chosen reply alone, or a rejected one.

    Args and Raises: as `to_pair`.
    """
    is_pair = not isinstance(record, Mapping) or record.get("chosen") is not None
    if is_pair or record.get("completion") is None:
        return to_pair(record, place)
    _refuse(record)
    label = str(record.get("label")).lower()
    if label not in LABELS:
        raise RecordFault(f"label: must be true or false, got {record.get('label')}")
    key = "completion"
    said = record[key]
    turns = [_reply(said, key)] if isinstance(said, str) else read_messages(said, key)
    if turns[0]["role"] != "assistant":
        raise RecordFault(f"{key}: the first turn must be the assistant's, got {turns[0]['role']}")
    reply = _response(turns, key)
    chosen, rejected = (reply, None) if LABELS[label] else ((), reply)
    return Pair(
        _prompt(record, _given(record["prompt"])), chosen, rejected, place, _rule(record),
        tools=read_tools(record),
    )  # fmt: skip


def to_prompt(record: Any, place: str) -> Pair:
    """Read the prompt of one record, which is `prompt` alone or a pair, whose replies are dropped.

    Its `reference_answer` is kept.

    Args and Raises: as `to_pair`.
    """
    if not isinstance(record, Mapping) or record.get("chosen") is not None:
        pair = replace(to_pair(record, place), chosen=(), rejected=None)
        return replace(pair, reference_answer=_reference_answer(record))
    _refuse(record)
    if record.get("prompt") is None:
        raise _missing(record, "prompt")
    prompt = _prompt(record, _given(record["prompt"]))
    return Pair(
        prompt, (), None, place, _rule(record), tools=read_tools(record),
        reference_answer=_reference_answer(record),
    )  # fmt: skip


def _reference_answer(record: Mapping[str, Any]) -> str | None:
    text = record.get(REFERENCE_ANSWER)
    if text is None:
        return None
    if not isinstance(text, str):
        raise RecordFault(f"{REFERENCE_ANSWER}: must be text, got {kind(text)}")
    check_text(text, REFERENCE_ANSWER)
    return text.strip() or None


def drop_reasoning(pair: Pair) -> Pair:
    """A pair without the reasoning of all its turns.

    Raises:
        RecordFault: a turn of a response is nothing but reasoning, or reasoning does not end.
    """
    for turn in pair.turns:
        check_reasoning_ends(turn)
    prompt = tuple(map(without_reasoning, pair.prompt))
    chosen, rejected = (
        response and _response([without_reasoning(turn) for turn in response], key)
        for key, response in (("chosen", pair.chosen), ("rejected", pair.rejected))
    )
    return replace(pair, prompt=prompt, chosen=chosen or (), rejected=rejected)


COLUMNS: dict[Callable[[Any, str], Pair], frozenset[str]] = {
    reader: frozenset(
        [
            *(*columns, "rule", "tools", "functions", *SYSTEM_COLUMNS),
            *(name for names in SCORE_COLUMNS for name in names),
        ]
    )
    for reader, columns in (
        (to_pair, ("prompt", "chosen", "rejected")),
        (to_dialogue, ("prompt", "chosen", "rejected", "messages")),
        (to_labelled, ("prompt", "chosen", "rejected", "completion", "label")),
        (to_prompt, ("prompt", "chosen", "rejected", REFERENCE_ANSWER)),
    )
}
"""The columns that each reader uses."""


def unread_columns(record: Mapping[str, Any], read: frozenset[str]) -> Iterator[str]:
    """Names of unused columns that have a value, and unused keys of messages (`chosen[].name`)."""
    for column, value in record.items():
        if column not in read:
            # `simpo annotate` writes the scores of all replies beside those of the two.
            if value is not None and not (column == "scores" and "chosen_score" in record):
                yield str(column)
        elif isinstance(value, list):
            for message in value:
                if isinstance(message, Mapping) and len(message) > 2:
                    yield from (f"{column}[].{key}" for key in unread_keys(message))


def remarks(record: Mapping[str, Any], pair: Pair) -> Iterator[str]:
    """Yield what looks wrong in a record that is still used."""
    if pair.score_margin is not None and pair.score_margin <= 0:
        chosen, rejected = next(keys for keys in SCORE_COLUMNS if _scores(record, keys))
        yield f"{chosen} {'is below' if pair.score_margin else 'equals'} {rejected}"
    texts = [turn["content"] or "" for turn in pair.turns]
    prompt = record.get("prompt")
    if isinstance(prompt, str) and prompt.strip() not in map(str.strip, texts):
        yield "prompt is not in the dialogue (prompt is ignored)"
    # The plain search is much faster than the pattern, and few texts get past it.
    if any("Human:" in text and _TURNS_IN_TEXT.search(text) for text in texts):
        yield "a text contains turns (Human: ...), which are read as one"
    calls = [call["function"] for turn in pair.turns for call in turn.get("tool_calls", ())]
    if any(value is None for call in calls for value in call["arguments"].values()):
        remedy = "columnar files add them: store arguments as JSON text"
        yield f"a tool call has null arguments ({remedy})"


def _score_margin(record: Mapping[str, Any]) -> float | None:
    found = next(filter(None, (_scores(record, keys) for keys in SCORE_COLUMNS)), None)
    return None if found is None else found[0] - found[1]


def _scores(record: Mapping[str, Any], keys: tuple[str, str]) -> tuple[float, float] | None:
    """The numbers in two columns, which are texts in a CSV file; None if one is no number."""
    try:
        chosen, rejected = (float(record[key]) for key in keys)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (chosen, rejected) if math.isfinite(chosen - rejected) else None


def _refuse(record: Mapping[str, Any]) -> None:
    refuse_not_text(record)
    for key in MESSAGE_KEYS:
        if has_value(record.get(key)):
            raise RecordFault(f"{key}: has a value outside of messages (put it into a message)")


def _is_system(turn: Message) -> bool:
    return turn["role"] in ("system", "developer")


def _rule(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    rule = record.get("rule")
    if rule is None:
        return None
    # In a columnar file each rule has the arguments of all other rules, as None.
    rule = {k: v for k, v in rule.items() if v is not None} if hasattr(rule, "items") else rule
    if fault := rule_fault(rule):
        raise RecordFault(f"rule: {fault}")
    check_text(json.dumps(rule, ensure_ascii=False), "rule")
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
        turns = [_reply(value, key)] if isinstance(value, str) else read_messages(value, key)
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
        return read_messages(prompt, "prompt")
    check_text(prompt, "prompt")
    refuse_messages_as_text(prompt, "prompt")
    if _is_list_of_texts(prompt):
        raise RecordFault(
            "prompt: is a JSON list of texts (make messages of its turns, format: module:function)"
        )
    return [{"role": "user", "content": prompt}]


def _reply(text: str, key: str) -> Message:
    check_text(text, key)
    refuse_messages_as_text(text, key)
    return {"role": "assistant", "content": text}


def is_messages_as_text(text: str) -> bool:
    """Whether a text is messages as a program printed them."""
    begin = _MESSAGES_AS_TEXT.match(text)
    return bool(begin and re.search(rf"""["']{_OTHER_KEY[begin[1]]}["']\s*:""", text))


def refuse_messages_as_text(text: str, key: str) -> None:
    """
    Raises:
        RecordFault: the text is messages as a program printed them.
    """
    if is_messages_as_text(text):
        raise RecordFault(
            f"{key}: is the text of messages, and the column was not read as such (write messages "
            "as JSON in every record; a reply that is such a text goes into a message)"
        )


def _is_list_of_texts(text: str) -> bool:
    if not re.match(r'\s*\[\s*"', text):
        return False
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _response(turns: list[Message], key: str, first: int | None = None) -> tuple[Message, ...]:
    """The turns of a response, checked; `first` is the index of the first one in column `key`."""
    if turns[-1]["role"] != "assistant":
        raise RecordFault(f"{key}: the last turn must be the assistant's, got {_last(turns)}")
    for index, turn in enumerate(turns, start=first or 0):
        if _is_system(turn):
            raise RecordFault(f"{key}: a {turn['role']} message may only come first")
        if turn["role"] == "assistant" and not ("tool_calls" in turn or turn["content"].strip()):
            place = key if first is None else f"{key}[{index}]"
            raise RecordFault(f"{place}: the response is empty")
    return tuple(turns)


def _last(turns: list[Message]) -> str:
    return str(turns[-1]["role"])


def _said(turn: Message) -> Message:
    return turn | {"content": turn["content"] and turn["content"].strip()}


def _missing(record: Mapping[str, Any], key: str) -> RecordFault:
    """The fault of a record that lacks `key`, with the columns that it has."""
    columns = ", ".join(str(k) for k, v in record.items() if v is not None)
    return RecordFault(f"{key}: missing (the record has {columns or 'no value'})")


def _prompt(record: Mapping[str, Any], turns: list[Message]) -> tuple[Message, ...]:
    """The turns of a prompt, checked, with the text of a column `system` before them."""
    for turn in filter(_is_system, turns[1:]):
        raise RecordFault(f"prompt: a {turn['role']} message may only come first")
    if turns[-1]["role"] not in ("user", "tool"):
        raise RecordFault(f"prompt: the last turn must be the user's, got {_last(turns)}")
    if turns[-1]["role"] == "user" and not turns[-1]["content"].strip():
        raise RecordFault("prompt: the last turn is empty")
    return tuple(_with_system(record, turns))


def _with_system(record: Mapping[str, Any], prompt: list[Message]) -> list[Message]:
    for column in SYSTEM_COLUMNS:
        text = record.get(column)
        if text is None:
            continue
        if not isinstance(text, str):
            raise RecordFault(f"{column}: must be text, got {kind(text)}")
        if not text.strip():
            continue
        check_text(text, column)
        if not _is_system(prompt[0]):
            prompt = [{"role": "system", "content": text}, *prompt]
        elif prompt[0]["content"] != text:
            raise RecordFault(f"{column}: the prompt has another system message of its own")
    return prompt
