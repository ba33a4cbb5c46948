"""Reads, checks and tokenizes the data of a run, and packs this process's share into rows."""

from __future__ import annotations

import ctypes
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from simpo.config.schema import RunConfig
from simpo.data.chats.chat import Chat
from simpo.data.mismatched import with_mismatched
from simpo.data.mixture import Mixture, SplitReport, load_mixture
from simpo.data.packing import pack, placeholder_row
from simpo.data.pairs import PackedPairs
from simpo.data.plan import TrainPlan, pairs_of_step, rows_of_pairs
from simpo.data.reading.for_loss import reader_of
from simpo.data.store import TokenizedSet
from simpo.data.tokens import settings_hash, stored_set, tokenize_set
from simpo.data.unchanged import Sources
from simpo.run.progress import say

BLOCK_PAIRS = 16_384
"""A whole set is laid out in blocks of this many pairs, so that it costs time by its size only."""


@dataclass(frozen=True)
class LoadedData:
    """The tokens of the train and test pairs of a run, the table of the splits they came from, and
    notes for the user about their records."""

    table: list[SplitReport]
    notes: list[str]
    train: TokenizedSet
    test: TokenizedSet


def for_loss(run: RunConfig, data: TokenizedSet) -> TokenizedSet:
    """Tokenized pairs with what the loss needs beside them."""
    if not run.loss.needs_mismatched:
        return data
    return with_mismatched(data, run.data.max_length_tokens)


def read_mixture(run: RunConfig) -> Mixture:
    """Read and mix the sources of a run: pairs, or what else its loss trains on.

    Raises:
        DataError, RunError: as `load_mixture`.
    """
    return load_mixture(run.data, reader_of(run.loss), Path(run.cache_dir).expanduser())


def load_data(run: RunConfig, chat: Chat, cache_dir: Path) -> LoadedData:
    """Read, mix and tokenize the sources of a run, or find what they gave before.

    Raises:
        DataError: a source cannot be read, a record is bad (with on_bad_record=stop), or no record
            is left.
        RunError: as `load_mixture` and `tokenize_set`.
    """
    kind = f"{settings_hash(chat, run.data)} {reader_of(run.loss).__name__}"
    sources = Sources(run.data, cache_dir, kind)
    data = _remembered(sources, cache_dir)
    if data is None:
        data = _read(run, chat, cache_dir, sources)
        _return_memory()
    return replace(data, train=for_loss(run, data.train), test=for_loss(run, data.test))


def _remembered(sources: Sources, cache_dir: Path) -> LoadedData | None:
    """What the sources gave before; None if that is not known, or its tokens are gone."""
    known = sources.remembered()
    if not known:
        return None
    train, test = (stored_set(known[name], cache_dir) for name in ("train", "test"))
    if train is None or test is None:
        return None
    say("the sources are as they were: taking their tokens from the cache")
    return LoadedData([SplitReport(**line) for line in known["table"]], known["notes"], train, test)


def _read(run: RunConfig, chat: Chat, cache_dir: Path, sources: Sources) -> LoadedData:
    """Read, mix and tokenize the sources of a run, and remember that."""
    mixture = read_mixture(run)
    train, test = (
        tokenize_set(chat, pairs, run.data, cache_dir) for pairs in (mixture.train, mixture.test)
    )
    if train.name and test.name:
        lines = [asdict(line) for line in mixture.table]
        names = {"train": train.name, "test": test.name}
        sources.remember({"table": lines, "notes": mixture.notes, **names})
    return LoadedData(mixture.table, mixture.notes, train, test)


def _return_memory() -> None:
    """Give back the memory of texts that are no longer held, which the C library would keep."""
    with suppress(AttributeError, OSError):  # another C library than that of GNU
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class PackedSet:
    """Tokenized pairs that this process packs its share of into rows.

    Attributes:
        data: the pairs of all processes.
        tokens_per_row: token budget of a row.
        share_prefix: whether the responses of a pair share its prompt.
        rank, processes: of this process, and how many there are.
    """

    data: TokenizedSet
    tokens_per_row: int
    share_prefix: bool = True
    rank: int = 0
    processes: int = 1

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """Tokens computed for each pair, int64 [pairs]."""
        return self.data.tokens.num_tokens(self.share_prefix)

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[PackedPairs]:
        """Yield this process's rows of some pairs; every process gets the same number of rows.

        A process with too few pairs gets placeholder rows, whose result is not counted.

        Args:
            indices: indices of the pairs; None is all of them.
        """
        every = range(len(self))
        starts = range(0, len(self), BLOCK_PAIRS)
        blocks = [every[start : start + BLOCK_PAIRS] for start in starts]
        for block in blocks if indices is None else [indices]:
            rows = rows_of_pairs(block, self.num_tokens, self.tokens_per_row, self.processes)
            for row in rows[self.rank :: self.processes]:
                if row:
                    yield pack([self.data.tokens[i] for i in row], row, self.share_prefix)
                else:
                    yield placeholder_row(self.data.tokens[0], self.share_prefix)


def steps_ahead(
    plan: TrainPlan, packed: PackedSet, first: int, in_thread: bool
) -> Generator[tuple[np.ndarray, list[PackedPairs]], None, None]:
    """Yield the pairs of each step from `first` on, and this process's rows of them.

    Close the generator to end it.

    Args:
        in_thread: a thread packs the next step meanwhile. On a CPU it would slow the step down, as
            Python runs one thread at a time.
    """

    def prepare(step: int) -> tuple[np.ndarray, list[PackedPairs]]:
        indices = pairs_of_step(plan, step)
        return indices, list(packed.rows(indices))

    if not in_thread:
        yield from map(prepare, range(first, plan.total_steps))
        return
    with ThreadPoolExecutor(1, "packing") as thread:
        following = thread.submit(prepare, first)
        for step in range(first, plan.total_steps):
            ready = following.result()
            if step + 1 < plan.total_steps:
                following = thread.submit(prepare, step + 1)
            yield ready
