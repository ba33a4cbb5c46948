"""Files of benchmarks that are not what their name says, and names that no file could have."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from simpo.__main__ import main
from simpo.config.compose import compose_run
from simpo.config.errors import DataError
from simpo.judging.answers import plain_name
from simpo.judging.benchmarks import open_benchmark
from simpo.judging.jsonl import answer_id, read_jsonl
from simpo.run.judged import Judged

ROWS = [{"key": 1}, {"key": 2}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS, indent=1).encode()
ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as archive:
    archive.writestr("m.jsonl", LINES)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.jsonl", LINES),
        ("m.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("m.jsonl", b"\n" + LINES.replace(b"\n", b"\n\n")),
        ("m.json", LINES),
        ("m.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("m.json", LIST),
        ("m.jsonl", LIST),
        ("m.jsonl", json.dumps(ROWS).encode()),
        ("m.jsonl", codecs.BOM_UTF8 + LIST),
        ("m", LIST),
    ],
)
def test_whatever_its_kind(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert read_jsonl(path, ["key"]) == ROWS


COPY = "(copy the file again)"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", f"is empty {COPY}"),
        (b"\n \n", f"is empty {COPY}"),
        (b"[]", f"is empty {COPY}"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer to a file of "
         "Git LFS (run git lfs pull)"),
        (gzip.compress(LINES, mtime=0), "it is compressed (name it m.jsonl.gz)"),
        (ZIP.getvalue(), "it is a zip archive or an Excel workbook (unpack it, or save it as CSV)"),
        (LINES.decode().encode("utf-16"), "it is UTF-16 or UTF-32 text (convert it to UTF-8)"),
        (LINES + b"\xff\n", f"line 3: not UTF-8 at column 1 {COPY}"),
        (b'{"x": 1, "x": 2}\n', f"line 1: not JSON: an object has the key x twice {COPY}"),
        (LINES[:-4], f"line 2: not JSON: Expecting value at column 8 {COPY}"),
        (b"[" * 100_000, f"not JSON: lists or objects are nested too deeply {COPY}"),
        (b"[1]", f"not an object {COPY}"),
        (b'"a"\n', f"line 1: not an object {COPY}"),
        (b'[{"no": 1}]', f"must be a JSON object with key {COPY}"),
        (b"<html>\n", f"line 1: not JSON: Expecting value at column 1 {COPY}"),
    ],
)  # fmt: skip
def test_faults(content: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(content)
    with pytest.raises(Exception) as error:
        read_jsonl(path, ["key"])
    assert str(error.value) == f"{path}: {fault}"


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(Exception) as error:
        read_jsonl(tmp_path, ["key"])
    assert str(error.value) == (
        f"{tmp_path}: cannot be read: Is a directory (copy the file again, or let this user read "
        "it)"
    )


@pytest.fixture
def arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of an Arena-Hard of two questions, judged by the lengths of answers."""
    code = "def length(prompt, replies, rule):\n    return [len(reply) for reply in replies]\n"
    (tmp_path / "lengths.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    questions = [{"uid": uid, "category": "arena-hard-v0.1", "prompt": "?"} for uid in "ab"]
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "model_answer").mkdir()
    answers(tmp_path / "model_answer" / "gpt-4-0314.jsonl", "gpt-4-0314")
    return [
        *("benchmark=arena_hard_v0.1", f"benchmark.path={tmp_path}"),
        *("judge.reward=lengths:length", f"output_dir={tmp_path}/out"),
    ]


def answers(path: Path, model: str, text: str = "yes") -> str:
    found: list[dict[str, Any]] = [
        {"uid": uid, "model": model, "messages": [{"content": text}]} for uid in "ab"
    ]
    path.write_text("\n".join(map(json.dumps, found)))
    return str(path)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["judge", *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_half_a_character_and_a_long_name_lose_no_result(arena: list[str], tmp_path: Path) -> None:
    name = "wide" * 100 + "\n\0\ud800"
    main(["judge", answers(tmp_path / "m.jsonl", name, "half: \ud83d"), *arena])
    folder = tmp_path / "out" / "judged" / ("wide" * 50) / "arena_hard_v0.1"
    found = Judged.read(folder / "judged.json")
    assert (found.model, found.by_question) == ("wide" * 50, {"a": 1.0, "b": 1.0})
    assert len((folder / "model_answer" / f"{'wide' * 50}.jsonl").read_text().splitlines()) == 2


def test_plain_names() -> None:
    assert [plain_name(name) for name in ("lab/a b", "a\tb\u2028c\x1b[0m", "", "\u4f60" * 99)] == [
        *("lab/a b", "a_b_c_[0m", "model", "\u4f60" * 66)
    ]
    assert answer_id("m", "\ud83d") != answer_id("m", "\ud83c")


def test_runs_that_are_no_files(
    arena: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(link)
    os.mkfifo(pipe)
    assert refused([str(link), str(pipe), *arena], capsys) == (
        f"RUN: {link} is a link to nothing (mend it, or name what it should lead to)\n"
        f"RUN: {pipe} is neither a folder nor a file (copy what it holds into a file)\n"
    )


def test_a_folder_that_this_user_may_not_read(
    arena: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, known = answers(tmp_path / "m.jsonl", "m"), Path.is_file
    closed = tmp_path / "model_answer" / "gpt-4-0314.jsonl"

    def is_file(path: Path) -> bool:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return known(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    with pytest.raises(DataError, match="let this user read it"):
        open_benchmark(compose_run(arena))  # as before training
    told = f"{closed}: Permission denied (let this user read it)\n"
    assert refused([file, *arena], capsys) == told
    closed = Path(file)
    assert refused([file, *arena], capsys) == told.replace(
        str(tmp_path / "model_answer" / "gpt-4-0314.jsonl"), file
    )


def test_questions_of_another_version(
    arena: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = answers(tmp_path / "m.jsonl", "m")
    assert refused([file, *arena, "benchmark=arena_hard_v2"], capsys) == (
        f"benchmark.path: {tmp_path} holds the questions of arena-hard-v0.1 (set "
        "benchmark=arena_hard_v0.1)\n"
    )
    questions = tmp_path / "question.jsonl"
    questions.write_text(questions.read_text().replace("arena-hard-v0.1", "hard_prompt"))
    assert refused([file, *arena], capsys) == (
        f"benchmark.path: {tmp_path} holds the questions of arena-hard-v2.0 (set "
        "benchmark=arena_hard_v2)\n"
    )
