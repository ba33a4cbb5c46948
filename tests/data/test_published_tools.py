"""Tools, reasoning and variables of the templates of ten model families, against
apply_chat_template and Mistral's library.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from jinja2.exceptions import TemplateError

from simpo.config.choices import Reasoning
from simpo.data.chats.chat import Chat
from simpo.data.pairs import Message, Pair
from simpo.data.reading.records import RecordFault, drop_reasoning
from tests.support.published_templates import (
    END,
    chat_of,
    scored_runs,
    their_ids,
    tokenized,
)
from tests.support.real_tokenizers import as_lists, assistant, system, tokenize_one, user

pytestmark = pytest.mark.matrix

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city, now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
            "required": ["city"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Time of day.",
        "parameters": {"type": "object", "properties": {}},
    },
}
RESULT = {
    "role": "tool",
    "tool_call_id": "abcdefghi",
    "name": "get_weather",
    "content": "Clear, 21 °C",
}
ASKED = [user("Weather in Zürich?")]
SAID = assistant("Clear, 21 °C. 🌞")


def calls(content: str | None = "") -> Message:
    function = {"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, 2]}}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def replies(chat: Chat, *args: Any, **settings: Any) -> list[str]:
    """What is scored, as text."""
    runs = scored_runs(tokenized(chat, *args, **settings))
    return [str(chat.tokenizer.decode(ids)) for ids in runs]


def check_ids(
    family: str, chat: Chat, prompt: Sequence[Message], chosen: Sequence[Message], **settings: Any
) -> None:
    """Check that ids of a pair are those of apply_chat_template with the same `settings`."""
    pair = tokenized(chat, prompt, chosen, settings.get("tools"))
    whole = their_ids(chat, [*prompt, *chosen], **settings)
    while whole[-1] != END[family]:  # a line break
        whole.pop()
    assert [*pair.prompt_ids.tolist(), *pair.chosen_ids.tolist()] == whole
    opened = their_ids(chat, prompt, add_generation_prompt=True, **settings)
    assert pair.prompt_ids.tolist() == opened


TOOL_DIALOGUES: dict[str, tuple[list[Message], list[Message]]] = {
    "a call": (ASKED, [calls()]),
    "a call under a system message": ([system("Be brief."), *ASKED], [calls()]),
    "a result": ([*ASKED, calls(), RESULT], [SAID]),
    "a call, its result and a reply": (ASKED, [calls(), RESULT, SAID]),
}
TOOL_FAMILIES = ("llama3_1", "llama3_2", "qwen2_5", "qwen3", "mistral_v3")


@pytest.mark.parametrize("name", TOOL_DIALOGUES)
@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_ids_with_tools_are_those_of_apply_chat_template(family: str, name: str) -> None:
    check_ids(family, chat_of(family), *TOOL_DIALOGUES[name], tools=[WEATHER, CLOCK])


ARGUMENTS = '{"city": "Zürich", "days": [1, 2]}'
CALL_TEXTS = {
    "llama3_1": f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}<|eot_id|>',
    "qwen2_5": (
        f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>'
    ),
    "mistral_v3": (
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}, "id": "abcdefghi"}}]</s>'
    ),
}


@pytest.mark.parametrize("family", CALL_TEXTS)
def test_calls_and_replies_are_scored_and_results_are_not(family: str) -> None:
    chat = chat_of(family)
    end = chat.tokenizer.convert_ids_to_tokens(END[family])
    call, said = replies(chat, ASKED, [calls(), RESULT, SAID], [WEATHER])
    assert (call, said) == (CALL_TEXTS[family], f"{SAID['content']}{end}")


@pytest.mark.parametrize(
    ("arguments", "said", "content"),
    [
        ({"on": True}, "true", None),
        ({}, "{}", None),
        ({"x": None}, "null", None),
        ({}, "r", "<think>hm</think>"),
    ],
)
@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_results_that_the_end_of_a_call_holds(
    family: str, arguments: dict[str, Any], said: str, content: str | None
) -> None:
    call = calls(content)
    call["tool_calls"][0]["function"]["arguments"] = arguments
    chat = chat_of(family)
    called, answer = replies(chat, ASKED, [call, RESULT | {"content": said}, SAID], [WEATHER])
    end = str(chat.tokenizer.convert_ids_to_tokens(END[family]))
    assert json.dumps(arguments) in called and called.endswith(end)
    assert answer.endswith(f"{SAID['content']}{end}")


@pytest.mark.parametrize("family", ["llama3_1", "qwen2_5", "mistral_v3"])
def test_a_call_without_content_is_one_with_empty_content(family: str) -> None:
    chat = chat_of(family)
    pairs = [tokenized(chat, ASKED, [calls(content)], [WEATHER]) for content in (None, "")]
    assert pairs[0].chosen_ids.tolist() == pairs[1].chosen_ids.tolist()
    assert pairs[0].chosen_ids.tolist().count(END[family]) == 1


def test_tools_of_mistral_are_those_of_its_library() -> None:
    pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct import messages as kinds
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    function = calls()["tool_calls"][0]["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    made = ToolCall(
        id="abcdefghi", function=FunctionCall(name=function["name"], arguments=arguments)
    )
    turns = [
        kinds.UserMessage(content=ASKED[0]["content"]),
        kinds.AssistantMessage(content=None, tool_calls=[made]),
        kinds.ToolMessage(content=RESULT["content"], tool_call_id="abcdefghi", name="get_weather"),
    ]
    tools = [Tool.model_validate(tool) for tool in (WEATHER, CLOCK)]
    encoder = MistralTokenizer.v3()
    chat = chat_of("mistral_v3")
    for messages, theirs in ((ASKED, turns[:1]), ([*ASKED, calls(), RESULT], turns)):
        request: Any = ChatCompletionRequest(messages=theirs, tools=tools)
        ids = list(encoder.encode_chat_completion(request).tokens)
        pair = tokenized(chat, messages, [SAID], [WEATHER, CLOCK])
        assert pair.prompt_ids.tolist() == ids


NO_TOOLS = "the chat template leaves out the tools (choose another model.chat_template)"


@pytest.mark.parametrize(
    "family", ["gemma2", "gemma3", "phi4", "smollm3", "deepseek", "deepseek_old", "glm4", "olmo2"]
)
def test_a_template_that_writes_no_tools_is_said(family: str) -> None:
    chat = chat_of(family)
    with pytest.raises(RecordFault) as refused:
        tokenized(chat, ASKED, [SAID], [WEATHER])
    assert str(refused.value) == NO_TOOLS
    with_tools = their_ids(chat, ASKED, add_generation_prompt=True, tools=[WEATHER])
    assert with_tools == their_ids(chat, ASKED, add_generation_prompt=True)


def test_words_beside_a_call_that_a_template_leaves_out_are_said() -> None:
    """Llama-3.1 writes either words or a call."""
    with pytest.raises(RecordFault) as refused:
        tokenized(chat_of("llama3_1"), ASKED, [calls("Let me look.")], [WEATHER])
    assert str(refused.value) == (
        "the chat template leaves out a part of what the assistant says "
        "(choose another model.chat_template)"
    )
    check_ids("qwen2_5", chat_of("qwen2_5"), ASKED, [calls("Let me look.")], tools=[WEATHER])


def test_results_between_alternating_turns_are_refused_as_by_transformers() -> None:
    chat = chat_of("gemma3")
    messages = [*ASKED, calls(), RESULT]
    with pytest.raises(RecordFault, match="the chat template refuses it: Conversation roles must"):
        tokenized(chat, messages, [SAID])
    with pytest.raises(TemplateError, match="Conversation roles must"):
        their_ids(chat, [*messages, SAID])


def thinks(thought: str, said: str) -> Message:
    return {"role": "assistant", "content": said, "reasoning_content": thought}


SUM = [user("3+3?")]
THINKING: dict[str, tuple[list[Message], list[Message]]] = {
    "one": (SUM, [thinks("Three twice.", "6")]),
    "earlier": ([*SUM, thinks("Three twice.", "6"), user("2+2?")], [thinks("Two twice.", "4")]),
    "inside": (SUM, [assistant("<think>\nThree twice.\n</think>\n\n6")]),
    "with a call": ([user("Weather?")], [calls() | {"reasoning_content": "I look."}, RESULT, SAID]),
}


@pytest.mark.parametrize("name", THINKING)
def test_reasoning_is_written_as_by_apply_chat_template(name: str) -> None:
    tools = [WEATHER] if name == "with a call" else None
    check_ids("qwen3", chat_of("qwen3"), *THINKING[name], tools=tools)


def test_reasoning_is_scored_or_kept() -> None:
    chat, dialogue = chat_of("qwen3"), THINKING["earlier"]
    assert replies(chat, *dialogue) == ["<think>\nTwo twice.\n</think>\n\n4<|im_end|>"]
    kept = tokenized(chat, *dialogue, reasoning=Reasoning.keep)
    assert kept.chosen_ids.tolist() == tokenized(chat, *dialogue).chosen_ids.tolist()
    assert [chat.tokenizer.decode(ids) for ids in scored_runs(kept)] == ["4<|im_end|>"]


def test_dropped_reasoning_is_as_if_it_never_was() -> None:
    prompt, chosen = THINKING["earlier"]
    pair = Pair(tuple(prompt), tuple(chosen), (assistant("5"),), place="")
    ours = tokenize_one(chat_of("qwen3"), drop_reasoning(pair))[0]
    bare = Pair((*SUM, assistant("6"), user("2+2?")), (assistant("4"),), pair.rejected, place="")
    assert as_lists(ours) == as_lists(tokenize_one(chat_of("qwen3"), bare)[0])


NO_REASONING = (
    "the chat template leaves out the reasoning of the last reply "
    "(set data.reasoning=drop, or choose another model.chat_template)"
)


@pytest.mark.parametrize("family", ["llama3_1", "gemma3", "phi4", "deepseek", "glm4", "olmo2"])
def test_a_template_that_leaves_reasoning_out_is_said(family: str) -> None:
    chat, (prompt, chosen) = chat_of(family), THINKING["one"]
    with pytest.raises(RecordFault) as refused:
        tokenized(chat, prompt, chosen)
    assert str(refused.value) == NO_REASONING


SEVERAL = [assistant("6"), user("2+2?"), assistant("4")]
VARIABLES: dict[str, tuple[str, dict[str, Any], list[Message], list[Message]]] = {
    "qwen3": ("qwen3", {"enable_thinking": False}, SUM, [assistant("6")]),
    "smollm3": ("smollm3", {"enable_thinking": False}, SUM, SEVERAL),
    "smollm3 tools": ("smollm3", {"xml_tools": [WEATHER["function"]]}, ASKED, [SAID]),
    "llama3_2 date": ("llama3_2", {"date_string": "1 May 2031"}, SUM, SEVERAL),
    "llama3_1 tools": (
        *("llama3_1", {"tools_in_user_message": False}),
        *(ASKED, [calls(), RESULT, SAID]),
    ),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_variables_are_given_to_the_template(name: str) -> None:
    family, variables, prompt, chosen = VARIABLES[name]
    plain = chat_of(family)
    chat = Chat(plain.tokenizer, template_kwargs=variables)
    tools = [WEATHER] if "tools_in_user_message" in variables else None
    check_ids(family, chat, prompt, chosen, **variables, tools=tools)
    before, after = (tokenized(one, prompt, chosen, tools).prompt_ids for one in (plain, chat))
    assert before.tolist() != after.tolist()


def test_an_empty_thought_is_in_the_prompt_where_thinking_is_off() -> None:
    """As Qwen3 generates; otherwise it is scored as the policy's own words."""
    plain = chat_of("qwen3")
    chat = Chat(plain.tokenizer, template_kwargs={"enable_thinking": False})
    empty = "<think>\n\n</think>\n\n"
    assert replies(plain, SUM, [assistant("6")]) == [f"{empty}6<|im_end|>"]
    assert replies(chat, SUM, [assistant("6")]) == ["6<|im_end|>"]
    # Behind a further question Qwen3 strips it, so the dialogue counts.
    assert replies(chat, SUM, SEVERAL) == ["6<|im_end|>", "4<|im_end|>"]
    pair, whole = tokenized(chat, SUM, SEVERAL), their_ids(chat, [*SUM, *SEVERAL])
    assert [*pair.prompt_ids.tolist(), *pair.chosen_ids.tolist()] == whole[:-1]
