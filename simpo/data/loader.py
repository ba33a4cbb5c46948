"""The data of a run: read, checked and tokenized once, then packed into this process's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simpo.config.schema import RunConfig, TrainConfig
from simpo.data.chat import Chat, TokenizedSet
from simpo.data.mixture import Mixture, load_mixture
from simpo.data.packing import pack, placeholder_row
from simpo.data.pairs import PackedPairs
from simpo.data.plan import rows_of_pairs
from simpo.data.records import to_dialogue, to_pair
from simpo.data.tokens import tokenize_set


@dataclass(frozen=True)
class LoadedData:
    """What the sources gave, and the tokens of the pairs to train on and of those held out."""

    mixture: Mixture
    train: TokenizedSet
    test: TokenizedSet


def read_mixture(run: RunConfig) -> Mixture:
    """Read and mix the sources of a run: pairs, or dialogues where its loss rejects nothing.

    Raises:
        DataError: as `load_mixture`.
    """
    return load_mixture(run.data, to_pair if run.loss.needs_rejected else to_dialogue)


def load_data(run: RunConfig, chat: Chat, cache_dir: Path) -> LoadedData:
    """Read, mix and tokenize the sources of a run.

    Raises:
        DataError: a source cannot be read, a record is bad (under on_bad_record=stop), or none is
            left.
    """
    mixture = read_mixture(run)
    train, test = (
        tokenize_set(chat, pairs, run.data, cache_dir) for pairs in (mixture.train, mixture.test)
    )
    return LoadedData(mixture, train, test)


class PackedSet:
    """Tokenized pairs, and how this process packs its share of them into rows.

    Attributes:
        data: the pairs.
        num_tokens: tokens computed for each pair, int64 [pairs].
    """

    def __init__(self, data: TokenizedSet, config: TrainConfig, rank: int, processes: int) -> None:
        self.data = data
        self.num_tokens = data.num_tokens(config.share_prefix)
        self._config = config
        self._rank, self._processes = rank, processes

    def __len__(self) -> int:
        return len(self.data.pairs)

    def rows(self, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[PackedPairs]:
        """This process's rows of some pairs, as many as every other process has.

        A process without pairs of its own gets a row that counts nowhere, and takes part all the
        same.

        Args:
            indices: of the pairs; None takes all.
        """
        every: Sequence[int] | np.ndarray = range(len(self)) if indices is None else indices
        share_prefix = self._config.share_prefix
        rows = rows_of_pairs(every, self.num_tokens, self._config.tokens_per_row, self._processes)
        for row in rows[self._rank :: self._processes]:
            if row:
                yield pack([self.data.tokens[i] for i in row], row, share_prefix)
            else:
                yield placeholder_row(self.data.tokens[0], share_prefix)

    def holding(self, data: TokenizedSet) -> PackedSet:
        """The same pairs and rows with other values beside their tokens."""
        return PackedSet(data, self._config, self._rank, self._processes)
