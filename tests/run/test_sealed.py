"""A damaged cache entry is rebuilt and reported, and a run continues without a cache."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simpo.backend import build_backend
from simpo.config.backends import SingleConfig
from simpo.config.choices import Precision
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.data.chats.chat import Chat
from simpo.data.packing import pack
from simpo.data.store import TokenizedSet
from simpo.data.tokens import tokenize_set
from simpo.loop import reference
from simpo.loop.train import train
from simpo.loss.with_reference import DpoConfig
from simpo.model import smollm2
from simpo.model.policy import Policy
from simpo.run.cache import entry_fault, find_entry, keep_entry, write_entry
from tests.support.real_tokenizers import as_lists, data_config, load_chat, make_pair, user
from tests.support.tiny_models import random_pairs, tiny_model, token_set


def write_text(folder: Path) -> None:
    (folder / "a").write_text("one")
    (folder / "sub").mkdir()
    (folder / "sub" / "b").write_text("two")


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    write_entry(tmp_path / "cache" / "entry", write_text)
    return tmp_path / "cache" / "entry"


def test_a_seal_holds_size_and_sha256_of_every_file(entry: Path) -> None:
    assert json.loads((entry / "seal.json").read_text()) == {
        "entry": "entry",
        "files": {
            name: [3, hashlib.sha256(text).hexdigest()]
            for name, text in (("a", b"one"), ("sub/b", b"two"))
        },
    }
    assert find_entry(entry) == (True, [])
    assert find_entry(entry.parent / "other") == (False, [])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def of_another(entry: Path) -> None:
    write_entry(entry.with_name("other"), write_text)
    shutil.rmtree(entry)
    entry.with_name("other").rename(entry)


def no_folder(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("a file")


DAMAGE: list[tuple[Any, str]] = [
    (lambda entry: flip(entry / "sub" / "b"), "sub/b has changed (sha256)"),
    (lambda entry: (entry / "a").write_text(""), "a has 0 bytes, not 3"),
    (lambda entry: (entry / "a").unlink(), "a is missing"),
    (lambda entry: (entry / "seal.json").unlink(), "it cannot be read (FileNotFoundError)"),
    (lambda entry: (entry / "seal.json").write_text(""), "it cannot be read (JSONDecodeError)"),
    (lambda entry: (entry / "seal.json").write_text("[1]"), "it cannot be read (TypeError)"),
    (lambda entry: (entry / "seal.json").write_text("{}"), "it cannot be read (KeyError)"),
    (
        lambda entry: (entry / "seal.json").write_bytes(b"\xff"),
        "it cannot be read (UnicodeDecodeError)",
    ),
    (
        lambda entry: (entry / "seal.json").write_text("[" * 100_000),
        "it cannot be read (RecursionError)",
    ),
    (of_another, "it was made for other"),
    (no_folder, "it cannot be read (NotADirectoryError)"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "fault"), DAMAGE, ids=[fault for _, fault in DAMAGE])
def test_damage_is_found_said_and_replaced(entry: Path, damage: Any, fault: str) -> None:
    damage(entry)
    told = f"note   cache: {entry} is damaged and made anew: {fault}"
    assert find_entry(entry) == (False, [told])
    write_entry(entry, write_text)
    assert find_entry(entry) == (True, [])
    assert list(entry.parent.iterdir()) == [entry]


def test_an_entry_that_another_process_made_meanwhile_stays(entry: Path) -> None:
    inode = entry.stat().st_ino
    write_entry(entry, write_text)
    assert entry.stat().st_ino == inode and list(entry.parent.iterdir()) == [entry]


def write_many(folder: str, times: int) -> None:
    for _ in range(times):
        write_entry(Path(folder), write_text)


def test_two_processes_make_one_entry_over_a_damaged_one(entry: Path) -> None:
    flip(entry / "a")
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=write_many, args=(str(entry), 20)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert entry_fault(entry) is None and list(entry.parent.iterdir()) == [entry]


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")],
)
def test_a_cache_that_cannot_be_written(tmp_path: Path, number: int, reason: str) -> None:
    def fail(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    told = f"note   cache: {tmp_path} cannot be written, not cached: {reason}"
    assert keep_entry(tmp_path / "entry", fail) == [told]
    assert list(tmp_path.iterdir()) == []


# --- Tokens --------------------------------------------------------------------------------------

PAIRS = [make_pair(user("Hi there")), make_pair(user("Bye"))]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return load_chat("mistral", "mistral_paper")


def tokens(data: TokenizedSet) -> list[Any]:
    return [as_lists(pair) for pair in data.tokens]


@pytest.mark.parametrize(
    "file", ["ids.npy", "bounds.npy", "places.npy", "report.json", "seal.json"]
)
def test_damaged_tokens_are_made_anew(chat: Chat, tmp_path: Path, file: str) -> None:
    first = tokens(tokenize_set(chat, PAIRS, data_config(), tmp_path))
    (folder,) = (tmp_path / "tokenized").iterdir()
    flip(folder / file)
    again = tokenize_set(chat, PAIRS, data_config(), tmp_path)
    assert tokens(again) == first
    (note,) = again.notes
    assert note.startswith(f"note   cache: {folder} is damaged and made anew: ")
    assert tokenize_set(chat, PAIRS, data_config(), tmp_path).notes == ()


def test_tokens_without_a_cache(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    data = tokenize_set(chat, PAIRS, data_config(), tmp_path / "file")
    assert tokens(data) == tokens(tokenize_set(chat, PAIRS, data_config(), tmp_path))
    assert data.notes == (
        f"note   cache: {tmp_path}/file/tokenized cannot be written, not cached: Not a directory",
    )


def test_a_run_says_once_that_it_has_no_cache(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "for" / "good")
    train(compose_run([*tiny_run, f"cache_dir={tmp_path}/link", "sample.num_prompts=0"]))
    told = f"note   cache: {tmp_path}/link/tokenized cannot be written, not cached: File exists\n"
    assert capsys.readouterr().out.count(told) == 1


# --- Reference -----------------------------------------------------------------------------------


def test_damaged_reference_log_probs_are_made_anew(tmp_path: Path) -> None:
    ids = random_pairs(np.random.default_rng(0), 3)
    data = token_set(ids)
    rows = [pack(ids, [0, 1, 2])]
    backend = build_backend(SingleConfig(), Precision.fp32, 1.0)
    policy = Policy(tiny_model("llama"))

    def scored(cache: Path) -> TokenizedSet:
        return reference.with_reference(policy, data, rows, "origin", cache, backend, DpoConfig())

    def logps(found: TokenizedSet) -> list[Any]:
        return [pair.reference_logps for pair in found.tokens]

    first = scored(tmp_path)
    (folder,) = (tmp_path / "reference").iterdir()
    assert first.notes == scored(tmp_path).notes == ()
    flip(folder / "scores.npy")  # the shape stays
    again = scored(tmp_path)
    assert logps(again) == logps(first)
    assert again.notes == (
        f"note   cache: {folder} is damaged and made anew: scores.npy has changed (sha256)",
    )
    (tmp_path / "file").touch()
    without = scored(tmp_path / "file")
    assert logps(without) == logps(first)
    assert without.notes == (
        f"note   cache: {tmp_path}/file/reference cannot be written, not cached: Not a directory",
    )


# --- The built-in model --------------------------------------------------------------------------


def test_an_emptied_or_damaged_built_in_model_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for the conversion."""
    made: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        made.append(gguf)
        (folder / "model.safetensors").write_text("weights")

    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: tmp_path / "gguf")

    def found() -> Path:
        smollm2.smollm2_folder.cache_clear()  # as in another process
        return smollm2.smollm2_folder(tmp_path)

    folder = found()
    assert found() == folder and len(made) == 1
    capsys.readouterr()
    flip(folder / "model.safetensors")
    assert found() == folder and len(made) == 2
    assert capsys.readouterr().out == (
        f"note   cache: {folder} is damaged and made anew: model.safetensors has changed (sha256)\n"
        "converting SmolLM2-135M-Instruct (once, about 20 s) ...\n"
    )
    for file in folder.iterdir():
        file.unlink()
    assert (found() / "model.safetensors").read_text() == "weights" and len(made) == 3
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        smollm2.smollm2_folder(tmp_path / "file")
    assert str(caught.value) == (
        f"cache_dir: {tmp_path}/file/models/SmolLM2-135M-Instruct cannot be written: "
        "Not a directory (make room, or choose another)"
    )
