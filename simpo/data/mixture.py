"""Mixes the sources into train and test pairs, and counts what each source contributed.

Every record of a split is read and checked. From the good records of a train split `weight` times
their number, or `num_pairs`, are taken in a seeded random order; a test split is taken whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from simpo.config.choices import OnBadRecord, Reasoning
from simpo.config.data import DataConfig, SourceConfig
from simpo.config.errors import DataError
from simpo.data.cleaning.filter import (
    KEY_BYTES,
    left_out,
    pair_text,
    prompt_text,
    text_key,
    unscored_notes,
)
from simpo.data.pairs import Pair
from simpo.data.reading.recognise import SplitReader
from simpo.data.reading.records import (
    COLUMNS,
    RecordFault,
    drop_reasoning,
    remarks,
    to_labelled,
    to_pair,
    unread_columns,
)
from simpo.data.reading.scored import LeftOut
from simpo.data.reading.sources import origin, raw_records
from simpo.data.texts import PairFile, Picked
from simpo.run.progress import say

MAX_FAULTS_SHOWN = 5
MAX_LETTERS_SHOWN = 300
TOO_DEEP = "lists or objects are nested too deeply"
LABELS = ("desirable", "undesirable")


@dataclass(frozen=True)
class SplitReport:
    """Counts of one split of one source: all records, bad records by fault, pairs taken, and pairs
    left out by the key of the check (see `simpo.data.cleaning.filter`)."""

    source: str
    split: str
    records: int
    bad: dict[str, int]
    taken: int
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Mixture:
    """The pairs of a run, and a table of the splits they came from.

    Attributes:
        notes: lines for the user about records that look wrong but are used.
        read: all good train pairs of the sources, before any is left out, chosen or repeated.
        faults: (place, fault) of each bad record.
    """

    train: Sequence[Pair]
    test: Sequence[Pair]
    table: list[SplitReport]
    notes: list[str]
    read: Sequence[Pair]
    faults: list[tuple[str, str]]


@dataclass
class _Split:
    """What is known of one split: bad records as (place, fault), and remarks for the user.

    `index` is that of its source, and `held_out_set` is empty for a train split. Its good pairs lie
    in the file from `first` on. The keys are hashes of their prompts and of all their texts, one
    after the other. `read_as` is the shape of the records, and `not_made` counts pairs that are not
    made by reason. Of good records `labels` counts single replies, and `replies` the ranked ones by
    their number of replies.
    """

    source: SourceConfig
    index: int
    held_out_set: str
    first: int
    read_as: str | None = None
    records: int = 0
    prompt_keys: bytearray = field(default_factory=bytearray)
    pair_keys: bytearray = field(default_factory=bytearray)
    faults: list[tuple[str, str]] = field(default_factory=list)
    unread: dict[str, None] = field(default_factory=dict)
    remarks: Counter[str] = field(default_factory=Counter)
    not_made: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    replies: Counter[int] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        return str(self.source.test_split if self.held_out_set else self.source.train_split)

    @property
    def place(self) -> str:
        return f"{origin(self.source, bool(self.held_out_set))} {self.name}"

    @property
    def num_pairs(self) -> int:
        return len(self.pair_keys) // KEY_BYTES

    def pairs(self) -> np.ndarray:
        """The places of its pairs in the file, int64 [pairs]."""
        return np.arange(self.first, self.first + self.num_pairs, dtype=np.int64)

    def report(self, taken: int, left_out: Mapping[str, int]) -> SplitReport:
        bad = dict(Counter(fault for _, fault in self.faults))
        return SplitReport(self.source.path, self.name, self.records, bad, taken, dict(left_out))

    def counts(self) -> str:
        """The numbers of records and of bad ones, with what most of them have."""
        bad = f"{len(self.faults)} bad"
        if self.faults:
            ((fault, _),) = Counter(fault for _, fault in self.faults).most_common(1)
            bad += f" (most often: {fault})"
        return ", ".join([f"{self.place}: {self._num_records()}", bad, *self._not_made()])

    def _num_records(self) -> str:
        return f"{self.records} record{'s' if self.records != 1 else ''}{self._kinds()}"

    def _kinds(self) -> str:
        """What a loss of single or of ranked replies is told of them, as text."""
        if self.labels:
            return ", " + ", ".join(f"{self.labels[label]} {label}" for label in LABELS)
        if self.replies:
            sizes = sorted({min(self.replies), max(self.replies)})
            return f" of {' to '.join(map(str, sizes))} replies"
        return ""

    def _not_made(self) -> list[str]:
        return [f"{count} pairs not made: {reason}" for reason, count in self.not_made.items()]

    def notes(self) -> list[str]:
        lines = []
        if self.read_as:
            lines.append(f"note   {self.place}: read as {self.read_as}, {self._num_records()}")
        lines += [f"note   {self.place}: {line}" for line in self._not_made()]
        lines += [
            f"note   {self.place}: {count} of {self.records} records: {remark}"
            for remark, count in self.remarks.items()
        ]
        if not self.num_pairs:
            lines.append(f"note   {self.place}: no good record in {self.records}, so none is taken")
        if self.unread:
            lines.append(f"note   {self.place}: columns not read: {', '.join(self.unread)}")
        return [_printable(line) for line in lines]


def load_mixture(
    config: DataConfig,
    read_record: Callable[[Any, str], Pair] = to_pair,
    folder: Path | None = None,
) -> Mixture:
    """Read, check and mix all sources.

    Args:
        read_record: turns a record and its place into a pair; see `simpo.data.reading.records`.
        folder: where the texts lie while the mixture is used; see `simpo.data.texts`.

    Raises:
        DataError: a source cannot be read, a record is bad (with on_bad_record=stop), or no record
            is left to train on.
        RunError: there is no room for the texts.
    """
    file = PairFile(folder)
    splits: list[_Split] = []
    for index, held_out_set in enumerate(config.held_out_names()):
        source = config.sources[index]
        say(f"reading {source.path} ...")
        if source.train_split is not None:
            splits.append(_read_split(config, index, "", file, read_record))
        if source.has_held_out():
            splits.append(_read_split(config, index, held_out_set, file, read_record))
    pairs = file.pairs()
    train_splits = [split for split in splits if not split.held_out_set]
    held_out = _joined(split.pairs() for split in splits if split.held_out_set)
    read = Picked(pairs, _joined(split.pairs() for split in train_splits))
    test = Picked(pairs, held_out)
    keys = left_out(read, test, config)
    next_keys = iter(keys)
    taken: list[np.ndarray] = []
    table: list[SplitReport] = []
    notes: list[str] = []
    for split in splits:
        if split.held_out_set:
            table.append(split.report(split.num_pairs, {}))
        else:
            own = list(islice(next_keys, split.num_pairs))
            stay = split.pairs()[np.array([key is None for key in own], dtype=bool)]
            taken.append(_take(stay, split, config.seed))
            table.append(split.report(len(taken[-1]), Counter(filter(None, own))))
        notes += split.notes()
    train = _joined(taken)
    notes += unscored_notes(read, config)
    notes += _overlap_notes(train, held_out, splits)
    notes += _repeat_notes(train_splits)
    if not len(train):
        counts = ", ".join(split.counts() for split in splits)
        by_key = Counter(filter(None, keys))
        left = "".join(f"; {count} left out by data.{key}" for key, count in by_key.items())
        raise DataError(f"data.sources: no record left to train on ({counts}{left})")
    faults = [fault for split in splits for fault in split.faults]
    return Mixture(Picked(pairs, train), test, table, notes, read, faults)


def load_held_out(
    config: DataConfig, read_record: Callable[[Any, str], Pair], folder: Path | None
) -> Sequence[Pair]:
    """The held-out pairs of all sources alone; arguments and errors as `load_mixture`."""
    file = PairFile(folder)
    splits = [
        _read_split(config, index, held_out_set, file, read_record)
        for index, held_out_set in enumerate(config.held_out_names())
        if config.sources[index].has_held_out()
    ]
    return Picked(file.pairs(), _joined(split.pairs() for split in splits))


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Places of pairs, one after the other."""
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _read_split(
    config: DataConfig,
    index: int,
    held_out_set: str,
    file: PairFile,
    read_record: Callable[[Any, str], Pair],
) -> _Split:
    """Read a split of a source into the file; `held_out_set` is empty for its train split."""
    source = config.sources[index]
    found = _Split(source, index, held_out_set, len(file))
    reader = SplitReader(source, read_record, found.place, config.seed)
    raw = raw_records(source, found.name, bool(held_out_set), config.seed)
    for where, record in raw:
        found.records += 1
        place = f"{found.place} {where}"
        try:
            if isinstance(record, RecordFault):
                raise record
            made = reader.records(record, found.records)
        except RecordFault as fault:
            found.faults.append((place, _printable(str(fault))))
        except RecursionError:
            found.faults.append((place, TOO_DEEP))
        else:
            for index, one in enumerate(made, start=1):
                pair_place = f"{place} pair {index}" if len(made) > 1 else place
                _read_pair(found, file, one, pair_place, read_record, config.reasoning)
    if refusal := reader.refusal():
        raise DataError("\n".join(map(_printable, refusal)))
    found.remarks.update(reader.remarks)
    found.read_as = None if source.path.startswith("builtin:") else reader.read_as()
    if found.faults and config.on_bad_record is OnBadRecord.stop:
        raise DataError(fault_lines(found.faults, all_bad=not found.num_pairs))
    return found


def _read_pair(
    found: _Split,
    file: PairFile,
    record: Any,
    place: str,
    read_record: Callable[[Any, str], Pair],
    reasoning: Reasoning,
) -> None:
    """Add the pair of one record to the file and its split, or its fault."""
    if isinstance(record, LeftOut):
        found.not_made[record.reason] += 1
        return
    try:
        pair = read_record(record, place)
        if reasoning is Reasoning.drop:
            pair = drop_reasoning(pair)
    except RecordFault as fault:
        found.faults.append((place, _printable(str(fault))))
    except RecursionError:
        found.faults.append((place, TOO_DEEP))
    else:
        file.add(replace(pair, held_out_set=found.held_out_set))
        found.prompt_keys += text_key(prompt_text(pair))
        found.pair_keys += text_key(pair_text(pair))
        if pair.scores:
            found.replies[len(pair.responses)] += 1
        elif read_record is to_labelled and len(pair.responses) == 1:
            found.labels[LABELS[pair.is_undesirable]] += 1
        found.unread |= dict.fromkeys(unread_columns(record, COLUMNS[read_record]))
        found.remarks.update(remarks(record, pair))


def _overlap_notes(train: np.ndarray, test: np.ndarray, splits: list[_Split]) -> list[str]:
    """A line with the number of train pairs whose prompt is also held out, if there are any.

    Args:
        train, test: places of the pairs among those of all splits.
    """
    if not len(test):
        return []
    prompts = _keys(b"".join(split.prompt_keys for split in splits))
    pairs = _keys(b"".join(split.pair_keys for split in splits))
    shared = train[np.isin(prompts, prompts[test])[train]]
    if not len(shared):
        return []
    same_pair = np.isin(pairs[shared], pairs[test]).sum()
    return [
        f"note   {len(shared)} of {len(train)} train pairs have a prompt that is also held out, "
        f"{same_pair} of them with the same replies "
        "(data.drop_overlap=true leaves them out of training)"
    ]


def _repeat_notes(splits: list[_Split]) -> list[str]:
    """A line for each train split that contains the same pair several times."""
    lines = []
    for split in splits:
        if repeats := split.num_pairs - len(np.unique(_keys(split.pair_keys))):
            lines.append(f"note   {split.place}: {repeats} records repeat an earlier one")
    return [_printable(line) for line in lines]


def _keys(joined: bytes | bytearray) -> np.ndarray:
    """Hashes that lie one after the other, bytes [hashes]."""
    return np.frombuffer(joined, f"S{KEY_BYTES}")


def _printable(text: str) -> str:
    """Text of a record as one line: shortened, with unprintable characters escaped."""
    shown = text if len(text) <= MAX_LETTERS_SHOWN else f"{text[:MAX_LETTERS_SHOWN]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def fault_lines(
    faults: list[tuple[str, str]], all_bad: bool = False, of_template: bool = False
) -> str:
    """The message for bad records: a line for each of the first few, and a remedy.

    Args:
        faults: (place, fault) of each bad record.
        all_bad: every record is bad, so dropping the bad ones is no remedy.
        of_template: the faults are those of records that the chat template cannot write.
    """
    lines = [f"{place}: {fault}" for place, fault in faults[:MAX_FAULTS_SHOWN]]
    if len(faults) > MAX_FAULTS_SHOWN:
        more = len(faults) - MAX_FAULTS_SHOWN
        lines.append(f"... and {more} more bad record{'s' if more > 1 else ''}")
    remedy = "(mend the records, or leave them out with data.on_bad_record=drop)"
    if all_bad and of_template:
        remedy = "(no record can be written by the chat template: docs/data.md, Chats)"
    elif all_bad:
        remedy = "(no record is good: bring them into one of the forms of docs/data.md)"
    return "\n".join([*lines, remedy])


def _take(pairs: np.ndarray, split: _Split, seed: int) -> np.ndarray:
    """Shuffled copies of all pairs, as often as the weight's whole part, then a random subset for
    its fraction; with `num_pairs` a random subset of that size.

    Raises:
        DataError: the split has fewer pairs than `num_pairs`, or the weight selects none.
    """
    source, rng = split.source, np.random.default_rng([seed, split.index])
    if source.num_pairs is not None:
        if source.num_pairs > len(pairs):
            raise DataError(
                f"{split.place}: num_pairs is {source.num_pairs}, but the "
                f"split has {len(pairs)} good records (use weight to repeat records)"
            )
        repeats, rest = 0, source.num_pairs
    else:
        whole, share = divmod(source.weight, 1)
        repeats, rest = int(whole), round(share * len(pairs))
        if len(pairs) and repeats + rest == 0:
            raise DataError(
                f"data.sources[{split.index}].weight: {source.weight} of {len(pairs)} records "
                "rounds to none (raise it)"
            )
    order = [rng.permutation(len(pairs)) for _ in range(repeats)]
    order.append(rng.permutation(len(pairs))[:rest])
    return pairs[np.concatenate(order)]
