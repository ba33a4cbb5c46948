"""Reads the messages and the tools of a record.

A message that was read has
    role               system, developer, user, assistant or tool
    content            text; None in a turn of the assistant that only calls tools
and, if the record gives them,
    reasoning_content  what the assistant thinks before it speaks
    tool_calls         of the assistant, in OpenAI's form, with `arguments` as an object
    tool_call_id, name of a tool's result
Reasoning may also be at the start of the content, as `<think>...</think>`. Where the generation
prompt opens the block, a generated reply has only its end: without the opening tag, `</think>` has
to be the first tag and the last of its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from simpo.data.pairs import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
OLD_ROLES = {"function": "tool"}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of a turn's reasoning in records; `reasoning_content` is the one it gets here."""
TEXT_PARTS = ("text", "input_text", "output_text")
READ_KEYS = frozenset(
    {"role", "content", "tool_calls", "function_call", "tool_call_id", "name", *REASONING_KEYS}
)
"""Keys of messages that are read, of those roles that may have them."""
NOT_TEXT = {"image", "images", "video", "videos", "audio", "audios"}
"""Columns of a record and keys of a message that change its meaning but are not text. A record with
a value for one of them is refused."""

_OPENS_THINKING = re.compile(r"\s*<think>")
_THINK_TAG = re.compile(r"<(/?)think>")
_REST_OF_LINE = re.compile(r"[^\S\n]*(?:\n\s*|\Z)")


class RecordFault(Exception):
    """What is wrong with one record, without its place."""


def read_messages(value: Any, key: str) -> list[Message]:
    """Read the messages of a column.

    Args:
        key: name of the column, for messages of faults.

    Raises:
        RecordFault: they are not messages, or hold something else than text.
    """
    if not isinstance(value, list):
        text = "" if key == "messages" else "text or "
        raise RecordFault(f"{key}: must be {text}a list of messages, got {kind(value)}")
    if not value:
        raise RecordFault(f"{key}: holds no message")
    messages = []
    for index, item in enumerate(value):
        place = f"{key}[{index}]"
        messages.append(_message(item, place))
        if key != "prompt" and messages[-1]["role"] == "assistant":
            _check_trained(item, place)
    return messages


def read_tools(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """The JSON schemas of the tools in a record: `tools`, or `functions` as OpenAI had them.

    Columnar files give each schema the keys of all others, as null; keys with null are left out of
    schemas that are not JSON text.

    Raises:
        RecordFault: they are no list of schemas with a name.
    """
    for column in ("tools", "functions"):
        value = _parsed(record.get(column), column)
        if not value:
            continue
        if not isinstance(value, list):
            raise RecordFault(f"{column}: must be a list of JSON schemas, got {kind(value)}")
        for index, tool in enumerate(value):
            place = f"{column}[{index}]"
            if not isinstance(tool, Mapping) or not isinstance(tool_name(tool), str):
                raise RecordFault(f"{place}: must be a JSON schema with a name")
            _check_json(tool, place)
        if not isinstance(record[column], str):
            value = _without_nulls(value)
        wrapped = ({"type": "function", "function": tool} for tool in value)
        return tuple(wrapped if column == "functions" else value)
    return None


def tool_name(tool: Mapping[str, Any]) -> Any:
    """The name of a tool, from its JSON schema."""
    function = tool.get("function")
    return (function if isinstance(function, Mapping) else tool).get("name")


def split_reasoning(message: Message) -> tuple[str, str]:
    """Reasoning and content of a message, both without white space around them."""
    within, said = "", message["content"] or ""
    if message["role"] == "assistant":
        within, said = _split(said)
    return str(message.get("reasoning_content", within)).strip(), said.strip()


def without_reasoning(message: Message) -> Message:
    """A message without its reasoning, in either form."""
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    return kept | {"content": kept["content"] and _split(kept["content"])[1]}


def check_reasoning_ends(message: Message) -> None:
    """
    Raises:
        RecordFault: the content begins with reasoning that does not end, as in a reply that was
            cut off, so that nobody can tell it from the answer.
    """
    content = message["content"] or ""
    opens = message["role"] == "assistant" and _OPENS_THINKING.match(content)
    if opens and _split(content)[1] == content:
        raise RecordFault(
            "a reply never ends its reasoning: <think> without </think> "
            "(set data.reasoning=score, or leave the record out)"
        )


def all_text(message: Message) -> str:
    """Reasoning, content and tool calls of a message as one text."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    parts = [
        message.get("reasoning_content"),
        message["content"],
        *(f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls),
    ]
    return "\n".join(part for part in parts if part)


def unread_keys(message: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a message that have a value and are not read."""
    used = next((message[key] for key in REASONING_KEYS if has_value(message.get(key))), None)
    for key, value in message.items():
        if value is None or value in ("", [], {}):
            continue
        second = key in REASONING_KEYS and has_value(value) and value != used
        named = key == "name" and message.get("role") in ROLES[:4]
        if key not in READ_KEYS or second or named:
            yield str(key)


def refuse_not_text(item: Mapping[str, Any], place: str = "") -> None:
    """
    Raises:
        RecordFault: a record or a message has an image, a video or a sound.
    """
    for key, value in item.items():
        if key in NOT_TEXT and has_value(value):
            raise RecordFault(f"{place}{key}: has a value, and only text can be trained on")


def has_value(value: Any) -> bool:
    """Whether a column or key says anything; columnar files write one into every record."""
    return bool(value) and value not in ("[]", "{}", "null")


def check_text(text: str, place: str) -> None:
    """
    Raises:
        RecordFault: the text is not Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise RecordFault(
            f"{place}: holds {half}, half of a character (a lone surrogate)"
        ) from error


def kind(value: Any) -> str:
    """The type of a value in the words of JSON."""
    names = {str: "text", list: "a list", dict: "an object", type(None): "null", bool: "a boolean"}
    return names.get(
        type(value), "a number" if isinstance(value, (int, float)) else "something else"
    )


def _split(content: str) -> tuple[str, str]:
    """The reasoning at the start of what the assistant says, and the rest."""
    opening, tags = _OPENS_THINKING.match(content), _THINK_TAG.finditer(content)
    if not opening:
        tag = next(tags, None)
        rest = _REST_OF_LINE.match(content, tag.end()) if tag and tag[1] else None
        return (content[: tag.start()], content[rest.end() :]) if tag and rest else ("", content)
    depth = 0  # reasoning may hold such a block itself
    for tag in tags:
        depth += -1 if tag[1] else 1
        if depth == 0:
            return content[opening.end() : tag.start()], content[tag.end() :].lstrip()
    return "", content


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise RecordFault(f"{place}: must be an object with role and content, got {kind(item)}")
    calls = _calls(item, place)
    if "role" not in item or ("content" not in item and not calls):
        has = ", ".join(map(str, item)) or "nothing"
        raise RecordFault(f"{place}: must have role and content, has {has}")
    refuse_not_text(item, f"{place}.")
    role = item["role"]
    role = OLD_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise RecordFault(f"{place}.role: must be one of {', '.join(ROLES)}, got {role}")
    if calls and role != "assistant":
        raise RecordFault(f"{place}.tool_calls: only the assistant calls tools, got role {role}")
    content = item.get("content")
    if content is not None or not calls:
        content = _content(content, f"{place}.content")
    message: Message = {"role": role, "content": content}
    if role == "assistant":
        named = ((key, item[key]) for key in REASONING_KEYS if has_value(item.get(key)))
        for key, reasoning in named:
            message.setdefault("reasoning_content", _text(reasoning, f"{place}.{key}"))
        if calls:
            message["tool_calls"] = calls
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if item.get(key) is not None:
                message[key] = _text(item[key], f"{place}.{key}")
    return message


def _check_trained(item: Mapping[str, Any], place: str) -> None:
    """
    Raises:
        RecordFault: the record does not want the turn to be trained.
    """
    weight = item.get("weight")
    untrained = "weight 0" if isinstance(weight, (int, float)) and weight == 0 else ""
    if item.get("train") is False:
        untrained = "train false"
    if untrained:
        raise RecordFault(
            f"{place}: is not to be trained ({untrained}), which is not supported: "
            "leave the turn out of the response"
        )


def _content(value: Any, place: str) -> str:
    """Text, or the text of a list of parts."""
    if not isinstance(value, list):
        return _text(value, place)
    texts = []
    for index, part in enumerate(value):
        here = f"{place}[{index}]"
        if not isinstance(part, Mapping):
            raise RecordFault(f"{here}: must be an object with type and text, got {kind(part)}")
        if part.get("type") not in TEXT_PARTS:
            named = part.get("type") or "of no type"
            raise RecordFault(f"{here}: is {named}, and only text can be trained on")
        texts.append(_text(part.get("text"), f"{here}.text"))
    return "".join(texts)


def _calls(item: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The tool calls of a message: `tool_calls`, or the one `function_call` that OpenAI had."""
    value, key = item.get("tool_calls"), f"{place}.tool_calls"
    if not has_value(value):
        if not has_value(item.get("function_call")):
            return []
        value, key = [item["function_call"]], f"{place}.function_call"
    if not isinstance(value, list):
        raise RecordFault(f"{key}: must be a list of tool calls, got {kind(value)}")
    calls = []
    for index, call in enumerate(value):
        here = f"{key}[{index}]" if key.endswith("calls") else key
        function = call.get("function") or call if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RecordFault(f"{here}: must have a function with name and arguments")
        check_text(function["name"], f"{here}.name")
        arguments = _parsed(function.get("arguments") or {}, f"{here}.arguments")
        if not isinstance(arguments, Mapping):
            raise RecordFault(f"{here}.arguments: must be a JSON object, got {kind(arguments)}")
        _check_json(arguments, f"{here}.arguments")
        identity = {} if call.get("id") is None else {"id": _text(call["id"], f"{here}.id")}
        made = {"name": function["name"], "arguments": arguments}
        calls.append({**identity, "type": "function", "function": made})
    return calls


def _parsed(value: Any, place: str) -> Any:
    """A value, or what it says as JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise RecordFault(f"{place}: not JSON: {what} at column {error.pos + 1}") from error
    except ValueError as error:
        raise RecordFault(f"{place}: not JSON: a number has too many digits") from error


def _without_nulls(value: Any) -> Any:
    """A JSON value without those keys of its objects that are null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _check_json(value: Any, place: str) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RecordFault(f"{place}: must be JSON, holds something else") from error
    check_text(text, place)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise RecordFault(f"{place}: must be text, got {kind(value)}")
    check_text(value, place)
    return value
