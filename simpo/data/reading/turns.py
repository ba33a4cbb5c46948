"""Reads dialogues written as HH-RLHF text or as ShareGPT, and the columns that hold a prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from simpo.data.reading.messages import RecordFault, has_value
from simpo.data.reading.printed import refuse_messages_as_text

PROMPTS = ("prompt", "instruction", "question", "context")
"""Columns that may hold the prompt."""
HUMAN, ASSISTANT = "Human", "Assistant"
HH_TEXT = re.compile(rf"\A\s*{HUMAN}:.*?\n\r?\n{ASSISTANT}:", re.DOTALL)
_SPEAKER = re.compile(rf"\n\n({HUMAN}|{ASSISTANT}):")
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool"), "tool"),
}
"""Roles of ShareGPT's `from`; `function_call` is a turn of the assistant with a tool call."""


def is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and (
        ("role" in value and "content" in value) or ("from" in value and "value" in value)
    )


def turns(value: Any, key: str) -> Any:
    """A message or a list of messages as a list of OpenAI messages; any other value as it is."""
    if is_message(value):
        return [_turn(value, key)]
    if isinstance(value, list) and any(
        isinstance(item, Mapping) and "from" in item for item in value
    ):
        return [_turn(item, f"{key}[{index}]") for index, item in enumerate(value)]
    return value


def _turn(item: Any, place: str) -> Any:
    if not is_message(item) or "role" in item:
        return item
    others = {k: v for k, v in item.items() if k not in ("from", "value")}
    speaker, said = item["from"], item["value"]
    if speaker != "function_call":
        role = _ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        return {"role": role, "content": said} | others
    calls = said
    if isinstance(said, str):
        try:
            calls = json.loads(said)
        except ValueError:
            calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(
        isinstance(call, Mapping) and {"name", "arguments"} <= call.keys() for call in calls
    ):
        raise RecordFault(f"{place}: a function_call must be JSON with name and arguments")
    made = [
        {"type": "function", "function": {key: call[key] for key in ("name", "arguments")}}
        for call in calls
    ]
    return {"role": "assistant", "content": "", "tool_calls": made} | others


def is_hh_prompt(prompt: Any) -> bool:
    return (
        isinstance(prompt, str)
        and prompt.rstrip().endswith(f"{ASSISTANT}:")
        and HH_TEXT.match(prompt) is not None
    )


def hh_turns(text: Any, key: str) -> list[dict[str, Any]]:
    """The turns of `Human: ...`, blank line, `Assistant: ...`, without white space around them."""
    said = "\n\n" + text.replace("\r\n", "\n").lstrip() if isinstance(text, str) else ""
    parts = _SPEAKER.split(said)
    if len(parts) == 1 or parts[0]:
        raise RecordFault(f"{key}: must begin with {HUMAN}: (HH-RLHF text)")
    roles = ("user" if speaker == HUMAN else "assistant" for speaker in parts[1::2])
    return [
        {"role": role, "content": said.strip()}
        for role, said in zip(roles, parts[2::2], strict=True)
    ]


def hh_prompt(prompt: Any) -> Any:
    return hh_turns(prompt, "prompt")[:-1] if is_hh_prompt(prompt) else prompt


def asked_of(rest: dict[str, Any]) -> Any:
    """The prompt, out of the column that holds it."""
    name = next(name for name in PROMPTS if rest.get(name) is not None)
    asked = rest.pop(name)
    if name == "instruction":
        asked = with_input(asked, rest.pop("input", None))
    return with_history(hh_prompt(turns(asked, name)), rest)


def with_history(prompt: Any, rest: dict[str, Any]) -> Any:
    """A prompt of one text behind the earlier turns in the column `history`; others as they are.

    Raises:
        RecordFault: `history` is no dialogue up to a reply, or the text is messages.
    """
    if not isinstance(prompt, str):
        return prompt
    refuse_messages_as_text(prompt, "prompt")
    if "history" not in rest:
        return prompt
    earlier = rest.pop("history")
    if not has_value(earlier):
        return prompt
    before = turns(earlier, "history")
    if isinstance(before, list) and all(isinstance(t, list) and len(t) == 2 for t in before):
        before = [
            {"role": role, "content": said}
            for turn in before
            for role, said in zip(("user", "assistant"), turn, strict=True)
        ]
    if not isinstance(before, list) or not all(map(is_message, before)):
        raise RecordFault("history: must be a list of [instruction, reply] or of messages")
    if before[-1]["role"] != "assistant":
        raise RecordFault("history: must end with a reply")
    return [*before, {"role": "user", "content": prompt}]


def with_input(instruction: Any, more: Any) -> Any:
    if not isinstance(instruction, str):
        raise RecordFault("instruction: must be text")
    if more is not None and not isinstance(more, str):
        raise RecordFault("input: must be text")
    return f"{instruction}\n{more}" if more and more.strip() else instruction
