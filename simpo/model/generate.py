"""Generates replies to batches of prompts with the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from simpo.data.chats.chat import Chat
from simpo.model.policy import Policy

BATCH_PROMPTS = 64
WIDEST_TOKENS = 512


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: mass of nucleus sampling.
        seed: for who generates with it; `generate_replies` draws with torch's state as it is.
        top_logprobs: how many likeliest first tokens are wanted with their log-probs. Logits of all
            tokens are held meanwhile, so it is for short replies.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    top_logprobs: int = 0


@dataclass(frozen=True)
class Reply:
    """A generated reply.

    Attributes:
        ids: without the end token, which `ended` says was generated.
        first_logprobs: log-probs of the likeliest first tokens by their text, the likeliest first,
            before temperature and `top_p`; empty unless they were wanted.
    """

    text: str
    ids: list[int]
    ended: bool
    first_logprobs: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return len(self.ids)


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of prompts in batches of similar length, to reduce padding: of at most `size`
    prompts, none more than `WIDEST_TOKENS` longer than another."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        batch = found[-1] if found else []
        if not batch or len(batch) == size or lengths[i] - lengths[batch[0]] > WIDEST_TOKENS:
            found.append(batch := [])
        batch.append(i)
    return found


@torch.no_grad()
def generate_replies(
    policy: Policy,
    chat: Chat,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    device: torch.device,
    streamer: BaseStreamer | None = None,
) -> list[Reply]:
    """Generate a reply to each prompt, in one left-padded batch.

    Args:
        prompts: token ids of each prompt.
        streamer: gets each token of a single prompt's reply as soon as it is generated.
    """
    policy.eval()
    base: Any = policy.base
    width = max(len(ids) for ids in prompts)
    pad_id = chat.tokenizer.pad_token_id
    pad_id = chat.end_id if pad_id is None else int(pad_id)
    padded = [[pad_id] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    sampled, wants_logits = sampling.temperature > 0, sampling.top_logprobs > 0
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampled,
        temperature=sampling.temperature if sampled else None,
        top_p=sampling.top_p if sampled else None,
        top_k=0 if sampled else None,
        eos_token_id=chat.end_id,
        pad_token_id=pad_id,
        return_dict_in_generate=wants_logits,
        output_logits=wants_logits,
    )
    # transformers would take unset options, such as a penalty, from the model's generation config.
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        output = base.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
            streamer=streamer,
        )
    finally:
        base.generation_config = own
    if not wants_logits:
        return [decode_reply(chat, ids) for ids in output[:, width:].tolist()]
    likeliest = output.logits[0].float().log_softmax(-1).topk(sampling.top_logprobs)
    found = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return [
        decode_reply(chat, ids, list(zip(*first, strict=True)))
        for ids, first in zip(output.sequences[:, width:].tolist(), found, strict=True)
    ]


def decode_reply(
    chat: Chat, ids: list[int], first_logprobs: Sequence[tuple[int, float]] = ()
) -> Reply:
    """The reply in generated ids: everything before the token that ends a response.

    Args:
        first_logprobs: ids of likeliest first tokens with their log-probs, the likeliest first.
    """
    ended = chat.end_id in ids
    ids = ids[: ids.index(chat.end_id)] if ended else ids
    by_text: dict[str, float] = {}
    for token, value in first_logprobs:  # of tokens with the same text the likeliest stays
        by_text.setdefault(str(chat.tokenizer.decode([token])), value)
    return Reply(str(chat.tokenizer.decode(ids, skip_special_tokens=True)), ids, ended, by_text)
