"""Held-out prompts in, the policy's greedy replies out: how many obey, how much they repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from simpo.data.chat import Chat
from simpo.data.rules import obeys
from simpo.model import Policy
from simpo.pairs import Pair

BATCH_PROMPTS = 64
NGRAM_TOKENS = 4
"""Tokens that make a repetition when they occur in one reply again: longer than set phrases."""


@dataclass(frozen=True)
class Reply:
    """A greedy reply to the prompt of a pair; `obeys` is None where the pair has no rule.

    `repetition` is what `repetition` says of its tokens.
    """

    pair: Pair
    text: str
    tokens: int
    obeys: bool | None
    repetition: float


@torch.no_grad()
def greedy_replies(
    policy: Policy, chat: Chat, pairs: Sequence[Pair], max_new_tokens: int, device: torch.device
) -> list[Reply]:
    """Answer the prompt of each pair, in the order given.

    The prompt's ids are those of training. A reply ends with the token that ends a response in
    training, or after `max_new_tokens`.
    """
    policy.eval()
    prompts = chat.encode([chat.prompt_text(pair.prompt) for pair in pairs])
    replies: dict[int, Reply] = {}
    # Prompts of like length together: less padding.
    order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH_PROMPTS):
        batch = order[start : start + BATCH_PROMPTS]
        width = max(len(prompts[i]) for i in batch)
        pad_id = int(chat.tokenizer.pad_token_id)
        padded = [[pad_id] * (width - len(prompts[i])) + prompts[i] for i in batch]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
        # Called on the policy's own model, whose settings for sampling must not take part.
        output = policy.model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=chat.end_id,
            pad_token_id=pad_id,
        )
        for i, ids in zip(batch, output[:, width:].tolist(), strict=True):
            length = ids.index(chat.end_id) if chat.end_id in ids else len(ids)
            text = str(chat.tokenizer.decode(ids[:length], skip_special_tokens=True))
            rule = pairs[i].rule
            replies[i] = Reply(
                pairs[i],
                text,
                length,
                None if rule is None else obeys(rule, text),
                repetition(ids[:length]),
            )
    return [replies[i] for i in range(len(pairs))]


def repetition(ids: Sequence[int]) -> float:
    """Share of a reply's 4-grams of tokens that occurred in it before, from 0 to below 1.

    Tokens and not words, of which "HiHiHi" and languages without spaces have one. A reply too short
    for a 4-gram repeats nothing. Example: `a b a b a b a` has abab, baba, abab, baba: 2 of 4.
    """
    ngrams = [tuple(ids[i : i + NGRAM_TOKENS]) for i in range(len(ids) - NGRAM_TOKENS + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def reply_metrics(replies: Sequence[Reply]) -> dict[str, float]:
    """Means of length and repetition, and the share that obey their rule where there are rules."""
    metrics = {
        "reply_tokens": sum(reply.tokens for reply in replies) / len(replies),
        "reply_repetition": sum(reply.repetition for reply in replies) / len(replies),
    }
    checked = [reply.obeys for reply in replies if reply.obeys is not None]
    if checked:
        metrics["rule_pass_rate"] = sum(checked) / len(checked)
    return metrics
