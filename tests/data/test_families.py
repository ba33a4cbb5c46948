"""Real model families: token ids compared with independent encoders, peculiarities of their
tokenizers, and tiny models trained both with packed rows and with a padded implementation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from simpo.backend import build_backend
from simpo.config.backends import SingleConfig
from simpo.config.choices import Device, Precision, Schedule
from simpo.config.schema import TrainConfig
from simpo.data.packing import pack
from simpo.data.pairs import Message
from simpo.data.plan import rows_of_pairs
from simpo.loop.optim import build_optimizer
from simpo.loop.score import summarise
from simpo.loop.step import update
from simpo.loss.simpo import SigmoidConfig
from simpo.model.policy import Policy
from tests.support.published_templates import MISTRAL_V3
from tests.support.real_tokenizers import (
    assistant,
    load_chat,
    make_pair,
    system,
    tokenize_one,
    user,
)
from tests.support.tiny_models import FAMILIES, loss_by_hand, random_pairs, tiny_model

pytestmark = pytest.mark.matrix

FAMILY_TEMPLATES = {
    "llama3": ("llama3", "llama3"),
    "mistral": ("mistral", "mistral_paper"),
    "mistral_v3": ("mistral_v3", MISTRAL_V3),
    "zephyr": ("mistral", "zephyr"),
    "gemma2": ("gemma2", "gemma_paper"),
    "gemma3": ("gemma3", None),
    "qwen2_5": ("qwen2_5", None),
    "smollm2": ("smollm2", None),
}
DIALOGUES = {
    "single": [user("What is 2 + 2?")],
    "several": [user("Hi"), assistant("Hello."), user("And 3 + 4?")],
    "system": [system("Be brief."), user("Hi")],
    "unicode": [user("Grüße, 世界! 🦉\né")],
    "empty system": [system(""), user("Hi")],
}
REPLY = "Four — 4."

# What is 2 + 2? of each family, as ids of the published vocabularies.
GOLDEN = {
    "llama3": (
        "128000 128006 882 128007 271 3923 374 220 17 489 220 17 30 128009 128006 78191 128007 271",
        "28070 2001 220 19 13 128009",
    ),
    "mistral": (
        "1 733 16289 28793 1824 349 28705 28750 648 28705 28750 28804 733 28748 16289 28793",
        "9611 1040 28705 28781 28723 28705 2",
    ),
    "mistral_v3": (
        "1 3 2592 1117 29473 29518 1416 29473 29518 29572 4",
        "10379 1808 29473 29549 29491 2",
    ),
    "zephyr": (
        "1 523 28766 1838 28766 28767 13 3195 349 28705 28750 648 28705 28750 28804 2 28705 "
        "13 28789 28766 489 11143 28766 28767 13",
        "28765 423 1040 28705 28781 28723 2",
    ),
    "gemma2": (
        "2 106 1645 108 1841 603 235248 235284 963 235248 235284 235336 107 108 106 2516 108",
        "18405 2062 235248 235310 235265 107",
    ),
    "gemma3": (
        "2 105 2364 107 3689 563 236743 236778 900 236743 236778 236881 106 107 105 4368 107",
        "26391 2192 236743 236812 236761 106",
    ),
    "qwen2_5": (
        "151644 8948 198 2610 525 1207 16948 11 3465 553 54364 14817 13 1446 525 264 10950 "
        "17847 13 151645 198 151644 872 198 3838 374 220 17 488 220 17 30 151645 198 151644 "
        "77091 198",
        "26972 1959 220 19 13 151645",
    ),
    "smollm2": (
        "1 9690 198 2683 359 253 5356 5646 11173 3365 3511 308 34519 28 7018 411 407 19712 "
        "8182 2 198 1 4093 198 1780 314 216 34 1232 216 34 47 2 198 1 520 9531 198",
        "19622 1841 216 36 30 2",
    ),
}


def raw_ids(family: str) -> Callable[[str], list[int]]:
    """The vocabulary alone: no template, no special tokens added."""
    backend = load_chat(*FAMILY_TEMPLATES[family]).tokenizer.backend_tokenizer
    return lambda text: list(backend.encode(text, add_special_tokens=False).ids)


def llama3_ids(messages: Sequence[Message]) -> list[int]:
    """Meta's format: <|begin_of_text|>, then headers and turns that end in <|eot_id|>."""
    raw = raw_ids("llama3")

    def header(role: str) -> list[int]:
        return [128006, *raw(role), 128007, *raw("\n\n")]

    turns = [i for m in messages for i in (*header(m["role"]), *raw(m["content"]), 128009)]
    return [128000, *turns, *header("assistant")]


def gemma_ids(family: str, start: int, end: int) -> Callable[[Sequence[Message]], list[int]]:
    """Google's format: turns of user and model; a system message is the user's first words."""

    def ids(messages: Sequence[Message]) -> list[int]:
        raw = raw_ids(family)
        first = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        if family == "gemma2" and not first.strip():
            first = ""
        out = [2]
        for index, m in enumerate(m for m in messages if m["role"] != "system"):
            role = "model" if m["role"] == "assistant" else "user"
            text = (first if index == 0 else "") + m["content"]
            out += [start, *raw(f"{role}\n{text}"), end, *raw("\n")]
        return [*out, start, *raw("model\n")]

    return ids


def chatml_ids(
    family: str, start: int, end: int, default: str
) -> Callable[[Sequence[Message]], list[int]]:
    """ChatML, with a system message of its own where there is none."""

    def ids(messages: Sequence[Message]) -> list[int]:
        raw = raw_ids(family)
        own = [] if messages[0]["role"] == "system" else [system(default)]
        out: list[int] = []
        for m in [*own, *messages]:
            out += [start, *raw(f"{m['role']}\n{m['content']}"), end, *raw("\n")]
        return [*out, start, *raw("assistant\n")]

    return ids


def mistral_ids(version: str) -> Callable[[Sequence[Message]], list[int]]:
    """Mistral's own library."""

    def ids(messages: Sequence[Message]) -> list[int]:
        pytest.importorskip("mistral_common")
        from mistral_common.protocol.instruct import messages as kinds
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        make: dict[str, Any] = {
            "system": kinds.SystemMessage,
            "user": kinds.UserMessage,
            "assistant": kinds.AssistantMessage,
        }
        request = ChatCompletionRequest(
            messages=[make[m["role"]](content=m["content"]) for m in messages if m["content"]]
        )
        return list(getattr(MistralTokenizer, version)().encode_chat_completion(request).tokens)

    return ids


INDEPENDENT: dict[str, Callable[[Sequence[Message]], list[int]]] = {
    "llama3": llama3_ids,
    "mistral": mistral_ids("v1"),
    "mistral_v3": mistral_ids("v3"),
    "gemma2": gemma_ids("gemma2", 106, 107),
    "gemma3": gemma_ids("gemma3", 105, 106),
    "qwen2_5": chatml_ids(
        "qwen2_5",
        151644,
        151645,
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "smollm2": chatml_ids(
        "smollm2",
        1,
        2,
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
}


def prompt_ids(family: str, messages: Sequence[Message]) -> list[int]:
    chat = load_chat(*FAMILY_TEMPLATES[family])
    return tokenize_one(chat, make_pair(*messages, chosen=REPLY))[0].prompt_ids.tolist()


CASES = [(family, case) for family in INDEPENDENT for case in DIALOGUES]
CASES.remove(("mistral", "several"))  # the paper's template puts a space before a turn's </s>


@pytest.mark.parametrize(("family", "case"), CASES)
def test_prompts_are_those_of_the_family(family: str, case: str) -> None:
    assert prompt_ids(family, DIALOGUES[case]) == INDEPENDENT[family](DIALOGUES[case])


@pytest.mark.parametrize("family", FAMILY_TEMPLATES)
def test_golden_ids(family: str) -> None:
    chat = load_chat(*FAMILY_TEMPLATES[family])
    tokens, *_ = tokenize_one(chat, make_pair(*DIALOGUES["single"], chosen=REPLY))
    for ids, golden in zip((tokens.prompt_ids, tokens.chosen_ids), GOLDEN[family], strict=True):
        assert ids.tolist() == [int(word) for word in golden.split()]


BOS = {"llama3": 128000, "mistral": 1, "mistral_v3": 1, "zephyr": 1, "gemma2": 2, "gemma3": 2}
END = {
    **{"llama3": 128009, "mistral": 2, "mistral_v3": 2, "zephyr": 2, "gemma2": 107},
    **{"gemma3": 106, "qwen2_5": 151645, "smollm2": 2},
}
"""Llama-3's and Gemma-2's turns do not end in their EOS."""


@pytest.mark.parametrize("family", FAMILY_TEMPLATES)
def test_one_bos_one_end_and_a_pad(family: str) -> None:
    chat = load_chat(*FAMILY_TEMPLATES[family])
    for messages in DIALOGUES.values():
        tokens, *_ = tokenize_one(chat, make_pair(*messages, chosen=REPLY))
        if family in BOS:
            assert tokens.prompt_ids[0] == BOS[family]
            assert tokens.prompt_ids.tolist().count(BOS[family]) == 1
        for ids in (tokens.chosen_ids.tolist(), tokens.rejected_ids.tolist()):
            assert ids[-1] == END[family] and ids.count(END[family]) == 1
            assert BOS.get(family) not in ids
    assert chat.end_id == END[family]
    assert chat.tokenizer.pad_token_id is not None


def test_an_open_header_behind_a_reply_is_not_scored() -> None:
    """Llama-3's own early template writes the assistant's header behind every dialogue."""
    chat = load_chat("llama3", None)
    text = chat.tokenizer.apply_chat_template([user("Hi"), assistant("Yes?")], tokenize=False)
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    tokens, *_ = tokenize_one(chat, make_pair(user("Hi")))
    assert tokens.chosen_ids[-1] == 128009 and 128006 not in tokens.chosen_ids


def test_an_end_that_pads_is_scored() -> None:
    """SmolLM2 pads with the token that ends its turns; a mask by id would not train it."""
    chat = load_chat("smollm2", None)
    assert chat.tokenizer.pad_token_id == chat.end_id == 2
    tokens, *_ = tokenize_one(chat, make_pair(user("Hi")))
    row = pack([tokens], [0])
    assert row.targets.tolist().count(2) == 2


RATE, NUM_STEPS, PAIRS = 3e-3, 10, 4
LOSS = SigmoidConfig(beta=2.0, gamma_beta_ratio=0.5, sft_weight=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_of_the_fast_path_are_those_of_the_plain_one(family: str) -> None:
    """In float64 (but for norms, which transformers computes in float32): packed, prefix-shared,
    chunked rows against padded sequences with full logits, autograd and torch's AdamW.
    """
    pairs = random_pairs(np.random.default_rng(1), PAIRS * NUM_STEPS)
    lengths = np.array([pair.num_tokens() for pair in pairs])
    model = tiny_model(family, dtype=torch.float64)
    plain = copy.deepcopy(model)
    config = TrainConfig(learning_rate=RATE, schedule=Schedule.constant, max_grad_norm=0.5)
    policy = Policy(model)
    backend = build_backend(SingleConfig(device=Device.cpu), Precision.fp32, config.max_grad_norm)
    optimizer = build_optimizer(policy, config)
    theirs = torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(NUM_STEPS):
        indices = range(step * PAIRS, (step + 1) * PAIRS)
        rows: list[Any] = rows_of_pairs(indices, lengths, 40)
        packed = [pack([pairs[i] for i in row], row) for row in rows]
        assert len(packed) > 1
        sums, _ = update(policy, optimizer, packed, LOSS, backend)
        loss = loss_by_hand(plain, [pairs[i] for i in indices], LOSS)
        theirs.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), config.max_grad_norm)
        theirs.step()
        assert summarise(LOSS, sums)["loss"] == pytest.approx(loss.item(), rel=1e-5), step
    start = dict(tiny_model(family, dtype=torch.float64).named_parameters())
    wanted = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        moved = (wanted[name] - start[name]).norm()
        assert moved > 0.01, name
        assert (weight - wanted[name]).norm() < 1e-3 * moved, name
