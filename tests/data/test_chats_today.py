"""Tools, reasoning, several replies, marks and variables of chat templates.

The templates are written here; each behaves as those of a family do. Token ids are compared with
`apply_chat_template` of transformers, and what is scored with text that is written out.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from jinja2 import UndefinedError
from pyarrow import parquet
from transformers import AutoTokenizer

from simpo.config.check import load_run, run_yaml
from simpo.config.choices import Compat, OnBadRecord, Reasoning
from simpo.config.compose import compose_run
from simpo.config.data import SourceConfig
from simpo.config.errors import ConfigError
from simpo.config.models import ModelConfig
from simpo.data.chats.chat import Chat
from simpo.data.mixture import load_mixture
from simpo.data.packing import pack
from simpo.data.pairs import Message, Pair
from simpo.data.reading.messages import split_reasoning
from simpo.data.reading.records import (
    COLUMNS,
    RecordFault,
    drop_reasoning,
    remarks,
    to_dialogue,
    to_pair,
    to_prompt,
    unread_columns,
)
from simpo.data.store import pairs_fingerprint
from simpo.data.tokens import tokenize_set
from simpo.loop import console
from simpo.on_policy.files import Prompt, read_prompts
from simpo.previewing.stages import _messages
from tests.support.real_tokenizers import (
    FOLDERS,
    assistant,
    data_config,
    load_chat,
    make_pair,
    system,
    tokenize_one,
    user,
)
from tests.support.versions import transformers_before

# Reasoning is written behind the last question only, in an empty block if there is none.
QWEN3 = """
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- for tool in tools %}{{ tool | tojson ~ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' ~ content ~ '\\n</tool_response><|im_end|>\\n' }}
    {%- elif m.role != 'assistant' %}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
    {%- else %}
        {%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {%- set content = content.lstrip('\\n') %}
{{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\\n' ~ reasoning.strip('\\n') ~ '\\n</think>\\n\\n' }}
        {%- endif %}
{{- content }}
        {%- for call in m.tool_calls or [] %}
{{- ('' if loop.first and not content else '\\n') ~ '<tool_call>\\n' }}
{{- '{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- call.function.arguments | tojson ~ '}\\n</tool_call>' }}
        {%- endfor %}
{{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
# Calls, results and tools have control tokens of their own.
MISTRAL = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if loop.first and tools %}{{ '[AVAILABLE_TOOLS] ' ~ tools | tojson }}
{{- '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' ~ m.content ~ '[/INST]' }}
    {%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' ~ m.content ~ ', "call_id": "' ~ m.tool_call_id ~ '"}' }}
{{- '[/TOOL_RESULTS]' }}
    {%- elif m.tool_calls %}
        {%- for call in m.tool_calls %}{% if call.id | length != 9 %}
{{- raise_exception('ids of calls have 9 letters') }}{% endif %}{% endfor %}
{{- '[TOOL_CALLS] ' ~ m.tool_calls | map(attribute='function') | list | tojson ~ eos_token }}
    {%- else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}
{%- endfor %}"""
# The generation prompt opens the reasoning, which no dialogue has; arguments are text.
DEEPSEEK = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.content is none %}
        {%- for call in m.tool_calls %}
{{- '<|im_start|>' + call.function.name + '\\n' + call.function.arguments + '<|im_end|>' }}
        {%- endfor %}
    {%- elif m.role == 'assistant' %}
{{- '<|im_start|>' ~ m.content.split('</think>')[-1] ~ '<|im_end|>' }}
    {%- else %}{{ m.role ~ ': ' ~ m.content ~ '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|><think>\\n' }}{% endif %}"""
# The token of the next role ends a turn.
GLM = """{% set roles = {'user': '<|reserved_special_token_1|>',
'tool': '<|reserved_special_token_3|>', 'assistant': '<|reserved_special_token_2|>',
'system': '<|reserved_special_token_4|>'} %}
{{- '<|begin_of_text|>' }}{% for m in messages %}{{ roles[m.role] ~ '\\n' ~ (m.content or '') }}
{%- for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{% endfor %}
{%- if add_generation_prompt %}{{ roles.assistant }}{% endif %}"""
# A call ends in a token of its own.
LLAMA = """{{ '<|begin_of_text|>' }}{% for m in messages %}
{{- '<|start_header_id|>' ~ ('ipython' if m.role == 'tool' else m.role) }}
{{- '<|end_header_id|>\\n\\n' }}
{%- if m.tool_calls %}{{ '<|reserved_special_token_0|>' ~ m.tool_calls[0].function | tojson }}
{{- '<|reserved_special_token_5|>' }}
{%- else %}{{ m.content | trim ~ '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
# Reasoning is a turn of its own before the answer, and ends in the token that ends other turns.
CHANNELS = """{% for m in messages %}{% if m.role == 'assistant' %}
{%- if m.thinking and loop.last %}
{{- '<|im_start|>assistant analysis ' ~ m.thinking ~ '<|im_end|>' }}{% endif %}
{{- '<|im_start|>assistant final ' ~ m.content ~ '<|im_end|>' }}
{%- else %}{{ '<|im_start|>' ~ m.role ~ ' ' ~ m.content ~ '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"""
MARKED = """{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content ~ '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CHATML = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(city: str, content: str | None = None, **more: Any) -> Message:
    function = {"name": "weather", "arguments": {"city": city}}
    calls = [{"id": "call00001", "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def result(text: str) -> Message:
    return {"role": "tool", "content": text, "tool_call_id": "call00001"}


def thinking(thought: str, text: str) -> Message:
    return assistant(text) | {"reasoning_content": thought}


@cache
def tokenizer_of(family: str) -> Any:
    return AutoTokenizer.from_pretrained(FOLDERS[family]())


def with_thought_inside(turn: Message) -> Message:
    """The other form of reasoning, in the content."""
    if not (turn["content"] and "reasoning_content" in turn):
        return turn
    rest = {key: value for key, value in turn.items() if key != "reasoning_content"}
    return rest | {"content": f"<think>{turn['reasoning_content']}</think>\n\n{turn['content']}"}


def chat_of(family: str, template: Any, **kwargs: Any) -> Chat:
    tokenizer = copy.copy(tokenizer_of(family))
    tokenizer.chat_template = template
    return Chat(tokenizer, template_kwargs=kwargs)


def pair_of(prompt: list[Message], *responses: list[Message], tools: bool = True) -> Pair:
    chosen, *rejected = map(tuple, responses)
    given = (TOOL,) if tools else None
    last = rejected[0] if rejected else None
    return Pair(tuple(prompt), chosen, last, "data.jsonl, record 1", tools=given)


def scored(chat: Chat, pair: Pair, **changes: Any) -> list[str]:
    """What is scored in each response; stretches that are not contiguous are divided by |."""
    tokens = tokenize_one(chat, pair, **changes)[0]
    parts = (tokens.chosen_ids, tokens.scored[0]), (tokens.rejected_ids, tokens.scored[1])
    texts = []
    for ids, mask in parts[: len(pair.responses)]:
        stretches: list[list[int]] = [[]]
        for i, token in enumerate(ids.tolist()):
            if mask is None or mask[i]:
                stretches[-1].append(token)
            elif stretches[-1]:
                stretches.append([])
        texts.append("|".join(str(chat.tokenizer.decode(part)) for part in stretches if part))
    return texts


def same_as_transformers(chat: Chat, pair: Pair, rest: str) -> None:
    """Prompt and response are the ids of the whole dialogue, but for `rest` behind its end."""
    tokens = tokenize_one(chat, pair)[0]
    for response, ids in zip(
        pair.responses, (tokens.chosen_ids, tokens.rejected_ids), strict=False
    ):
        whole: Any = chat.tokenizer.apply_chat_template(
            [*pair.prompt, *response],
            tools=[dict(tool) for tool in pair.tools or ()] or None,
            return_dict=False,
            **chat.template.kwargs,
        )
        own = [*tokens.prompt_ids.tolist(), *ids.tolist()]
        assert whole[: len(own)] == own
        assert chat.tokenizer.decode(whole[len(own) :]) == rest


ASKED = [user("Rome?")]
SUNNY = [call("Rome"), result("sunny"), assistant("Sun.")]
PARIS = [call("Paris"), result("rain"), assistant("Rain.")]
DIRECT = [assistant("Warm.")]
WITH_THOUGHT = [
    call("Rome", reasoning_content="I look."), result("sunny"), thinking("It shines.", "Sun."),
]  # fmt: skip
LATER = [
    thinking("Hm.", "Hello."), user("Rome?"), call("Rome", reasoning_content="I look."),
    result("sunny"), thinking("It shines.", "Sun."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "template", "pair", "rest"),
    [
        ("qwen2_5", QWEN3, pair_of(ASKED, SUNNY, PARIS), "\n"),
        ("qwen2_5", QWEN3, pair_of(ASKED, SUNNY, DIRECT), "\n"),
        ("qwen2_5", QWEN3, pair_of([*ASKED, *SUNNY[:2]], DIRECT, [assistant("Sun.")]), "\n"),
        ("qwen2_5", QWEN3, pair_of(ASKED, WITH_THOUGHT, [thinking("No.", "Bah.")]), "\n"),
        ("qwen2_5", QWEN3, pair_of([user("Hi")], LATER, [*LATER[:2], assistant("Bah.")]), "\n"),
        ("smollm2", CHATML, pair_of(ASKED, [*DIRECT, *ASKED, *DIRECT], DIRECT, tools=False), "\n"),
        ("mistral_v3", MISTRAL, pair_of(ASKED, SUNNY, PARIS), ""),
        ("mistral_v3", MISTRAL, pair_of([*ASKED, *SUNNY[:2]], DIRECT, [assistant("Sun.")]), ""),
        ("llama3", LLAMA, pair_of(ASKED, SUNNY, DIRECT, tools=False), ""),
    ],
)
def test_ids_are_those_of_transformers(family: str, template: str, pair: Pair, rest: str) -> None:
    same_as_transformers(chat_of(family, template), pair, rest)


ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize(
    ("mode", "pair", "wanted"),
    [
        # The call and the answer; not what the tool says. The template's empty block is as it is.
        ("score", pair_of(ASKED, SUNNY, DIRECT), [
            f"{ROME}|<think>\n\n</think>\n\nSun.<|im_end|>",
            "<think>\n\n</think>\n\nWarm.<|im_end|>",
        ]),
        ("keep", pair_of(ASKED, SUNNY, DIRECT), [f"{ROME}|Sun.<|im_end|>", "Warm.<|im_end|>"]),
        ("score", pair_of(ASKED, WITH_THOUGHT, DIRECT), [
            f"<think>\nI look.\n</think>\n\n{ROME}|<think>\nIt shines.\n</think>\n\nSun.<|im_end|>",
            "<think>\n\n</think>\n\nWarm.<|im_end|>",
        ]),
        ("keep", pair_of(ASKED, WITH_THOUGHT, DIRECT), [
            f"{ROME}|Sun.<|im_end|>", "Warm.<|im_end|>",
        ]),
        # The first reply's reasoning is stripped, as a question follows.
        ("score", pair_of([user("Hi")], LATER), [
            f"Hello.<|im_end|>|<think>\nI look.\n</think>\n\n{ROME}|"
            "<think>\nIt shines.\n</think>\n\nSun.<|im_end|>",
        ]),
        ("keep", pair_of([user("Hi")], LATER), [
            f"Hello.<|im_end|>|{ROME}|Sun.<|im_end|>",
        ]),
    ],
)  # fmt: skip
def test_what_is_scored(mode: str, pair: Pair, wanted: list[str]) -> None:
    chat = chat_of("qwen2_5", QWEN3)
    assert scored(chat, pair, reasoning=Reasoning(mode)) == wanted
    inside = [tuple(map(with_thought_inside, response)) for response in pair.responses]
    other = replace(pair, chosen=inside[0], rejected=inside[1] if len(inside) > 1 else None)
    assert scored(chat, other, reasoning=Reasoning(mode)) == wanted


def test_reasoning_that_a_later_question_strips_is_counted(tmp_path: Path) -> None:
    """Before the second reply the first one's reasoning is written; in the whole dialogue not."""
    chat = chat_of("qwen2_5", QWEN3)
    stripped = [*WITH_THOUGHT, user("Thanks"), thinking("Polite.", "Welcome.")]
    pair = pair_of(ASKED, stripped)
    same_as_transformers(chat, pair, "\n")
    assert scored(chat, pair) == [
        f"{ROME}|Sun.<|im_end|>|<think>\nPolite.\n</think>\n\nWelcome.<|im_end|>"
    ]
    pairs = [pair, pair_of(ASKED, WITH_THOUGHT)]
    for _ in range(2):  # made, and read from the cache
        data = tokenize_set(chat, pairs, data_config(), tmp_path)
        assert data.report.unreasoned == 1
    assert console.token_notes(compose_run([]), chat, [], data) == [
        "note   1 train pairs have replies that are scored without their reasoning, which the chat "
        "template strips because another question follows"
    ]


def test_no_thinking() -> None:
    """The generation prompt has an empty block, as a dialogue has it before its last reply only."""
    chat = chat_of("qwen2_5", QWEN3, enable_thinking=False)
    block = "<think>\n\n</think>\n\n"
    one = pair_of(ASKED, DIRECT, [assistant("Cold.")], tools=False)
    tokens = tokenize_one(chat, one)[0]
    assert chat.tokenizer.decode(tokens.prompt_ids).endswith(f"<|im_start|>assistant\n{block}")
    assert scored(chat, one) == ["Warm.<|im_end|>", "Cold.<|im_end|>"]
    same_as_transformers(chat, one, "\n")
    several = pair_of(ASKED, [*DIRECT, user("Bye"), assistant("Bye.")], DIRECT, tools=False)
    same_as_transformers(chat, several, "\n")
    tokens = tokenize_one(chat, several)[0]
    assert chat.tokenizer.decode(tokens.prompt_ids).endswith("<|im_start|>assistant\n")
    assert scored(chat, several) == ["Warm.<|im_end|>|Bye.<|im_end|>", "Warm.<|im_end|>"]
    with pytest.raises(RecordFault, match=r"^the chat template leaves out"):
        tokenize_one(chat_of("smollm2", DEEPSEEK), pair_of(ASKED, WITH_THOUGHT, DIRECT))


def test_reasoning_where_the_prompt_has_an_empty_block() -> None:
    """The prompt ends before the block, all of which is the response's."""
    chat = chat_of("qwen2_5", QWEN3, enable_thinking=False)
    block = "<think>\nHm.\n</think>\n\n"
    thought = [thinking("Hm.", "Sun.")]
    for other, score in (
        ([thinking("Hm.", "No.")], f"{block}No.<|im_end|>"),
        (DIRECT, "Warm.<|im_end|>"),
    ):
        pair = pair_of(ASKED, thought, other, tools=False)
        same_as_transformers(chat, pair, "\n")
        prompt = chat.tokenizer.decode(tokenize_one(chat, pair)[0].prompt_ids)
        assert prompt == "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n"
        assert scored(chat, pair) == [f"{block}Sun.<|im_end|>", score]
        keep = [f"{text}<|im_end|>" for text in ("Sun.", other[0]["content"])]
        assert scored(chat, pair, reasoning=Reasoning.keep) == keep


def test_a_generation_prompt_that_opens_the_reasoning() -> None:
    """As DeepSeek-R1's: dialogues have no reasoning, so the prompt ends before it."""
    chat = chat_of("smollm2", DEEPSEEK)
    pair = pair_of(ASKED, DIRECT, [assistant("Cold.")], tools=False)
    same_as_transformers(chat, pair, "")
    tokens = tokenize_one(chat, pair)[0]
    assert chat.tokenizer.decode(tokens.prompt_ids) == "<|im_start|>user: Rome?\n<|im_start|>"
    assert scored(chat, pair) == ["Warm.<|im_end|>", "Cold.<|im_end|>"]
    thought = pair_of(ASKED, DIRECT, [assistant("<think>Hm.</think>Cold.")], tools=False)
    with pytest.raises(RecordFault) as caught:
        tokenize_one(chat, thought)
    assert str(caught.value) == (
        "the chat template leaves out the reasoning of the last reply (set data.reasoning=drop, or "
        "choose another model.chat_template)"
    )
    # Its calls take arguments as text, and content that is null.
    assert scored(chat, pair_of(ASKED, SUNNY, tools=False)) == [
        'weather\n{"city": "Rome"}<|im_end|>|Sun.<|im_end|>'
    ]


def test_reasoning_in_a_channel() -> None:
    """As gpt-oss writes it: the first end token is not that of the reply."""
    chat = chat_of("qwen2_5", CHANNELS)
    several = [thinking("Hm.", "One."), user("And?"), thinking("So.", "Two.")]
    pair = pair_of(ASKED, several, [thinking("No.", "Bah.")], tools=False)
    if not transformers_before("5.21"):  # which give such a template no thinking
        same_as_transformers(chat, pair, "")
    assert scored(chat, pair) == [
        " final One.<|im_end|>| analysis So.<|im_end|><|im_start|>assistant final Two.<|im_end|>",
        " analysis No.<|im_end|><|im_start|>assistant final Bah.<|im_end|>",
    ]
    assert scored(chat, pair, reasoning=Reasoning.keep) == [
        " final One.<|im_end|>| Two.<|im_end|>", " Bah.<|im_end|>",
    ]  # fmt: skip


def test_dropped_reasoning(tmp_path: Path) -> None:
    """Both forms, of prompts too; a reply of nothing else is a fault."""
    rows = [
        {"prompt": [user("Hi"), thinking("a", "Yes?"), user("Bye")],
         "chosen": [assistant("<think>\nb\n</think>\n\nBye.")],
         "rejected": "c\n</think>\n\nGo."},
        {"prompt": "Hi", "chosen": "<think>a</think>", "rejected": "b"},
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = data_config(
        sources=[SourceConfig(path=str(path))],
        reasoning=Reasoning.drop,
        on_bad_record=OnBadRecord.drop,
    )
    mixture = load_mixture(config)
    (pair,) = mixture.train
    assert pair.prompt == (user("Hi"), assistant("Yes?"), user("Bye"))
    assert pair.responses == ((assistant("Bye."),), (assistant("Go."),))
    assert mixture.table[0].bad == {"chosen: the response is empty": 1}


NO_END = (
    "a reply never ends its reasoning: <think> without </think> "
    "(set data.reasoning=score, or leave the record out)"
)


@pytest.mark.parametrize(
    ("content", "thought", "said"),
    [
        ("<think>\nHm.\n</think>\n\nSun.", "Hm.", "Sun."),
        ("<think>Hm.</think>Sun.", "Hm.", "Sun."),
        (" <think></think>Sun.", "", "Sun."),
        ("<think>a<think>b</think>c</think>d", "a<think>b</think>c", "d"),
        ("<think>a</think>Write <think>b</think>.", "a", "Write <think>b</think>."),
        # As R1 replies to a prompt that opens the block.
        ("Hm.\n</think>\n\nSun.", "Hm.", "Sun."),
        ("Hm.</think>  \nSun.", "Hm.", "Sun."),
        # Of these nothing is reasoning.
        ("Hello <think>x</think> world", "", "Hello <think>x</think> world"),
        ("Hello <think>x\n</think>\nworld", "", "Hello <think>x\n</think>\nworld"),
        ("Write </think> to close.", "", "Write </think> to close."),
        ("Write </think> to\nclose.", "", "Write </think> to\nclose."),
    ],
)
def test_where_reasoning_ends(content: str, thought: str, said: str) -> None:
    turn = assistant(content)
    assert split_reasoning(turn) == (thought, said)
    assert drop_reasoning(make_pair(user("Hi"), chosen=content)).chosen == (assistant(said),)
    if not thought:
        text = content.strip().removeprefix("<think></think>")
        pair = pair_of(ASKED, [turn], DIRECT, tools=False)
        wanted = [f"{text}<|im_end|>", "Warm.<|im_end|>"]
        assert scored(chat_of("smollm2", CHATML), pair, reasoning=Reasoning.keep) == wanted


@pytest.mark.parametrize("content", ["<think>Hm.", "\n<think>a<think>b</think>c"])
def test_reasoning_without_an_end(content: str) -> None:
    """As a generation that was cut off: under `score` it is trained as it is."""
    chat = chat_of("smollm2", CHATML)
    pair = pair_of(ASKED, [assistant(content)], DIRECT, tools=False)
    assert scored(chat, pair) == [f"{content}<|im_end|>", "Warm.<|im_end|>"]
    for fails in (
        lambda: drop_reasoning(pair),
        lambda: drop_reasoning(pair_of([*ASKED, assistant(content), *ASKED], DIRECT)),
        lambda: tokenize_one(chat, pair, reasoning=Reasoning.keep),
    ):
        with pytest.raises(RecordFault) as caught:
            fails()
        assert str(caught.value) == NO_END


def test_a_cut_that_leaves_reasoning_only() -> None:
    chat = chat_of("qwen2_5", QWEN3)
    pair = pair_of(ASKED, DIRECT, [thinking("Hm. " * 60, "Cold.")], tools=False)
    sizes = {"max_length_tokens": 60, "max_prompt_tokens": 20}
    tokenize_one(chat, pair, **sizes)
    with pytest.raises(RecordFault) as caught:
        tokenize_one(chat, pair, reasoning=Reasoning.keep, **sizes)
    assert str(caught.value) == (
        "rejected: no scored token is left once it is cut (raise data.max_length_tokens)"
    )


# --- What ends a reply ---------------------------------------------------------------------------


def test_the_next_role_ends_a_reply() -> None:
    """As in GLM-4: the last reply gets the tokenizer's EOS."""
    chat = chat_of("llama3", GLM)
    dialogue = [*SUNNY, user("user"), assistant("So?")]
    assert scored(chat, pair_of(ASKED, dialogue, DIRECT, tools=False)) == [
        '\n{"name": "weather", "arguments": {"city": "Rome"}}<|reserved_special_token_3|>|'
        "\nSun.<|reserved_special_token_1|>|\nSo?<|end_of_text|>",
        "\nWarm.<|end_of_text|>",
    ]


def test_a_call_ends_in_a_token_of_its_own() -> None:
    """As Llama-3.1's <|eom_id|>; what the tool says is not scored."""
    start, end = "<|reserved_special_token_0|>", "<|reserved_special_token_5|>"
    called = f'{start}{{"name": "weather", "arguments": {{"city": "Rome"}}}}{end}'
    chat = chat_of("llama3", LLAMA)
    assert scored(chat, pair_of(ASKED, SUNNY, [call("Rome")], tools=False)) == [
        f"{called}|Sun.<|eot_id|>", called,
    ]  # fmt: skip


def test_two_calls_with_short_results() -> None:
    """A result is found neither in the end of the calls nor taken for it."""
    calls = call("Rome", "Both.") | {"tool_calls": [*call("Rome")["tool_calls"],
                                                    *call("Paris")["tool_calls"]]}  # fmt: skip
    pair = pair_of(ASKED, [calls, result("a"), result(""), assistant("Done.")], DIRECT)
    chat = chat_of("qwen2_5", QWEN3)
    same_as_transformers(chat, pair, "\n")
    both = ROME.removesuffix("<|im_end|>") + "\n" + ROME.replace("Rome", "Paris")
    assert scored(chat, pair, reasoning=Reasoning.keep) == [
        f"Both.\n{both}|Done.<|im_end|>", "Warm.<|im_end|>",
    ]  # fmt: skip


def test_the_users_end_is_not_the_replys() -> None:
    template = """{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}
{%- if m.role == 'user' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
    pair = pair_of(ASKED, [*DIRECT, user("Bye"), assistant("Bye.")], tools=False)
    with pytest.raises(
        RecordFault, match=r"^the chat template ends no reply before the next turn$"
    ):
        tokenize_one(chat_of("qwen2_5", template), pair)


# --- What a template leaves out ------------------------------------------------------------------

OTHER = "(choose another model.chat_template)"


@pytest.mark.parametrize(
    ("template", "pair", "fault"),
    [
        (CHATML, pair_of(ASKED, DIRECT, [assistant("No.")]),
         f"the chat template leaves out the tools {OTHER}"),
        (QWEN3.replace("if tools", "if false"), pair_of([*ASKED, *SUNNY, *ASKED], DIRECT, PARIS),
         f"the chat template leaves out the tools {OTHER}"),
        (QWEN3.replace("| tojson ~ '}", "| length ~ '}"), pair_of(ASKED, SUNNY, DIRECT),
         f"the chat template leaves out a tool call {OTHER}"),
        (QWEN3.replace("m.tool_calls or []", "[]"), pair_of(ASKED, SUNNY, DIRECT),
         f"the chat template leaves out a tool call {OTHER}"),
        (QWEN3.replace("m.tool_calls or []", "[]"),
         pair_of([*ASKED, *SUNNY[:2]], DIRECT, SUNNY[2:]),
         f"the chat template leaves out a tool call {OTHER}"),
        (QWEN3.replace("~ content ~ '\\n</tool_", "~ '\\n</tool_"), pair_of(ASKED, SUNNY, DIRECT),
         f"the chat template leaves out a part of what the tool says {OTHER}"),
        (QWEN3.replace("~ content ~ '\\n</tool_", "~ '\\n</tool_"),
         pair_of([*ASKED, *SUNNY[:2]], DIRECT, SUNNY[2:]),
         f"the chat template leaves out a part of what the tool says {OTHER}"),
    ],
)  # fmt: skip
def test_what_is_left_out(template: str, pair: Pair, fault: str) -> None:
    with pytest.raises(RecordFault) as caught:
        tokenize_one(chat_of("qwen2_5", template), pair)
    assert str(caught.value) == fault
    tokenize_one(chat_of("qwen2_5", QWEN3), pair)  # no fault of the pair


def test_results_may_be_written_as_json() -> None:
    template = QWEN3.replace("~ content ~ '\\n</tool_", "~ content | tojson ~ '\\n</tool_")
    said = result('{"sky": "clear", "wind": "é"}')
    tokenize_one(chat_of("qwen2_5", template), pair_of(ASKED, [SUNNY[0], said, SUNNY[2]], DIRECT))


def test_a_template_that_fails_on_null_content() -> None:
    """As Qwen3's first ones do, where OpenAI writes null beside a call: the ids are those of ''."""
    template = QWEN3.replace("m.content if m.content is string else ''", "m.content + ''")
    pair = pair_of(ASKED, SUNNY, PARIS)
    empty = [replace_content(turn) for turn in SUNNY], [replace_content(turn) for turn in PARIS]
    assert SUNNY[0]["content"] is None
    fails = chat_of("qwen2_5", template)
    with pytest.raises(TypeError if transformers_before("5.23") else UndefinedError):
        fails.tokenizer.apply_chat_template([*ASKED, *SUNNY])
    found, wanted = (
        tokenize_one(chat, one)[0]
        for chat, one in ((fails, pair), (chat_of("qwen2_5", QWEN3), pair_of(ASKED, *empty)))
    )
    assert found.chosen_ids.tolist() == wanted.chosen_ids.tolist()
    assert found.rejected_ids.tolist() == wanted.rejected_ids.tolist()


def replace_content(turn: Message) -> Message:
    return turn | {"content": turn["content"] or ""}


def test_a_template_refuses_a_call() -> None:
    """With its own reason, though arguments are also tried as text."""
    wrong = json.loads(json.dumps(SUNNY).replace("call00001", "call1"))
    with pytest.raises(RecordFault) as caught:
        tokenize_one(chat_of("mistral_v3", MISTRAL), pair_of(ASKED, wrong, DIRECT))
    assert str(caught.value) == "the chat template refuses it: ids of calls have 9 letters"


@pytest.mark.parametrize(
    "pair",
    [
        pair_of(ASKED, [thinking("a<|im_end|>", "b")], DIRECT),
        pair_of(ASKED, [call("<|im_end|>"), *SUNNY[1:]], DIRECT),
        pair_of(ASKED, [SUNNY[0], result("<|im_end|>"), SUNNY[2]], DIRECT),
        pair_of([*ASKED, *SUNNY[:1], result("<|im_end|>")], DIRECT, SUNNY[2:]),
    ],
)
def test_forged_turns(pair: Pair) -> None:
    chat = chat_of("qwen2_5", QWEN3)
    with pytest.raises(RecordFault, match=r"^a message holds the token <\|im_end\|> as text$"):
        tokenize_one(chat, pair)
    forging = json.loads(json.dumps(TOOL).replace("string", "<|im_end|>"))
    with pytest.raises(RecordFault, match=r"^the tools hold the token <\|im_end\|> as text$"):
        tokenize_one(chat, replace(pair_of(ASKED, SUNNY, DIRECT), tools=(forging,)))


def test_developers() -> None:
    """Passed as they are to a template that knows them, else as the system."""
    pair = pair_of([{"role": "developer", "content": "Be kind."}, *ASKED], DIRECT, SUNNY[2:])
    pair = replace(pair, tools=None)
    for template, role in ((CHATML, "system"), (CHATML + "{# developer #}", "developer")):
        chat = chat_of("qwen2_5", template)
        tokens = tokenize_one(chat, pair)[0]
        text = chat.tokenizer.decode(tokens.prompt_ids)
        assert text.startswith(f"<|im_start|>{role}\nBe kind.<|im_end|>")
        as_role = replace(pair, prompt=(pair.prompt[0] | {"role": role}, *ASKED))
        same_as_transformers(chat, as_role, "\n")


# --- Several replies -----------------------------------------------------------------------------


def test_several_replies_in_a_packed_row() -> None:
    """Of both responses all replies count, with or without a shared prompt."""
    chat = chat_of("smollm2", CHATML)
    several = [assistant("One."), user("And?"), assistant("Two.")]
    pair = pair_of(ASKED, several, [assistant("No."), *several[1:]], tools=False)
    assert scored(chat, pair) == ["One.<|im_end|>|Two.<|im_end|>", "No.<|im_end|>|Two.<|im_end|>"]
    tokens = tokenize_one(chat, pair)[0]
    sizes = tuple(int(mask.sum()) for mask in (tokens.scored[0], tokens.scored[1]))
    for share_prefix in (True, False):
        row = pack([tokens], [0], share_prefix)
        assert row.response_tokens == sizes
        text = chat.tokenizer.decode(row.targets)
        assert text == "One.<|im_end|>Two.<|im_end|>No.<|im_end|>Two.<|im_end|>"
        # Each is predicted from the position before it.
        following = row.input_ids[0, row.predictors[1 : sizes[0]] + 1]
        assert following.tolist() == row.targets[1 : sizes[0]].tolist()
    cut = tokenize_one(chat, pair, max_length_tokens=24, max_prompt_tokens=12)
    assert cut.chosen_cut and cut.rejected_cut
    with pytest.raises(RecordFault, match=r"^data\.compat=paper has responses of one turn only$"):
        tokenize_one(chat, pair, compat=Compat.paper)
    with pytest.raises(RecordFault, match=r"^data\.compat=paper has no tools$"):
        tokenize_one(chat, pair_of(ASKED, SUNNY, DIRECT), compat=Compat.paper)


# --- Marks, and several templates ----------------------------------------------------------------


UNMARKED_END = "{{ m.content }}{% endgeneration %}{{ 'END<|im_end|>' }}"


# With "ed" one token spans the end of what is marked.
@pytest.mark.parametrize("end", [None, "", "ed"])
def test_marks_decide_what_is_imitated(end: str | None) -> None:
    """The mask is transformers' own; a pair is scored as without marks."""
    marked = "{{ m.content ~ '<|im_end|>' }}{% endgeneration %}"
    template = MARKED
    if end is not None:
        template = MARKED.replace(marked, UNMARKED_END.replace("END", end))
    assert (template == MARKED) == (end is None)
    chat = chat_of("qwen2_5", template)
    turns = [system("Be kind."), user("Hi"), assistant("I want"), user("Bye"), assistant("I play")]
    tokens = tokenize_one(chat, to_dialogue({"messages": turns}, "here"))[0]
    wanted: Any = chat.tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    own = [*tokens.prompt_ids.tolist(), *tokens.chosen_ids.tolist()]
    assert wanted["input_ids"][: len(own)] == own
    mask = [*[False] * len(tokens.prompt_ids), *tokens.scored[0].tolist()]
    assert mask == [bool(one) for one in wanted["assistant_masks"][: len(own)]]
    assert sum(mask) == sum(wanted["assistant_masks"])
    pair = make_pair(user("Hi"))
    closing = f"{end or ''}<|im_end|>"
    assert scored(chat, pair) == [f"Hello!{closing}", f"Go away.{closing}"]


def test_marks_and_reasoning() -> None:
    chat = chat_of("smollm2", MARKED)
    turns = [user("Hi"), assistant("<think>Hm.</think>Yes?"), user("Bye"), assistant("Bye.")]
    pair = to_dialogue({"messages": turns}, "here")
    assert scored(chat, pair) == ["<think>Hm.</think>Yes?<|im_end|>|Bye.<|im_end|>"]
    assert scored(chat, pair, reasoning=Reasoning.keep) == ["Yes?<|im_end|>|Bye.<|im_end|>"]


def test_the_template_for_tools() -> None:
    templates = {"default": CHATML, "tool_use": QWEN3}
    chat = chat_of("qwen2_5", templates)
    same_as_transformers(chat, pair_of(ASKED, SUNNY, DIRECT), "\n")
    plain = pair_of(ASKED, DIRECT, [assistant("Cold.")], tools=False)
    same_as_transformers(chat, plain, "\n")
    assert scored(chat, plain)[0] == "Warm.<|im_end|>"
    assert chat.template_sha256 != chat_of("smollm2", CHATML).template_sha256


# --- Variables of a template ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "kwargs", "fault"),
    [
        (QWEN3, {"enable_thinkin": True},
         "enable_thinkin: the chat template has no such variable (did you mean enable_thinking?)"),
        (QWEN3, {"date": 1},
         "date: the chat template has no such variable (it has enable_thinking, reasoning)"),
        (CHATML, {"enable_thinking": True},
         "enable_thinking: the chat template has no such variable (it has none)"),
    ],
)  # fmt: skip
def test_unknown_variables(template: str, kwargs: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chat_of("qwen2_5", template, **kwargs)
    assert str(caught.value) == f"model.chat_template_kwargs.{fault}"


def test_the_setting(tmp_path: Path) -> None:
    key = "model.chat_template_kwargs"
    run = compose_run([f"{key}.enable_thinking=false", f"{key}.effort=high"])
    assert run.model.chat_template_kwargs == {"enable_thinking": False, "effort": "high"}
    assert compose_run([f"{key}={{a: [1]}}"]).model.chat_template_kwargs == {"a": [1]}
    (tmp_path / "run.yaml").write_text(run_yaml(run))
    assert load_run(tmp_path / "run.yaml") == run
    for overrides, fault in (
        (["loss.betaa=1", f"{key}.a=1"], "loss.betaa: no such key (did you mean loss.beta?)"),
        ([f"{key}=on"], f"{key}: must be of the form {{name: value, ...}}, got on"),
        ([f"{key}.tools=1"], f"{key}.tools: is given to every template (leave it out)"),
        (["data.reasoning=keep", "data.compat=paper"],
         "data.reasoning: with compat=paper all of a response is scored, got keep (set drop)"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            compose_run(overrides)
        assert caught.value.problems == [fault]
    assert list(ModelConfig(name="x", path="a/b").problems()) == []


def test_what_the_cache_tells_apart(tmp_path: Path) -> None:
    pairs = [pair_of(ASKED, WITH_THOUGHT, DIRECT), pair_of(ASKED, SUNNY, DIRECT)]
    thinking_off = chat_of("qwen2_5", QWEN3, enable_thinking=False)
    config = data_config()
    for chat, given, settings in (
        (chat_of("qwen2_5", QWEN3), pairs, config),
        (thinking_off, pairs, config),
        (thinking_off, pairs, replace(config, reasoning=Reasoning.keep)),
        (thinking_off, [replace(p, tools=(TOOL, TOOL)) for p in pairs], config),
    ):
        tokenize_set(chat, given, settings, tmp_path)
    assert len(list((tmp_path / "tokenized").iterdir())) == 4
    assert pairs_fingerprint(pairs) != pairs_fingerprint([replace(p, tools=None) for p in pairs])


def test_another_variable_is_another_run(tiny_run: list[str], tmp_path: Path) -> None:
    from simpo.loop.train import train

    (tmp_path / "own.jinja").write_text(QWEN3)
    words = [*tiny_run, f"model.chat_template={tmp_path}/own.jinja", f"run_dir={tmp_path}/run",
             "train.max_steps=2", "model.chat_template_kwargs.enable_thinking=false"]  # fmt: skip
    train(compose_run(words))
    (tmp_path / "run/status.json").unlink()
    with pytest.raises(ConfigError) as caught:
        train(compose_run([*words[:-1], "model.chat_template_kwargs.enable_thinking=true"]))
    assert str(caught.value) == (
        f"model.chat_template_kwargs: the run in {tmp_path}/run has {{'enable_thinking': False}}, "
        "got {'enable_thinking': True} (restore it, or choose another folder)"
    )


# --- Records -------------------------------------------------------------------------------------


def test_forms_of_records() -> None:
    """Parts, old names and JSON text come out as one form."""
    text = [{"type": "input_text", "text": "Ro"}, {"type": "text", "text": "me?", "image": None}]
    call_of_old = {"name": "weather", "arguments": '{"city": "Rome"}'}
    made = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    row = {
        "functions": json.dumps([TOOL["function"]]),
        "prompt": [{"role": "developer", "content": "Be kind."}, user(text)],  # type: ignore[arg-type]
        "chosen": [
            {"role": "assistant", "content": None, "function_call": call_of_old, "thinking": "Hm."},
            {"role": "function", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "Sun.", "tool_calls": [], "reasoning": None},
        ],
        "rejected": [{"role": "assistant", "tool_calls": [{"id": "a", "function": call_of_old}]}],
    }
    pair = to_pair(row, "here")
    assert pair.tools == (TOOL,)
    assert pair.prompt == ({"role": "developer", "content": "Be kind."}, user("Rome?"))
    assert pair.chosen == (
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [made]},
        {"role": "tool", "content": "sunny", "name": "weather"},
        assistant("Sun."),
    )
    assert pair.rejected == (
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", **made}]},
    )
    assert list(unread_columns(row, COLUMNS[to_pair])) == []
    assert list(remarks(row, pair)) == []
    assert to_prompt({"prompt": "Hi", "tools": [TOOL]}, "here").tools == (TOOL,)
    same = [*row["prompt"], *SUNNY[:2]]
    split = to_pair(
        {"chosen": [*same, assistant("a")], "rejected": [*same, assistant("b")]}, "here"
    )
    assert split.prompt[-2:] == (SUNNY[0], SUNNY[1]) and split.chosen == (assistant("a"),)


def test_what_is_noticed_of_records() -> None:
    row = {
        "prompt": [user("Hi") | {"name": "Ann", "reasoning": None}],
        "chosen": [call("Rome") | {"weight": 1}, *SUNNY[1:]],
        "rejected": DIRECT,
    }
    row["chosen"][0]["tool_calls"][0]["function"]["arguments"]["unit"] = None
    pair = to_pair(row, "here")
    assert list(unread_columns(row, COLUMNS[to_pair])) == ["prompt[].name", "chosen[].weight"]
    assert list(remarks(row, pair)) == [
        "a tool call has null arguments (columnar files add them: store arguments as JSON text)"
    ]


def test_schemas_of_a_columnar_file(tmp_path: Path) -> None:
    """Each gets the keys of all others; a null in a list or in JSON text is meant."""
    clock = json.loads(json.dumps(TOOL).replace("weather", "clock").replace("city", "zone"))
    clock["function"]["parameters"]["enum"] = [None]
    table = pyarrow.Table.from_pylist([{"tools": [TOOL, clock]}])
    parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert row["tools"][0]["function"]["parameters"]["properties"]["zone"] is None
    assert to_prompt({"prompt": "Hi", **row}, "here").tools == (TOOL, clock)
    old = {"prompt": "Hi", "functions": [tool["function"] for tool in row["tools"]]}
    assert to_prompt(old, "here").tools == (TOOL, clock)
    clock["function"]["parameters"]["default"] = None
    text = json.dumps([clock])
    assert to_prompt({"prompt": "Hi", "tools": text}, "here").tools == (clock,)


@pytest.mark.parametrize(
    ("keys", "why"),
    [({"weight": 0}, "weight 0"), ({"weight": 0.0}, "weight 0"), ({"train": False}, "train false")],
)
def test_turns_that_are_not_to_be_trained(keys: dict[str, Any], why: str) -> None:
    told = f"is not to be trained ({why}), which is not supported: "
    told += "leave the turn out of the response"
    untrained = assistant("Sun.") | keys
    for read, row, place in (
        (to_dialogue, {"messages": [*ASKED, untrained, *ASKED, *DIRECT]}, "messages[1]"),
        (to_pair, {"prompt": "Rome?", "chosen": [untrained], "rejected": "No."}, "chosen[0]"),
    ):
        with pytest.raises(RecordFault) as caught:
            read(row, "here")
        assert str(caught.value) == f"{place}: {told}"
    # A prompt is not trained anyway.
    row = {"prompt": [*ASKED, untrained, user("So?") | keys], "chosen": "a", "rejected": "b"}
    assert to_pair(row, "here").prompt == (*ASKED, assistant("Sun."), user("So?"))
    assert list(unread_columns(row, COLUMNS[to_pair])) == [f"prompt[].{next(iter(keys))}"] * 2


def test_two_reasonings_of_a_turn() -> None:
    """The second is told, unless it is the same."""
    turn = thinking("Hm.", "Sun.") | {"reasoning": "Hm.", "thinking": "Well."}
    row = {"prompt": "Rome?", "chosen": [turn], "rejected": "No."}
    assert to_pair(row, "here").chosen == (thinking("Hm.", "Sun."),)
    assert list(unread_columns(row, COLUMNS[to_pair])) == ["chosen[].thinking"]


def test_what_the_preview_shows() -> None:
    assert _messages(pair_of(ASKED, WITH_THOUGHT, DIRECT)) == [
        ("tools", "weather"),
        ("user", "Rome?"),
        ("chosen", 'I look.\nweather({"city": "Rome"})'),
        ("tool", "sunny"),
        ("chosen", "It shines.\nSun."),
        ("rejected", "Warm."),
    ]


def test_prompts_to_reply_to_keep_their_tools(tmp_path: Path) -> None:
    from dataclasses import asdict

    prompts = [
        Prompt("a", "train", tuple(ASKED), None, (TOOL,)), Prompt("b", "test", tuple(ASKED), None),
    ]  # fmt: skip
    lines = [json.dumps(asdict(prompt)) + "\n" for prompt in prompts]
    # As it was written before prompts had tools.
    lines.append(lines[1].replace('"b"', '"c"').replace(', "tools": null', ""))
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    assert read_prompts(tmp_path) == [*prompts, replace(prompts[1], id="c")]
    chat = chat_of("qwen2_5", QWEN3)
    assert '"name": "weather"' in chat.prompt_text(prompts[0].prompt, prompts[0].tools)
    assert load_chat("smollm2", "chatml").prompt_text(ASKED).endswith("assistant\n")
