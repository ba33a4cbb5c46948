"""Renders dialogues with a chat template, and finds the control tokens of that template."""

from __future__ import annotations

import hashlib
import re
import traceback
from collections.abc import Sequence
from datetime import date, datetime, time
from pathlib import Path

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from simpo.config.errors import ConfigError, first_line
from simpo.config.paths import template_file
from simpo.data.pairs import Message
from simpo.data.records import RecordFault

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


class Template:
    """A compiled chat template with a fixed date.

    Attributes:
        sha256: hash of its text.
        date: the date it is given as today's; None if it does not ask for one.
        speaks_of_system: whether the original trainer would give it an empty system message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: date) -> None:
        """
        Raises:
            ConfigError: the tokenizer has no template, or it is not valid Jinja.
        """
        text = _text(tokenizer)
        try:
            self._compiled = _compile_jinja_template(text)
        except Exception as error:  # Jinja's errors, or Python's in the code that Jinja generates
            line = getattr(error, "lineno", None)
            raise ConfigError(
                [
                    f"model.chat_template: {f'line {line}: ' if line else ''}"
                    f"{first_line(error)} (mend the template, or choose another)"
                ]
            ) from error
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.date = today if "strftime_now" in text else None
        self.speaks_of_system = "system" in text or "<|im_start|>" in text
        now = datetime.combine(today, time())
        self._variables = {
            **tokenizer.special_tokens_map,
            "tools": None,
            "documents": None,
            # transformers' own function gives the time of rendering.
            "strftime_now": now.strftime,
        }

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Render a dialogue as `tokenizer.apply_chat_template` does, but with the fixed date.

        Raises:
            RecordFault: the template refuses the messages, fails on them or does not end.
        """
        room = MAX_WRITTEN + 10 * sum(len(message["content"]) for message in messages)
        parts: list[str] = []
        turns = [dict(message) for message in messages]
        try:
            for part in self._compiled.generate(
                **self._variables, messages=turns, add_generation_prompt=add_generation_prompt
            ):
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
        return "".join(parts)

    def probe(self, question: str, answer: str) -> str:
        """Render a question and its answer, with a system message if the template requires one.

        Raises:
            ConfigError: the template fails, or leaves out one of the two.
        """
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
        return text


def use_template(tokenizer: PreTrainedTokenizerBase, name_or_path: str) -> None:
    """Give a tokenizer a shipped template, by name, or the template in a file.

    Raises:
        ConfigError: the tokenizer lacks a token of the template and would split it into letters.
    """
    tokenizer.chat_template = template_file(name_or_path).read_text(encoding="utf-8")
    needed = NEEDED_TOKENS.get(name_or_path)
    if needed is None:
        question, answer = "2hv7", "8wq3"
        text = Template(tokenizer, date.today()).probe(question, answer)
        ending = MARK.match(text, text.rindex(answer) + len(answer))
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


def _text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of the tokenizer's template, or of the default one if there are several."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(template))
            raise ConfigError(
                [
                    f"model.chat_template: the tokenizer has several templates and none is the "
                    f"default: {names} (write the one wanted to a .jinja file, and name that)"
                ]
            )
        template = template["default"]
    if not isinstance(template, str) or not template.strip():
        raise ConfigError(
            ["model.chat_template: the tokenizer has no template (name one, or a .jinja file)"]
        )
    return template


def _is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return len(tokenizer(text, add_special_tokens=False).input_ids) == 1


def _with_line(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == "<template>"]
    return f"line {lines[-1]}: {first_line(error)}" if lines else first_line(error)
