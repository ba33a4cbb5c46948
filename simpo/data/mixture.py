"""Sources in, the pairs to train on and the pairs held out, with a table of what was taken.

Every row of a split is read and checked. Of the good ones a train split gives `weight` times
their number, or `num_pairs`, taken from a seeded shuffle; a test split gives all of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from simpo.config import DataConfig, OnBadRow, SourceConfig
from simpo.data.demo import demo_rows
from simpo.data.rows import RowFault, to_pair
from simpo.errors import DataError, first_line
from simpo.pairs import Pair

MAX_FAULTS_SHOWN = 5


@dataclass(frozen=True)
class SplitReport:
    """What one split of one source gave: rows it has, bad rows by fault, pairs taken."""

    source: str
    split: str
    rows: int
    bad: dict[str, int]
    taken: int


@dataclass(frozen=True)
class Mixture:
    """The pairs of a run and the table of where they came from."""

    train: list[Pair]
    test: list[Pair]
    table: list[SplitReport]


def load_mixture(config: DataConfig, read_row: Callable[[Any, str], Pair] = to_pair) -> Mixture:
    """Read, check and mix all sources.

    Args:
        read_row: from a row and its place to what is wanted of it; see `simpo.data.rows`.

    Raises:
        DataError: a source cannot be read, a row is bad (with on_bad_row=stop), or nothing is left.
    """
    train: list[Pair] = []
    test: list[Pair] = []
    table: list[SplitReport] = []
    read = partial(_read_split, config=config, read_row=read_row)
    for index, source in enumerate(config.sources):
        if source.train_split is not None:
            pairs, rows, bad = read(source, source.train_split, False)
            taken = _take(pairs, source, np.random.default_rng([config.seed, index]))
            train += taken
            table.append(SplitReport(source.path, source.train_split, rows, bad, len(taken)))
        if source.test_split is not None and (not source.is_file() or source.test_path):
            pairs, rows, bad = read(source, source.test_split, True)
            test += pairs
            table.append(SplitReport(source.path, source.test_split, rows, bad, len(pairs)))
    if not train:
        counts = ", ".join(
            f"{t.source} {t.split}: {t.rows} rows, {sum(t.bad.values())} bad" for t in table
        )
        raise DataError(f"data.sources: no row left to train on ({counts})")
    return Mixture(train, test, table)


def _read_split(
    source: SourceConfig,
    split: str,
    held_out: bool,
    config: DataConfig,
    read_row: Callable[[Any, str], Pair],
) -> tuple[list[Pair], int, dict[str, int]]:
    pairs: list[Pair] = []
    faults: list[tuple[str, str]] = []
    num_rows = 0
    origin = f"{_origin(source, held_out)} {split}"
    for row in _raw_rows(source, split, held_out, config.seed):
        num_rows += 1
        place = f"{origin} row {num_rows}"
        try:
            if isinstance(row, json.JSONDecodeError):
                raise RowFault(f"not JSON: {row.msg} at column {row.colno}")
            pairs.append(read_row(row, place))
        except RowFault as fault:
            faults.append((place, str(fault)))
    if faults and config.on_bad_row is OnBadRow.stop:
        raise DataError(fault_lines(faults))
    return pairs, num_rows, dict(Counter(fault for _, fault in faults))


def fault_lines(faults: list[tuple[str, str]]) -> str:
    """The message for bad rows, given as (place, fault): a line each, the first few of them."""
    lines = [f"{place}: {fault}" for place, fault in faults[:MAX_FAULTS_SHOWN]]
    if len(faults) > MAX_FAULTS_SHOWN:
        more = len(faults) - MAX_FAULTS_SHOWN
        lines.append(f"... and {more} more bad row{'s' if more > 1 else ''}")
    return "\n".join([*lines, "(mend the rows, or leave them out with data.on_bad_row=drop)"])


def _origin(source: SourceConfig, held_out: bool) -> str:
    return source.test_path if held_out and source.test_path else source.path


def _raw_rows(source: SourceConfig, split: str, held_out: bool, seed: int) -> Iterator[Any]:
    path = Path(_origin(source, held_out)).expanduser()
    # datasets reports faults in many types and over many lines.
    try:
        if source.path == "builtin:demo":
            yield from demo_rows(seed, split)
        elif path.suffix == ".jsonl":
            yield from _json_lines(path)
        else:
            yield from _dataset(source, path, split)
    except Exception as error:
        # "An error occurred while generating the dataset" has its reason in the cause.
        cause = error.__cause__ or error
        place = f"{_origin(source, held_out)} {split}"
        raise DataError(f"{place}: cannot be read: {first_line(cause)}") from error


def _json_lines(path: Path) -> Iterator[Any]:
    """The value of each line that is not blank, or the error of one that is no JSON."""
    # Some editors begin a file with a byte order mark.
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                try:
                    # With its line feed, a cut line would be faulted at column 1 of the next.
                    yield json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    yield error


def _dataset(source: SourceConfig, path: Path, split: str) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    if source.is_file():
        kind = "parquet" if path.suffix == ".parquet" else "json"
        return load_dataset(kind, data_files=str(path), split="train")
    if path.is_dir() and any((path / f).exists() for f in ("dataset_dict.json", "state.json")):
        saved = load_from_disk(str(path))
        # A folder that holds one data set and no names for its splits is one split, as a file is.
        only = source.train_split or source.test_split
        splits: dict[Any, Any] = saved if isinstance(saved, DatasetDict) else {only: saved}
        if split not in splits:
            raise ValueError(
                f"no such split, only {', '.join(splits)} (one set to null is left out)"
            )
        return splits[split]
    name = str(path) if path.is_dir() else source.path
    return load_dataset(name, source.subset, split=split, revision=source.revision)


def _take(pairs: list[Pair], source: SourceConfig, rng: np.random.Generator) -> list[Pair]:
    """All pairs as often as the weight says, shuffled, then a shuffled part of them."""
    if source.num_pairs is not None:
        if source.num_pairs > len(pairs):
            raise DataError(
                f"{source.path} {source.train_split}: num_pairs is {source.num_pairs}, but the "
                f"split has {len(pairs)} good rows (use weight to repeat rows)"
            )
        repeats, rest = 0, source.num_pairs
    else:
        whole, share = divmod(source.weight, 1)
        repeats, rest = int(whole), round(share * len(pairs))
    order = [rng.permutation(len(pairs)) for _ in range(repeats)]
    order.append(rng.permutation(len(pairs))[:rest])
    return [pairs[i] for i in np.concatenate(order)]
