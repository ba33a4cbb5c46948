"""Sets of tokens: made in blocks by several processes, kept, continued, and mapped into memory."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo.config.choices import Compat, OnBadRecord, PromptTruncation
from simpo.config.data import DataConfig
from simpo.config.errors import DataError, RunError
from simpo.data import tokens as token_store
from simpo.data.chats import chat as chat_module
from simpo.data.chats.chat import Chat
from simpo.data.flat_tokens import Tokens
from simpo.data.pairs import Pair, Tokenized, TokenizedPair
from simpo.data.reading.records import RecordFault
from simpo.data.store import (
    Block,
    TokenizedSet,
    TokenReport,
    open_set,
    pairs_fingerprint,
    write_set,
)
from simpo.data.texts import Lines
from simpo.data.tokens import tokenize_set
from tests.support.real_tokenizers import (
    as_lists,
    assistant,
    data_config,
    load_chat,
    make_pair,
    tokenize_one,
    user,
)

BAD = make_pair(user("Hi"), chosen="</s>")
PAIRS = [
    make_pair(user("Hi there")),
    replace(BAD, place="data.jsonl, record 2"),
    make_pair(user("word " * 60)),
    make_pair(user("Hi"), chosen="word " * 60),
    replace(BAD, place="data.jsonl, record 5"),
    make_pair(user("Bye"), rejected="word " * 60),
]
LONG = data_config(max_length_tokens=400, max_prompt_tokens=200)
GOOD = [PAIRS[i] for i in (0, 2, 3, 5)]
SHORT = data_config(max_length_tokens=40, max_prompt_tokens=20, on_bad_record=OnBadRecord.drop)


def contents(result: TokenizedSet) -> tuple[Any, ...]:
    """All of a set but its notes."""
    held_out = list(result.held_out)
    fields = {name: value for name, value in vars(result).items() if name != "notes"}
    tokens = [as_lists(pair) for pair in result.tokens]
    return fields | {
        "tokens": tokens,
        "places": list(result.places),
        "held_out": held_out,
    }, held_out


def no_encoding(texts: list[str]) -> list[list[int]]:
    raise AssertionError("tokenized again")


def entries(cache_dir: Path) -> list[Path]:
    return sorted((cache_dir / "tokenized").iterdir())


@pytest.fixture(scope="module")
def chat() -> Chat:
    return load_chat("mistral", "mistral_paper")


@pytest.mark.parametrize(("batch_pairs", "block_pairs"), [(1, 4), (2, 1000), (512, 1)])
def test_set(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_pairs: int, block_pairs: int
) -> None:
    monkeypatch.setattr(chat_module, "BATCH_PAIRS", batch_pairs)
    monkeypatch.setattr(token_store, "BLOCK_PAIRS", block_pairs)
    result = tokenize_set(chat, PAIRS, SHORT, tmp_path)
    assert list(result.places) == [pair.place for pair in GOOD] and len(result.held_out) == 0
    for pair, tokens in zip(GOOD, result.tokens, strict=True):
        assert as_lists(tokens) == as_lists(
            tokenize_one(chat, pair, max_length_tokens=40, max_prompt_tokens=20)[0]
        )
    assert [len(tokens.prompt_ids) for tokens in result.tokens] == [10, 35, 9, 10]
    assert result.tokens.num_tokens().tolist() == [t.num_tokens() for t in result.tokens]
    report = result.report
    assert (report.pairs, report.merged_prompts) == (4, 0)
    assert (report.cut_prompts, report.cut_chosen, report.cut_rejected) == (1, 1, 1)
    assert report.bad == {"a message holds the token </s> as text": 2}
    assert list(result.faults) == [1, 4]
    assert result.text_fingerprint == pairs_fingerprint(GOOD)
    assert [path.suffix for path in entries(tmp_path)] == [""]


def test_long_texts_are_encoded_a_few_at_a_time(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number of letters is bounded, but for those of the last pair; the tokens are the
    same."""
    pairs = many(40)
    whole = [as_lists(one.pair) for one in chat.tokenize(pairs, LONG) if isinstance(one, Tokenized)]
    letters: list[int] = []
    encode = chat.encode

    def counted(texts: list[str]) -> list[list[int]]:
        letters.append(sum(map(len, texts)))
        return encode(texts)

    monkeypatch.setattr(chat, "encode", counted)
    monkeypatch.setattr(chat_module, "BATCH_LETTERS", 2000)
    parts = [as_lists(one.pair) for one in chat.tokenize(pairs, LONG) if isinstance(one, Tokenized)]
    assert parts == whole and len(whole) == 36
    assert len(letters) > 5 and max(letters) < 2000 + 3 * len("word " * 60)


def test_an_empty_set(chat: Chat, tmp_path: Path) -> None:
    """Nothing held out: made, and read back."""
    for _ in range(2):
        data = tokenize_set(chat, [], data_config(), tmp_path)
        assert len(data) == 0 and list(data.tokens) == [] and data.largest_id == -1
        assert data.tokens.longest_sequence() == 0 and data.tokens.num_tokens().tolist() == []


def test_set_stops_at_bad_rows(chat: Chat, tmp_path: Path) -> None:
    tokenize_set(chat, PAIRS, SHORT, tmp_path)
    with pytest.raises(DataError, match=r"record 2.*</s>(.|\n)*record 5.*</s>"):
        tokenize_set(chat, PAIRS, replace(SHORT, on_bad_record=OnBadRecord.stop), tmp_path)
    with pytest.raises(DataError) as caught:
        tokenize_set(chat, [replace(BAD, place=f"a.jsonl record {n}") for n in (10, 9, 9)], SHORT,
                     tmp_path)  # fmt: skip
    assert str(caught.value) == (
        "a.jsonl record 9: a message holds the token </s> as text\n"
        "a.jsonl record 10: a message holds the token </s> as text\n"
        "(no record can be written by the chat template: docs/data.md, Chats)"
    )


def test_cache_is_read(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenize_set(chat, PAIRS, SHORT, tmp_path)
    other = load_chat("mistral", "zephyr")
    for each in (chat, other):
        monkeypatch.setattr(each, "encode", no_encoding)
    assert contents(tokenize_set(chat, PAIRS, SHORT, tmp_path)) == contents(first)
    misses = [
        (other, PAIRS, SHORT),
        (chat, PAIRS[:3], SHORT),
        (chat, [*PAIRS[:-1], make_pair(user("Bye!"))], SHORT),
        (chat, [*PAIRS[:-1], replace(PAIRS[-1], place="elsewhere")], SHORT),
        (chat, [*PAIRS[:-1], replace(PAIRS[-1], held_out_set="own")], SHORT),
        (chat, PAIRS, replace(SHORT, max_length_tokens=41)),
        (chat, PAIRS, replace(SHORT, max_prompt_tokens=21)),
        (chat, PAIRS, replace(SHORT, prompt_truncation=PromptTruncation.keep_start)),
        (chat, PAIRS, replace(SHORT, compat=Compat.paper)),
    ]
    for arguments in misses:
        with pytest.raises(AssertionError, match="tokenized again"):
            tokenize_set(*arguments, tmp_path)
    for library in ("tokenizers", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(token_store, library), "__version__", "another")
            with pytest.raises(AssertionError, match="tokenized again"):
                tokenize_set(chat, PAIRS, SHORT, tmp_path)


@pytest.mark.parametrize("file", ["ids.npy", "report.json"])
def test_cache_without_one_file_is_made_anew(chat: Chat, tmp_path: Path, file: str) -> None:
    first = tokenize_set(chat, PAIRS, SHORT, tmp_path)
    (folder,) = entries(tmp_path)
    (folder / file).unlink()
    assert contents(tokenize_set(chat, PAIRS, SHORT, tmp_path)) == contents(first)
    assert entries(tmp_path) == [folder]


def test_fingerprint_is_of_texts_in_order() -> None:
    moved = [replace(pair, place="elsewhere") for pair in PAIRS]
    assert pairs_fingerprint(moved) == pairs_fingerprint(PAIRS)
    assert pairs_fingerprint(PAIRS[::-1]) != pairs_fingerprint(PAIRS)
    digest = hashlib.sha256()
    for pair in (ruled := [replace(PAIRS[0], rule={"name": "x", "count": 2}, tools=({"a": 1},))]):
        text = asdict(replace(pair, place="", held_out_set="", score_margin=None))
        del text["reference_answer"]  # nothing is trained on it
        del text["others"], text["scores"]  # only of ranked responses
        digest.update(json.dumps(text, sort_keys=True).encode())
    assert pairs_fingerprint(ruled) == digest.hexdigest()[:16]


# --- Flat arrays ---------------------------------------------------------------------------------

ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(lambda x: np.array(x, np.int32))


@st.composite
def tokenized_pairs(draw: st.DrawFn) -> TokenizedPair:
    others = draw(st.lists(ids.filter(len), max_size=3))
    responses = (draw(ids), draw(ids), *others)
    masks = [
        draw(st.none() | st.lists(st.booleans(), min_size=len(part), max_size=len(part)))
        for part in responses
    ]
    scored = tuple(None if mask is None else np.array(mask, bool) for mask in masks)
    scores = draw(st.tuples(*[st.floats(-4, 4, width=32)] * len(responses)))
    return TokenizedPair(draw(ids), responses, scored, scores)


def all_masks(pair: TokenizedPair) -> list[list[bool]]:
    parts = zip(pair.responses, pair.scored, strict=True)
    return [[True] * len(part) if mask is None else mask.tolist() for part, mask in parts]


@given(st.lists(tokenized_pairs(), max_size=6))
@settings(max_examples=60, deadline=None)
def test_flat_arrays_hold_the_same_pairs(pairs: list[TokenizedPair]) -> None:
    tokens = Tokens.of(pairs)
    assert len(tokens) == len(pairs)
    for one, other in zip(tokens, pairs, strict=True):
        assert one.prompt_ids.tolist() == other.prompt_ids.tolist()
        assert [r.tolist() for r in one.responses] == [r.tolist() for r in other.responses]
        assert all_masks(one) == all_masks(other)
        assert one.scores == other.scores
    for share in (True, False):
        assert tokens.num_tokens(share).tolist() == [pair.num_tokens(share) for pair in pairs]
    whole, parts = hashlib.sha256(), hashlib.sha256()
    tokens.add_to(whole)
    for pair in pairs:
        for part in (pair.prompt_ids, *pair.responses):
            parts.update(len(part).to_bytes(8, "little") + part.tobytes())
    assert whole.hexdigest() == parts.hexdigest()


def at(place: str) -> Pair:
    return replace(PAIRS[0], place=place)


def test_blocks_without_scores_among_ranked_ones(tmp_path: Path) -> None:
    """Their lines are NaN; the scores of the others stay."""
    pair = TokenizedPair.of([1], [2], [3])
    parts = [[pair], [replace(pair, scores=(2.0, 1.0))]]
    blocks = [
        Block(Tokens.of(part), 1, [1, 0, 0, 0, 0], {}, {}, [str(i)], [])
        for i, part in enumerate(parts)
    ]
    write_set(tmp_path, lambda: iter(blocks), [at("0"), at("1")], "texts")
    found = open_set(tmp_path).tokens.scores
    np.testing.assert_array_equal(found, [[math.nan, math.nan], [2, 1]])


@given(
    st.lists(st.lists(tokenized_pairs(), max_size=3), max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_files_hold_the_blocks_one_after_the_other(
    parts: list[list[TokenizedPair]], faulty: list[bool]
) -> None:
    """Read through files of blocks; a block may end with a pair that has no tokens."""
    with TemporaryDirectory() as name:
        files: list[Path] = []
        given_pairs: list[Pair] = []
        faults: dict[int, str] = {}
        for index, (part, fault) in enumerate(zip(parts, faulty, strict=False)):
            given_pairs += [at(f"\u00e9 {len(given_pairs) + i}") for i in range(len(part))]
            if fault:
                faults[len(given_pairs)] = "bad"
                given_pairs.append(at("of the bad one"))
            own = {len(part): "bad"} if fault else {}
            files.append(Path(name) / f"{index}.npz")
            places = [pair.place for pair in given_pairs[len(given_pairs) - len(part) - fault :]]
            block = Block(
                Tokens.of(part), len(part) + fault, [len(part), 0, 1, 0, 2], own, {"x": 1},
                places[: len(part)], [],
            )  # fmt: skip
            block.save(files[-1])
        (folder := Path(name) / "set").mkdir()
        write_set(folder, lambda: map(Block.load, files), given_pairs, "texts")
        found = open_set(folder)
    pairs = [pair for part in parts for pair in part]
    whole = Tokens.of(pairs)
    assert found.tokens.ids.tolist() == whole.ids.tolist()
    assert found.tokens.bounds.tolist() == whole.bounds.tolist()
    assert list(map(all_masks, found.tokens)) == list(map(all_masks, pairs))
    assert [pair.scores for pair in found.tokens] == [pair.scores for pair in pairs]
    digest = hashlib.sha256()
    whole.add_to(digest)
    assert found.fingerprint == digest.hexdigest()[:16]
    assert found.largest_id == whole.ids.max(initial=-1) and found.faults == faults
    good = [pair for i, pair in enumerate(given_pairs) if i not in faults]
    assert list(found.places) == [pair.place for pair in good]
    assert found.text_fingerprint == (pairs_fingerprint(good) if faults else "texts")
    bad = {"bad": len(faults)} if faults else {}
    report = TokenReport(len(pairs), len(pairs), 0, len(parts), 0, bad, 2 * len(parts))
    assert found.report == report and found.kept_by_paper == ({"x": len(parts)} if parts else {})


def test_an_item_of_lines_has_an_index_or_a_slice() -> None:
    lines = Lines(np.frombuffer(b"abbccc", np.uint8), np.array([0, 1, 3, 3, 6]), bytes.decode)
    assert list(lines) == ["a", "bb", "", "ccc"] and lines[1:3] == ["bb", ""]
    for sequence in (lines, Tokens.of([])):
        with pytest.raises(IndexError):
            sequence[4]


def test_held_out_pairs_are_kept_without_replies(chat: Chat, tmp_path: Path) -> None:
    pairs = [
        replace(pair, held_out_set=name, rule={"name": "bullets", "count": 2}, place="\udcff 1")
        for pair, name in zip(GOOD, ("a", "a", "b", "b"), strict=True)
    ]
    for _ in range(2):  # made, and read back
        data = tokenize_set(chat, pairs, SHORT, tmp_path)
        assert list(data.held_out) == [replace(p, chosen=(), rejected=None) for p in pairs]
        assert list(data.places) == ["\udcff 1"] * 4


# --- Blocks and processes ------------------------------------------------------------------------


def many(count: int) -> list[Pair]:
    """Pairs of which each tenth is bad, some are cut, and some have tokens that are not scored."""
    turns = (assistant("Yes?"), user("Go on."), assistant("Well."))
    made = []
    for i in range(count):
        pair = make_pair(user(f"Question {i}? " + "word " * (i % 50)), chosen=f"So, {i}.")
        if i % 10 == 3:
            pair = make_pair(user(f"Question {i}?"), chosen="</s>")
        elif i % 10 == 5:
            pair = replace(pair, chosen=turns)
        made.append(replace(pair, place=f"data.jsonl record {i}"))
    return made


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "BLOCK_PAIRS", 7)


@pytest.mark.parametrize("compat", [Compat.none, Compat.paper])
def test_processes_make_what_one_makes(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None, compat: Compat
) -> None:
    """Bit for bit, and the files too; in their blocks they are rendered by other processes."""
    pairs, config = many(60), replace(SHORT, compat=compat)
    found, files = [], []
    for cores in (1, 3):
        monkeypatch.setattr(token_store, "_cores", lambda cores=cores: cores)
        with monkeypatch.context() as patch:
            if cores > 1:
                patch.setattr(token_store, "_block", in_another_process(token_store._block))
            found.append(contents(tokenize_set(chat, pairs, config, tmp_path / str(cores))))
        (entry,) = entries(tmp_path / str(cores))
        files.append({path.name: path.read_bytes() for path in entry.iterdir()})
    assert found[0] == found[1]
    assert files[0] == files[1]


def in_another_process(function: Any) -> Any:
    own = os.getpid()

    def checked(*args: Any) -> Any:
        assert os.getpid() != own
        return function(*args)

    return checked


def tokenize_until_killed(
    chat: Chat, pairs: Sequence[Pair], config: DataConfig, cache_dir: Path, cores: int
) -> None:
    """In a process of its own: the fifth block is never done."""
    token_store.BLOCK_PAIRS = 7
    token_store._cores = lambda: cores
    save = Block.save

    def slow(block: Block, path: Path) -> None:
        if path.name.startswith("28-"):
            path.with_suffix(".part").write_bytes(b"half")
            time.sleep(100)
        save(block, path)

    setattr(Block, "save", slow)  # noqa: B010
    tokenize_set(chat, pairs, config, cache_dir)


@pytest.mark.parametrize("cores", [1, 2])
def test_a_killed_start_goes_on(
    chat: Chat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_blocks: None,
    capsys: pytest.CaptureFixture[str],
    cores: int,
) -> None:
    """From the blocks that are whole: one is damaged meanwhile. The files are the same bytes.

    Of two processes that tokenize, one goes on while the other hangs; both end with their parent.
    """
    names = ["0-7.npz", "7-14.npz", "14-21.npz", "21-28.npz"]
    names += ["35-42.npz", "42-49.npz", "49-56.npz", "56-60.npz"] if cores == 2 else []
    pairs = many(60)
    whole = tokenize_set(chat, pairs, SHORT, tmp_path / "whole")
    process = multiprocessing.get_context("fork").Process(
        target=tokenize_until_killed, args=(chat, pairs, SHORT, tmp_path / "killed", cores)
    )
    process.start()
    try:
        wait_for(lambda: list((tmp_path / "killed").rglob("28-*.part")))
        wait_for(lambda: len(list((tmp_path / "killed").rglob("*.npz"))) == len(names))
        workers = psutil.Process(process.pid).children()
    finally:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    (kept,) = entries(tmp_path / "killed")
    assert len(workers) == (cores if cores > 1 else 0)
    psutil.wait_procs(workers, timeout=20)
    assert not any(worker.is_running() for worker in workers)
    blocks = [kept / name for name in names]
    assert sorted(kept.glob("*.npz")) == sorted(blocks)
    content = bytearray(blocks[0].read_bytes())
    content[content.index(Block.load(blocks[0]).tokens.ids.tobytes())] ^= 1
    blocks[0].write_bytes(content)
    tokenized: list[int] = []
    tokenize = chat.tokenize

    def counted(part: Sequence[Pair], config: DataConfig) -> Iterator[Any]:
        tokenized.append(len(part))
        return tokenize(part, config)

    monkeypatch.setattr(chat, "tokenize", counted)
    monkeypatch.setattr(token_store, "_cores", lambda: 1)
    assert contents(tokenize_set(chat, pairs, SHORT, tmp_path / "killed")) == contents(whole)
    assert sum(tokenized) == (7 + 7 if cores == 2 else 7 + 32)
    done = 60 - sum(tokenized)
    assert f"{done} of 60 pairs are tokenised already\n" in capsys.readouterr().out
    (entry,) = entries(tmp_path / "killed")
    (other,) = entries(tmp_path / "whole")
    for file in other.iterdir():
        assert (entry / file.name).read_bytes() == file.read_bytes()


def wait_for(found: Any) -> None:
    deadline = time.monotonic() + 30
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_that_is_killed(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    """One line; what is done is kept."""
    pairs = many(60)
    block = token_store._block

    def deadly(chat: Chat, config: DataConfig, part: Sequence[Pair], results: Any) -> Block:
        if part[0].place == "data.jsonl record 35":
            os.kill(os.getpid(), signal.SIGKILL)
        return block(chat, config, part, results)

    monkeypatch.setattr(token_store, "_cores", lambda: 2)
    with monkeypatch.context() as patch, pytest.raises(RunError) as caught:
        patch.setattr(token_store, "_block", deadly)
        tokenize_set(chat, pairs, SHORT, tmp_path)
    assert str(caught.value) == (
        "tokenising: a process was killed, often because memory ran out (the same command "
        "continues with the pairs that are left)"
    )
    (kept,) = entries(tmp_path)
    assert len(list(kept.glob("*.npz"))) >= 3
    assert len(tokenize_set(chat, pairs, SHORT, tmp_path)) == 54


def test_one_of_two_makes_the_tokens(
    chat: Chat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The other waits for its lock, says so, and reads what it has made."""
    first = tokenize_set(chat, PAIRS, SHORT, tmp_path)
    (entry,) = entries(tmp_path)
    entry.rename(tmp_path / "away")
    kept = entry.with_name(f"{entry.name}.blocks")
    kept.mkdir()

    def finish() -> None:
        time.sleep(0.5)
        (tmp_path / "away").rename(entry)
        lock.close()

    lock = (kept / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    monkeypatch.setattr(chat, "encode", no_encoding)
    thread = threading.Thread(target=finish)
    thread.start()
    assert contents(tokenize_set(chat, PAIRS, SHORT, tmp_path)) == contents(first)
    thread.join()
    assert capsys.readouterr().out == f"wait   another process tokenises these pairs into {kept}\n"
    assert entries(tmp_path) == [entry]


def test_a_file_system_without_locks(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    """Another process is done first, and removes the blocks of both."""

    def refuse(*_: Any) -> bool:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(token_store, "is_free", refuse)
    pairs = many(30)
    alone = tokenize_set(chat, pairs, SHORT, tmp_path / "alone")
    others: list[Any] = []
    block = token_store._block

    def while_another_ends(*args: Any) -> Block:
        if not others:
            others.append(None)
            others[0] = tokenize_set(chat, pairs, SHORT, tmp_path / "both")
        return block(*args)

    monkeypatch.setattr(token_store, "_cores", lambda: 1)
    monkeypatch.setattr(token_store, "_block", while_another_ends)
    found = tokenize_set(chat, pairs, SHORT, tmp_path / "both")
    for one in (found, *others):
        assert contents(one) == contents(alone) and one.notes == ()
    assert [entry.name for entry in entries(tmp_path / "both")] == [alone.name]


def test_two_write_the_same_block(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, savez = tmp_path / "0-4.npz", np.savez
    results = list(chat.tokenize(GOOD, SHORT))
    block = token_store._block(chat, SHORT, GOOD, results)

    def while_another_does(file: Any, **arrays: Any) -> None:
        monkeypatch.setattr(np, "savez", savez)
        block.save(path)
        savez(file, **arrays)

    monkeypatch.setattr(np, "savez", while_another_does)
    block.save(path)
    assert token_store._is_whole(path, 4) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("begin", [b"half", b"PK\3\4", b""])
def test_a_damaged_block(chat: Chat, tmp_path: Path, begin: bytes) -> None:
    path = tmp_path / "0-4.npz"
    token_store._block(chat, SHORT, GOOD, list(chat.tokenize(GOOD, SHORT))).save(path)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\1\2") + 10] = 9  # its method of compression
    path.write_bytes(begin or content)
    assert not token_store._is_whole(path, 4)


def test_faults_are_those_of_tokenize(chat: Chat, tmp_path: Path, small_blocks: None) -> None:
    pairs = many(30)
    results = list(chat.tokenize(pairs, SHORT))
    expected = {i: str(one) for i, one in enumerate(results) if isinstance(one, RecordFault)}
    assert tokenize_set(chat, pairs, SHORT, tmp_path).faults == expected and expected
