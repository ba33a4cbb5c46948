"""A chat template: what it writes for a dialogue, and what must not stand in a message under it."""

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
from simpo.config.inputs import template_file
from simpo.data.pairs import Message
from simpo.data.records import RecordFault

NEEDED_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma_paper": ("<start_of_turn>", "<end_of_turn>"),
    # Mistral's and Zephyr's turns begin with plain text, and end in the tokenizer's EOS.
    "mistral_paper": (),
    "zephyr": (),
}
"""Tokens that the templates shipped here are made of, by name."""

MARK = re.compile(r"\s*(<\|[^|<>\s]+\|>|<\w+_of_\w+>)")
"""What is meant as one token by whoever writes it: `<|im_end|>`, `<end_of_turn>`."""

MAX_WRITTEN = 1_000_000
"""Characters that a template may write beside ten times those of the messages."""


class Template:
    """A chat template, compiled, with the date that it writes.

    Attributes:
        sha256: hash of its text.
        date: the day that it takes for today; None where it asks for no date.
        speaks_of_system: whether the original trainer would give it an empty system message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: date) -> None:
        """
        Raises:
            ConfigError: the tokenizer has no template, or one that is not written in Jinja.
        """
        text = _text(tokenizer)
        try:
            self._compiled = _compile_jinja_template(text)
        except Exception as error:  # also Python's own, of the code that Jinja makes of it
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
            # transformers' own is of the moment at which a record is rendered.
            "strftime_now": now.strftime,
        }

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """A dialogue as text, like `tokenizer.apply_chat_template`, but for today's date.

        Raises:
            RecordFault: the template refuses the messages, fails on them or finds no end.
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
        except Exception as error:  # a template is a program
            if type(error) is TemplateError:  # what raise_exception raises
                raise RecordFault(f"the chat template refuses it: {first_line(error)}") from error
            raise RecordFault(f"the chat template fails on it: {_with_line(error)}") from error
        return "".join(parts)

    def probe(self, question: str, answer: str) -> str:
        """A question and its answer as text, after a system message where it must have one.

        Raises:
            ConfigError: the template cannot write it, or leaves one of the two out.
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
    """Give a tokenizer a template shipped here, by name, or that of a file.

    Raises:
        ConfigError: the tokenizer lacks tokens that the template is made of, which would be read as
            letters.
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
    """Tokens that give a dialogue its shape: as text of a message they would forge a turn.

    They are all special tokens, and of the other added ones those that the template writes around
    messages. A pair like <think> and </think> is what replies are made of, and not among them.

    Args:
        written: a dialogue as the template writes it.
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
    """The tokenizer's template, or the default one of several."""
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
