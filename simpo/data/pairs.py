"""The data types of a preference pair, from text to packed row.

    Pair           messages of the prompt and of both responses
    TokenizedPair  three arrays of token ids: prompt, chosen, rejected
    PackedPairs    several pairs in one row, each prompt once: [P C R][P C R]...

From a row the model computes `simpo.loss.PairLogps`, the input of the loss.

Letters of tensor shapes in the whole project:
    B rows in a forward (always 1: rows are packed, never padded)
    T tokens in a row       P pairs in a row       K responses of a pair (2, or more if ranked)
    N response tokens scored in a row              D hidden size     V vocabulary
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Message = dict[str, Any]
"""One message in OpenAI's format: `role`, `content`, and what else
`simpo.data.reading.messages` reads."""


@dataclass(frozen=True)
class Pair:
    """A prompt and the two responses to it, or several that are ranked by scores, or one.

    A response is one turn of the assistant or several, with the turns between them. What the
    assistant says is scored. `rejected` is None for supervised fine-tuning and of a desirable
    response alone; `chosen` is empty of an undesirable one alone. A prompt alone has neither.

    Attributes:
        prompt: the turns before the responses.
        chosen, rejected: the turns of each response; the first and the last are the assistant's.
            Of ranked responses the best and the worst.
        place: source, split and record, for messages.
        rule: a check that a program can run on a reply (see `simpo.data.rules`).
        held_out_set: name of the held-out set it is in, or empty.
        score_margin: score of chosen minus score of rejected; None if the record has no scores.
        tools: JSON schemas of the tools that the assistant may call; None without tools.
        reference_answer: what a judge of replies compares them with; read of prompts alone.
        others: the ranked responses between chosen and rejected, the best first.
        scores: of `responses`, in their order; empty if they are not ranked.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...] | None
    place: str
    rule: Mapping[str, Any] | None = None
    held_out_set: str = ""
    score_margin: float | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    reference_answer: str | None = None
    others: tuple[tuple[Message, ...], ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def responses(self) -> tuple[tuple[Message, ...], ...]:
        """`chosen`, `rejected` if there is one, and `others`; without a `chosen` beside it
        `rejected` alone."""
        if self.rejected is None:
            return (self.chosen,)
        return (*([self.chosen] if self.chosen else []), self.rejected, *self.others)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of `responses`."""
        return ("rejected",) if self.is_undesirable else response_names(len(self.responses))

    @property
    def is_undesirable(self) -> bool:
        """Whether it is an undesirable response alone."""
        return self.rejected is not None and not self.chosen

    @property
    def turns(self) -> tuple[Message, ...]:
        """All turns: those of the prompt, then those of each response."""
        return sum(self.responses, self.prompt)


def padded(numbers: Sequence[float], length: int, missing: float) -> list[float]:
    """Numbers of the responses of a pair, and `missing` for each of `length` that it lacks."""
    return [*numbers, *[missing] * (length - len(numbers))]


def response_names(number: int) -> tuple[str, ...]:
    """Names of so many responses of a pair, for messages: chosen, rejected, other 1, ..."""
    return ("chosen", "rejected", *(f"other {i}" for i in range(1, number - 1)))[:number]


def kind_of_pairs(numbers: Collection[int]) -> str:
    """What pairs are, for messages: their prompts if some rank several responses, replies if they
    have one each.

    Args:
        numbers: the different numbers of responses that they have.
    """
    if any(number > 2 for number in numbers):
        return "prompts"
    if 1 in numbers:
        return "pairs and replies" if 2 in numbers else "replies"
    return "pairs"


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of a pair, each an int32 array [length].

    Attributes:
        prompt_ids: the prompt, which all responses continue.
        responses: chosen, rejected and the others; one of which a pair lacks is empty.
        scored: for each response bool [its length], False for tokens that are not scored, such as
            those between two replies of the assistant; None scores all of it.
        scores: of ranked responses.
        reference_logps: summed log-probs of the responses under the reference model; None until it
            has scored the pair.
    """

    prompt_ids: np.ndarray
    responses: tuple[np.ndarray, ...]
    scored: tuple[np.ndarray | None, ...]
    scores: tuple[float, ...] | None = None
    reference_logps: tuple[float, ...] | None = None

    @staticmethod
    def of(
        prompt: Sequence[int] | np.ndarray, *responses: Sequence[int] | np.ndarray
    ) -> TokenizedPair:
        """Make a pair of sequences of token ids; all of the responses is scored."""
        first, *rest = (np.asarray(ids, dtype=np.int32) for ids in (prompt, *responses))
        return TokenizedPair(first, tuple(rest), (None,) * len(rest))

    @property
    def chosen_ids(self) -> np.ndarray:
        """The first response."""
        return self.responses[0]

    @property
    def rejected_ids(self) -> np.ndarray:
        """The second response."""
        return self.responses[1]

    def num_tokens(self, share_prefix: bool = True) -> int:
        """Tokens computed for the pair; without `share_prefix` its prompt for each response."""
        present = sum(len(ids) > 0 for ids in self.responses)
        prompts = len(self.prompt_ids) * (1 if share_prefix else max(1, present))
        return prompts + sum(map(len, self.responses))


class Tokenized(NamedTuple):
    """A tokenized pair, and how tokenization changed it.

    Attributes:
        merged: one token spans the end of the prompt and the start of the response.
        prompt_cut, chosen_cut, rejected_cut: this part was cut to its budget; others count as
            rejected.
        unreasoned: a reply is scored without its reasoning, which the chat template strips.
    """

    pair: TokenizedPair
    merged: bool
    prompt_cut: bool
    chosen_cut: bool
    rejected_cut: bool
    unreasoned: bool = False


Segment = tuple[int, ...]
"""Row positions of a pair: where its prompt begins, and where the prompt and each of its responses
end. A pair is (start, chosen, rejected, end): prompt [start, chosen), chosen [chosen, rejected),
rejected [rejected, end). Where prompts are not shared, each response with its prompt is a segment
of its own."""


def segment_lengths(segments: Sequence[Segment]) -> list[int]:
    """Lengths in tokens of prompt + first response and of each other one, pair by pair."""
    return [end - begin for start, _, *ends in segments for begin, end in pairwise((start, *ends))]


@dataclass(frozen=True)
class KeyTable:
    """Keys and segment bounds of a row in the layout of variable-length attention kernels.

    Attributes:
        index: int64 [keys], row position of each key: for each pair prompt + chosen, then prompt +
            rejected, and so on.
        query_ends: int32 [responses + 1], cumulative query counts from 0: for each pair prompt +
            chosen, then each other response alone.
        key_ends: int32 [responses + 1], cumulative key counts from 0.
        longest_queries, longest_keys: largest query and key count of a segment.
        masks: of this row, which `simpo.model.attention` makes when a layer first needs one. Not a
            dict, of which FSDP would give each layer a copy.
    """

    index: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_queries: int
    longest_keys: int
    masks: UserDict[Any, Tensor] = field(default_factory=UserDict, compare=False, repr=False)


@dataclass(frozen=True)
class PackedPairs:
    """One row of packed pairs: the input of a forward.

    Attributes:
        pairs: index of each pair in its data set, for messages [P]; empty in a placeholder row.
        segments: row positions of each pair [P], without shared prompts of each sequence.
        keys: the same for variable-length kernels.
        num_responses: K, the most responses that a pair of the row has, at least 2.
        response_tokens: scored tokens of each response [P * K]: those of a pair follow one another,
            chosen, rejected, others; 0 for a response that it lacks.
        input_ids: int64 [B, T].
        position_ids: int64 [B, T]; each response continues its prompt's positions.
        predictors: int64 [N], the row position whose hidden state predicts each scored token,
            response after response. The prompt's last position predicts the first token of all its
            responses; without a prompt that token is not scored.
        targets: int64 [N], the scored tokens.
        response_lengths: int64 [P * K], `response_tokens` as a tensor, which travels with the row.
        reference_logps: float32 [P * K], summed log-probs under the reference model; None without
            one.
        scores: float32 [P * K] of ranked responses, NaN where a pair lacks one; None without.
        factors: float64 [P * K], the gradient of a step's loss by the summed log-probs, if the loss
            couples the pairs of a step (`simpo.loop.coupled`); else None.
    """

    pairs: tuple[int, ...]
    segments: tuple[Segment, ...]
    keys: KeyTable
    num_responses: int
    response_tokens: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    response_lengths: Tensor
    reference_logps: Tensor | None = None
    scores: Tensor | None = None
    factors: Tensor | None = None

    @property
    def chosen_tokens(self) -> int:
        """Scored tokens of all chosen responses."""
        return sum(self.response_tokens[0 :: self.num_responses])

    def to(self, device: torch.device) -> PackedPairs:
        """The same row with its tensors on `device`; on a GPU the copy is not waited for."""
        keys = replace(self.keys, **_moved_fields(self.keys, device))
        return replace(self, **_moved_fields(self, device), keys=keys)


def _moved_fields(shape: PackedPairs | KeyTable, device: torch.device) -> dict[str, Any]:
    fields = {name: x for name, x in vars(shape).items() if isinstance(x, Tensor)}
    if device.type == "cuda":  # from other memory the copy would be waited for
        fields = {name: x.pin_memory() for name, x in fields.items()}
    return {name: x.to(device, non_blocking=True) for name, x in fields.items()}
