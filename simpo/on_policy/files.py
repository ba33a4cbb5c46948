"""Reads and writes the files of prompts and replies that generate and annotate share.

<folder>/
    settings.json              settings of simpo.generate; a run with others is refused
    prompts.jsonl              id, split, prompt (messages), rule, tools, reference_answer
    responses.jsonl            replies: prompt id, seed, text, its tokens, whether it ended, share
                               of repeated 4-grams; of held-out prompts also the ids of its tokens
    responses-<part>.jsonl     the same, of one part of several (on_policy.parts)
    scores-<reward>.jsonl      prompt id, hashes of its replies and of the reward, their scores
    train.jsonl, test.jsonl    the pairs, as `data=jsonl` reads them
    measures.json, reply_scores.jsonl      see `simpo.on_policy.measures`
    drift.jsonl                            see `simpo.on_policy.drift`
    lock, lock-<part>          held by the commands that work in the folder
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from simpo.config.errors import DISK, ConfigError, DamagedError, unwritable
from simpo.config.models import ADAPTER_FILE, ModelConfig
from simpo.config.schema import RunConfig
from simpo.data import hub
from simpo.data.pairs import Message, Pair
from simpo.model.pretrained import model_source
from simpo.run.atomic import write_text
from simpo.run.cache import sha256
from simpo.run.folder import is_free, refuse_changed
from simpo.run.progress import say

MODEL_FILES = (".safetensors", ".bin", ".pt", ".py", "config.json", "tokenizer.json", ".model")
"""Suffixes of the files that decide what a model generates."""

ADAPTER = "model.lora.adapter"
"""The setting that names an adapter."""
SEEDS = "on_policy.seeds"
"""Key of settings.json: the seeds of the last command, which may differ from earlier ones."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to reply to; `id` is a hash of its messages and tools.

    Attributes:
        reference_answer: what a judge compares replies with; None without one.
    """

    id: str
    split: str
    prompt: tuple[Message, ...]
    rule: Mapping[str, Any] | None
    tools: tuple[Mapping[str, Any], ...] | None = None
    reference_answer: str | None = None


@dataclass(frozen=True)
class StoredReply:
    """A reply to the prompt `id`.

    Attributes:
        tokens: their number without the end token.
        ended: False if it was cut off.
        repetition: see `simpo.loop.replies.repetition`; None if an earlier version wrote the reply.
        ids: of the tokens as they were drawn, without the end token; None if the prompt is to train
            on, or an earlier version wrote the reply.
    """

    id: str
    seed: int
    text: str
    tokens: int
    ended: bool
    repetition: float | None = None
    ids: tuple[int, ...] | None = None

    def line(self) -> dict[str, Any]:
        """Its line of responses.jsonl."""
        return {
            "id": self.id,
            "seed": self.seed,
            "response": self.text,
            "tokens": self.tokens,
            "ended": self.ended,
            **({} if self.repetition is None else {"repetition": self.repetition}),
            **({} if self.ids is None else {"ids": self.ids}),
        }


def on_policy_folder(run: RunConfig) -> Path:
    """The folder of a run's replies, which may not exist yet."""
    if run.on_policy.folder is not None:
        return Path(run.on_policy.folder).expanduser().absolute()
    name = f"{run.model.name}-{run.data.name}"
    return (Path(run.output_dir).expanduser() / "on_policy" / name).absolute()


def weights_content(
    key: str, model: ModelConfig, cache_dir: Path, adapter_key: str | None = None
) -> list[str | None]:
    """Hashes of a model's files and of its adapter's, None without one.

    Args:
        key: the setting that names the model, for messages.
        adapter_key: the setting that names its adapter, if that is another.
    """
    adapter = model.lora.adapter
    return [
        model_content(key, model_source(model, cache_dir), model.revision),
        adapter and model_content(adapter_key or key, adapter, None, ADAPTER_FILE),
    ]


def prompt_id(pair: Pair) -> str:
    """What a pair's prompt is known by: a hash of its messages and tools."""
    return content_hash([pair.prompt, pair.tools] if pair.tools else pair.prompt)


@contextmanager
def working_in(folder: Path, wait: bool = False, part: int | None = None) -> Iterator[None]:
    """Make a folder if needed, and lock it against other commands while entered.

    Args:
        wait: for another process that works in it, instead of refusing.
        part: of the replies that is generated, which excludes that part and whoever works in the
            whole folder, but no other part.

    Raises:
        ConfigError: another process works in it.
        RunError: it cannot be written, or the disk is full; what was written stays.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    with ExitStack() as held:
        told = f"on_policy.folder: another process works in {folder} (wait for it)"
        kind = fcntl.LOCK_EX if part is None else fcntl.LOCK_SH
        held.enter_context(_locked(folder / "lock", kind, None if wait else told))
        if part is not None:
            told = f"on_policy.part: another process generates part {part} in {folder} "
            told += "(wait for it, or set another part)"
            held.enter_context(_locked(folder / f"lock-{part}", fcntl.LOCK_EX, told))
        try:
            yield
        except OSError as error:
            if error.errno in DISK:
                raise unwritable(folder, error) from error
            raise


def one_part_at_a_time(folder: Path) -> AbstractContextManager[None]:
    """Wait for other parts that are in this context, and keep others out of it.

    Raises:
        RunError: the folder cannot be written.
    """
    return _locked(folder / "lock-settings", fcntl.LOCK_EX, None)


@contextmanager
def _locked(file: Path, kind: int, told: str | None) -> Iterator[None]:
    """Hold a lock of a folder.

    Args:
        kind: LOCK_EX or LOCK_SH of fcntl.
        told: the error if another process holds it; None waits for that process.
    """
    folder = file.parent
    try:
        handle = file.open("w")
    except OSError as error:
        raise unwritable(folder, error) from error
    with handle:
        try:
            if not is_free(handle, kind):
                if told is not None:
                    raise ConfigError([told])
                say(f"waiting for another process that works in {folder} ...")
                fcntl.flock(handle, kind)
        except OSError as error:  # the file system has no locks
            reason = error.strerror
            print(f"note   {folder} cannot be locked, so run only one command in it: {reason}")
        yield


def content_hash(value: Any) -> str:
    """Hash of a JSON value, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def model_content(key: str, source: str, revision: str | None, file: str = "config.json") -> str:
    """Identifies the content of a model, which may change under the same name.

    Args:
        key: the setting that names it, for messages.
        source: a folder, whose files are hashed; or a hub id, whose commit is looked up.
        file: a file that every such model has.

    Raises:
        ConfigError: it can be loaded neither from disk nor from the hub.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.name.endswith(MODEL_FILES))
        return content_hash([[path.name, path.stat().st_size, sha256(path)] for path in files])
    hub.go_offline_if_unreachable()
    try:
        return str(extract_commit_hash(cached_file(source, file, revision=revision), None))
    except OSError as error:
        fault = hub.reason(error, source)
        raise ConfigError([f"{key}: {source} cannot be loaded: {fault}"]) from error


def read_settings(folder: Path, mend: bool = True) -> dict[str, Any]:
    """What settings.json holds; empty if there is none.

    Args:
        mend: as of `read_lines`.

    Raises:
        DamagedError: it is not a JSON object.
    """
    return next(iter(read_lines(folder / "settings.json", mend)), {})


def refuse_other_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that the replies of a folder were generated with the settings of now.

    Args:
        before: its `read_settings`, which may hold more.

    Raises:
        ConfigError: some differ; a line for each.
    """
    begun = f"the replies in {folder} were generated with"
    refuse_changed({key: before.get(key) for key in now}, now, begun, "another on_policy.folder")


def read_prompts(folder: Path) -> list[Prompt]:
    """Read prompts.jsonl.

    Raises:
        DamagedError: a line is not as `simpo.generate` writes it.
    """
    path = folder / "prompts.jsonl"
    prompts = []
    for number, line in enumerate(read_lines(path), start=1):
        # Earlier versions did not write these two.
        match {"tools": None, "reference_answer": None} | line:
            case {
                "id": str(key),
                "split": "train" | "test" as split,
                "prompt": [{}, *_] as turns,
                "rule": {} | None as rule,
                "tools": [*_] | None as tools,
                "reference_answer": str() | None as reference,
            }:
                own = None if tools is None else tuple(tools)
                prompts.append(Prompt(key, split, tuple(turns), rule, own, reference))
            case _:
                raise damaged_line(path, number, "not a prompt")
    return prompts


def responses_files(folder: Path) -> list[Path]:
    """The files of replies that are there: the one of no part first, then by part."""
    return sorted(folder.glob("responses*.jsonl"), key=lambda file: (len(file.name), file.name))


def read_stored_replies(folder: Path, own: Path | None = None) -> list[StoredReply]:
    """Read the replies of all parts: by seed, then by prompt, each once.

    Args:
        own: the file that this process writes, if other parts may be writing theirs: those are
            left as they are.

    Raises:
        DamagedError: a line is not as `simpo.generate` writes it.
    """
    replies: dict[tuple[int, str], StoredReply] = {}
    for path in responses_files(folder):
        lines = read_lines(path, mend=own in (None, path))
        for number, line in enumerate(lines, start=1):
            reply = _stored_reply(line)
            if reply is None:
                raise damaged_line(path, number, "not a reply")
            replies.setdefault((reply.seed, reply.id), reply)
    return [reply for _, reply in sorted(replies.items(), key=lambda item: item[0])]


def lacking_replies(
    folder: Path, prompts: Sequence[Prompt], stored: Sequence[StoredReply]
) -> tuple[int, list[int]]:
    """How many prompts lack replies to seeds that others have, or that were asked for; and the
    seeds."""
    asked = read_settings(folder).get(SEEDS)  # an earlier version did not write them
    seeds = sorted({reply.seed for reply in stored} | set(asked if isinstance(asked, list) else []))
    there = Counter(key for key, _ in {(reply.id, reply.seed) for reply in stored})
    return sum(there[prompt.id] < len(seeds) for prompt in prompts), seeds


def _stored_reply(line: dict[str, Any]) -> StoredReply | None:
    """The reply in a line; None if it is not as `StoredReply.line` writes it."""
    # Earlier versions did not write the last two.
    match {"repetition": None, "ids": None} | line:
        case {
            "id": str(key),
            "seed": int(seed),
            "response": str(text),
            "tokens": int(tokens),
            "ended": bool(ended),
            "repetition": float() | None as repetition,
            "ids": [*_] | None as ids,
            **more,
        } if not more and all(type(token) is int for token in ids or ()):
            own = None if ids is None else tuple(ids)
            return StoredReply(key, seed, text, tokens, ended, repetition, own)
    return None


def read_lines(path: Path, mend: bool = True) -> list[dict[str, Any]]:
    """The lines of a JSON lines file, without an incomplete last one.

    Args:
        mend: remove an incomplete last line of a killed writer from the file.

    Raises:
        DamagedError: a line is not a JSON object.
        RunError: it cannot be read, or not mended.
    """
    if not path.is_file():
        return []
    try:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if mend and len(whole) < len(text):
            with path.open("r+b") as file:
                file.truncate(len(whole))
    except OSError as error:
        raise unwritable(path, error) from error
    lines = []
    for number, encoded in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(encoded)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            raise damaged_line(path, number, "not a JSON object")
        lines.append(line)
    return lines


def damaged_line(path: Path, number: int, fault: str) -> DamagedError:
    return DamagedError(path, f"line {number} is {fault}", "remove that line")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON lines file whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """
    Raises:
        RunError: they cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise unwritable(path, error) from error
