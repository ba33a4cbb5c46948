"""Generates greedy replies to held-out prompts, and measures repetition and obedience to rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simpo.data.chats.chat import Chat
from simpo.data.pairs import Pair
from simpo.data.rules import in_words, obeys
from simpo.model.generate import BATCH_PROMPTS, Sampling, batches, generate_replies
from simpo.model.policy import Policy
from simpo.run.progress import bar

NGRAM_TOKENS = 4
"""Length of the n-grams that count as repetition: longer than common phrases."""


@dataclass(frozen=True)
class HeldOutReply:
    """A greedy reply to the prompt of a pair; `obeys` is None if the pair has no rule.

    `repetition` is that of its tokens, see the function.
    """

    pair: Pair
    text: str
    tokens: int
    obeys: bool | None
    repetition: float


def greedy_replies(
    policy: Policy, chat: Chat, pairs: Sequence[Pair], max_new_tokens: int, device: torch.device
) -> list[HeldOutReply]:
    """Answer the prompt of each pair, in the order given.

    The prompt's ids are those of training. A reply ends with the token that ends a response in
    training, or after `max_new_tokens`.
    """
    prompts = chat.encode([chat.prompt_text(pair.prompt, pair.tools) for pair in pairs])
    greedy = Sampling(0.0, 1.0, max_new_tokens, seed=0)
    replies: dict[int, HeldOutReply] = {}
    with bar("held-out replies", len(pairs)) as shown:
        for batch in batches([len(ids) for ids in prompts], BATCH_PROMPTS):
            generated = generate_replies(policy, chat, [prompts[i] for i in batch], greedy, device)
            for i, reply in zip(batch, generated, strict=True):
                rule = pairs[i].rule
                replies[i] = HeldOutReply(
                    pairs[i],
                    reply.text,
                    reply.tokens,
                    None if rule is None else obeys(rule, reply.text),
                    repetition(reply.ids),
                )
            shown.advance(len(batch))
    return [replies[i] for i in range(len(pairs))]


def repetition(ids: Sequence[int]) -> float:
    """Share of a reply's 4-grams of tokens that occurred in it before, from 0 to below 1.

    Of tokens, not words, since "HiHiHi" and languages without spaces have one word. 0 for a reply
    that is too short for a 4-gram. Example: `a b a b a b a` has abab, baba, abab, baba: 2 of 4.
    """
    ngrams = [tuple(ids[i : i + NGRAM_TOKENS]) for i in range(len(ids) - NGRAM_TOKENS + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def reply_metrics(replies: Sequence[HeldOutReply]) -> dict[str, float]:
    """Means of length and repetition, and the share that obey their rule if there are rules."""
    metrics = {
        "reply_tokens": sum(reply.tokens for reply in replies) / len(replies),
        "reply_repetition": sum(reply.repetition for reply in replies) / len(replies),
    }
    checked = [reply.obeys for reply in replies if reply.obeys is not None]
    if checked:
        metrics["rule_pass_rate"] = sum(checked) / len(checked)
    return metrics


def reply_lines(replies: Sequence[HeldOutReply]) -> list[dict[str, Any]]:
    """The lines of samples/step-N.json."""
    return [
        {
            "prompt": reply.pair.prompt[-1]["content"],
            "reply": reply.text,
            "tokens": reply.tokens,
            "obeys": reply.obeys,
            **({"rule": in_words(reply.pair.rule)} if reply.pair.rule else {}),
        }
        for reply in replies
    ]
