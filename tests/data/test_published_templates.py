"""Ten model families as published: token ids of a pair are those of apply_chat_template, and those
of prompts are those of another library. `tests/support/published_templates.py` lists the families.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import tiktoken
from jinja2.exceptions import TemplateError

from simpo.data.pairs import Message
from simpo.data.reading.records import RecordFault
from tests.support.published_templates import (
    BOS,
    END,
    TEMPLATES,
    chat_of,
    scored_runs,
    their_ids,
    tokenized,
)
from tests.support.real_tokenizers import FOLDERS, assistant, deepseek_token, system, user

pytestmark = pytest.mark.matrix

CODE = "```python\ndef f(x):\n\treturn {'a': x < 3}  # ∀x ≠ ∅\n```"
THOUGHT = "<think>\nThree twice.\n</think>\n\n"
DIALOGUES: dict[str, tuple[list[Message], list[Message]]] = {
    "single": ([user("What is 2 + 2?")], [assistant("Four — 4.")]),
    "system": ([system("Be brief."), user("Hi")], [assistant("Hello!")]),
    "several": ([user("Hi"), assistant("Hello."), user("And 3 + 4?")], [assistant("Seven.")]),
    "code": (
        [user(f"Grüße, 世界! 🦉\né e\u0301 {CODE}")],
        [assistant(f"Ça va 👩‍👩‍👧:\n\n{CODE}")],
    ),
    "white space": ([user("  \n Hi \n\n")], [assistant(" \n\nHello!  \n")]),
    "long": ([user("one word and, " * 1000)], [assistant("so it goes on. " * 1000)]),
    "several replies": (
        [user("Hi")],
        [assistant("Hello."), user("More?"), assistant("No."), user("Yes?"), assistant("Fine.")],
    ),
    "earlier thought": ([user("3+3?"), assistant(f"{THOUGHT}6"), user("2+2?")], [assistant("4")]),
    "thought": ([user("3+3?")], [assistant(f"{THOUGHT}6")]),
}
"""Prompt and chosen reply of each dialogue."""

REFUSED = {
    ("gemma2", "system"): "the chat template refuses it: System role not supported",
    **dict.fromkeys(
        [("deepseek", "thought"), ("deepseek_old", "thought")],
        "the chat template leaves out the reasoning of the last reply "
        "(set data.reasoning=drop, or choose another model.chat_template)",
    ),
}


CASES = [(family, name) for family in TEMPLATES for name in DIALOGUES]


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case not in REFUSED])
def test_ids_are_those_of_apply_chat_template(family: str, name: str) -> None:
    chat, (prompt, chosen) = chat_of(family), DIALOGUES[name]
    pair = tokenized(chat, prompt, chosen)
    opened = their_ids(chat, prompt, add_generation_prompt=True)
    whole = their_ids(chat, [*prompt, *chosen])
    end = END[family]
    if family == "deepseek":  # opens a thought that it leaves out of a dialogue
        assert opened[-2:] == chat.tokenizer("<think>\n", add_special_tokens=False).input_ids
        opened = opened[:-2]
    if family == "glm4":  # ends no turn: the next one's header does
        whole.append(end)
    while whole[-1] != end:  # a line break
        whole.pop()
    assert pair.prompt_ids.tolist() == opened
    assert [*pair.prompt_ids.tolist(), *pair.chosen_ids.tolist()] == whole
    if family in BOS:
        assert whole[0] == BOS[family] and whole.count(BOS[family]) == 1


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case not in REFUSED])
def test_what_is_scored_is_the_replies_and_their_ends(family: str, name: str) -> None:
    chat, (prompt, chosen) = chat_of(family), DIALOGUES[name]
    runs = list(scored_runs(tokenized(chat, prompt, chosen)))
    replies = [turn["content"] for turn in chosen if turn["role"] == "assistant"]
    assert len(runs) == len(replies)
    next_turn = chat.tokenizer.convert_tokens_to_ids("<|user|>")
    for index, (ids, reply) in enumerate(zip(runs, replies, strict=True)):
        inside = family == "glm4" and index < len(replies) - 1
        end = next_turn if inside else END[family]
        assert ids[-1] == end and ids.count(end) == 1
        text = str(chat.tokenizer.decode(ids[:-1]))
        if family == "qwen3" and "<think>" not in reply:
            text = text.removeprefix("<think>\n\n</think>\n\n")
        composed = unicodedata.normalize("NFC", reply)
        assert unicodedata.normalize("NFC", text).strip() == composed.strip()


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_what_a_template_refuses_or_leaves_out_is_said(family: str, name: str) -> None:
    chat, (prompt, chosen) = chat_of(family), DIALOGUES[name]
    with pytest.raises(RecordFault) as refused:
        tokenized(chat, prompt, chosen)
    assert str(refused.value) == REFUSED[family, name]
    if name == "system":
        with pytest.raises(TemplateError):
            their_ids(chat, [*prompt, *chosen])
    else:
        left = chat.tokenizer.decode(their_ids(chat, [*prompt, *chosen]))
        assert "Three twice." not in left


@cache
def byte_pairs(name: str) -> tiktoken.Encoding:
    """The vocabulary in OpenAI's library, which ranks pairs by their ids."""
    written = json.loads((FOLDERS[name]() / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {token["content"]: token["id"] for token in written["added_tokens"]}
    # Bytes that GPT-2 shows as themselves, and the letters from 256 on that it shows others by.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in shown}
    others = [byte for byte in range(256) if byte not in shown]
    letters |= {chr(256 + index): byte for index, byte in enumerate(others)}
    vocab = written["model"]["vocab"].items()
    ranks = {
        bytes(letters[letter] for letter in text): index
        for text, index in vocab
        if text not in tokens
    }
    (split,) = [
        part["pattern"]["Regex"]
        for part in written["pre_tokenizer"]["pretokenizers"]
        if "pattern" in part
    ]
    return tiktoken.Encoding(name, pat_str=split, mergeable_ranks=ranks, special_tokens=tokens)


def llama31_format(messages: Sequence[Message]) -> str:
    asked = messages[0]["content"] if messages[0]["role"] == "system" else ""
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"
    turns = [("system", f"{dates}\n\n{asked}")]
    turns += [(m["role"], m["content"].strip()) for m in messages if m["role"] != "system"]
    parts = ["<|begin_of_text|>"]
    for role, said in turns:
        parts.append(f"<|start_header_id|>{role}<|end_header_id|>\n\n{said}<|eot_id|>")
    return "".join([*parts, "<|start_header_id|>assistant<|end_header_id|>\n\n"])


def qwen3_format(messages: Sequence[Message]) -> str:
    parts = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(parts) + "<|im_start|>assistant\n"


def phi4_format(messages: Sequence[Message]) -> str:
    parts = [f"<|im_start|>{m['role']}<|im_sep|>{m['content']}<|im_end|>" for m in messages]
    return "".join(parts) + "<|im_start|>assistant<|im_sep|>"


def deepseek_format(messages: Sequence[Message]) -> str:
    begin, end = deepseek_token("begin▁of▁sentence"), deepseek_token("end▁of▁sentence")
    header = {
        "system": "",
        "user": deepseek_token("User"),
        "assistant": deepseek_token("Assistant"),
    }
    parts = [begin]
    for m in messages:
        parts += [header[m["role"]], m["content"].split("</think>")[-1]]
        parts += [end] if m["role"] == "assistant" else []
    return "".join([*parts, header["assistant"]])


def glm4_format(messages: Sequence[Message]) -> str:
    parts = [f"<|{m['role']}|>\n{m['content']}" for m in messages]
    return "[gMASK]<sop>" + "".join(parts) + "<|assistant|>"


def olmo2_format(messages: Sequence[Message]) -> str:
    end = {"assistant": "<|endoftext|>"}
    parts = [f"<|{m['role']}|>\n{m['content']}{end.get(m['role'], '')}\n" for m in messages]
    return "<|endoftext|>" + "".join(parts) + "<|assistant|>\n"


FORMATS: dict[str, Callable[[Sequence[Message]], str]] = {
    "llama3_1": llama31_format,
    "qwen3": qwen3_format,
    "phi4": phi4_format,
    "deepseek": deepseek_format,
    "deepseek_old": deepseek_format,
    "glm4": glm4_format,
    "olmo2": olmo2_format,
}
"""Prompts as the families document them; the others are held by test_families.py."""


@pytest.mark.parametrize("family", FORMATS)
def test_prompts_are_those_of_an_encoder_of_another_library(family: str) -> None:
    chat = chat_of(family)
    encoder = byte_pairs(TEMPLATES[family][0])
    for name, (prompt, chosen) in DIALOGUES.items():
        if (family, name) in REFUSED or (family, name) == ("qwen3", "earlier thought"):
            continue
        text = FORMATS[family](prompt)
        if family in ("qwen3", "deepseek", "deepseek_old"):  # Qwen composes characters
            text = unicodedata.normalize("NFC", text)
        ids = encoder.encode(text, allowed_special="all")
        assert tokenized(chat, prompt, chosen).prompt_ids.tolist() == ids, name
