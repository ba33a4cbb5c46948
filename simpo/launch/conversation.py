"""A dialogue in a terminal, or over pipes: reads questions and commands, prints replies.

Replies go to stdout; notes, errors and answers to commands go to stderr.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

from simpo.config.errors import DataError, SimpoError, unwritable
from simpo.data.pairs import Message
from simpo.model.generate import Sampling
from simpo.model.talk import TalkingModel

HELP = r"""
/clear         begin a new dialogue; the system prompt stays
/undo          take the last question and its reply back
/system TEXT   set the system prompt; without TEXT, remove it
/save FILE     add the dialogue to a file of JSON lines, which data=jsonl reads
/help          show this
/quit          end, as Ctrl-D does
A line that ends with \ goes on in the next one. A question that begins with / needs a blank before
it. Ctrl-C stops a reply.
""".strip()
COMMANDS = tuple(line.split()[0] for line in HELP.splitlines() if line.startswith("/"))

STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters; not the tab and the line feed."""


class Conversation:
    """A dialogue with a model.

    Attributes:
        messages: the turns so far, each question with its reply; without the system prompt.
        system: the system prompt; empty for none.
    """

    def __init__(self, model: TalkingModel, sampling: Sampling, system: str = "") -> None:
        """
        Raises:
            DataError: the chat template does not take the system prompt.
        """
        self.messages: list[Message] = []
        self.system = ""
        self._model, self._sampling, self._asked = model, sampling, 0
        self._set_system(system)

    def ask(self, question: str) -> None:
        """Print the reply to a question, below that of the base if there is one.

        Raises:
            DataError: the question cannot be asked; the dialogue stays as it was.
        """
        turns = [*self.messages, {"role": "user", "content": question}]
        ids = self._model.prompt_ids(_with_system(self.system, turns))
        # A question that is asked again after /undo gets another reply.
        sampling = replace(self._sampling, seed=self._sampling.seed + self._asked)
        self._asked += 1
        if self._model.base_name:
            print("[base]", flush=True)
            _, early = self._model.reply(ids, sampling, _show, of_base=True)
            _end(early)
            print("[trained]", flush=True)
        reply, early = self._model.reply(ids, sampling, _show)
        _end(early)
        if reply.text.strip():
            self.messages = [*turns, {"role": "assistant", "content": reply.text}]
        else:  # templates and readers of data refuse it
            _note("(the reply is empty: the question is taken back)")

    def command(self, line: str) -> bool:
        """Carry out a command such as `/clear`.

        Returns:
            Whether the dialogue goes on.

        Raises:
            DataError: it is no command, or cannot be carried out.
            RunError: the file to save to cannot be written.
        """
        name, _, text = line.partition(" ")
        text = text.strip()
        if name == "/clear":
            self.messages = []
        elif name == "/undo":
            if not self.messages:
                raise DataError("/undo: there is no question to take back")
            _note(f"taken back: {self.messages[-2]['content']}")
            self.messages = self.messages[:-2]
        elif name == "/system":
            self._set_system(text)
        elif name == "/save":
            self._save(text)
        elif name == "/help":
            _note(HELP)
        elif name != "/quit":
            raise DataError(f"{name}: no such command (one of {', '.join(COMMANDS)})")
        return name != "/quit"

    def _set_system(self, text: str) -> None:
        """
        Raises:
            DataError: the chat template does not take it.
        """
        if text:
            probe = _with_system(text, [{"role": "user", "content": "Hi"}])
            self._model.prompt_ids(probe)
            if text not in self._model.chat.prompt_text(probe):
                raise DataError(
                    "the chat template leaves out the system prompt (put it into a question)"
                )
        self.system = text

    def _save(self, name: str) -> None:
        if not name.endswith(".jsonl"):
            raise DataError(f"/save: must be followed by a .jsonl file, got {name or 'nothing'}")
        if not self.messages:
            raise DataError("/save: there is nothing to save")
        path = Path(name).expanduser()
        record = {"messages": _with_system(self.system, self.messages)}
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise unwritable(path, error) from error
        _note(f"saved  {path}")


def talk(conversation: Conversation) -> None:
    """Read questions and commands until they end.

    In a terminal, lines can be edited and an error is printed; otherwise an error ends it.

    Raises:
        SimpoError: a question or command of a pipe or file cannot be carried out.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _edit_lines()
        _note("       /help lists the commands, Ctrl-C stops a reply, Ctrl-D ends\n")
    goes_on = True
    while goes_on:
        try:
            text = _read(interactive)
            if text.startswith("/"):
                goes_on = conversation.command(text)
            elif text.strip():
                conversation.ask(text)
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
        except SimpoError as error:
            if not interactive:
                raise
            _note(str(error))
    if interactive:
        print()


def _read(interactive: bool) -> str:
    r"""A question: a line, with those that follow it if it ends with \.

    Raises:
        EOFError: there are no more.
        DataError: it is not UTF-8.
    """
    lines: list[str] = []
    while not lines or lines[-1].endswith("\\"):
        prompt = ("... " if lines else "> ") if interactive else ""
        try:
            # A file of Windows may begin with a byte-order mark, and its lines end in two bytes.
            line = input(prompt).removeprefix("\ufeff").rstrip("\r")
            line.encode()
        except UnicodeError as error:
            raise DataError("the question is not UTF-8 (convert it)") from error
        except EOFError:
            if not lines:
                raise
            break
        lines.append(line)
    return "\n".join([*(line.removesuffix("\\") for line in lines[:-1]), lines[-1]])


def _edit_lines() -> None:
    """Let input() edit lines, keep a history, and take pasted lines as one question."""
    try:
        import readline
    except ImportError:  # Python was built without it
        return
    # Python switches it off.
    readline.parse_and_bind("set enable-bracketed-paste on")


def _with_system(system: str, turns: list[Message]) -> list[Message]:
    return [{"role": "system", "content": system}, *turns] if system else turns


def _show(text: str) -> None:
    """Print a part of a reply; on a terminal without characters that would steer it."""
    if sys.stdout.isatty():
        text = STEERING.sub("\ufffd", text)
    print(text, end="", flush=True)


def _end(early: str) -> None:
    print(flush=True)
    if early:
        _note(f"({early})")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
