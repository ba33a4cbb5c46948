"""Replies out of a padded batch are those that each prompt gets alone, token by token."""

from __future__ import annotations

from pathlib import Path

import torch

from simpo.compose import compose_run
from simpo.data.chat import Chat
from simpo.data.mixture import load_mixture
from simpo.model import load_policy, load_tokenizer
from simpo.sample import Reply, greedy_replies, reply_metrics


def test_replies_of_a_batch(tiny_run: list[str], tmp_path: Path) -> None:
    run = compose_run(tiny_run)
    chat = Chat(load_tokenizer(run.model, tmp_path))
    policy = load_policy(run.model, tmp_path, torch.device("cpu"), seed=0)
    pairs = load_mixture(run.data).test[:6]
    replies = greedy_replies(policy, chat, pairs, max_new_tokens=12, device=torch.device("cpu"))
    assert len({len(chat.encode([chat.prompt_text(p.prompt)])[0]) for p in pairs}) > 1
    for pair, reply in zip(pairs, replies, strict=True):
        ids = chat.encode([chat.prompt_text(pair.prompt)])[0]
        written: list[int] = []
        while len(written) < 12:
            with torch.no_grad():
                logits = policy.base(torch.tensor([ids + written]), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token == chat.end_id:
                break
            written.append(token)
        assert reply.pair is pair
        assert reply.tokens == len(written)
        assert reply.text == chat.tokenizer.decode(written, skip_special_tokens=True)


def test_reply_metrics() -> None:
    pair: object = None
    replies = [Reply(pair, "", n, ok) for n, ok in ((2, True), (4, False), (9, None), (5, True))]  # type: ignore[arg-type]
    assert reply_metrics(replies) == {"reply_tokens": 5.0, "rule_pass_rate": 2 / 3}
    assert reply_metrics(replies[2:3]) == {"reply_tokens": 9.0}
