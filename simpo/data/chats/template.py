"""Renders dialogues with a chat template, and finds the control tokens of that template."""

from __future__ import annotations

import hashlib
import json
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import meta
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from simpo.config.errors import ConfigError, did_you_mean, first_line
from simpo.config.models import TEMPLATE_VARIABLES
from simpo.config.paths import template_file
from simpo.data.pairs import Message
from simpo.data.reading.records import RecordFault

NEEDED_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma_paper": ("<start_of_turn>", "<end_of_turn>"),
    # Turns of Mistral and Zephyr begin with plain text and end with the tokenizer's EOS.
    "mistral_paper": (),
    "zephyr": (),
}
"""Tokens that the tokenizer must have for each shipped template."""

MARK = re.compile(r"\s*(<\|[^|<>\s]+\|>|<\w+_of_\w+>)")
"""Text that looks like a special token: `<|im_end|>`, `<end_of_turn>`."""

MAX_WRITTEN = 1_000_000
"""Characters that a template may write, in addition to ten times those of the messages."""


_GENERATION = re.compile(r"{%-?\s*generation\b")


class Rendering(NamedTuple):
    """A rendered dialogue.

    Attributes:
        text: what the template writes.
        marked: characters [start, end) that it writes within `{% generation %}` marks; None if the
            template has no such marks.
    """

    text: str
    marked: list[tuple[int, int]] | None


class _Program(NamedTuple):
    text: str
    compiled: Any


class Template:
    """A compiled chat template with a fixed date.

    Attributes:
        sha256: hash of its text.
        date: the date it is given as today's; None if it does not ask for one.
        speaks_of_system: whether the original trainer would give it an empty system message.
        kwargs: variables given to it in every rendering.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        today: date,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Raises:
            ConfigError: the tokenizer has no template, it is not valid Jinja, or it never asks for
                one of `kwargs`.
        """
        text, text_with_tools = _texts(tokenizer)
        self._plain = _Program(text, _compiled(text))
        self._with_tools = self._plain
        if text_with_tools is not None:
            self._with_tools = _Program(text_with_tools, _compiled(text_with_tools))
        self.sha256 = hashlib.sha256((text + (text_with_tools or "")).encode()).hexdigest()
        self.date = today if "strftime_now" in text + (text_with_tools or "") else None
        self.speaks_of_system = "system" in text or "<|im_start|>" in text
        self.kwargs = dict(kwargs or {})
        _refuse_unknown(self.kwargs, (self._plain, self._with_tools))
        now = datetime.combine(today, time())
        self._variables = {
            **tokenizer.special_tokens_map,
            **self.kwargs,
            "documents": None,
            # transformers' own function gives the time of rendering.
            "strftime_now": now.strftime,
        }

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Render a dialogue as `tokenizer.apply_chat_template` does, but with the fixed date.

        Raises:
            RecordFault: the template refuses the messages, fails on them or does not end.
        """
        return self.rendering(messages, tools, add_generation_prompt).text

    def rendering(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendering:
        """As `render`, with the stretches that the template marks as generated.

        `developer` becomes `system` in a template that never mentions it. To a template that fails
        on tool calls they are given once more with arguments as JSON text instead of objects, then
        with '' instead of null content.

        Raises:
            RecordFault: as `render`.
        """
        program = self._with_tools if tools else self._plain
        system = "developer" if "developer" in program.text else "system"
        turns = [
            message | {"role": system} if message["role"] == "developer" else dict(message)
            for message in messages
        ]
        for turn in turns:
            if "reasoning_content" in turn:  # gpt-oss reads it under another name
                turn["thinking"] = turn["reasoning_content"]
        given = {"tools": tools and list(tools), "add_generation_prompt": add_generation_prompt}
        try:
            return self._run(program, turns, given)
        except RecordFault as fault:
            if not any("tool_calls" in turn for turn in turns):
                raise
            with_content = [turn | {"content": turn["content"] or ""} for turn in turns]
            for other in (
                list(map(_with_arguments_as_text, turns)),
                with_content,
                list(map(_with_arguments_as_text, with_content)),
            ):
                with suppress(RecordFault):
                    return self._run(program, other, given)
            raise fault from None

    def _run(self, program: _Program, turns: list[Message], given: Mapping[str, Any]) -> Rendering:
        size = sum(map(_size, turns)) + len(json.dumps(given["tools"]))
        room = MAX_WRITTEN + 10 * size
        parts: list[str] = []
        marked: list[tuple[int, int]] = []
        try:
            with program.compiled.environment.activate_tracker(parts, marked):
                for part in program.compiled.generate(**self._variables, messages=turns, **given):
                    parts.append(part)
                    room -= len(part)
                    if room < 0:
                        raise RecordFault("the chat template writes text without an end")
        except RecordFault:
            raise
        except Exception as error:  # a template is a program and can raise anything
            if type(error) is TemplateError:  # what raise_exception raises
                raise RecordFault(f"the chat template refuses it: {first_line(error)}") from error
            raise RecordFault(f"the chat template fails on it: {_with_line(error)}") from error
        return Rendering("".join(parts), marked if _GENERATION.search(program.text) else None)

    def probe(self) -> tuple[str, str]:
        """Render a question and its answer, with a system message if the template requires one.

        Returns:
            The dialogue, and what the template writes behind the answer.

        Raises:
            ConfigError: the template fails, or leaves out one of the two.
        """
        question, answer = "2hv7", "8wq3"
        dialogue = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        try:
            text = self.render(dialogue[1:])
        except RecordFault as fault:
            try:
                text = self.render(dialogue)
            except RecordFault:
                raise ConfigError(
                    [
                        f"model.chat_template: tried on a question and its answer: {fault} "
                        "(mend the template, or choose another)"
                    ]
                ) from fault
        for message in dialogue[1:]:
            if message["content"] not in text:
                raise ConfigError(
                    [
                        f"model.chat_template: leaves out what the {message['role']} says "
                        "(mend the template, or choose another)"
                    ]
                )
        return text, text[text.rindex(answer) + len(answer) :]


def use_template(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> None:
    """Give a tokenizer a shipped template, by name, or the template in a file.

    Raises:
        ConfigError: the tokenizer lacks a token of the template and would split it into letters.
    """
    tokenizer.chat_template = template_file(name_or_path).read_text(encoding="utf-8")
    needed = NEEDED_TOKENS.get(name_or_path)
    if needed is None:
        _, tail = Template(tokenizer, date.today()).probe()
        ending = MARK.match(tail)
        needed = (ending[1],) if ending else ()
    missing = [token for token in needed if not _is_token(tokenizer, token)]
    if missing:
        raise ConfigError(
            [
                f"model.chat_template: {name_or_path} is made of tokens that the tokenizer does "
                f"not have: {', '.join(missing)} (choose the template of the model's family)"
            ]
        )


def control_tokens(tokenizer: PreTrainedTokenizerBase, written: str) -> set[str]:
    """Tokens that delimit turns; as text in a message they would forge a turn.

    These are all special tokens, and the other added tokens that the template writes around
    messages. Paired tokens such as <think> and </think> are excluded: replies contain them.

    Args:
        written: a dialogue rendered by the template.
    """
    added = list(tokenizer.added_tokens_decoder.values())
    names = {token.content for token in added}
    found = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    for name in names - found:
        partner = name.replace("</", "<", 1) if "</" in name else name.replace("<", "</", 1)
        paired = partner != name and partner in names
        if name[:1] in "<[{|" and name in written and not paired:
            found.add(name)
    return {name for name in found if name.strip()}


def _texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """Text of the tokenizer's template, or of the default one if there are several; and that for
    dialogues with tools if it is another."""
    template, with_tools = tokenizer.chat_template, None
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(template))
            raise ConfigError(
                [
                    f"model.chat_template: the tokenizer has several templates and none is the "
                    f"default: {names} (write the one wanted to a .jinja file, and name that)"
                ]
            )
        template, with_tools = template["default"], template.get("tool_use")
    if not isinstance(template, str) or not template.strip():
        raise ConfigError(
            ["model.chat_template: the tokenizer has no template (name one, or a .jinja file)"]
        )
    return template, with_tools


def _compiled(text: str) -> Any:
    try:
        return _compile_jinja_template(text)
    except Exception as error:  # Jinja's errors, or Python's in the code that Jinja generates
        line = getattr(error, "lineno", None)
        raise ConfigError(
            [
                f"model.chat_template: {f'line {line}: ' if line else ''}"
                f"{first_line(error)} (mend the template, or choose another)"
            ]
        ) from error


def _refuse_unknown(names: Iterable[str], programs: Iterable[_Program]) -> None:
    """
    Raises:
        ConfigError: a name is no variable of the templates.
    """
    asked: set[str] = set()
    for text, compiled in programs:
        names_of_text = meta.find_undeclared_variables(compiled.environment.parse(text))
        asked |= names_of_text - set(compiled.globals)
    free = sorted(name for name in asked - TEMPLATE_VARIABLES if not name.endswith("_token"))
    problems = []
    for name in names:
        if name not in asked:
            known = f"it has {', '.join(free)}" if free else "it has none"
            hint = did_you_mean(name, free, known)
            place = f"model.chat_template_kwargs.{name}"
            problems.append(f"{place}: the chat template has no such variable ({hint})")
    if problems:
        raise ConfigError(problems)


def _with_arguments_as_text(turn: Message) -> Message:
    if "tool_calls" not in turn:
        return turn
    calls = [
        call
        | {
            "function": call["function"]
            | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
        }
        for call in turn["tool_calls"]
    ]
    return turn | {"tool_calls": calls}


def _size(turn: Message) -> int:
    """Characters of a turn, about."""
    return len(turn["content"] or "") if len(turn) == 2 else len(json.dumps(turn))


def _is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return len(tokenizer(text, add_special_tokens=False).input_ids) == 1


def _with_line(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == "<template>"]
    return f"line {lines[-1]}: {first_line(error)}" if lines else first_line(error)
