"""Tokens of records with several responses: those that each has as a pair with another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from simpo.config.choices import PromptTruncation, Reasoning
from simpo.data.pairs import Message, Pair, Tokenized
from simpo.data.reading.records import RecordFault
from simpo.data.tokens import tokenize_set
from tests.support.real_tokenizers import (
    assistant,
    data_config,
    load_chat,
    make_pair,
    pieces,
    tokenize_one,
    user,
)

PIECES = ("ha", " ha", "\n", "\n\n", "é", "1", " 2", "<", "no", ".", "  ", "\u65e5", "ing", "'s")
replies = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)
several = st.lists(replies.filter(str.strip), min_size=2, max_size=5, unique_by=str.strip)


def ranked(prompt: Sequence[Message], *texts: str) -> Pair:
    """A pair of texts: chosen, rejected, others."""
    chosen, rejected, *others = ((assistant(text),) for text in texts)
    scores = (float(len(texts)), 0.0, *map(float, range(len(others), 0, -1)))
    return Pair(tuple(prompt), chosen, rejected, "here", others=tuple(others), scores=scores)


def with_prompt(one: Tokenized, index: int) -> list[int]:
    return [*one.pair.prompt_ids.tolist(), *one.pair.responses[index].tolist()]


@pytest.mark.parametrize(
    ("family", "template"), [("mistral", "mistral_paper"), ("llama3", "llama3"), ("qwen3", None)]
)
@settings(max_examples=30, deadline=None)
@given(several, st.sampled_from(["Why?", "Why?\n", "ha"]))
def test_each_response_has_the_tokens_of_a_pair(
    family: str, template: str | None, texts: list[str], asked: str
) -> None:
    """The prompt ends where the dialogues part first."""
    chat = load_chat(family, template)
    pair = ranked([user(asked)], *texts)
    couples = list(combinations(range(len(texts)), 2))
    try:
        pairs = {both: tokenize_one(chat, ranked(pair.prompt, *(texts[i] for i in both)))
                 for both in couples}  # fmt: skip
    except RecordFault as fault:
        assume("same tokens" not in str(fault))
        raise
    whole = tokenize_one(chat, pair)
    assert len(whole.pair.responses) == len(texts) and whole.pair.scores == pair.scores
    for (i, j), both in pairs.items():
        for place, index in enumerate((i, j)):
            assert with_prompt(whole, index) == with_prompt(both, place)
    shortest = min((both.pair for both in pairs.values()), key=lambda one: len(one.prompt_ids))
    assert whole.pair.prompt_ids.tolist() == shortest.prompt_ids.tolist()
    assert whole.pair.scored == (None,) * len(texts)
    assert whole.merged == any(both.merged for both in pairs.values())


def test_what_is_scored_of_responses_of_several_turns() -> None:
    chat = load_chat("smollm2", None)
    turns = [(assistant(said), user("So?"), assistant(f"{said} It is.")) for said in "ABC"]
    (pair,) = [
        Pair((user("Why?"),), turns[0], turns[1], "here", others=(turns[2],), scores=(3, 1, 2))
    ]
    whole = tokenize_one(chat, pair).pair
    for index, response in ((1, turns[1]), (2, turns[2])):
        both = tokenize_one(chat, replace(pair, rejected=response, others=(), scores=())).pair
        assert whole.responses[index].tolist() == both.responses[1].tolist()
        mask, wanted = whole.scored[index], both.scored[1]
        assert mask is not None and wanted is not None
        assert mask.tolist() == wanted.tolist() and not mask.all()


lengths = st.lists(st.integers(1, 40), min_size=2, max_size=5)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 40), lengths, st.sampled_from(PromptTruncation))
def test_cuts(
    data: st.DataObject, prompt: int, sizes: list[int], truncation: PromptTruncation
) -> None:
    """All responses are cut to the room that the prompt leaves, which the longest one decides."""
    max_length = data.draw(st.integers(8, 90), label="max_length")
    max_prompt = data.draw(st.integers(1, max_length - 7), label="max_prompt")
    chat = load_chat("mistral", "mistral_paper")
    texts = [" ".join([letter, *"1" * size]) for letter, size in zip("ABCDE", sizes, strict=False)]
    pair = ranked([user(" ".join("2" * prompt))], *texts)
    whole = tokenize_one(chat, pair, max_length_tokens=10_000).pair
    room = {"max_length_tokens": max_length, "max_prompt_tokens": max_prompt}
    found = tokenize_one(chat, pair, **room, prompt_truncation=truncation)
    full, longest = len(whole.prompt_ids), max(map(len, whole.responses))
    kept = full
    if full + longest > max_length:
        kept = min(full, max(max_prompt, max_length - longest))
    assert len(found.pair.prompt_ids) == kept
    for ids, uncut in zip(found.pair.responses, whole.responses, strict=True):
        assert ids.tolist() == uncut[: max_length - kept].tolist()
    cut = [len(ids) > max_length - kept for ids in whole.responses]
    assert (found.prompt_cut, found.chosen_cut, found.rejected_cut) == (
        kept < full, cut[0], any(cut[1:]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "changes", "fault"),
    [
        (
            ["A", "B", "C <|im_end|>"],
            {},
            "other 1: a message holds the token <|im_end|> as text",
        ),
        (
            ["one two three four", "B", "C", "one two three five"],
            {"max_length_tokens": 23, "max_prompt_tokens": 20},
            "chosen and other 2 have the same tokens once they are cut "
            "(raise data.max_length_tokens)",
        ),
        (
            ["A", "B", "C", "<think>\nx y z\n</think>\n\nD"],
            {"max_length_tokens": 24, "max_prompt_tokens": 20, "reasoning": Reasoning.keep},
            "other 2: no scored token is left once it is cut (raise data.max_length_tokens)",
        ),
    ],
)
def test_faults_name_the_response(texts: list[str], changes: dict[str, object], fault: str) -> None:
    chat = load_chat("smollm2", None)
    with pytest.raises(RecordFault) as told:
        tokenize_one(chat, ranked([user("Why is it so?")], *texts), **changes)
    assert str(told.value) == fault


def test_the_cache_holds_records_of_different_numbers_of_responses(tmp_path: Path) -> None:
    """In blocks of pairs alone, and of as many as five responses."""
    chat = load_chat("smollm2", None)
    pairs = [make_pair(user("Hi"))] * 3
    pairs = [replace(pair, scores=(1.0, 0.0)) for pair in pairs]
    pairs += [ranked([user("Why?")], *"ABCDE"[:number]) for number in (2, 5, 3)]
    wanted = [one.pair for one in chat.tokenize(pairs, data_config()) if isinstance(one, Tokenized)]
    tokenize = pytest.MonkeyPatch()
    tokenize.setattr("simpo.data.tokens.BLOCK_PAIRS", 3)
    with tokenize.context():
        first = tokenize_set(chat, pairs, data_config(), tmp_path)
    again = tokenize_set(chat, pairs, data_config(), tmp_path)
    for data in (first, again):
        assert data.tokens.num_responses == 5 and len(data) == 6
        for one, other in zip(data.tokens, wanted, strict=True):
            assert one.scores == other.scores
            assert pieces(chat, one) == pieces(chat, other)
            assert [ids.tolist() for ids in one.responses] == [
                ids.tolist() for ids in other.responses
            ]
    # Other scores are other data, though the tokens are the same.
    doubled = [replace(pair, scores=tuple(2 * score for score in pair.scores)) for pair in pairs]
    data = tokenize_set(chat, doubled, data_config(), tmp_path)
    assert data.name != first.name and data.text_fingerprint != first.text_fingerprint
    assert np.nanmax(data.tokens.scores) == 2 * np.nanmax(first.tokens.scores)  # type: ignore[arg-type]
