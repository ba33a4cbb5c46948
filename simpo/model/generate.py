"""Generates replies to batches of prompts with the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from simpo.data.chats.chat import Chat
from simpo.model.policy import Policy

BATCH_PROMPTS = 64


@dataclass(frozen=True)
class Reply:
    """A generated reply. `ids` exclude the end token, which `ended` says was generated."""

    text: str
    ids: list[int]
    ended: bool

    @property
    def tokens(self) -> int:
        return len(self.ids)


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of prompts in batches of similar length, to reduce padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def generate_replies(
    policy: Policy,
    chat: Chat,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    device: torch.device,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: BaseStreamer | None = None,
) -> list[Reply]:
    """Generate a reply to each prompt, in one left-padded batch.

    Args:
        prompts: token ids of each prompt.
        temperature: sampling temperature; 0 is greedy decoding.
        top_p: probability mass of nucleus sampling.
        streamer: gets each token of a single prompt's reply as soon as it is generated.
    """
    policy.eval()
    base: Any = policy.base
    width = max(len(ids) for ids in prompts)
    pad_id = chat.tokenizer.pad_token_id
    pad_id = chat.end_id if pad_id is None else int(pad_id)
    padded = [[pad_id] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    sampled = temperature > 0
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        temperature=temperature if sampled else None,
        top_p=top_p if sampled else None,
        top_k=0 if sampled else None,
        eos_token_id=chat.end_id,
        pad_token_id=pad_id,
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
    return [decode_reply(chat, ids) for ids in output[:, width:].tolist()]


def decode_reply(chat: Chat, ids: list[int]) -> Reply:
    """The reply in generated ids: everything before the token that ends a response."""
    ended = chat.end_id in ids
    ids = ids[: ids.index(chat.end_id)] if ended else ids
    return Reply(str(chat.tokenizer.decode(ids, skip_special_tokens=True)), ids, ended)
