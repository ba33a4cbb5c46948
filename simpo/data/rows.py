"""One raw row in, one `Pair` out, or a fault that says what is wrong with the row.

A row is one of
    prompt + chosen + rejected   text, or OpenAI messages; a response may repeat the prompt's turns
    chosen + rejected            whole dialogues that differ in their last turn only
    messages                     a dialogue to imitate, for supervised fine-tuning only
A string `prompt` beside whole dialogues is left aside, as the dialogues hold it.
An optional `rule` says what a program can check in a reply (see `simpo.data.rules`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simpo.data.rules import rule_fault
from simpo.pairs import Message, Pair

ROLES = ("system", "user", "assistant")


class RowFault(Exception):
    """What is wrong with one row, without its place."""


def to_pair(row: Any, place: str) -> Pair:
    """Read one row.

    Args:
        row: the row as its source gave it.
        place: source, split and row, for messages.

    Raises:
        RowFault: the row is in none of the forms above, or holds nothing to prefer.
    """
    if not isinstance(row, Mapping):
        raise RowFault(f"must be an object with chosen and rejected, got {_kind(row)}")
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            columns = ", ".join(str(k) for k, v in row.items() if v is not None)
            raise RowFault(f"{key}: missing (the row has {columns or 'no value'})")
    chosen_before, chosen = _split(row["chosen"], "chosen")
    rejected_before, rejected = _split(row["rejected"], "rejected")
    prompt = _prompt(row.get("prompt"), chosen_before, rejected_before)
    if chosen.strip() == rejected.strip():
        raise RowFault("chosen and rejected are the same")
    return Pair(tuple(prompt), chosen, rejected, place, _rule(row))


def to_dialogue(row: Any, place: str) -> Pair:
    """Read one row for supervised fine-tuning: `messages`, or a pair, whose rejected is left out.

    Args and Raises: as `to_pair`.
    """
    if not isinstance(row, Mapping) or row.get("messages") is None:
        return replace(to_pair(row, place), rejected=None)
    messages = _messages(row["messages"], "messages")
    roles = [turn["role"] for turn in messages]
    if roles[-1] != "assistant":
        raise RowFault(f"messages: the last turn must be the assistant's, got {roles[-1]}")
    first = roles.index("assistant")
    for index, turn in enumerate(messages):
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise RowFault(f"messages[{index}]: the response is empty")
    prompt = _prompt(messages[:first] or None, [], [])
    if "system" in roles[first:]:
        raise RowFault("messages: a system message may only come first")
    return Pair(
        tuple(prompt), messages[first]["content"], None, place, None, tuple(messages[first + 1 :])
    )


def to_prompt(row: Any, place: str) -> Pair:
    """Read one row for its prompt: `prompt` alone, or a pair, whose replies are left out.

    Args and Raises: as `to_pair`.
    """
    if not isinstance(row, Mapping) or row.get("chosen") is not None:
        return replace(to_pair(row, place), chosen="", rejected=None)
    return Pair(tuple(_prompt(row.get("prompt"), [], [])), "", None, place, _rule(row))


def _rule(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    rule = row.get("rule")
    if rule is None:
        return None
    # A columnar file gives every rule the arguments of all others, as None.
    rule = {k: v for k, v in rule.items() if v is not None} if hasattr(rule, "items") else rule
    if fault := rule_fault(rule):
        raise RowFault(f"rule: {fault}")
    return rule


def _split(value: Any, key: str) -> tuple[list[Message], str]:
    """A response as (turns before it, its text)."""
    if isinstance(value, str):
        turns, text = [], value
    else:
        *turns, last = _messages(value, key)
        if last["role"] != "assistant":
            raise RowFault(f"{key}: the last turn must be the assistant's, got {last['role']}")
        text = last["content"]
    if not text.strip():
        raise RowFault(f"{key}: the response is empty")
    return turns, text


def _prompt(value: Any, chosen: list[Message], rejected: list[Message]) -> list[Message]:
    if chosen != rejected:
        raise RowFault("chosen and rejected start from different prompts")
    if isinstance(value, str) and not chosen:
        prompt = [{"role": "user", "content": value}]
    elif value is None or isinstance(value, str):
        prompt = chosen
    else:
        prompt = _messages(value, "prompt")
        if chosen and chosen != prompt:
            raise RowFault("chosen does not continue prompt: their turns differ")
    if not prompt:
        raise RowFault("prompt: missing")
    if any(turn["role"] == "system" for turn in prompt[1:]):
        raise RowFault("prompt: a system message may only come first")
    if prompt[-1]["role"] != "user":
        raise RowFault(f"prompt: the last turn must be the user's, got {prompt[-1]['role']}")
    if not prompt[-1]["content"].strip():
        raise RowFault("prompt: the last turn is empty")
    return prompt


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowFault(f"{key}: must be text or a list of messages, got {_kind(value)}")
    if not value:
        raise RowFault(f"{key}: holds no message")
    messages = []
    for index, item in enumerate(value):
        place = f"{key}[{index}]"
        if not isinstance(item, Mapping):
            raise RowFault(f"{place}: must be an object with role and content, got {_kind(item)}")
        if "role" not in item or "content" not in item:
            has = ", ".join(map(str, item)) or "nothing"
            raise RowFault(f"{place}: must have role and content, has {has}")
        role, content = item["role"], item["content"]
        if role not in ROLES:
            raise RowFault(f"{place}.role: must be one of {', '.join(ROLES)}, got {role}")
        if not isinstance(content, str):
            raise RowFault(f"{place}.content: must be text, got {_kind(content)}")
        messages.append({"role": role, "content": content})
    return messages


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", type(None): "null", bool: "a boolean"}
    return names.get(
        type(value), "a number" if isinstance(value, (int, float)) else "something else"
    )
