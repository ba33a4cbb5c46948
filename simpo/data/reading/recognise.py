"""Finds the shape of a split's records, and turns each of them into those that `records` reads."""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simpo.config.choices import PairChoice
from simpo.config.data import SourceConfig
from simpo.config.errors import DataError, did_you_mean
from simpo.config.own_code import RAISED, fault_of, is_function, load_function
from simpo.data.pairs import Pair
from simpo.data.reading.hints import NEVER_TEXT, fits_no_shape, named_values
from simpo.data.reading.records import (
    COLUMNS,
    RANKED,
    RecordFault,
    to_dialogue,
    to_labelled,
    to_prompt,
    to_ranking,
)
from simpo.data.reading.scored import (
    SCORES,
    LeftOut,
    Scored,
    Verdict,
    WrongShape,
    comparison,
    ranked_record,
    replies,
    scored_pairs,
)
from simpo.data.reading.shapes import (
    SHAPES,
    Gives,
    Record,
    Shape,
    as_they_are,
)
from simpo.data.reading.turns import is_message

ReadRecord = Callable[[Any, str], Pair]
_MESSAGES = (
    *("prompt", "context", "chosen", "rejected", "messages", "conversations", "conversation"),
    *("completion", "response"),
)
_LISTS = (
    *("preferred_output", "non_preferred_output", "responses", "completions", "answers"),
    *("generations", "replies", *SCORES, "history", "output"),
)
_KNOWN = frozenset(
    [name for shape in SHAPES for names in (*shape.needs, shape.optional) for name in names]
    + [name for columns in COLUMNS.values() for name in columns]
)
_REPLIES = next(shape for shape in SHAPES if shape.read is replies)
_OPTIONAL = frozenset(
    [
        *(name for columns in COLUMNS.values() for name in columns),
        *("history", "input"),
    ]
) - {"prompt", "chosen", "rejected", "messages", "completion", "label", *RANKED}
"""Columns that a record need not have."""
_USES_TWO = (
    "uses two of the scored replies (pairs: all of the source makes a pair of each two, "
    "loss.compare=all compares all of them)"
)


@dataclass
class SplitReader:
    """Turns the raw records of one split into records for `read_record`.

    The first record that fits a shape decides the shape of the split; `format` of the source
    narrows the shapes to those of its name, or is a function of the user. `remarks`
    counts what the user should know of records that are used.

    Raises:
        DataError: `columns` of the source names something that no shape reads.
        OwnCodeError: the user's function cannot be imported.
    """

    source: SourceConfig
    read_record: ReadRecord
    place: str
    seed: int
    shape: Shape | None = None
    remarks: Counter[str] = field(default_factory=Counter)
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
                hint = did_you_mean(ours, sorted(_KNOWN), "such as prompt, chosen or rejected")
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
            own = self._own(record)
            made = own if isinstance(own, list) else [own]
            return [found for one in made for found in self._all_replies(one, number)]
        if not isinstance(record, Mapping):
            return [record]
        given = _with_json(record, self._json_columns)
        if self.shape is None:
            self._choose(record, given, number)
        if self.shape is None:
            return [record]
        return self._read(self.shape, given, number)

    def _all_replies(self, record: Any, number: int) -> list[Any]:
        """The records of one that a user's function gave, which may hold scored replies."""
        if self.read_record is to_prompt or not isinstance(record, Mapping):
            return [record]
        told = (record.get(name) for name in ("chosen", "messages", "completion"))
        whole = all(one is None for one in told) and record.get("responses") is not None
        return self._read(_REPLIES, dict(record), number) if whole else [record]

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
                names = [name for name, _ in named_values(record)]
                hint = did_you_mean(theirs, names, f"it has {', '.join(map(str, record))}")
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
            self._json_columns = NEVER_TEXT.union(parsed)

    def _shapes(self) -> list[Shape]:
        """The shapes that can be read, the first to try first."""
        wanted, shapes = [Gives.pair], list(SHAPES)
        if self.read_record is to_ranking:  # all replies tell more than two of them
            shapes.insert(0, _REPLIES)
        if self.read_record is to_dialogue:
            wanted = [Gives.dialogue, Gives.pair]
        elif self.read_record is to_labelled:
            wanted = [Gives.pair, Gives.labelled]
        elif self.read_record is to_prompt:
            wanted = [Gives.pair, Gives.prompt, Gives.dialogue]
        return [
            shape
            for gives in wanted
            for shape in shapes
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
        if self.read_record is to_ranking:
            one = ranked_record(made, self.source.min_margin)
            return [one if isinstance(one, LeftOut) else rest | one]
        rng = np.random.default_rng([self.seed, number])
        pairs = scored_pairs(made, self.source.pairs, self.source.min_margin, rng)
        records = [pair if isinstance(pair, LeftOut) else rest | pair for pair in pairs]
        takes_two = self.source.pairs is not PairChoice.all and isinstance(records[0], dict)
        if takes_two and len(made.replies) > 2 and self.read_record is not to_dialogue:
            self.remarks[f"{self.source.pairs.value} {_USES_TWO}"] += 1
        return records

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
            return fits_no_shape(place, record, shapes, self.source.columns)
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
    function = load_function("data.sources.format", name)

    def form(record: Any) -> Any:
        try:
            found = function(record)
        except RAISED as error:
            raise RecordFault(f"{name}: {fault_of(error, name)}") from error
        if found is None:
            raise RecordFault(f"{name}: must return a record or a list of them, got None")
        return found

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
