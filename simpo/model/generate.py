"""Held-out prompts in, the policy's greedy replies out: how many obey, how much they repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from simpo.data.chat import Chat
from simpo.data.pairs import Pair
from simpo.data.rules import obeys
from simpo.model.policy import Policy

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


@dataclass(frozen=True)
class Completion:
    """What a model wrote, and whether it came to an end; `ids` are without the token for that."""

    text: str
    ids: list[int]
    ended: bool

    @property
    def tokens(self) -> int:
        return len(self.ids)


def greedy_replies(
    policy: Policy, chat: Chat, pairs: Sequence[Pair], max_new_tokens: int, device: torch.device
) -> list[Reply]:
    """Answer the prompt of each pair, in the order given.

    The prompt's ids are those of training. A reply ends with the token that ends a response in
    training, or after `max_new_tokens`.
    """
    prompts = chat.encode([chat.prompt_text(pair.prompt) for pair in pairs])
    replies: dict[int, Reply] = {}
    for batch in batches([len(ids) for ids in prompts], BATCH_PROMPTS):
        completed = complete(policy, chat, [prompts[i] for i in batch], max_new_tokens, device)
        for i, completion in zip(batch, completed, strict=True):
            rule = pairs[i].rule
            replies[i] = Reply(
                pairs[i],
                completion.text,
                completion.tokens,
                None if rule is None else obeys(rule, completion.text),
                repetition(completion.ids),
            )
    return [replies[i] for i in range(len(pairs))]


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of prompts in batches of like length, which need less padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def complete(
    policy: Policy,
    chat: Chat,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    device: torch.device,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[Completion]:
    """Continue prompts, given as token ids, in one batch.

    Args:
        temperature: 0 takes the likeliest token each time.
        top_p: drawn from the likeliest tokens that make up this share.
    """
    policy.eval()
    base: Any = policy.base
    width = max(len(ids) for ids in prompts)
    pad_id = chat.tokenizer.pad_token_id
    pad_id = chat.end_id if pad_id is None else int(pad_id)
    padded = [[pad_id] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    drawn = temperature > 0
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=drawn,
        temperature=temperature if drawn else None,
        top_p=top_p if drawn else None,
        top_k=0 if drawn else None,
        eos_token_id=chat.end_id,
        pad_token_id=pad_id,
    )
    # transformers takes what is not set here from the model's own settings: a penalty, say.
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        output = base.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
        )
    finally:
        base.generation_config = own
    return [completion(chat, ids) for ids in output[:, width:].tolist()]


def completion(chat: Chat, ids: list[int]) -> Completion:
    """What a model wrote, up to the token that ends a response in training."""
    ended = chat.end_id in ids
    ids = ids[: ids.index(chat.end_id)] if ended else ids
    return Completion(str(chat.tokenizer.decode(ids, skip_special_tokens=True)), ids, ended)


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
