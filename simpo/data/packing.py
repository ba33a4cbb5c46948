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

from simpo.data.pairs import KeyTable, PackedPairs, Segment, TokenizedPair, segment_lengths


def pack(
    pairs: Sequence[TokenizedPair], indices: Sequence[int], share_prefix: bool = True
) -> PackedPairs:
    """Pack pairs into one row, one after the other.

    Args:
        pairs: the pairs of the row, in order.
        indices: their indices in the data set, for messages.
        share_prefix: False repeats the prompt: p p p c c | p p p r r r.

    Raises:
        ValueError: a chosen response, or another one that is not empty, has no scored token.
    """
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    segments: list[Segment] = []
    response_tokens: list[int] = []
    num_responses = max(len(pair.responses) for pair in pairs)
    end = 0
    for pair, index in zip(pairs, indices, strict=True):
        num_prompt = len(pair.prompt_ids)
        bounds: list[int] = []
        for ids, scored in zip(pair.responses, pair.scored, strict=True):
            wanted = _scored(ids, scored, num_prompt)
            if not wanted.any() and (len(ids) or ids is pair.chosen_ids):
                raise ValueError(f"pair {index}: a response has no token to score")
            response_tokens.append(int(wanted.sum()))
            if not len(ids):
                continue
            continues = bool(bounds) and share_prefix
            if not continues:
                if bounds:
                    segments.append(tuple(bounds))
                bounds = [end, end + num_prompt]
                tokens.append(pair.prompt_ids)
                positions.append(np.arange(num_prompt))
                end += num_prompt
            tokens.append(ids)
            positions.append(np.arange(num_prompt, num_prompt + len(ids)))
            before = np.arange(end - 1, end - 1 + len(ids))
            before[0] = bounds[1] - 1
            predictors.append(before[wanted])
            targets.append(ids[wanted])
            end += len(ids)
            bounds.append(end)
        segments.append(tuple(bounds))
        response_tokens += [0] * (num_responses - len(pair.responses))

    return PackedPairs(
        pairs=tuple(int(index) for index in indices),
        segments=tuple(segments),
        keys=_key_table(segments),
        num_responses=num_responses,
        response_tokens=tuple(response_tokens),
        input_ids=_column(tokens)[None],
        position_ids=_column(positions)[None],
        predictors=_column(predictors),
        targets=_column(targets),
        response_lengths=torch.tensor(response_tokens),
        reference_logps=_numbers([pair.reference_logps for pair in pairs], num_responses, 0.0),
        scores=_numbers([pair.scores for pair in pairs], num_responses, math.nan),
    )


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
    numbers: Sequence[tuple[float, ...] | None], num_responses: int, missing: float
) -> torch.Tensor | None:
    """A number for each response of each pair, float32 [P * K]; None if a pair has none."""
    known = [line for line in numbers if line is not None]
    if len(known) < len(numbers):
        return None
    padded = [[*line, *[missing] * (num_responses - len(line))] for line in known]
    return torch.tensor(padded, dtype=torch.float32).flatten()


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
