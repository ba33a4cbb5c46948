"""Ten model families as published: token ids of a pair are those of apply_chat_template.

Where the vocabulary and the template come from:

    family       vocabulary                        template
    llama3_1     npm, Llama-3.1                    TRL's copy of the published one
    llama3_2     as llama3_1                       TRL's copy
    qwen2_5      npm, with its template            its own
    qwen3        npm, with its template            its own
    gemma2       npm, Gemma-2                      TRL's copy
    gemma3       npm, with its template            its own
    mistral_v3   mistral-common                    of our writing (Mistral's library is the judge)
    phi4         npm, cl100k + Phi-4's tokens      in the metadata of the published GGUF file
    smollm3      Llama-3.1's + SmolLM3's tokens    of our writing, with the published structure
    deepseek_old Qwen2.5's + DeepSeek's tokens     the first one, in a published GGUF file
    glm4         cl100k + GLM-4's tokens           in the metadata of the published GGUF file
    olmo2        npm, cl100k + OLMo-2's tokens     in the metadata of the published GGUF file

Phi-4 and OLMo-2 have the vocabulary cl100k, SmolLM3 has Llama-3's and the distilled model has
Qwen2.5's; their special tokens were added here, and not compared with the checkpoints. GLM-4's
vocabulary is another one than cl100k.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, time
from functools import cache
from typing import Any

import pytest
import tiktoken
from jinja2.exceptions import TemplateError
from transformers.utils import chat_template_utils

from simpo.data.chat import Chat
from simpo.data.pairs import Message, Pair, TokenizedPair
from simpo.data.records import RecordFault
from tests.data.test_families import MISTRAL_V3
from tests.support.published_templates import gguf_template, trl_template
from tests.support.real_tokenizers import (
    FOLDERS,
    assistant,
    deepseek_token,
    load_chat,
    system,
    tokenize_one,
    user,
)

# The header without the words that SmolLM3 adds to it; earlier thoughts stay, as in SmolLM3's.
SMOLLM3 = """\
{%- set mode = "/think" if enable_thinking is not defined or enable_thinking else "/no_think" -%}
{%- set first = messages[0].content if messages[0].role == "system" else "" -%}
{%- if "/no_think" in first -%}{%- set mode = "/no_think" -%}{%- endif -%}
{{- "<|im_start|>system\\n## Metadata\\n\\nToday Date: " ~ strftime_now("%d %B %Y") -}}
{{- "\\nReasoning Mode: " ~ mode ~ "\\n\\n" ~ first.replace("/no_think", "").rstrip() ~ "\\n\\n" -}}
{%- if xml_tools -%}
{{- "<tools>\\n" -}}{%- for tool in xml_tools -%}{{- tool | string ~ "\\n" -}}{%- endfor -%}
{{- "</tools>\\n\\n" -}}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- set empty = "" if mode == "/think" else "<think>\\n\\n</think>\\n" -%}
{%- for message in messages -%}
{%- if message.role in ("user", "tool") -%}
{{ "<|im_start|>user\\n" ~ message.content ~ "<|im_end|>\\n" }}
{%- elif message.role == "assistant" -%}
{% generation %}
{{- "<|im_start|>assistant\\n" ~ empty ~ message.content.lstrip("\\n") ~ "<|im_end|>\\n" }}
{%- endgeneration %}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" ~ empty }}{%- endif -%}
"""
TEMPLATES: dict[str, tuple[str, Callable[[], str | None]]] = {
    "llama3_1": ("llama3_1", lambda: trl_template("llama3_1")),
    "llama3_2": ("llama3_1", lambda: trl_template("llama3_2")),
    "qwen2_5": ("qwen2_5", lambda: None),
    "qwen3": ("qwen3", lambda: None),
    "gemma2": ("gemma2", lambda: trl_template("gemma")),
    "gemma3": ("gemma3", lambda: None),
    "mistral_v3": ("mistral_v3", lambda: MISTRAL_V3),
    "phi4": ("phi4", lambda: gguf_template("phi4:14b")),
    "smollm3": ("smollm3", lambda: SMOLLM3),
    "deepseek_old": ("deepseek_qwen", lambda: gguf_template("deepseek-r1:8b")),
    "glm4": ("glm4", lambda: gguf_template("glm4:9b")),
    "olmo2": ("olmo2", lambda: gguf_template("olmo2:7b")),
}
"""Of each family, its tokenizer and its template (None: the one in the tokenizer's folder)."""

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

BOS = {
    **{"llama3_1": 128000, "llama3_2": 128000, "gemma2": 2, "gemma3": 2, "mistral_v3": 1},
    **{"deepseek_old": 151646},
}
"""OLMo-2's, which is its end as well, is not listed."""
END = {
    **{"llama3_1": 128009, "llama3_2": 128009, "gemma2": 107, "gemma3": 106, "mistral_v3": 2},
    **{"qwen2_5": 151645, "qwen3": 151645, "deepseek_old": 151643},
    **{"phi4": 100265, "olmo2": 100257, "glm4": 100257, "smollm3": 128012},
}

REFUSED = {
    ("gemma2", "system"): "the chat template refuses it: System role not supported",
    ("deepseek_old", "thought"): (
        "the chat template leaves out a part of what the assistant says "
        "(choose another model.chat_template)"
    ),
    ("glm4", "several replies"): "the chat template ends no reply before the next turn",
}


def chat_of(family: str) -> Chat:
    name, template = TEMPLATES[family]
    return load_chat(name, template())


def tokenized(chat: Chat, prompt: list[Message], chosen: list[Message]) -> TokenizedPair:
    pair = Pair(tuple(prompt), tuple(chosen), (assistant("Go away."),), place="data, record 1")
    room = {"max_length_tokens": 100_000, "max_prompt_tokens": 50_000}
    pair, merged, *_ = tokenize_one(chat, pair, **room)
    assert not merged
    return pair


@pytest.fixture
def their_ids(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """apply_chat_template on the day that the chat writes."""

    def ids(chat: Chat, messages: list[Message], **settings: Any) -> list[int]:
        class Clock:
            @staticmethod
            def now() -> datetime:
                assert chat.template.date is not None
                return datetime.combine(chat.template.date, time())

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        found: Any = chat.tokenizer.apply_chat_template(messages, return_dict=False, **settings)
        return list(found)

    return ids


def scored_runs(pair: TokenizedPair) -> Iterator[list[int]]:
    """The ids of each reply that is scored."""
    ids, scored = pair.chosen_ids.tolist(), pair.chosen_scored
    run: list[int] = []
    for index, token in enumerate(ids):
        if scored is None or scored[index]:
            run.append(token)
        elif run:
            yield run
            run = []
    yield run


CASES = [(family, name) for family in TEMPLATES for name in DIALOGUES]


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case not in REFUSED])
def test_ids_are_those_of_apply_chat_template(
    family: str, name: str, their_ids: Callable[..., list[int]]
) -> None:
    chat, (prompt, chosen) = chat_of(family), DIALOGUES[name]
    pair = tokenized(chat, prompt, chosen)
    opened = their_ids(chat, prompt, add_generation_prompt=True)
    whole = their_ids(chat, [*prompt, *chosen])
    end = END[family]
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
    for ids, reply in zip(runs, replies, strict=True):
        assert ids[-1] == END[family] and ids.count(END[family]) == 1
        text = str(chat.tokenizer.decode(ids[:-1]))
        if family == "qwen3" and "<think>" not in reply:
            text = text.removeprefix("<think>\n\n</think>\n\n")
        composed = unicodedata.normalize("NFC", reply)
        assert unicodedata.normalize("NFC", text).strip() == composed.strip()


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_what_a_template_refuses_or_leaves_out_is_said(
    family: str, name: str, their_ids: Callable[..., list[int]]
) -> None:
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
        if family in ("qwen3", "deepseek_old"):  # Qwen composes characters
            text = unicodedata.normalize("NFC", text)
        ids = encoder.encode(text, allowed_special="all")
        assert tokenized(chat, prompt, chosen).prompt_ids.tolist() == ids, name
