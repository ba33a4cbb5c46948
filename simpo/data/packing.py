"""Packs tokenized pairs into one row that contains each prompt once.

Two pairs with prompts of 3 and 2 tokens become

    tokens     p p p c c r r r | q q c r r
    positions  0 1 2 3 4 3 4 5 | 0 1 2 2 3

Each response continues the positions of its prompt, and `simpo.model.attention` hides the other
responses from it; ranked responses follow in the same way. Computing the shared prompt of a pair
once follows https://arxiv.org/abs/2410.20305.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import torch

from simpo.data.pairs import (
    KeyTable,
    PackedPairs,
    Segment,
    TokenizedPair,
    padded,
    segment_lengths,
)


def pack(
    pairs: Sequence[TokenizedPair], indices: Sequence[int], share_prefix: bool = True
) -> PackedPairs:
    """Pack pairs into one row, one after the other.

    Args:
        pairs: the pairs of the row, in order.
        indices: their indices in the data set, for messages.
        share_prefix: False repeats the prompt: p p p c c | p p p r r r.

    Raises:
        ValueError: a response that is not empty has no scored token, or all responses are empty.
    """
    num_responses = max(len(pair.responses) for pair in pairs)
    row = _Row()
    for pair, index in zip(pairs, indices, strict=True):
        row.add(pair, index, share_prefix)
        row.response_tokens += [0] * (num_responses - len(pair.responses))
    return PackedPairs(
        pairs=tuple(int(index) for index in indices),
        segments=tuple(row.segments),
        keys=_key_table(row.segments),
        num_responses=num_responses,
        response_tokens=tuple(row.response_tokens),
        input_ids=_column(row.tokens)[None],
        position_ids=_column(row.positions)[None],
        predictors=_column(row.predictors),
        targets=_column(row.targets),
        response_lengths=torch.tensor(row.response_tokens),
        reference_logps=_numbers([pair.reference_logps for pair in pairs], num_responses, 0.0),
        scores=_numbers([pair.scores for pair in pairs], num_responses, math.nan, True),
    )


class _Row:
    """The parts of a row, one after the other."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.predictors: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.response_tokens: list[int] = []
        self._end = 0

    def add(self, pair: TokenizedPair, index: int, share_prefix: bool) -> None:
        """Append a pair: its prompt once, or before each response."""
        num_prompt, bounds = len(pair.prompt_ids), list[int]()
        for ids, scored in zip(pair.responses, pair.scored, strict=True):
            wanted = _scored(ids, scored, num_prompt)
            if not wanted.any() and len(ids):
                raise ValueError(f"pair {index}: a response has no token to score")
            self.response_tokens.append(int(wanted.sum()))
            if not len(ids):
                continue
            if bounds and not share_prefix:
                self.segments.append(tuple(bounds))
                bounds = []
            if not bounds:
                bounds = [self._end, self._append(pair.prompt_ids, 0)]
            before = np.arange(self._end - 1, self._end - 1 + len(ids))
            before[0] = bounds[1] - 1
            self.predictors.append(before[wanted])
            self.targets.append(ids[wanted])
            bounds.append(self._append(ids, num_prompt))
        if not bounds:
            raise ValueError(f"pair {index}: a response has no token to score")
        self.segments.append(tuple(bounds))

    def _append(self, ids: np.ndarray, position: int) -> int:
        """Append tokens, the first of them at a position; the end of the row then."""
        self.tokens.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self._end += len(ids)
        return self._end


def placeholder_row(pair: TokenizedPair, share_prefix: bool = True) -> PackedPairs:
    """A row for a process that has no pairs: its tokens are computed, but `pairs` is empty.

    Sharded layers are gathered by all processes, so each must run a forward. The result is not
    counted.
    """
    return replace(pack([pair], [0], share_prefix), pairs=())


def _column(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _scored(ids: np.ndarray, scored: np.ndarray | None, num_prompt: int) -> np.ndarray:
    """Which tokens of a response are scored, bool [length]: all of them if `scored` is None.

    The first token is not scored without a prompt, as nothing predicts it.
    """
    wanted = np.ones(len(ids), dtype=bool) if scored is None else scored.copy()
    wanted[: 0 if num_prompt else 1] = False
    return wanted


def _numbers(
    numbers: Sequence[tuple[float, ...] | None],
    num_responses: int,
    missing: float,
    partly: bool = False,
) -> torch.Tensor | None:
    """A number for each response of each pair, float32 [P * K]; None if a pair has none, or with
    `partly` if no pair has any."""
    known = [line is not None for line in numbers]
    if not (any(known) if partly else all(known)):
        return None
    whole = [padded(line or (), num_responses, missing) for line in numbers]
    return torch.tensor(whole, dtype=torch.float32).flatten()


def _key_table(segments: Sequence[Segment]) -> KeyTable:
    index = []
    for start, prompt, first, *ends in segments:
        index.append(np.arange(start, first))
        shared = np.arange(start, prompt)
        for begin, end in pairwise((first, *ends)):
            index.append(np.concatenate([shared, np.arange(begin, end)]))
    queries = segment_lengths(segments)
    keys = [len(part) for part in index]
    return KeyTable(
        index=torch.from_numpy(np.concatenate(index)),
        query_ends=torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        key_ends=torch.tensor([0, *accumulate(keys)], dtype=torch.int32),
        longest_queries=max(queries),
        longest_keys=max(keys),
    )
