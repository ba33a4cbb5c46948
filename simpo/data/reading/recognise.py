"""Finds the shape of a split's records, and turns each of them into those that `records` reads."""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simpo.config.data import SourceConfig
from simpo.config.errors import DataError, first_line
from simpo.config.own_code import is_function, load
from simpo.data.pairs import Pair
from simpo.data.reading.records import (
    COLUMNS,
    RecordFault,
    is_messages_as_text,
    to_dialogue,
    to_prompt,
)
from simpo.data.reading.scored import (
    REPLIES,
    SCORES,
    LeftOut,
    Scored,
    Verdict,
    WrongShape,
    comparison,
    scored_pairs,
)
from simpo.data.reading.shapes import (
    SHAPES,
    Gives,
    Record,
    Shape,
    as_they_are,
)
from simpo.data.reading.turns import PROMPTS, is_message

ReadRecord = Callable[[Any, str], Pair]
MAX_LETTERS_OF_A_VALUE = 60
_MESSAGES = ("prompt", "context", "chosen", "rejected", "messages", "conversations", "conversation")
_LISTS = (
    *("preferred_output", "non_preferred_output", "responses", "completions", "answers"),
    *("generations", "replies", *SCORES, "history", "output"),
)
_NEVER_TEXT = frozenset([*SCORES, *REPLIES, "history", "messages", "conversations"]) - {"output"}
_KNOWN = frozenset(
    [name for shape in SHAPES for names in (*shape.needs, shape.optional) for name in names]
    + [name for columns in COLUMNS.values() for name in columns]
)
_OPTIONAL = frozenset(
    [
        *(name for columns in COLUMNS.values() for name in columns),
        *("history", "input"),
    ]
) - {"prompt", "chosen", "rejected", "messages"}
"""Columns that a record need not have."""
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


@dataclass
class SplitReader:
    """Turns the raw records of one split into records for `read_record`.

    The first record that fits a shape decides the shape of the split; `format` of the source
    narrows the shapes to those of its name, or is a function of the user.

    Raises:
        DataError: `columns` of the source names something that no shape reads.
        OwnCodeError: the user's function cannot be imported.
    """

    source: SourceConfig
    read_record: ReadRecord
    place: str
    seed: int
    shape: Shape | None = None
    _own: Callable[[Any], Any] | None = None
    _first: tuple[int, Record] | None = None
    _verdict: Verdict = field(default_factory=Verdict)
    _found: set[str] = field(default_factory=set)
    _json_columns: frozenset[str] = field(default=frozenset([*_MESSAGES, *_LISTS, "input"]))

    def __post_init__(self) -> None:
        if self.source.format is not None and is_function(self.source.format):
            self._own = _own_form(self.source.format)
            return
        for theirs, ours in self.source.columns.items():
            if ours not in _KNOWN:
                near = difflib.get_close_matches(ours, sorted(_KNOWN), 1)
                hint = f"did you mean {near[0]}?" if near else "such as prompt, chosen or rejected"
                raise DataError(
                    f"data.sources.columns: {theirs}: {ours} is no column that is read ({hint})"
                )

    def read_as(self) -> str | None:
        """What the records of the split were taken for; None if that is not known."""
        if self._own:
            return self.source.format
        return self.shape.title if self.shape else None

    def records(self, record: Any, number: int) -> list[Any]:
        """The records of a raw record, and a `LeftOut` for each pair that is not made.

        Args:
            number: of the record in its split, from 1.

        Raises:
            RecordFault: the record lacks a column, or a value is none of its shape.
            DataError: the shape was taken for another one.
        """
        if isinstance(record, Mapping) and self.source.columns:
            record = self._renamed(record)
        if self._own:
            made = self._own(record)
            return made if isinstance(made, list) else [made]
        if not isinstance(record, Mapping):
            return [record]
        given = _with_json(record, self._json_columns)
        if self.shape is None:
            self._choose(record, given, number)
        if self.shape is None:
            return [record]
        return self._read(self.shape, given, number)

    def _renamed(self, record: Mapping[str, Any]) -> Record:
        """The record with its columns under our names; optional ones may be absent.

        Raises:
            RecordFault: it lacks one that is needed.
        """
        rest, found = dict(record), {}
        for theirs, ours in self.source.columns.items():
            try:
                found[ours] = _taken(rest, theirs)
                self._found.add(theirs)
            except KeyError:
                if ours in _OPTIONAL:
                    continue
                names = [name for name, _ in _flat(record)]
                near = difflib.get_close_matches(theirs, names, 1)
                hint = (
                    f"did you mean {near[0]}?" if near else f"it has {', '.join(map(str, record))}"
                )
                raise RecordFault(f"columns: the record has no {theirs} ({hint})") from None
        return rest | found

    def _choose(self, record: Mapping[str, Any], given: Record, number: int) -> None:
        self._first = self._first or (number, given)
        shapes = self._shapes()
        self.shape = next((shape for shape in shapes if shape.fits(given)), None)
        if self.shape is None and self.source.format is not None and not self._no_shape():
            # The setting stands above what the record looks like.
            self.shape = shapes[-1]
        if self.shape is not None:
            # Only these columns are parsed from now on: a reply may be text that looks like JSON.
            parsed = [key for key in self._json_columns if given.get(key) is not record.get(key)]
            self._json_columns = _NEVER_TEXT.union(parsed)

    def _shapes(self) -> list[Shape]:
        """The shapes that can be read, the first to try first."""
        wanted = [Gives.pair]
        if self.read_record is to_dialogue:
            wanted = [Gives.dialogue, Gives.pair]
        elif self.read_record is to_prompt:
            wanted = [Gives.pair, Gives.prompt]
        return [
            shape
            for gives in wanted
            for shape in SHAPES
            if shape.gives is gives and self.source.format in (None, shape.name)
        ]

    def _read(self, shape: Shape, given: Record, number: int) -> list[Any]:
        if shape.read is not as_they_are and (lacking := shape.lacks(given)):
            columns = ", ".join(str(k) for k, v in given.items() if v is not None)
            names = " or ".join(lacking[0])
            raise RecordFault(f"{names}: missing (the record has {columns or 'no value'})")
        rest = dict(given)
        try:
            if shape.read is comparison:
                made: Record | Scored = comparison(rest, self._verdict)
            else:
                made = shape.read(rest)
        except WrongShape as error:
            raise DataError(f"{self.place} record {number}: {error}") from error
        if not isinstance(made, Scored):
            return [rest | made]
        if self.read_record is to_prompt:
            return [rest | {"prompt": made.prompt}]
        rng = np.random.default_rng([self.seed, number])
        pairs = scored_pairs(made, self.source.pairs, self.source.min_margin, rng)
        return [pair if isinstance(pair, LeftOut) else rest | pair for pair in pairs]

    def refusal(self) -> list[str]:
        """Why the split cannot be read, once all its records were, as lines; empty if it can."""
        if lines := self._no_shape():
            return lines
        missing = [name for name in self.source.columns if name not in self._found]
        if self._first and missing:
            return [f"{self.place}: columns: no record has {missing[0]}"]
        problem = None if self.read_record is to_prompt else self._verdict.problem()
        return [f"{self.place}: {problem}"] if problem else []

    def _no_shape(self) -> list[str]:
        """Why no record of the split has a shape that can be read, as lines; empty if one has."""
        if self.shape is not None or self._first is None:
            return []
        number, record = self._first
        place = f"{self.place} record {number}"
        named = [shape for shape in SHAPES if self.source.format in (None, shape.name)]
        fitting = [shape for shape in named if shape.fits(record)]
        if self.source.format is None:  # most records have a prompt
            fitting = [shape for shape in fitting if shape.gives is not Gives.prompt]
        if self.read_record is to_dialogue:  # one reply is enough
            fitting = [shape for shape in fitting if shape.name != "ratings"]
        if fitting:
            return [f"{place}: {_why_not(fitting[0])}"]
        shapes = self._shapes()
        if self.source.format is None:
            return [*_shown(place, record), *(_lists_as_text(record) or _nearest(shapes, record))]
        return [] if shapes else [f"{place}: {_why_not(named[0])}"]


def _why_not(shape: Shape) -> str:
    """Why the records of a shape cannot be read here, and what to do."""
    if shape.gives is Gives.dialogue:
        return f"{shape.needs[-1][0]} has no rejected reply (loss=sft imitates it)"
    if shape.gives is Gives.prompt:
        return "a prompt alone has no replies (simpo generate makes some)"
    return shape.why_not


def _own_form(name: str) -> Callable[[Any], Any]:
    """The user's function that converts a record; its exceptions become faults of the record."""
    function = load("data.sources.format", name)

    def form(record: Any) -> Any:
        try:
            return function(record)
        except Exception as error:
            raise RecordFault(f"{name}: {type(error).__name__}: {first_line(error)}") from error

    return form


def _taken(record: Record, name: str) -> Any:
    """Take a column out of a record; `a.b` is the key b of the object a.

    Raises:
        KeyError: the record has no such column.
    """
    if name in record:
        return record.pop(name)
    head, _, below = name.partition(".")
    inner = record.get(head)
    if not below or not isinstance(inner, Mapping):
        raise KeyError(name)
    record[head] = left = dict(inner)
    value = _taken(left, below)
    if not left:
        del record[head]
    return value


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of each column, and of the keys of objects as `a.b`."""
    for key, value in record.items():
        yield str(key), value
        if isinstance(value, Mapping) and not is_message(value):
            yield from ((f"{key}.{inner}", item) for inner, item in value.items())


def _with_json(record: Mapping[str, Any], columns: frozenset[str]) -> Record:
    """The record with lists in place of their JSON, as the cells of a CSV file hold it."""
    given = dict(record)
    for name in columns:
        text = given.get(name)
        if isinstance(text, str) and text.lstrip()[:1] in ("[", "{"):
            given[name] = _from_json(text, name)
    return given


def _from_json(text: str, name: str) -> Any:
    """The value of a text that is JSON, or what Python prints for it; the text if it is neither, or
    not what the column may hold."""
    value: Any = None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
            break
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    if name == "input":
        return value if isinstance(value, dict) and "messages" in value else text
    if name == "output":
        two = isinstance(value, list) and len(value) == 2
        return value if two and all(isinstance(item, str) for item in value) else text
    messages = value if isinstance(value, list) else [value]
    if messages and all(map(is_message, messages)):
        return value
    return value if name in _LISTS and isinstance(value, list) else text


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
        and (is_messages_as_text(value) or (name in _NEVER_TEXT and value.lstrip()[:1] == "["))
    ]
    return [f"({', '.join(names)}: lists as text that is not JSON; write JSON)"] if names else []


def _nearest(shapes: list[Shape], record: Mapping[str, Any]) -> list[str]:
    """Lines with the shape that a record is nearest to, what it lacks, and what to set."""

    def nearness(shape: Shape) -> tuple[int, bool, int]:
        one = shape.gives is Gives.dialogue
        lacking = shape.lacks(record)
        if not lacking:  # values of another kind
            return len(shape.needs) - 3, one, 0
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
    named = [f"{guesses.get(names[0], '...')}: {names[0]}" for names in lacking]
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
    free = [name for name, value in _flat(record) if name not in used and value is not None]
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
