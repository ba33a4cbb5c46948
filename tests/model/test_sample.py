"""Replies generated in a padded batch equal those generated alone, token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from simpo.config.compose import compose_run
from simpo.data.chats.chat import Chat
from simpo.data.mixture import load_mixture
from simpo.loop.replies import HeldOutReply, greedy_replies, repetition, reply_metrics
from simpo.model.generate import Sampling, batches, generate_replies
from simpo.model.load import load_policy
from simpo.model.tokenizer import load_tokenizer
from tests.support.tiny_models import FAMILIES, tiny_model

OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "min_new_tokens": 12},
    "words": {"bad_words_ids": [[i] for i in range(200, 300)], "forced_eos_token_id": 7},
    "search": {"num_beams": 3, "do_sample": True, "temperature": 0.5, "top_k": 2},
    "ends": {"eos_token_id": list(range(100, 384)), "stop_strings": ["a", "e"]},
    "outputs": {"return_dict_in_generate": True, "output_scores": True, "use_cache": False},
}


def test_a_long_prompt_does_not_pad_short_ones() -> None:
    assert batches([], 3) == []
    assert batches([40, 20, 30, 10], 3) == [[3, 1, 2], [0]]
    # 523 is 513 longer than 10, and 522 is not.
    assert batches([523, 10, 522, 30, 9000, 8600], 8) == [[1, 3, 2], [0], [5, 4]]


@pytest.fixture
def odd_run(
    request: pytest.FixtureRequest, tiny_run: list[str], tiny_folder: Path, tmp_path: Path
) -> list[str]:
    """A run of a model with settings of its own for generation."""
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    settings = {"eos_token_id": 2, "pad_token_id": 0} | OWN_SETTINGS[request.param]
    (base / "generation_config.json").write_text(json.dumps(settings))
    return [*tiny_run, f"model.path={base}"]


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("odd_run", OWN_SETTINGS, indirect=True)
def test_replies_of_a_batch(rank: int, odd_run: list[str], tmp_path: Path) -> None:
    """Whatever the model's own settings for generation are."""
    run = compose_run([*odd_run, f"model.lora.rank={rank}"])
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
        assert reply.repetition == repetition(written)
        assert reply.text == chat.tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    """Of two prompts in a left-padded batch, against transformers' eager attention on each."""
    model: Any = tiny_model(family).eval()
    prompts = [torch.arange(3, 3 + length)[None] for length in (4, 17)]
    pad = torch.nn.functional.pad
    batch = torch.cat([pad(ids, (17 - ids.shape[1], 0)) for ids in prompts])
    with torch.no_grad():
        found = model(batch, attention_mask=batch.sign()).logits[:, -1]
        model.set_attn_implementation("eager")
        expected = torch.cat([model(ids).logits[:, -1] for ids in prompts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_drawn_replies_go_by_our_settings_only(tiny_run: list[str], tmp_path: Path) -> None:
    run = compose_run(tiny_run)
    chat = Chat(load_tokenizer(run.model, tmp_path))
    policy = load_policy(run.model, tmp_path, torch.device("cpu"), seed=0)
    drawn = []
    for settings in OWN_SETTINGS.values():
        policy.base.generation_config = own = GenerationConfig(**settings)
        torch.manual_seed(0)
        prompts = chat.encode(["Hi", "Owls are birds"])
        sampling = Sampling(1.0, 0.9, 12, seed=0)
        drawn.append(generate_replies(policy, chat, prompts, sampling, torch.device("cpu")))
        assert policy.base.generation_config is own, "which is what is exported"
    assert drawn == [drawn[0]] * len(OWN_SETTINGS)
    assert all(0 < reply.tokens <= 12 for reply in drawn[0])


def test_reply_metrics() -> None:
    pair: object = None
    told = ((2, True, 0.0), (4, False, 0.5), (9, None, 0.75), (5, True, 0.0))
    replies = [HeldOutReply(pair, "", n, ok, again) for n, ok, again in told]  # type: ignore[arg-type]
    assert reply_metrics(replies) == {
        "reply_tokens": 5.0,
        "reply_repetition": 0.3125,
        "rule_pass_rate": 2 / 3,
    }
    assert reply_metrics(replies[2:3]) == {"reply_tokens": 9.0, "reply_repetition": 0.75}


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ("abababa", 2 / 4),  # abab baba abab baba
        ("hhhhhhhhhhh", 7 / 8),  # eight times hhhh
        ("abcdbcdabc", 0.0),  # three in a row come again, never four
        ("abcd-abcd", 1 / 6),
        ("aaa", 0.0),
        ("", 0.0),
    ],
)
def test_repetition(ids: str, share: float) -> None:
    """Letters as token ids: 4-grams counted by hand."""
    assert repetition([ord(letter) for letter in ids]) == pytest.approx(share)
