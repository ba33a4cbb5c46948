"""Lower bounds of settings, for the `problems()` of their sections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any


def at_least(section: Any, lowest: int, *keys: str, zero: str = "") -> Iterator[str]:
    """Faults of settings that must be `lowest` or more, or null if they may be that.

    Args:
        zero: what a value of 0 means, such as "off".
    """
    meaning = f" ({zero})" if zero else ""
    for key in keys:
        value = getattr(section, key)
        if value is not None and value < lowest:
            yield f"{key}: must be {lowest}{meaning} or more{_or_null(section, key)}, got {value}"


def above_zero(section: Any, *keys: str) -> Iterator[str]:
    """Faults of settings that must be above 0, or null if they may be that."""
    for key in keys:
        value = getattr(section, key)
        if value is not None and value <= 0:
            yield f"{key}: must be above 0{_or_null(section, key)}, got {value}"


def _or_null(section: Any, key: str) -> str:
    may_be_null = {item.name for item in fields(section) if "None" in str(item.type)}
    return ", or null" if key in may_be_null else ""
