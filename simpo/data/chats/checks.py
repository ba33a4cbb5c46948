"""Checks pairs and their token ids before they reach a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from simpo.config.choices import Compat
from simpo.config.data import DataConfig
from simpo.config.errors import ConfigError, DataError
from simpo.data.chats.chat import Chat
from simpo.data.pairs import Pair, TokenizedPair
from simpo.data.reading.records import RecordFault
from simpo.data.store import TokenizedSet


def placed_ids(
    sets: Iterable[TokenizedSet], num_embeddings: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the place of each pair and all its token ids, of sets with an id that a model with
    embeddings of so many tokens does not have."""
    for data in sets:
        if data.largest_id >= num_embeddings:
            for place, ids in zip(data.places, data.tokens, strict=True):
                yield place, np.concatenate((ids.prompt_ids, *ids.responses))


def refuse_unknown_ids(
    chat: Chat, placed: Iterable[tuple[str, Sequence[int] | np.ndarray]], num_embeddings: int
) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        placed: places of pairs or prompts, each with its token ids.
        num_embeddings: rows of the model's embedding.

    Raises:
        ConfigError: the token that ends a response, or the pad token, has such an id.
        DataError: a token at one of the places has such an id.
    """
    lacks = f"but the model has embeddings of {num_embeddings:,} tokens only"
    remedy = "(model.tokenizer and model.path are of different models)"

    def token(number: int) -> str:
        return f"{chat.tokenizer.convert_ids_to_tokens(number)} has id {number:,}"

    for number in filter(None, (chat.end_id, chat.tokenizer.pad_token_id)):
        if number >= num_embeddings:
            raise ConfigError([f"model.tokenizer: its token {token(number)}, {lacks} {remedy}"])
    for place, ids in placed:
        if len(ids) and (number := int(np.max(ids))) >= num_embeddings:
            raise DataError(f"{place}: the token {token(number)}, {lacks} {remedy}")


def faults_kept_by_paper(
    chat: Chat, pairs: Sequence[Pair], tokens: Iterable[TokenizedPair], config: DataConfig
) -> dict[str, int]:
    """Count the pairs that only compat=paper accepts, by the fault they have without it.

    The original trainer keeps them. Empty without compat=paper.
    """
    if config.compat is not Compat.paper:
        return {}

    def forges(pair: Pair) -> bool:
        try:
            chat.check_pair(pair)
        except RecordFault:
            return True
        return False

    return {
        "special tokens as text in a message": sum(map(forges, pairs)),
        "the same tokens in both responses": sum(
            np.array_equal(ids.chosen_ids, ids.rejected_ids) for ids in tokens
        ),
    }
