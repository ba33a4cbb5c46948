"""The response to another prompt that each pair gets for KTO."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simpo.data.flat_tokens import Tokens
from simpo.data.mismatched import next_with_another_prompt, with_mismatched
from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from tests.support.tiny_models import token_set


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenizedPair:
    return TokenizedPair.of(prompt, chosen, rejected)


PAIRS = [
    pair([1, 2], [10, 11], [12]),
    pair([1, 2], [13], [14, 15]),
    pair([1, 3], [16, 17, 18], [19]),
    pair([4], [], [20, 21]),
    pair([1, 2], [22], []),
]


def test_the_next_pair_with_another_prompt() -> None:
    """The first two share a prompt with each other, and with the last, whose next they are."""
    assert next_with_another_prompt(Tokens.of(PAIRS)).tolist() == [2, 2, 3, 4, 2]
    assert next_with_another_prompt(Tokens.of(PAIRS[:2])).tolist() == [-1, -1]
    assert next_with_another_prompt(Tokens.of(PAIRS[:1])).tolist() == [-1]
    assert next_with_another_prompt(Tokens.of([])).tolist() == []


def test_it_is_the_third_response() -> None:
    """The chosen reply, or the one that there is, cut to 4 tokens with the prompt."""
    given = token_set(PAIRS)
    data = with_mismatched(given, 4)
    third = [each.responses[2].tolist() for each in data.tokens]
    assert third == [[16, 17], [16, 17], [20, 21], [22], [16, 17]]
    for mine, theirs in zip(data.tokens, PAIRS, strict=True):
        assert [ids.tolist() for ids in mine.responses[:2]] == [
            ids.tolist() for ids in theirs.responses
        ]
    assert data.tokens.lengths()[0].tolist() == [2, 2, 1, 2]
    assert data.tokens.num_tokens().tolist() == [each.num_tokens() for each in data.tokens]
    assert data.tokens.num_tokens(False).tolist() == [
        each.num_tokens(share_prefix=False) for each in data.tokens
    ]
    assert data.tokens.longest_sequence() == 5 and len(data) == 5
    prints = {given.fingerprint, data.fingerprint, with_mismatched(given, 5).fingerprint}
    assert len(prints) == 3, "scores of the reference are cached under it"


def test_reference_log_probs_are_those_of_three() -> None:
    tokens = with_mismatched(token_set(PAIRS), 9).tokens
    known = replace(tokens, reference_logps=np.arange(15, dtype=np.float32).reshape(5, 3))
    assert known[3].reference_logps == (9, 10, 11) and tokens[3].reference_logps is None
    row = pack([known[3], known[0]], [3, 0])
    assert row.num_responses == 3 and row.response_tokens == (0, 2, 1, 2, 1, 3)
    assert row.reference_logps is not None
    assert row.reference_logps.tolist() == [9, 10, 11, 0, 1, 2]


def test_what_cannot_be_scored_is_no_response() -> None:
    """No room behind the prompt; the first token without a prompt; a cut before all that counts."""
    data = with_mismatched(token_set([pair([1, 2, 3], [4], [5]), pair([6], [7], [8])]), 3)
    assert [len(each.responses[2]) for each in data.tokens] == [0, 1]
    data = with_mismatched(token_set([pair([], [4, 5], [5, 6]), pair([6], [7], [8])]), 9)
    assert [len(each.responses[2]) for each in data.tokens] == [0, 2]
    late = replace(PAIRS[2], scored=(np.array([False, False, True]), None))
    for longest, size in ((4, 0), (5, 3)):
        tokens = with_mismatched(token_set([PAIRS[0], late]), longest).tokens
        assert len(tokens[0].responses[2]) == size
        pack([tokens[0]], [0])


def test_one_prompt_alone_is_told() -> None:
    data = with_mismatched(token_set(PAIRS[:2]), 9)
    assert [len(each.responses[2]) for each in data.tokens] == [0, 0]
    said = "all pairs have the same prompt, so none has a response to another"
    assert data.notes == (f"note   {said} (z is 0)",)
    assert with_mismatched(token_set(PAIRS), 9).notes == ()


def test_a_pair_without_any_response_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^pair 7: a response has no token to score$"):
        pack([pair([1], [], [])], [7])
