"""Tokenizes pairs, or reads their tokens from the cache.

The name of a cache entry is a hash of everything the tokens depend on: pairs, tokenizer, template,
settings, the code of this folder and the versions of the libraries.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from simpo.config.choices import OnBadRecord
from simpo.config.data import DataConfig
from simpo.config.errors import DataError
from simpo.data.chats.chat import Chat, TokenizedSet, TokenReport
from simpo.data.mixture import fault_lines
from simpo.data.pairs import Pair, Tokenized, TokenizedPair
from simpo.data.reading.records import RecordFault
from simpo.run import progress
from simpo.run.cache import find_entry, keep_entry, sha256


def tokenize_set(
    chat: Chat, pairs: list[Pair], config: DataConfig, cache_dir: Path
) -> TokenizedSet:
    """Tokenize pairs, or read the tokens from the cache.

    A damaged cache entry is rebuilt, and a cache that cannot be written is not used; `notes` of the
    result say so.

    Raises:
        DataError: a pair cannot be tokenized (with on_bad_record=stop), or none can.
    """
    folder = cache_dir / "tokenized" / _content_hash(chat, pairs, config)
    found, notes = find_entry(folder)
    if found:
        arrays, stored = _read(folder)
    else:
        with progress.bar("tokenising pairs", len(pairs)) as bar:
            results = []
            for result in chat.tokenize(pairs, config):
                results.append(result)
                bar.advance()
        arrays, stored = _collected(results)
        notes += keep_entry(folder, partial(_write, arrays=arrays, stored=stored))
    faults = {int(index): fault for index, fault in stored["faults"].items()}
    good = [pair for index, pair in enumerate(pairs) if index not in faults]
    if faults and (config.on_bad_record is OnBadRecord.stop or not good):
        # Each record once, in their order, which the mixture shuffles.
        placed = {pairs[i].place: fault for i, fault in faults.items()}
        ordered = sorted(placed.items(), key=_numbers)
        raise DataError(fault_lines(ordered, all_bad=not good, of_template=True))
    ends = np.cumsum(arrays["lengths"].reshape(-1))[:-1]
    parts = np.split(arrays["ids"], ends)
    masks: list[np.ndarray | None] = [None] * len(parts)
    if "scored" in arrays:
        masks = list(np.split(arrays["scored"], ends))
    tokens = [
        TokenizedPair(parts[i], parts[i + 1], parts[i + 2], masks[i + 1], masks[i + 2])
        for i in range(0, 3 * len(good), 3)
    ]
    merged, prompts, chosen, rejected, unreasoned = stored["counts"]
    bad = dict(Counter(faults.values()))
    report = TokenReport(len(good), merged, prompts, chosen, rejected, bad, unreasoned)
    return TokenizedSet(good, tokens, report, tuple(notes))


def _numbers(placed: tuple[str, str]) -> list[str | int]:
    """A key that sorts places by the numbers in them: record 9 comes before record 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", placed[0])]


def _collected(
    results: Sequence[Tokenized | RecordFault],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The content of a cache entry from the results of `Chat.tokenize`: arrays, and counts and
    faults."""
    done = [item for item in results if not isinstance(item, RecordFault)]
    tokens = [
        ids
        for pair, *_ in done
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    ]  # fmt: skip
    masks = [mask for pair, *_ in done for mask in (None, pair.chosen_scored, pair.rejected_scored)]
    arrays = {
        "ids": np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
        "lengths": np.array([len(ids) for ids in tokens], np.int64).reshape(-1, 3),
    }
    if any(mask is not None for mask in masks):
        arrays["scored"] = np.concatenate(
            [
                np.ones(len(ids), dtype=bool) if mask is None else mask
                for ids, mask in zip(tokens, masks, strict=True)
            ]
        )
    counts = [sum(column) for column in zip(*(one[1:] for one in done), strict=True)] or [0] * 5
    faults = {str(i): str(item) for i, item in enumerate(results) if isinstance(item, RecordFault)}
    return arrays, {"counts": counts, "faults": faults}


def _read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    stored = json.loads((folder / "report.json").read_text())
    with np.load(folder / "tokens.npz") as file:
        return dict(file), stored


def _write(folder: Path, arrays: Mapping[str, np.ndarray], stored: Mapping[str, Any]) -> None:
    np.savez(folder / "tokens.npz", **arrays)  # type: ignore[arg-type]
    (folder / "report.json").write_text(json.dumps(stored))


def _content_hash(chat: Chat, pairs: list[Pair], config: DataConfig) -> str:
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
    for pair in pairs:
        digest.update(json.dumps([pair.prompt, pair.chosen, pair.rejected, pair.tools]).encode())
    return digest.hexdigest()[:32]
