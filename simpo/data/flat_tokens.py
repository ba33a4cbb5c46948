"""The token ids of many pairs in flat arrays, which may be mapped from files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from simpo.data.pairs import TokenizedPair, kind_of_pairs, padded, response_names

NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Tokens:
    """The token ids of many pairs, one after the other; `tokens[i]` is a `TokenizedPair`.

    Attributes:
        bounds: int64 [(1 + K) * pairs + 1], where prompt, chosen, rejected and others of each pair
            end.
        ids: int32 [tokens].
        scored: bool [tokens], False for tokens that are not scored; None scores all responses.
        reference_logps: float32 [pairs, K], summed log-probs of the responses under the reference
            model; None until it has scored them.
        num_responses: K, the most responses of a pair, at least 2; those that it lacks are empty.
        scores: float32 [pairs, K] of ranked responses, NaN where a pair lacks one; else None.
    """

    bounds: np.ndarray
    ids: np.ndarray
    scored: np.ndarray | None = None
    reference_logps: np.ndarray | None = None
    num_responses: int = 2
    scores: np.ndarray | None = None

    @staticmethod
    def of(pairs: Sequence[TokenizedPair]) -> Tokens:
        """The same tokens in flat arrays in memory, without reference log-probs."""
        most = max([2, *(len(pair.responses) for pair in pairs)])
        parts: list[np.ndarray] = []
        masks: list[np.ndarray | None] = []
        for pair in pairs:
            missing = most - len(pair.responses)
            parts += [pair.prompt_ids, *pair.responses, *[NOTHING] * missing]
            masks += [None, *pair.scored, *[None] * missing]
        scored = None
        if any(mask is not None for mask in masks):
            scored = np.concatenate(
                [
                    np.ones(len(ids), dtype=bool) if mask is None else mask
                    for ids, mask in zip(parts, masks, strict=True)
                ]
            )
        scores = None
        if any(pair.scores is not None for pair in pairs):
            lines = [padded(pair.scores or (), most, np.nan) for pair in pairs]
            scores = np.array(lines, dtype=np.float32)
        bounds = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        ids = np.concatenate(parts) if parts else NOTHING
        return Tokens(bounds, ids, scored, None, most, scores)

    def __len__(self) -> int:
        return len(self.bounds) // (1 + self.num_responses)

    def __getitem__(self, index: int) -> TokenizedPair:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = (1 + self.num_responses) * index
        ends = self.bounds[first : first + self.num_responses + 2].tolist()
        places = [slice(*both) for both in pairwise(ends)]
        while len(places) > 3 and places[-1].start == places[-1].stop:
            places.pop()
        masks: list[np.ndarray | None] = [None] * (len(places) - 1)
        if self.scored is not None:
            masks = [self.scored[place] for place in places[1:]]
        prompt, *responses = (self.ids[place] for place in places)
        scores, logps = (
            None if lines is None else tuple(lines[index, : len(responses)].tolist())
            for lines in (self.scores, self.reference_logps)
        )
        return TokenizedPair(prompt, tuple(responses), tuple(masks), scores, logps)

    def __iter__(self) -> Iterator[TokenizedPair]:
        return (self[index] for index in range(len(self)))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the responses of a pair."""
        return response_names(self.num_responses)

    @property
    def kind(self) -> str:
        """What the pairs are, see `kind_of_pairs`."""
        present = (self.lengths()[:, 1:] > 0).sum(axis=1)
        return kind_of_pairs(np.unique(present).tolist())

    def lengths(self) -> np.ndarray:
        """Tokens of the prompt and of each response of each pair, int64 [pairs, 1 + K]."""
        return np.diff(self.bounds).reshape(-1, 1 + self.num_responses)

    def num_tokens(self, share_prefix: bool = True) -> np.ndarray:
        """Tokens computed for each pair, int64 [pairs]; without `share_prefix` its prompt for each
        response.
        """
        lengths = self.lengths()
        found: np.ndarray = lengths.sum(axis=1)
        if not share_prefix:
            present = (lengths[:, 1:] > 0).sum(axis=1)
            found += lengths[:, 0] * np.maximum(present - 1, 0)
        return found

    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with one response; 0 without pairs."""
        lengths = self.lengths()
        return int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max(initial=0))

    def with_responses(self, number: int) -> Tokens:
        """The same with room for `number` responses of each pair, at least as many as now."""
        more = number - self.num_responses
        if not more:
            return self
        ends = self.bounds[1:].reshape(-1, 1 + self.num_responses)
        ends = np.concatenate([ends, np.repeat(ends[:, -1:], more, axis=1)], axis=1)
        scores = self.scores
        if scores is not None:
            scores = np.pad(scores, ((0, 0), (0, more)), constant_values=np.nan)
        bounds = np.concatenate([self.bounds[:1], ends.ravel()])
        return Tokens(bounds, self.ids, self.scored, None, number, scores)

    def add_to(self, digest: Any) -> None:
        """Add length and ids of each part to a hash; that of all pairs is their fingerprint. Others
        that a pair lacks add nothing."""
        ids, size = self.ids.tobytes(), self.ids.itemsize
        for part, (start, end) in enumerate(pairwise((self.bounds * size).tolist())):
            if start == end and part % (1 + self.num_responses) > 2:
                continue
            digest.update(((end - start) // size).to_bytes(8, "little") + ids[start:end])
