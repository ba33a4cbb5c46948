"""Packs tokenized pairs into one row that contains each prompt once.

Two pairs with prompts of 3 and 2 tokens become

    tokens     p p p c c r r r | q q c r r
    positions  0 1 2 3 4 3 4 5 | 0 1 2 2 3

A rejected response continues the positions of its prompt, and `simpo.model.attention` hides the
chosen response from it. Computing the shared prompt of a pair once follows
https://arxiv.org/abs/2410.20305.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

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
        ValueError: a chosen response, or a rejected one that is not empty, has no scored token.
    """
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    segments: list[Segment] = []
    response_tokens: list[int] = []
    start = 0
    for pair, index in zip(pairs, indices, strict=True):
        num_prompt = len(pair.prompt_ids)
        # Without a rejected response the prompt is not repeated.
        share = share_prefix or not len(pair.rejected_ids)
        chosen = start + num_prompt
        second_prompt = chosen + len(pair.chosen_ids)
        rejected = second_prompt if share else second_prompt + num_prompt
        end = rejected + len(pair.rejected_ids)
        tokens += [pair.prompt_ids, pair.chosen_ids]
        tokens += [pair.rejected_ids] if share else [pair.prompt_ids, pair.rejected_ids]
        again = np.arange(end - second_prompt) + (num_prompt if share else 0)
        positions += [np.arange(second_prompt - start), again]
        segments += _segments(share, start, chosen, second_prompt, rejected, end)
        for first, ids, scored in (
            (chosen, pair.chosen_ids, pair.chosen_scored),
            (rejected, pair.rejected_ids, pair.rejected_scored),
        ):
            wanted = _scored(ids, scored, num_prompt)
            if not wanted.any() and (len(ids) or ids is pair.chosen_ids):
                raise ValueError(f"pair {index}: a response has no token to score")
            before = np.arange(first - 1, first - 1 + len(ids))
            if share:
                before[:1] = chosen - 1
            predictors.append(before[wanted])
            targets.append(ids[wanted])
            response_tokens.append(int(wanted.sum()))
        start = end

    return PackedPairs(
        pairs=tuple(int(index) for index in indices),
        segments=tuple(segments),
        keys=_key_table(segments),
        response_tokens=tuple(response_tokens),
        input_ids=_column(tokens)[None],
        position_ids=_column(positions)[None],
        predictors=_column(predictors),
        targets=_column(targets),
        response_lengths=torch.tensor(response_tokens),
        reference_logps=_reference(pairs),
    )


def _segments(
    share: bool, start: int, chosen: int, second_prompt: int, rejected: int, end: int
) -> list[Segment]:
    """One of a pair whose rejected response shares the prompt, else one of each response."""
    if share:
        return [Segment(start, chosen, rejected, end)]
    return [
        Segment(start, chosen, second_prompt, second_prompt),
        Segment(second_prompt, rejected, end, end),
    ]


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


def _reference(pairs: Sequence[TokenizedPair]) -> torch.Tensor | None:
    logps = [pair.reference_logps for pair in pairs if pair.reference_logps is not None]
    return torch.tensor(logps, dtype=torch.float32).flatten() if len(logps) == len(pairs) else None


def _key_table(segments: Sequence[Segment]) -> KeyTable:
    index = []
    for start, chosen, rejected, end in segments:
        shared, own = np.arange(start, chosen), np.arange(rejected, end)
        second = np.concatenate([shared, own]) if len(own) else own
        index += [np.arange(start, rejected), second]
    queries = segment_lengths(segments)
    keys = [len(part) for part in index]
    return KeyTable(
        index=torch.from_numpy(np.concatenate(index)),
        query_ends=torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        key_ends=torch.tensor([0, *accumulate(keys)], dtype=torch.int32),
        longest_queries=max(queries),
        longest_keys=max(keys),
    )
