"""The shapes a preference pair takes on its way from text to loss.

    Pair           messages, as a person reads them
    TokenizedPair  three runs of token ids: prompt, chosen, rejected
    PackedPairs    several pairs in one row, each prompt once: [P C R][P C R]...

What the model makes of a row for the loss is `simpo.loss.PairLogps`.

Letters of tensor shapes, here and everywhere:
    B rows in a forward (1: a row is packed to the budget, so rows are never padded together)
    T tokens in a row       P pairs in a row       R responses in a row (2P)
    N response tokens scored in a row              D hidden size     V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Message = dict[str, str]
"""One OpenAI-format message: `role` (system, user, assistant) and `content`."""


@dataclass(frozen=True)
class Pair:
    """A prompt and the two replies to it, with the place they came from.

    `rule` is what a program can check in a reply (see `simpo.data.rules`), or None. For supervised
    fine-tuning `rejected` is None and `later` holds the turns after the chosen reply.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str | None
    place: str
    rule: Mapping[str, Any] | None = None
    later: tuple[Message, ...] = ()


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of a pair, each an int32 array [length].

    `chosen_ids` and `rejected_ids` follow the prompt directly; neither is empty, but `rejected_ids`
    where nothing is rejected. There `scored`, bool [length of chosen_ids], leaves out what others
    say between replies. `reference_logps`, summed over each response, are there once a reference
    has scored the pair.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    scored: np.ndarray | None = None
    reference_logps: tuple[float, float] | None = None

    @staticmethod
    def of(prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenizedPair:
        """From lists of token ids."""
        arrays = [np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)]
        return TokenizedPair(arrays[0], arrays[1], arrays[2])

    def num_tokens(self, share_prefix: bool = True) -> int:
        """Tokens computed for the pair, its prompt once or for each response."""
        prompts = len(self.prompt_ids) * (1 if share_prefix or not len(self.rejected_ids) else 2)
        return prompts + len(self.chosen_ids) + len(self.rejected_ids)


class Tokenized(NamedTuple):
    """A tokenized pair, and what happened to it on the way.

    Attributes:
        merged: the template's end of the prompt became one token with the response's beginning.
        prompt_cut, chosen_cut, rejected_cut: tokens were left out to fit.
    """

    pair: TokenizedPair
    merged: bool
    prompt_cut: bool
    chosen_cut: bool
    rejected_cut: bool


class Segment(NamedTuple):
    """Where a pair lies in its row: prompt [start, chosen), chosen [chosen, rejected), ..."""

    start: int
    chosen: int
    rejected: int
    end: int


def segment_lengths(segments: Sequence[Segment]) -> list[int]:
    """Row positions of prompt + chosen, and of rejected, of each pair in turn."""
    return [n for s in segments for n in (s.rejected - s.start, s.end - s.rejected)]


@dataclass(frozen=True)
class KeyTable:
    """The keys of a row's responses one behind the other, as variable-length kernels want them.

    Attributes:
        index: int64 [K], row position of each key: of each pair prompt + chosen, prompt + rejected.
        query_ends: int32 [R + 1], 0 and where the queries end: prompt + chosen, rejected alone.
        key_ends: int32 [R + 1], 0 and where the keys end.
        longest_queries, longest_keys: the most of them that one response has.
    """

    index: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_queries: int
    longest_keys: int


@dataclass(frozen=True)
class PackedPairs:
    """One row of packed pairs, everything a forward needs.

    Attributes:
        pairs: index of each pair in its data set, for messages about it [P]. Empty in a row that is
            computed for the other processes' sake only and counts nowhere.
        segments: where each pair lies in the row [P]; empty where prompts are not shared.
        keys: the same for variable-length kernels; None where prompts are not shared.
        response_tokens: scored tokens of each response [R]: 2p is chosen, 2p + 1 rejected.
        input_ids: int64 [B, T].
        position_ids: int64 [B, T]; a rejected response continues its prompt's positions.
        predictors: int64 [N], the row position whose hidden state predicts each scored token,
            response after response. The first token of both responses is predicted from the
            prompt's last position; without a prompt nothing predicts it and it is not scored.
        targets: int64 [N], the tokens predicted.
        reference_logps: float32 [R], sums under the reference; None without one.
    """

    pairs: tuple[int, ...]
    segments: tuple[Segment, ...]
    keys: KeyTable | None
    response_tokens: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    reference_logps: Tensor | None = None

    @property
    def chosen_tokens(self) -> int:
        """Scored tokens of all chosen responses."""
        return sum(self.response_tokens[0::2])

    def to(self, device: torch.device) -> PackedPairs:
        """The same row with its tensors on `device`."""
        keys = None if self.keys is None else replace(self.keys, **_moved_fields(self.keys, device))
        return replace(self, **_moved_fields(self, device), keys=keys)


def _moved_fields(shape: PackedPairs | KeyTable, device: torch.device) -> dict[str, Any]:
    fields = vars(shape).items()
    return {n: x.to(device, non_blocking=True) for n, x in fields if isinstance(x, Tensor)}
