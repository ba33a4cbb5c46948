"""Ten model families as published: their tokenizers, chat templates and ends of turns.

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
    deepseek     Qwen2.5's + DeepSeek's tokens     TRL's copy; deepseek_old: the first one, of GGUF
    glm4         cl100k + GLM-4's tokens           in the metadata of the published GGUF file
    olmo2        npm, cl100k + OLMo-2's tokens     in the metadata of the published GGUF file

Phi-4 and OLMo-2 have the vocabulary cl100k, SmolLM3 has Llama-3's and the distilled model has
Qwen2.5's; their special tokens were added here, and not compared with the checkpoints. GLM-4's
vocabulary is another one than cl100k.

Templates are under their authors' licences, so they are not part of this repository.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, time
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers.utils import chat_template_utils

from simpo.data.chats.chat import Chat
from simpo.data.pairs import Message, Pair, TokenizedPair
from tests.support.real_tokenizers import (
    assistant,
    cached_folder,
    load_chat,
    tokenize_one,
    unpack_npm,
)

OLLAMA_UTILS = "@huggingface/ollama-utils@0.0.18"


def trl_template(name: str) -> str:
    """A template that TRL keeps byte for byte, to recognise a model by it."""
    try:
        listed = files("trl") or []
    except PackageNotFoundError:
        pytest.skip("trl is not installed")
    found = [f.locate() for f in listed if f.parent.name == "chat_templates" and f.stem == name]
    if not found:
        pytest.skip(f"this trl holds no template {name}")
    return Path(str(found[0])).read_text(encoding="utf-8")


@cache
def gguf_template(model: str) -> str:
    """The template in the metadata of a published GGUF file, which ollama-utils lists by model."""
    listing = "src/chat-template-automap.ts"
    folder = cached_folder(
        "ollama-utils", lambda folder: unpack_npm(OLLAMA_UTILS, [listing], folder)
    )
    text = (folder / Path(listing).name).read_text(encoding="utf-8")
    pattern = rf'model: "library/{re.escape(model)}",\s*gguf:\s*(.*?),\n\s*ollama: '
    found = re.search(pattern, text, re.DOTALL)
    assert found, f"{OLLAMA_UTILS} lists no {model}"
    # A string of JavaScript in quotes, whose escapes are Python's as well.
    return str(ast.literal_eval(found[1]))


# No space before [/INST], as Mistral's library has it.
MISTRAL_V3 = """\
{{- bos_token -}}
{%- set ns = namespace(system="", tools=tools) -%}
{%- for message in messages -%}
{%- if message.role == "system" and message.content -%}
{%- set ns.system = message.content + "\\n\\n" -%}
{%- elif message.role == "user" -%}
{%- if ns.tools -%}
{{- "[AVAILABLE_TOOLS] " + ns.tools | tojson + "[/AVAILABLE_TOOLS]" -}}{%- set ns.tools = none -%}
{%- endif -%}
{{- "[INST] " + ns.system + message.content + "[/INST]" -}}{%- set ns.system = "" -%}
{%- elif message.role == "tool" -%}
{{- '[TOOL_RESULTS] {"content": ' + message.content | tojson -}}
{{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' -}}
{%- elif message.tool_calls -%}
{{- "[TOOL_CALLS] [" -}}
{%- for call in message.tool_calls -%}
{{- ", " if not loop.first -}}{{- '{"name": "' + call.function.name + '", "arguments": ' -}}
{{- call.function.arguments | tojson + ', "id": "' + call.id + '"}' -}}
{%- endfor -%}
{{- "]" + eos_token -}}
{%- elif message.role == "assistant" -%}
{{- " " + message.content + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
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
    "deepseek": ("deepseek_qwen", lambda: trl_template("deepseek_r1_distill")),
    "deepseek_old": ("deepseek_qwen", lambda: gguf_template("deepseek-r1:8b")),
    "glm4": ("glm4", lambda: gguf_template("glm4:9b")),
    "olmo2": ("olmo2", lambda: gguf_template("olmo2:7b")),
}
"""Of each family, its tokenizer and its template (None: the one in the tokenizer's folder)."""

BOS = {
    **{"llama3_1": 128000, "llama3_2": 128000, "gemma2": 2, "gemma3": 2, "mistral_v3": 1},
    **{"deepseek": 151646, "deepseek_old": 151646},
}
"""OLMo-2's, which is its end as well, is not listed."""
END = {
    **{"llama3_1": 128009, "llama3_2": 128009, "gemma2": 107, "gemma3": 106, "mistral_v3": 2},
    **{"qwen2_5": 151645, "qwen3": 151645, "deepseek": 151643, "deepseek_old": 151643},
    **{"phi4": 100265, "olmo2": 100257, "glm4": 100257, "smollm3": 128012},
}


def chat_of(family: str) -> Chat:
    name, template = TEMPLATES[family]
    return load_chat(name, template())


def tokenized(
    chat: Chat,
    prompt: Sequence[Message],
    chosen: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    **settings: Any,
) -> TokenizedPair:
    """Tokens of a pair with some rejected reply, uncut."""
    pair = Pair(
        *(tuple(prompt), tuple(chosen), (assistant("Go away."),)),
        place="data, record 1",
        tools=tuple(tools) if tools else None,
    )
    room = {"max_length_tokens": 100_000, "max_prompt_tokens": 50_000}
    tokens, merged, *_ = tokenize_one(chat, pair, **room, **settings)
    assert not merged
    return tokens


def their_ids(chat: Chat, messages: Sequence[Message], **settings: Any) -> list[int]:
    """apply_chat_template on the day that the chat writes."""

    class Clock:
        @staticmethod
        def now() -> datetime:
            assert chat.template.date is not None
            return datetime.combine(chat.template.date, time())

    with mock.patch.object(chat_template_utils, "datetime", Clock):
        found: Any = chat.tokenizer.apply_chat_template(
            list(messages), return_dict=False, **settings
        )
    return list(found)


def scored_runs(pair: TokenizedPair) -> Iterator[list[int]]:
    """The ids of each reply that is scored."""
    ids, scored = pair.chosen_ids.tolist(), pair.scored[0]
    run: list[int] = []
    for index, token in enumerate(ids):
        if scored is None or scored[index]:
            run.append(token)
        elif run:
            yield run
            run = []
    yield run
