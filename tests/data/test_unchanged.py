"""A second start reads no source that is as it was, and takes no changed one for the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from simpo.config.compose import compose_run
from simpo.config.data import SourceConfig
from simpo.config.schema import RunConfig
from simpo.data import loader, unchanged
from simpo.data.chats.chat import Chat
from simpo.data.loader import LoadedData, load_data
from tests.support.real_tokenizers import load_chat

OLD_S = 3600
SAID = "the sources are as they were: taking their tokens from the cache\n"


@pytest.fixture(scope="module")
def chat() -> Chat:
    return load_chat("mistral", "mistral_paper")


def record(index: int, reply: str = "Yes.") -> str:
    return json.dumps({"prompt": f"Question {index}?", "chosen": reply, "rejected": "No."}) + "\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Two files that changed long ago, as far as this process can tell."""
    for name, count in (("train", 5), ("test", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(map(record, range(count))))
    later(monkeypatch)
    return compose_run(overrides(tmp_path))


def overrides(folder: Path) -> list[str]:
    files = f"path: {folder}/train.jsonl, test_path: {folder}/test.jsonl"
    return ["data=jsonl", f"data.sources=[{{{files}, weight: 1.5}}]"]


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = unchanged.time.time
    monkeypatch.setattr(unchanged.time, "time", lambda: now_s() + OLD_S)


def contents(data: LoadedData) -> Any:
    sets = [
        {
            "ids": found.tokens.ids.tolist(),
            "bounds": found.tokens.bounds.tolist(),
            "places": list(found.places),
            "held out": list(found.held_out),
            "report": found.report,
            "fingerprints": (found.fingerprint, found.text_fingerprint, found.largest_id),
            "rest": (found.kept_by_paper, found.faults, found.notes),
        }
        for found in (data.train, data.test)
    ]
    return data.table, data.notes, sets


class Starts:
    """Starts of a run; `reads` counts those that read the sources."""

    def __init__(self, chat: Chat, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chat, self.cache_dir, self.reads = chat, cache_dir, 0
        read = loader.read_mixture

        def counted(run: RunConfig) -> Any:
            self.reads += 1
            return read(run)

        monkeypatch.setattr(loader, "read_mixture", counted)

    def __call__(self, run: RunConfig) -> Any:
        return contents(load_data(run, self.chat, self.cache_dir))


@pytest.fixture
def start(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starts:
    return Starts(chat, tmp_path / "cache", monkeypatch)


def test_a_second_start_reads_nothing(
    start: Starts, run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(run)
    assert SAID not in capsys.readouterr().out
    assert start(run) == first and start.reads == 1
    assert SAID in capsys.readouterr().out
    table, notes, (train, test) = first
    assert [line.taken for line in table] == [7, 2] and len(notes) == 3
    assert len(train["places"]) == 7 and len(test["held out"]) == 2


def rewrite(file: Path) -> None:
    """As many bytes, in place."""
    text = file.read_text()
    with file.open("r+") as opened:
        opened.write(text.replace("Yes.", "Sí!"))


def rewrite_with_old_times(file: Path) -> None:
    before = file.stat()
    rewrite(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert file.stat().st_size == before.st_size


def replace_with_old_times(file: Path) -> None:
    before, other = file.stat(), file.with_suffix(".new")
    other.write_text(file.read_text().replace("Yes.", "Sí!"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, file)


def append(file: Path) -> None:
    with file.open("a") as opened:
        opened.write(record(9))


@pytest.mark.parametrize("name", ["train", "test"])
@pytest.mark.parametrize(
    "change", [rewrite, rewrite_with_old_times, replace_with_old_times, append]
)
def test_a_changed_file_is_read(
    start: Starts, run: RunConfig, tmp_path: Path, change: Callable[[Path], None], name: str
) -> None:
    first = start(run)
    change(tmp_path / f"{name}.jsonl")
    second = start(run)
    assert start.reads == 2 and second != first
    assert start(run) == second and start.reads == 2


def test_a_touched_file_is_read_but_not_tokenized(
    start: Starts, run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(run)
    (tmp_path / "train.jsonl").touch()
    monkeypatch.setattr(start.chat, "encode", lambda texts: pytest.fail("tokenized again"))
    assert start(run) == first and start.reads == 2


@pytest.mark.parametrize("change", ["data.seed=1", "data.drop_overlap=true", "loss=sft"])
def test_other_settings_are_read(
    start: Starts, run: RunConfig, change: str, tmp_path: Path
) -> None:
    start(run)
    start(compose_run([*overrides(tmp_path), change]))
    assert start.reads == 2


def test_a_file_that_has_just_changed_is_not_remembered(
    start: Starts, run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It might change again within the same tick of the clock."""
    monkeypatch.undo()
    for _ in range(2):
        (tmp_path / "train.jsonl").touch()  # the machine may be slow
        load_data(run, start.chat, start.cache_dir)
    assert not (start.cache_dir / "mixtures").exists()


def test_a_file_that_changes_meanwhile_is_not_remembered(
    start: Starts, run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize = loader.tokenize_set

    def changing(*args: Any) -> Any:
        (tmp_path / "test.jsonl").touch()
        return tokenize(*args)

    monkeypatch.setattr(loader, "tokenize_set", changing)
    start(run)
    start(run)
    assert start.reads == 2


@pytest.mark.parametrize("file", ["ids.npy", "mixture.json"])
def test_a_damaged_cache_is_made_anew(start: Starts, run: RunConfig, file: str) -> None:
    first = start(run)
    for path in start.cache_dir.rglob(file):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    table, notes, sets = start(run)
    assert (table, notes) == first[:2] and start.reads == 2
    for one, other in zip(sets, first[2], strict=True):
        assert one["ids"] == other["ids"] and one["fingerprints"] == other["fingerprints"]


def test_what_a_function_converts_is_read(run: RunConfig) -> None:
    """It may use any other code or file."""
    source = run.data.sources[0]
    assert unchanged._states(run.data) is not None
    source.format = "my_module:my_function"
    assert unchanged._states(run.data) is None
    source.format, source.test_path = None, None
    source.path = "builtin:demo"
    assert unchanged._states(run.data) == [[], [], []]


def test_a_file_that_moves_to_the_other_split_is_read(
    start: Starts, run: RunConfig, tmp_path: Path
) -> None:
    """The header of README.md says which files are which split; the files are as they were."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, name in enumerate("abc"):
        (folder / f"{name}.jsonl").write_text(record(index))
    run.data.sources[0] = SourceConfig(path=str(folder))
    for train, test in ("ab", "c"), ("a", "bc"):
        splits = {"train": train, "test": test}
        files = "".join(
            f"  - split: {split}\n    path: [{', '.join(f'{name}.jsonl' for name in names)}]\n"
            for split, names in splits.items()
        )
        header = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
        (folder / "README.md").write_text(header)
        table, *_ = start(run)
        assert {line.split: line.taken for line in table} == {
            split: len(names) for split, names in splits.items()
        }


def test_benchmarks_are_files_too(start: Starts, run: RunConfig, tmp_path: Path) -> None:
    """A file of its own, one in a folder, and one that is new there."""
    (tmp_path / "more").mkdir()
    for name in ("b.txt", "more/c.txt"):
        (tmp_path / name).write_text("Who?\n")
    run.data.filter.benchmarks = [f"{tmp_path}/b.txt", f"{tmp_path}/more"]
    for index, name in enumerate(("b.txt", "more/c.txt", "more/d.txt"), start=1):
        before = start(run)
        assert start(run) == before and start.reads == index
        (tmp_path / name).write_text(f"Question {index}?\n")
        (line, *_), *_ = start(run)
        assert line.left_out == {"filter.benchmarks": index}
        assert start.reads == index + 1


def test_a_dataset_of_the_hub_is_read_once_a_revision(
    start: Starts, run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` keeps each revision in files of its own; one that has none there is read."""
    source = run.data.sources[0]
    source.path, source.test_path, source.test_split = "user/name", None, None
    asked: list[str] = []

    def answer(path: str, *_: Any, **__: Any) -> Any:
        asked.append(path)
        return revision

    revisions = []
    for reply in ("Yes.", "Aye."):
        table = pyarrow.Table.from_pylist([json.loads(record(i, reply)) for i in range(4)])
        with pyarrow.ipc.new_stream(tmp_path / f"{reply}arrow", table.schema) as stream:
            stream.write_table(table)
        revisions.append(datasets.Dataset.from_file(str(tmp_path / f"{reply}arrow")))
    monkeypatch.setattr(datasets, "load_dataset", answer)
    revision = revisions[0]
    first = start(run)
    assert start(run) == first and start.reads == 1 and set(asked) == {"user/name"}
    revision = revisions[1]
    assert start(run)[2] != first[2] and start.reads == 2
    revision = datasets.Dataset.from_list(list(revision))  # in memory alone
    for reads in (3, 4):
        start(run)
        assert start.reads == reads


def test_nothing_is_remembered_without_a_cache(
    start: Starts, run: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "cache").touch()
    first = start(run)
    assert start(run) == first and start.reads == 2
    (note, *_), *_ = (found["rest"][2] for found in first[2])
    assert note.endswith("cannot be written, not cached: Not a directory")
