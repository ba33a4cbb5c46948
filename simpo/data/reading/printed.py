"""Recognises texts that are messages or lists as a program printed them."""

from __future__ import annotations

import json
import re

from simpo.data.reading.messages import RecordFault

_OTHER_KEY = {"role": "content", "content": "role", "from": "value", "value": "from"}
_MESSAGES_AS_TEXT = re.compile(
    r"""\s*(?:array\()?\[?\s*\{\s*["'](role|content|from|value)["']\s*:"""
)


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


def is_list_of_texts(text: str) -> bool:
    if not re.match(r'\s*\[\s*"', text):
        return False
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
