"""Pairs in a file: their mixture is that of pairs in lists, and few of them are in memory."""

from __future__ import annotations

import errno
import json
import os
import pickle
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo.config.choices import OnBadRecord
from simpo.config.data import DataConfig, FilterConfig, SourceConfig
from simpo.config.errors import DataError, RunError
from simpo.data import texts
from simpo.data.mixture import SplitReport, load_mixture
from simpo.data.pairs import Pair
from simpo.data.reading.records import to_pair
from simpo.data.texts import PairFile, Picked

# --- A mixture in plain lists --------------------------------------------------------------------

BAD = {"prompt": "Why?", "chosen": "So.", "rejected": "So."}
TOOL = {"type": "function", "function": {"name": "z", "description": "a", "parameters": {"b": 1}}}


@st.composite
def records(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Records of few texts, so that some repeat others, with some that are bad."""
    text = st.sampled_from(["a", "b", "ä\n", "\U0001f600 c"])
    found = []
    for _ in range(draw(st.integers(0, 7))):
        record: dict[str, Any] = {
            "prompt": draw(text),
            "chosen": f"{draw(text)}.",
            "rejected": draw(text),
        }
        if draw(st.booleans()):
            record["tools"] = [TOOL]
        if draw(st.booleans()):
            record |= {"score_chosen": draw(st.integers(1, 3)), "score_rejected": 1}
        found.append(BAD if draw(st.integers(0, 4)) == 0 else record)
    return found


@st.composite
def sources(draw: st.DrawFn) -> dict[str, Any]:
    """A source: its records, its held-out records or None, and its settings."""
    parts: list[dict[str, Any]] = [
        {},
        {"weight": draw(st.sampled_from([0.5, 1.7, 2.0]))},
        {"num_pairs": draw(st.integers(1, 3))},
    ]
    name = draw(st.sampled_from([None, "shared"]))
    return {
        "train": draw(records()),
        "test": draw(st.none() | records()),
        "settings": draw(st.sampled_from(parts)) | {"held_out_name": name},
    }


def read(path: str, split: str, rows: list[dict[str, Any]]) -> tuple[list[Pair], list[Any]]:
    """The good pairs of a split, and its faults."""
    pairs, faults = [], []
    for number, row in enumerate(rows, start=1):
        place = f"{path} {split} record {number}"
        if row is BAD:
            faults.append((place, "chosen and rejected are the same"))
        else:
            pairs.append(to_pair(row, place))
    return pairs, faults


def prompt(pair: Pair) -> Any:
    return [(turn["role"], turn["content"].strip()) for turn in pair.prompt]


def whole(pair: Pair) -> Any:
    said = [(turn["role"], turn["content"].strip()) for turn in pair.turns]
    return json.dumps([said, pair.tools], sort_keys=True)


def in_lists(config: DataConfig, given: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What a mixture must be, from pairs in lists; None if it must be refused."""
    read_splits = [
        (read(source.path, "train", part["train"]),
         None if part["test"] is None else read(str(source.test_path), "test", part["test"]))
        for source, part in zip(config.sources, given, strict=True)
    ]  # fmt: skip
    test = [
        replace(pair, held_out_set=name)
        for name, (_, held_out) in zip(config.held_out_names(), read_splits, strict=True)
        for pair in (held_out[0] if held_out else [])
    ]
    held_out_prompts = [prompt(pair) for pair in test]
    seen: list[Any] = []
    train: list[Pair] = []
    table, faults, every = [], [], []
    for index, (source, (own, held_out)) in enumerate(
        zip(config.sources, read_splits, strict=True)
    ):
        kept, gone = [], Counter[str]()
        for pair in own[0]:
            every.append(pair)
            if config.drop_overlap and prompt(pair) in held_out_prompts:
                gone["drop_overlap"] += 1
            elif config.filter.exact_duplicates and whole(pair) in seen:
                gone["filter.exact_duplicates"] += 1
            else:
                seen.append(whole(pair))
                kept.append(pair)
        rng = np.random.default_rng([config.seed, index])
        if source.num_pairs is None:
            repeats, rest = int(source.weight), round(source.weight % 1 * len(kept))
        else:
            repeats, rest = 0, source.num_pairs
        if rest > len(kept) or (kept and repeats + rest == 0):
            return None
        taken = [kept[i] for _ in range(repeats) for i in rng.permutation(len(kept))]
        taken += [kept[i] for i in rng.permutation(len(kept))[:rest]]
        train += taken
        for split, path, (pairs, bad), number, left in (
            ("train", source.path, own, len(taken), dict(gone)),
            *([("test", source.path, held_out, len(held_out[0]), {})] if held_out else []),
        ):
            counts = dict(Counter(fault for _, fault in bad))
            table.append(SplitReport(path, split, len(pairs) + len(bad), counts, number, left))
            faults += bad
    found = {"train": train, "test": test, "table": table, "read": every, "faults": faults}
    return found if train else None


@given(st.lists(sources(), min_size=1, max_size=3), st.booleans(), st.booleans(), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_mixture_is_that_of_lists(
    parts: list[dict[str, Any]], drop_overlap: bool, exact_duplicates: bool, seed: int
) -> None:
    with TemporaryDirectory() as name:
        listed = []
        for index, part in enumerate(parts):
            paths: dict[str, Any] = {"path": "train", "test_path": "test"}
            for key, split in paths.items():
                paths[key] = f"{name}/{split}{index}.jsonl"
                lines = [json.dumps(record) + "\n" for record in part[split] or ()]
                Path(paths[key]).write_text("".join(lines))
            if part["test"] is None:
                paths.pop("test_path")
            listed.append(SourceConfig(**paths, **part["settings"]))
        config = DataConfig(
            name="x", sources=listed, seed=seed, drop_overlap=drop_overlap,
            on_bad_record=OnBadRecord.drop, filter=FilterConfig(exact_duplicates=exact_duplicates),
        )  # fmt: skip
        expected = in_lists(config, parts)
        if expected is None:
            with pytest.raises(DataError):
                load_mixture(config)
            return
        found = load_mixture(config, to_pair, Path(name) / "cache")
        assert {key: getattr(found, key) for key in expected} == expected
        assert list((Path(name) / "cache").iterdir()) == []  # the file has no name
    overlap = [pair for pair in expected["train"] if prompt(pair) in map(prompt, expected["test"])]
    same = sum(whole(pair) in map(whole, expected["test"]) for pair in overlap)
    line = f"note   {len(overlap)} of {len(found.train)} train pairs have a prompt that is also "
    said = [note for note in found.notes if note.startswith(line)]
    assert len(said) == bool(overlap)
    assert all(f" held out, {same} of them with the same replies " in note for note in said)
    for index, source in enumerate(config.sources):
        own = [pair for pair in expected["read"] if pair.place.startswith(f"{source.path} ")]
        repeats = len(own) - len(set(map(whole, own)))
        line = f"note   {source.path} train: {repeats} records repeat an earlier one"
        assert (line in found.notes) == (repeats > 0), index


# --- The file ------------------------------------------------------------------------------------


def pair_of(number: int) -> Pair:
    record = {
        "prompt": f"{number}?",
        "chosen": "Yes.",
        "rejected": f"No {number}.",
        "tools": [TOOL],
    }
    return replace(to_pair(record, f"\udcff {number}"), rule={"name": "x", "count": number})


def test_pairs_are_read_as_they_were(tmp_path: Path) -> None:
    """The order of keys too, which a template may write."""
    file = PairFile(tmp_path / "new")
    for number in range(5):
        file.add(pair_of(number))
    assert len(file) == 5
    pairs = file.pairs()
    assert list(pairs) == [pair_of(number) for number in range(5)]
    assert str(pairs[3]) == str(pair_of(3))
    assert list(PairFile(None).pairs()) == []


def test_picked() -> None:
    picked = Picked("abc", np.array([2, 0, 0]))
    assert list(picked) == ["c", "a", "a"] == picked and picked[1:] == ["a", "a"]
    assert picked[-1] == "a" and len(picked) == 3
    assert picked != ["c", "a"] and picked != 3 and Picked("abc", np.zeros(0, int)) == []
    with pytest.raises(IndexError):
        picked[3]


def test_few_pairs_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While they are read, checked, mixed and looked at one by one."""
    alive: weakref.WeakSet[Counted] = weakref.WeakSet()
    most = 0

    class Counted(Pair):
        __hash__ = object.__hash__

        def __init__(self, pair: Pair) -> None:
            nonlocal most
            vars(self).update(vars(pair))
            alive.add(self)
            most = max(most, len(alive))

    def load(text: bytes) -> Pair:
        return Counted(pickle.loads(text))

    monkeypatch.setattr(texts, "pickle", SimpleNamespace(**vars(pickle) | {"loads": load}))
    rows = [{"prompt": f"{i % 50}?", "chosen": "Yes.", "rejected": f"{i}"} for i in range(200)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=f"{tmp_path}/train.jsonl", test_path=f"{tmp_path}/test.jsonl")
    config = DataConfig(
        name="x", sources=[source],
        filter=FilterConfig(
            exact_duplicates=True, cut_off=True, max_length_ratio=9, min_score_margin=0.1
        ),
    )  # fmt: skip
    mixture = load_mixture(config)
    assert len(mixture.train) == len(mixture.test) == 200
    assert sum(len(pair.turns) for pair in mixture.train) == 600
    assert 1 <= most <= 3


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """The system's temporary folder is taken; the caches say that theirs cannot be written."""
    (tmp_path / "file").touch()
    file = PairFile(tmp_path / "file" / "cache")
    file.add(pair_of(1))
    assert list(file.pairs()) == [pair_of(1)]


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, as the texts are written or when the last ones are."""
    told = f"{tmp_path}: No space left on device (make room, and the same command continues)"

    def full(**_: Any) -> Any:
        return open("/dev/full", "w+b")

    monkeypatch.setattr(texts.tempfile, "TemporaryFile", full)
    file = PairFile(tmp_path)
    with pytest.raises(RunError) as caught:
        for _ in range(100_000):
            file.add(pair_of(1))
    assert str(caught.value) == told
    file = PairFile(tmp_path)
    file.add(pair_of(1))
    with pytest.raises(RunError) as caught:
        file.pairs()
    assert str(caught.value) == told


def test_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(texts.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(texts.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RunError) as caught:
        PairFile(tmp_path / "cache")
    assert str(caught.value) == (
        f"{tmp_path}: Read-only file system (let this user write there, or choose another folder)"
    )
