"""Prompts and replies on disk: what `simpo.generate` writes and `simpo.annotate` reads.

<folder>/
    settings.json              of the drawing; others are refused
    prompts.jsonl              id, split, prompt (messages), rule
    responses.jsonl            prompt id, seed, response, its tokens, whether it came to an end
    scores-<reward>.jsonl      prompt id, hash of its responses, a score for each of them
    train.jsonl, test.jsonl    the pairs, as `data=jsonl` reads them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo.config import RunConfig
from simpo.errors import ConfigError
from simpo.pairs import Message


@dataclass(frozen=True)
class Prompt:
    """A prompt that replies are drawn to; `id` is a hash of its messages."""

    id: str
    split: str
    prompt: tuple[Message, ...]
    rule: Mapping[str, Any] | None


@dataclass(frozen=True)
class Response:
    """A reply to the prompt of an id; `ended` is False where it was cut off."""

    id: str
    seed: int
    response: str
    tokens: int
    ended: bool


def on_policy_folder(run: RunConfig) -> Path:
    """Where a run's replies lie, or are to."""
    if run.on_policy.folder is not None:
        return Path(run.on_policy.folder).expanduser().absolute()
    name = f"{run.model.name}-{run.data.name}"
    return (Path(run.output_dir).expanduser() / "on_policy" / name).absolute()


def content_hash(value: Any) -> str:
    """16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_prompts(folder: Path) -> list[Prompt]:
    return [
        Prompt(row["id"], row["split"], tuple(row["prompt"]), row["rule"])
        for row in read_lines(folder / "prompts.jsonl")
    ]


def read_responses(folder: Path) -> list[Response]:
    return [Response(**row) for row in read_lines(folder / "responses.jsonl")]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that is appended to; what a killed writer left of one is cut off.

    Raises:
        ConfigError: another line is not JSON.
    """
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ConfigError([f"{path}: not JSON lines: {error} (remove the file)"]) from error


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
