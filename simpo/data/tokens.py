"""Tokenizes pairs in several processes, or finds their tokens in the cache.

The name of a cache entry is a hash of everything the tokens depend on: pairs, tokenizer, template,
settings, the code of this folder and the versions of the libraries. Until the entry is whole its
blocks lie beside it, so that a start that was killed is continued:

    <cache_dir>/tokenized/
        <entry>/            the files of `simpo.data.store`
        <entry>.blocks/     lock, and a file for each block that has been tokenized
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from simpo.config.choices import OnBadRecord
from simpo.config.data import DataConfig
from simpo.config.errors import DataError, RunError, unwritable
from simpo.data.chats.chat import Chat
from simpo.data.chats.checks import faults_kept_by_paper
from simpo.data.flat_tokens import Tokens
from simpo.data.mixture import fault_lines
from simpo.data.pairs import Pair
from simpo.data.reading.records import RecordFault
from simpo.data.store import (
    Block,
    TokenizedSet,
    held_out_json,
    open_set,
    pair_json,
    write_set,
)
from simpo.run import progress
from simpo.run.cache import find_entry, not_cached, sha256, write_entry
from simpo.run.folder import is_free
from simpo.run.parent import die_with_parent
from simpo.run.signals import ALL

BLOCK_PAIRS = 1000
"""Pairs that one process tokenizes at a time: about 4 s of work."""
PAUSE_S = 0.2


@dataclass(frozen=True)
class _Job:
    """What decides the tokens of pairs."""

    chat: Chat
    config: DataConfig
    pairs: Sequence[Pair]
    text_fingerprint: str

    def blocks(self, folder: Path) -> dict[Path, range]:
        """The places of each block's pairs, by the file that holds its tokens."""
        whole = range(len(self.pairs))
        parts = [whole[start : start + BLOCK_PAIRS] for start in whole[::BLOCK_PAIRS]]
        return {folder / f"{part.start}-{part.stop}.npz": part for part in parts}

    def block(self, part: range) -> Sequence[Pair]:
        """The pairs of a block; they alone are in memory if the others lie in a file."""
        return self.pairs[part.start : part.stop]


def tokenize_set(
    chat: Chat, pairs: Sequence[Pair], config: DataConfig, cache_dir: Path
) -> TokenizedSet:
    """Tokenize pairs, or map their tokens from the cache into memory.

    A damaged cache entry is rebuilt, and a cache that cannot be written is not used; `notes` of the
    result say so. Of several processes that want the same tokens, one makes them.

    Raises:
        DataError: a pair cannot be tokenized (with on_bad_record=stop), or none can.
        RunError: a process that tokenizes was killed; its finished blocks are kept.
    """
    name, text_fingerprint = _content_hash(chat, pairs, config)
    folder = cache_dir / "tokenized" / name
    job = _Job(chat, config, pairs, text_fingerprint)
    found, notes = find_entry(folder)
    try:
        if not found:
            _make(folder, job)
        data = replace(open_set(folder), name=name)
    except OSError as error:
        notes.append(not_cached(folder, error))
        data = _uncached(job)
    if data.faults and (config.on_bad_record is OnBadRecord.stop or not len(data)):
        # Each record once, in their order, which the mixture shuffles.
        placed = {pairs[i].place: fault for i, fault in data.faults.items()}
        ordered = sorted(placed.items(), key=_numbers)
        raise DataError(fault_lines(ordered, all_bad=not len(data), of_template=True))
    return replace(data, notes=tuple(notes))


def stored_set(name: str, cache_dir: Path) -> TokenizedSet | None:
    """The set that `tokenize_set` stored under a name; None if it is damaged or gone."""
    folder = cache_dir / "tokenized" / name
    return replace(open_set(folder), name=name) if find_entry(folder)[0] else None


def _numbers(placed: tuple[str, str]) -> list[str | int]:
    """A key that sorts places by the numbers in them: record 9 comes before record 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", placed[0])]


def _make(folder: Path, job: _Job) -> None:
    """Make a cache entry, or wait until another process has made it.

    Raises:
        OSError: it cannot be written.
        RunError: as `tokenize_set`.
    """
    kept = folder.with_name(f"{folder.name}.blocks")
    kept.mkdir(parents=True, exist_ok=True)
    with _alone(kept):
        if not find_entry(folder)[0]:
            try:
                files = _tokenize(job, kept)
                write_entry(folder, lambda part: _write(part, files, job))
            except OSError:
                shutil.rmtree(kept, ignore_errors=True)
                # Without locks another process may have been first, and have removed the blocks.
                if not find_entry(folder)[0]:
                    raise
        shutil.rmtree(kept, ignore_errors=True)


def _write(folder: Path, files: Sequence[Path], job: _Job) -> None:
    write_set(folder, lambda: map(Block.load, files), job.pairs, job.text_fingerprint)


def _uncached(job: _Job) -> TokenizedSet:
    """Tokenize into files of this process alone, which are removed once they are mapped.

    Raises:
        RunError: there is no room for them either; and as `tokenize_set`.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="simpo-tokens-") as scratch:
            folder = Path(scratch) / "whole"
            folder.mkdir()
            _write(folder, _tokenize(job, Path(scratch)), job)
            return open_set(folder)
    except OSError as error:
        raise unwritable(tempfile.gettempdir(), error) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Context in which no other process is in it with this folder; waits for that, and says so.

    The system frees the lock of a process that ends in any way. A file system without locks lets
    all in: they do the same work, and none sees a part of another's.
    """
    with (folder / "lock").open("w") as lock:
        try:
            if not is_free(lock, fcntl.LOCK_EX):
                progress.say(f"wait   another process tokenises these pairs into {folder}")
                while not is_free(lock, fcntl.LOCK_EX):
                    time.sleep(PAUSE_S)
        except OSError:
            pass
        yield


def _tokenize(job: _Job, folder: Path) -> list[Path]:
    """Tokenize the blocks that a folder lacks.

    Returns:
        The files of all blocks, in order.
    """
    blocks = job.blocks(folder)
    missing = {path: part for path, part in blocks.items() if not _is_whole(path, len(part))}
    done = len(job.pairs) - sum(map(len, missing.values()))
    workers = min(len(missing), _cores())
    with progress.bar("tokenising pairs", len(job.pairs)) as bar:
        if done:
            progress.say(f"{done} of {len(job.pairs)} pairs are tokenised already")
            bar.begin_at(done)
        if workers > 1:
            for count in _in_processes(job, missing, workers):
                bar.advance(count)
        else:
            for path, part in missing.items():
                pairs, results = job.block(part), []
                for result in job.chat.tokenize(pairs, job.config):
                    results.append(result)
                    bar.advance()
                _block(job.chat, job.config, pairs, results).save(path)
    return list(blocks)


def _is_whole(path: Path, given: int) -> bool:
    """Whether a file holds the tokens of a block; its content has checksums."""
    try:
        return Block.load(path).given == given
    except Exception:  # of many types, from readers of archives, arrays and JSON
        return False


def _cores() -> int:
    """Cores that this process may tokenize on with others; 1 where it cannot be forked safely."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return len(os.sched_getaffinity(0))


def _in_processes(job: _Job, blocks: dict[Path, range], workers: int) -> Iterator[int]:
    """Tokenize blocks in processes of their own, and yield the number of pairs of each when done.

    They are forked: so they need not import anything, no program of a user is run again, and each
    reads the pairs of its block itself. They only render and encode texts, and use none of the
    threads or devices of this process.
    """
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("fork"),
        _begin_worker,
        (job, os.getpid()),
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process", DeprecationWarning)
            waiting = {pool.submit(_work, part, path): len(part) for path, part in blocks.items()}
        for done in as_completed(waiting):
            done.result()
            yield waiting[done]
    except BrokenProcessPool:
        raise RunError(
            "tokenising: a process was killed, often because memory ran out (the same command "
            "continues with the pairs that are left)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_job: _Job | None = None
"""What a worker process makes blocks of."""


def _begin_worker(job: _Job, parent: int) -> None:
    global _worker_job
    for number in ALL:
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what this process shares with its parent stays shared
    gc.disable()
    _worker_job = job


def _work(part: range, path: Path) -> None:
    job = _worker_job
    assert job is not None
    pairs = job.block(part)
    _block(job.chat, job.config, pairs, list(job.chat.tokenize(pairs, job.config))).save(path)
    gc.collect()


def _block(chat: Chat, config: DataConfig, pairs: Sequence[Pair], results: Sequence[Any]) -> Block:
    """The block of pairs from the results of `Chat.tokenize`."""
    faults = {i: str(item) for i, item in enumerate(results) if isinstance(item, RecordFault)}
    done = [item for item in results if not isinstance(item, RecordFault)]
    tokens = Tokens.of([item.pair for item in done])
    good = [pair for i, pair in enumerate(pairs) if i not in faults]
    counts = [sum(column) for column in zip(*(item[1:] for item in done), strict=True)] or [0] * 5
    kept_by_paper = faults_kept_by_paper(chat, good, tokens, config)
    places = [pair.place for pair in good]
    held_out = [held_out_json(pair) for pair in good if pair.held_out_set]
    return Block(tokens, len(pairs), counts, faults, kept_by_paper, places, held_out)


def settings_hash(chat: Chat, config: DataConfig) -> str:
    """Hash of everything that decides the tokens of a pair but the pair: 64 hex digits."""
    tokenizer = chat.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = (
        json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    )
    code = [sha256(file) for file in sorted(Path(__file__).parent.rglob("*.py"))]
    settings = (
        code, transformers.__version__, tokenizers.__version__, type(tokenizer).__name__,
        config.max_length_tokens, config.max_prompt_tokens,
        config.prompt_truncation.value, config.compat.value, config.reasoning.value,
        str(tokenizer.special_tokens_map),
        json.dumps(chat.template.kwargs, sort_keys=True),
        chat.template_sha256, str(chat.template.date), chat.end_id, chat._adds_bos,
    )  # fmt: skip
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(vocabulary.encode())
    return digest.hexdigest()


def _content_hash(chat: Chat, pairs: Sequence[Pair], config: DataConfig) -> tuple[str, str]:
    """The name of the cache entry of pairs, and the fingerprint of their texts."""
    digest, texts = hashlib.sha256(settings_hash(chat, config).encode()), hashlib.sha256()
    for pair in pairs:
        texts.update(pair_json(pair))
        digest.update(repr((pair.place, pair.held_out_set)).encode())
    digest.update(texts.digest())
    return digest.hexdigest()[:32], texts.hexdigest()[:16]
