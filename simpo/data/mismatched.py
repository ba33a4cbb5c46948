"""Gives each pair a response to another prompt, for losses that need one (KTO).

It is the third response of a pair: that of the next pair in the data set with another prompt, the
chosen one if it has two, cut like the others. So it does not depend on steps, rows or processes,
and the pass under the reference model covers it. Its tokens are those in the files of the set.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from simpo.data.flat_tokens import Tokens
from simpo.data.pairs import TokenizedPair
from simpo.data.store import TokenizedSet

NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class MismatchedTokens(Tokens):
    """Tokens of pairs of which each has a mismatched response behind its two own ones.

    Attributes:
        given: the pairs without it.
        sources: int64 [pairs], the pair whose response it is.
        sizes: int64 [pairs], its tokens; 0 for a pair without one.
    """

    given: Tokens
    sources: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> TokenizedPair:
        pair = self.given[index]
        source, size = self.given[int(self.sources[index])], int(self.sizes[index])
        place = _response_of(source)
        mask = source.scored[place]
        logps = self.reference_logps
        return replace(
            pair,
            responses=(*pair.responses, source.responses[place][:size]),
            scored=(*pair.scored, None if mask is None else mask[:size]),
            reference_logps=None if logps is None else tuple(logps[index].tolist()),
        )

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.given.names, "mismatched")

    @property
    def kind(self) -> str:
        return self.given.kind

    def lengths(self) -> np.ndarray:
        return np.column_stack([self.given.lengths(), self.sizes])


def _response_of(pair: TokenizedPair) -> int:
    """The place of the response of a pair that another one gets: the first that is there."""
    return 0 if len(pair.responses[0]) else 1


def with_mismatched(data: TokenizedSet, max_length_tokens: int) -> TokenizedSet:
    """The same pairs, each with a mismatched response.

    A pair gets none if all pairs have the same prompt, or if no token of it could be scored.

    Args:
        max_length_tokens: of the prompt with the response.
    """
    tokens = data.tokens
    lengths = tokens.lengths()
    sources = next_with_another_prompt(tokens)
    found = sources >= 0
    sources = np.where(found, sources, 0)
    theirs = np.where(lengths[:, 1] > 0, lengths[:, 1], lengths[:, 2])
    whole = theirs[sources] if len(tokens) else NONE
    sizes = np.minimum(whole, np.maximum(max_length_tokens - lengths[:, 0], 0)) * found
    # Without a prompt nothing predicts the first token.
    sizes[sizes <= (lengths[:, 0] == 0)] = 0
    if tokens.scored is not None:
        for index in np.flatnonzero(sizes < whole):
            pair = tokens[int(sources[index])]
            mask = pair.scored[_response_of(pair)]
            if mask is not None and not mask[: sizes[index]].any():
                sizes[index] = 0
    notes = data.notes
    if len(tokens) and not found.any():
        said = "all pairs have the same prompt, so none has a response to another"
        notes = (*notes, f"note   {said} (z is 0)")
    kind = f"{data.fingerprint} mismatched {max_length_tokens}"
    return replace(
        data,
        tokens=MismatchedTokens(
            tokens.bounds,
            tokens.ids,
            tokens.scored,
            num_responses=3,
            given=tokens,
            sources=sources,
            sizes=sizes,
        ),
        fingerprint=hashlib.sha256(kind.encode()).hexdigest()[:16],
        notes=notes,
    )


def next_with_another_prompt(tokens: Tokens) -> np.ndarray:
    """For each pair the next one with another prompt, int64 [pairs]; the first follows the last. -1
    if all have the same prompt."""
    count = len(tokens)
    prompts = tokens.lengths()[:, 0]
    begin = tokens.bounds[:-1].reshape(count, -1)[:, 0] if count else NONE
    following = np.roll(np.arange(count), -1)
    same = prompts == prompts[following]
    for index in np.flatnonzero(same):
        one, other = (begin[i] for i in (index, following[index]))
        size = prompts[index]
        same[index] = np.array_equal(tokens.ids[one : one + size], tokens.ids[other : other + size])
    ends = np.flatnonzero(~same)
    if not len(ends):
        return np.full(count, -1, np.int64)
    return following[ends[np.searchsorted(ends, np.arange(count)) % len(ends)]]
