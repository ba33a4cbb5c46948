"""Divides the responses of a record into the prompt that all start with, and what follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from simpo.data.pairs import Message, response_names
from simpo.data.reading.messages import RecordFault, check_text, read_messages
from simpo.data.reading.printed import is_list_of_texts, refuse_messages_as_text


def parts(
    record: Mapping[str, Any], given: Sequence[Any]
) -> tuple[list[Message], dict[str, list[Message]]]:
    """The turns of the prompt, which is all that the responses given start with, and those of each
    response by its name.

    Raises:
        RecordFault: there is no prompt, or a response does not continue it.
    """
    prompt = record.get("prompt")
    dialogues: dict[str, list[Message]] = {}
    for key, value in zip(response_names(len(given)), given, strict=True):
        turns = [text_reply(value, key)] if isinstance(value, str) else read_messages(value, key)
        if turns[-1]["role"] != "assistant":
            raise RecordFault(f"{key}: the last turn must be the assistant's, got {last(turns)}")
        if turns[0]["role"] == "assistant":
            if prompt is None:
                raise missing(record, "prompt")
            turns = [*given_turns(prompt), *turns]
        elif prompt is not None and not isinstance(prompt, str):
            asked = given_turns(prompt)
            if turns[: len(asked)] != asked:
                raise RecordFault(f"{key} does not continue prompt: their turns differ")
        dialogues[key] = turns
    same = len(dialogues["chosen"])
    for (one, first), (other, second) in combinations(dialogues.items(), 2):
        both = enumerate(zip(first, second, strict=False))
        shortest = min(len(first), len(second))
        shared = next((i for i, (a, b) in both if a != b), shortest)
        if shared == len(first) == len(second):
            raise RecordFault(f"{one} and {other} are the same")
        if shared == shortest:
            longer, shorter = (other, one) if shared == len(first) else (one, other)
            raise RecordFault(f"{longer} is {shorter} with more turns, so they are no two replies")
        same = min(same, shared)
    if same == 0 or any(turns[same]["role"] != "assistant" for turns in dialogues.values()):
        begin = dialogues["chosen"][: same + 1]
        other = next(name for name, turns in dialogues.items() if turns[: same + 1] != begin)
        raise RecordFault(f"chosen and {other} start from different prompts")
    responses = {name: turns[same:] for name, turns in dialogues.items()}
    return dialogues["chosen"][:same], responses


def given_turns(prompt: Any) -> list[Message]:
    """The turns of the column `prompt`."""
    if not isinstance(prompt, str):
        return read_messages(prompt, "prompt")
    check_text(prompt, "prompt")
    refuse_messages_as_text(prompt, "prompt")
    if is_list_of_texts(prompt):
        raise RecordFault(
            "prompt: is a JSON list of texts (make messages of its turns, format: module:function)"
        )
    return [{"role": "user", "content": prompt}]


def text_reply(text: str, key: str) -> Message:
    check_text(text, key)
    refuse_messages_as_text(text, key)
    return {"role": "assistant", "content": text}


def last(turns: list[Message]) -> str:
    """The role of the last turn."""
    return str(turns[-1]["role"])


def missing(record: Mapping[str, Any], key: str) -> RecordFault:
    """The fault of a record that lacks `key`, with the columns that it has."""
    columns = ", ".join(str(k) for k, v in record.items() if v is not None)
    return RecordFault(f"{key}: missing (the record has {columns or 'no value'})")
