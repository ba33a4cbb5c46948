"""Turns a pair into the texts that the chat template writes, with the places of the replies.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n<think>Hm.</think>\\n\\nHello!<|im_end|>\\n
                                                         |start                |scored  |said

A response of several turns has such places for each reply of the assistant. What a template leaves
out of a message is a fault of the record: nobody could see it in the tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from simpo.config.choices import Reasoning
from simpo.data.chats.template import Template
from simpo.data.pairs import Message, Pair
from simpo.data.reading.messages import (
    RecordFault,
    check_reasoning_ends,
    split_reasoning,
    tool_name,
    without_reasoning,
)

OTHER_TEMPLATE = "(choose another model.chat_template)"

_EMPTY_THINKING = re.compile(r"\s*(<think>\s*)?(</think>\s*)?")
_CLOSED_THINKING = re.compile(r"<think>\s*</think>\s*\Z")
_END_OF_THINKING = re.compile(r"(\s*<think>)?\s*</think>\s*")


class Reply(NamedTuple):
    """Places of a reply, as characters of a rendered dialogue.

    Attributes:
        start: end of its generation prompt.
        scored: where what is scored begins: `start`, or the end of reasoning that is not scored.
        said: end of its last text, behind which the template ends the turn.
        until: start of the next reply, or the end of the dialogue.
        next_text: content of the turn behind it; empty behind the last reply.
    """

    start: int
    scored: int
    said: int
    until: int
    next_text: str


class RenderedResponse(NamedTuple):
    """A dialogue up to the end of a response.

    Attributes:
        whole: the text.
        replies: the replies of the response.
        marked: characters [start, end) of the response that the template marks as generated; None
            if the marks do not decide what is scored.
    """

    whole: str
    replies: tuple[Reply, ...]
    marked: list[tuple[int, int]] | None

    def places(self) -> Iterator[int]:
        """The places whose tokens have to be found."""
        yield from (reply.scored for reply in self.replies)
        for bounds in self.marked or ():
            yield from bounds


class Rendered(NamedTuple):
    """The texts of a pair.

    Attributes:
        prompt: the prompt, with what both responses share of the generation prompt.
        responses: of chosen, of rejected if there is one, and of others.
        unreasoned: whether the template strips the reasoning of a reply that is not the last.
        scores: of ranked responses.
        names: of the responses.
    """

    prompt: str
    responses: tuple[RenderedResponse, ...]
    unreasoned: bool
    scores: tuple[float, ...] = ()
    names: tuple[str, ...] = ("chosen", "rejected")

    def texts(self) -> Iterator[str]:
        """The texts whose tokens are needed."""
        yield self.prompt
        for response in self.responses:
            yield response.whole
            yield from (response.whole[:place] for place in response.places())


def render_pair(template: Template, pair: Pair, reasoning: Reasoning) -> Rendered:
    """Render a pair.

    The marks of a template decide what is scored if the pair has one response.

    Raises:
        RecordFault: the template refuses the pair, leaves out a part of it, or does not write the
            prompt as the beginning of the dialogue.
    """
    wholes = [
        template.rendering([*pair.prompt, *response], pair.tools) for response in pair.responses
    ]
    prompt = template.render(pair.prompt, pair.tools, add_generation_prompt=True)
    _check_prompt(prompt, pair)
    _check_tools(template, prompt, pair)
    texts = [whole.text for whole in wholes]
    prompt, starts = _before(template, pair.prompt, pair.tools, texts, prompt)
    responses, unreasoned = [], False
    for response, (whole, marked), start in zip(pair.responses, wholes, starts, strict=True):
        indices = [i for i, turn in enumerate(response) if turn["role"] == "assistant"]
        earlier = ([*pair.prompt, *response[:i]] for i in indices[1:])
        begin = [start, *(_before(template, b, pair.tools, [whole])[1][0] for b in earlier)]
        replies = []
        for i, at, until in zip(indices, begin, [*begin[1:], len(whole)], strict=True):
            following = response[i + 1]["content"] if i < indices[-1] else ""
            reply, stripped = _reply(whole, at, until, response[i], reasoning)
            if stripped and i == indices[-1]:
                raise RecordFault(
                    "the chat template leaves out the reasoning of the last reply "
                    "(set data.reasoning=drop, or choose another model.chat_template)"
                )
            replies.append(reply._replace(next_text=(following or "").strip()))
            unreasoned |= stripped
        _check_turns(whole[start:], response)
        marks = [(max(a, start), b) for a, b in marked or () if b > start]
        ours = marked is None or len(pair.responses) > 1
        responses.append(RenderedResponse(whole, tuple(replies), None if ours else marks))
    texts_of = tuple(responses)
    return Rendered(prompt[: min(starts)], texts_of, unreasoned, pair.scores, pair.names)


def _before(
    template: Template,
    turns: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    wholes: Sequence[str],
    text: str | None = None,
) -> tuple[str, list[int]]:
    """The text before a reply with its generation prompt, and where it ends in each dialogue.

    A template may write the reasoning of earlier turns before a reply, and strip it from a dialogue
    that goes on with another question. The dialogue counts.

    Args:
        text: that text as the template writes it, if it is known.

    Raises:
        RecordFault: a dialogue does not begin with that text.
    """
    for shown in (turns, list(map(without_reasoning, turns))):
        if text is None:
            text = template.render(shown, tools, add_generation_prompt=True)
        ends = [_end(text, whole) for whole in wholes]
        if None not in ends:
            return text, [end for end in ends if end is not None]
        text = None
    raise RecordFault(
        f"the chat template writes the prompt differently before a reply {OTHER_TEMPLATE}"
    )


def _end(before: str, whole: str) -> int | None:
    """How much of `before` a dialogue begins with: all of it, or all but a block of thinking that
    is empty or just opened; None if it is another dialogue.
    """
    if whole.startswith(before):
        return len(before)
    both = enumerate(zip(before, whole, strict=False))
    shared = next((i for i, (one, other) in both if one != other), min(len(before), len(whole)))
    block = before.rfind("<think>")
    if block >= 0 and _CLOSED_THINKING.match(before, block):
        shared = min(shared, block)  # the dialogue may have a block that is not empty
    # The dialogue may go on with a letter of the tag.
    for end in range(shared, max(shared - len("</think>"), -1), -1):
        if _EMPTY_THINKING.fullmatch(before, end):
            return end
    return None


def _reply(
    whole: str, start: int, until: int, turn: Message, reasoning: Reasoning
) -> tuple[Reply, bool]:
    """The places of a reply, and whether the template strips its reasoning.

    Raises:
        RecordFault: the template leaves out another part of it, or reasoning that is not to be
            scored does not end.
    """
    if reasoning is Reasoning.keep:
        check_reasoning_ends(turn)
    thought, said = split_reasoning(turn)
    # The reasoning counts only before the content, which may repeat it.
    thought_end = _find(thought, whole, start, until)
    stripped = thought_end < 0 or whole.find(said, thought_end, until) < 0
    begin = start if stripped else thought_end
    content = whole.find(said, begin, until)
    if content < 0:
        raise _left_out("assistant")
    end = content + len(said)
    for call in turn.get("tool_calls", ()):
        end = max(end, _check_call(call["function"], whole, end, until))
    scored = start
    if reasoning is Reasoning.keep:
        closing = _END_OF_THINKING.match(whole, begin, until)
        after = content if thought and said and not stripped else begin
        scored = closing.end() if closing else after
    return Reply(start, scored, end, until, ""), stripped


def _check_prompt(text: str, pair: Pair) -> None:
    """Check that a prompt has all of its turns but for the assistant's earlier texts, from which
    some templates drop the reasoning on purpose.

    Raises:
        RecordFault: the template leaves out a part.
    """
    _check_turns(text, pair.prompt)
    # A call comes behind the turn that it answers; the schemas before it may hold its name.
    at = 0
    for turn in pair.prompt:
        if turn["role"] in ("user", "tool"):
            at = max(at, _find(turn["content"], text, at, len(text)))
        for call in turn.get("tool_calls", ()):
            at = _check_call(call["function"], text, at, len(text))


def _check_tools(template: Template, prompt: str, pair: Pair) -> None:
    """
    Raises:
        RecordFault: the prompt lacks a tool, or is the same without tools: an earlier call may hold
            the name of a tool that is not written.
    """
    if not pair.tools:
        return
    without = None
    with suppress(RecordFault):  # a template may need the tools to write a call
        without = template.render(pair.prompt, add_generation_prompt=True)
    if prompt == without or not all(tool_name(tool) in prompt for tool in pair.tools):
        raise RecordFault(f"the chat template leaves out the tools {OTHER_TEMPLATE}")


def _check_turns(text: str, turns: Sequence[Message]) -> None:
    """
    Raises:
        RecordFault: the text lacks what somebody else than the assistant says.
    """
    for turn in turns:
        if turn["role"] != "assistant" and _find(turn["content"], text, 0, len(text)) < 0:
            raise _left_out(turn["role"])


def _check_call(function: Mapping[str, Any], text: str, start: int, end: int) -> int:
    """The end of a tool call in a text.

    Raises:
        RecordFault: the text lacks its name, or a text or number among its arguments.
    """
    values = (function["name"], *_leaves(function["arguments"]))
    ends = [_find(value, text, start, end) for value in values]
    if min(ends) < 0:
        raise RecordFault(f"the chat template leaves out a tool call {OTHER_TEMPLATE}")
    return max(ends)


def _leaves(value: Any) -> Iterator[str | int | float]:
    """The texts and numbers in a JSON value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value is not None and not isinstance(value, bool):
        yield value


def _find(value: str | int | float, text: str, start: int, end: int) -> int:
    """The end of a value in a text, as it is or as JSON or Python write it; -1 if it is missing."""
    plain = str(value).strip()
    if (at := text.find(plain, start, end)) >= 0:
        return at + len(plain)
    for escaped in (json.dumps(plain, ensure_ascii=False), json.dumps(plain), repr(plain)):
        if (at := text.find(escaped[1:-1], start, end)) >= 0:
            return at + len(escaped) - 2
    return -1


def _left_out(role: str) -> RecordFault:
    return RecordFault(
        f"the chat template leaves out a part of what the {role} says {OTHER_TEMPLATE}"
    )
