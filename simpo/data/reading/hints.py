"""Says what a record that fits no shape looks like, and which setting would make it fit."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from simpo.data.reading.printed import is_messages_as_text
from simpo.data.reading.scored import REPLIES, SCORES
from simpo.data.reading.shapes import Gives, Shape
from simpo.data.reading.turns import PROMPTS, is_message

MAX_LETTERS_OF_A_VALUE = 60
NEVER_TEXT = frozenset([*SCORES, *REPLIES, "history", "messages", "conversations"]) - {"output"}
"""Columns that hold lists, also where they are written as text."""
_ALIASES = {
    "prompt": {"question", "instruction", "input", "query", "problem", "request", "ask"},
    "chosen": {"better", "best", "good", "accepted", "preferred", "winner", "win", "positive", "j"},
    "rejected": {
        "worse",
        "worst",
        "bad",
        "loser",
        "lose",
        "negative",
        "dispreferred",
        "refused",
        "k",
    },
    "responses": {"candidates", "outputs", "samples"},
}
"""Words in the names of columns that probably mean one of ours."""
_IMITATED = {
    "instruction": {"prompt", "question", "query", "problem", "request"},
    "output": {"answer", "completion", "response", "reply", "target"},
}
"""The same for a prompt with one reply."""


def fits_no_shape(
    place: str, record: Mapping[str, Any], shapes: list[Shape], columns: Mapping[str, str]
) -> list[str]:
    """Lines with the record, the shape that it is nearest to, and what to set.

    Args:
        shapes: those that can be read.
        columns: names that the source already maps; the setting that is shown has them too.
    """
    return [*_shown(place, record), *(_lists_as_text(record) or _nearest(shapes, record, columns))]


def named_values(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of each column; of an object that is no message its keys instead, as `a.b`."""
    for key, value in record.items():
        if isinstance(value, Mapping) and not is_message(value):
            yield from ((f"{key}.{inner}", item) for inner, item in named_values(value))
        else:
            yield str(key), value


def _shown(place: str, record: Mapping[str, Any]) -> list[str]:
    """Lines with the columns of a record and their values, shortened."""
    lines = [f"{place}: fits no shape of record that is read here (docs/data.md); it has"]
    for key, value in record.items():
        text = value if isinstance(value, str) else repr(value)
        cut = len(text) > MAX_LETTERS_OF_A_VALUE
        lines.append(f"  {key}: {text[:MAX_LETTERS_OF_A_VALUE]}{'...' if cut else ''}")
    return lines


def _lists_as_text(record: Mapping[str, Any]) -> list[str]:
    """A line with the columns that could not be parsed, such as lists that NumPy printed."""
    names = [
        name
        for name, value in record.items()
        if isinstance(value, str)
        and (is_messages_as_text(value) or (name in NEVER_TEXT and value.lstrip()[:1] == "["))
    ]
    return [f"({', '.join(names)}: lists as text that is not JSON; write JSON)"] if names else []


def _nearest(
    shapes: list[Shape], record: Mapping[str, Any], columns: Mapping[str, str]
) -> list[str]:
    """Lines with the shape that a record is nearest to, what it lacks, and what to set."""

    def nearness(shape: Shape) -> tuple[int, bool, int]:
        one = shape.gives is Gives.dialogue
        lacking = shape.lacks(record)
        if not lacking:  # values of another kind
            return len(shape.needs) - 1, one, 0
        guesses = _guesses(shape, record)
        replies = [names for names in shape.needs if names[0] not in PROMPTS]
        if all(names in lacking and names[0] not in guesses for names in replies):
            return -len(shapes), one, 0  # nothing but a prompt in common
        unknown = len(lacking) - len(guesses)
        return len(shape.needs) - 2 * unknown, one, len(shape.needs) - len(lacking)

    plain = next(shape for shape in reversed(shapes) if shape.name == "pair")
    shape = max([plain, *shapes], key=nearness)
    lacking, guesses = shape.lacks(record), _guesses(shape, record)
    needs = ", ".join(names[0] for names in shape.needs)
    own = "or convert the records: format: module:function, docs/extending.md"
    if not lacking:
        return [f"nearest shape: {shape.title} ({needs}), with other kinds of values", f"({own})"]
    lacks = ", ".join(" or ".join(names) for names in lacking)
    named = [f"{theirs}: {ours}" for theirs, ours in columns.items()]
    named += [f"{guesses.get(names[0], '...')}: {names[0]}" for names in lacking]
    setting = f"columns: {{{', '.join(named)}}}"
    return [
        f"nearest shape: {shape.title} ({needs}); it lacks {lacks}",
        f"(set for this source {setting})"
        if len(guesses) == len(lacking)
        else f"(name its columns in the source: {setting}, {own})",
    ]


def _guesses(shape: Shape, record: Mapping[str, Any]) -> dict[str, str]:
    """For columns that a shape lacks, the columns of the record that probably are them."""
    used = {name for names in shape.needs for name in names}
    free = [name for name, value in named_values(record) if name not in used and value is not None]
    found: dict[str, str] = {}
    for ours in (names[0] for names in shape.lacks(record)):
        aliases = _IMITATED if shape.gives is Gives.dialogue else _ALIASES
        meant = {ours, *aliases.get(ours, ())}
        able = [name for name in free if meant & set(re.split(r"[^a-z0-9]+", name.lower()))]
        able = sorted(able, key=lambda name: len(re.split(r"[^A-Za-z0-9]+", name)))
        if able or (able := difflib.get_close_matches(ours, free, 1, 0.8)):
            found[ours] = able[0]
            free.remove(able[0])
    return found
