"""Reads what servers with OpenAI's interface answer, which differ in much that is not the text."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

LONGEST_WAIT_S = 86_400.0
"""What a server may ask for at most."""


def text_in(content: Any) -> str | None:
    """The text of a message; None without. Thoughts may be parts of their own, beside the text."""
    if isinstance(content, list):
        texts = [part["text"] for part in content if part.get("type") == "text"]
        content = "".join(texts) if texts else None
    return content if isinstance(content, str) else None


def count_in(usage: Any, key: str) -> int:
    """A number of tokens; 0 if the server does not tell it, or tells nonsense."""
    value = usage.get(key) if isinstance(usage, Mapping) else None
    return value if type(value) is int and value > 0 else 0


def first_logprobs_in(choice: Mapping[str, Any]) -> dict[str, float]:
    """Log-probs of the likeliest first tokens of a choice; empty if it has none."""
    positions = (choice.get("logprobs") or {}).get("content")
    if not positions:
        return {}
    found: dict[str, float] = {}
    for one in positions[0].get("top_logprobs") or ():
        if math.isfinite(value := float(one["logprob"])):
            found.setdefault(str(one["token"]), value)
    return found


def seconds_until(retry_after: str | None) -> float | None:
    """How long a `Retry-After` header asks to wait: seconds, or until a date."""
    if retry_after is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", retry_after.strip()):
        return min(float(retry_after), LONGEST_WAIT_S)
    try:
        wait_s = parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(max(0.0, wait_s), LONGEST_WAIT_S)
