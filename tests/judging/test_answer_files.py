"""Files of answers in the place of models: read in each benchmark's format, judged and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpo.__main__ import main
from simpo.config.compose import compose_run
from simpo.judging.answers import judged_folder
from simpo.judging.arena_files import read_answers
from simpo.judging.benchmarks import open_benchmark
from simpo.judging.shapes import Answer, JudgedAnswers
from simpo.run.judged import Judged

QUESTIONS = 4
REWARD = "def length(prompt, replies, rule):\n    return [len(reply) for reply in replies]\n"


def outputs(path: Path, generator: str, texts: list[str], first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"dataset": "d", "instruction": f"q{first + i}", "output": text, "generator": generator}
        for i, text in enumerate(texts)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def alpaca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of an AlpacaEval of four questions, judged by the lengths of answers."""
    file = outputs(tmp_path / "base" / "model_outputs.json", "base", ["xx"] * QUESTIONS)
    (tmp_path / "lengths.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    return [
        "benchmark=alpaca_eval_2",
        *(f"benchmark.path={file}", "benchmark.baseline=base", "judge.reward=lengths:length"),
        *(f"output_dir={tmp_path}/out", "benchmark.temperature=0"),
    ]


def test_files_of_answers_are_judged_and_compared(
    alpaca: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first is longer than the baseline twice and equal twice, the second always shorter."""
    one = outputs(tmp_path / "one.json", "lab/one", ["xxx", "xxx", "yy", "yy"])
    two = outputs(tmp_path / "two.json", "..", ["x"] * QUESTIONS)
    main(["judge", str(one), str(two), *alpaca])
    shown = capsys.readouterr().out
    assert "minus lab/one" in shown
    folder = tmp_path / "out" / "judged" / "lab__one" / "alpaca_eval_2"
    found = Judged.read(folder / "judged.json")
    assert (found.model, found.baseline, found.questions) == ("lab/one", "base", QUESTIONS)
    assert found.by_question == {"0": 1, "1": 1, "2": 0.5, "3": 0.5}
    assert found.figures["win_rate"].value == 75
    assert json.loads((folder / "model_outputs.json").read_text()) == json.loads(one.read_text())
    other = Judged.read(tmp_path / "out" / "judged" / "model" / "alpaca_eval_2" / "judged.json")
    assert (other.model, other.figures["win_rate"].value) == ("..", 0)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["judge", *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_files_that_cannot_be_judged(
    alpaca: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(["base/typo", *alpaca], capsys) == "RUN: no such folder or file, got base/typo\n"
    few = outputs(tmp_path / "few.json", "few", ["a", "b"], first=2)
    assert refused([str(few), *alpaca], capsys) == (
        f"{few}: no answer to 2 of 4 questions, such as 0 (benchmark.num_prompts takes the first "
        "ones alone)\n"
    )
    told = refused([str(few), *alpaca[:3], f"judge.annotations={few}"], capsys)
    assert told == f"judge.annotations: hold answers too, got {few} (leave it out)\n"
    others = outputs(tmp_path / "others.json", "others", ["a"], first=1)
    assert refused([str(others), *alpaca, "benchmark.num_prompts=1"], capsys) == (
        f"{others}: no answer to 1 of 1 questions, such as 0 (benchmark.num_prompts takes the "
        "first ones alone)\n"
    )
    lines = tmp_path / "lines.jsonl"
    lines.write_text("{}\n{}\n")
    assert refused([str(lines), *alpaca], capsys) == (
        f"{lines}: item 1: instruction must be a text (copy the file again)\n"
    )
    assert refused([str(few), "benchmark=pairs", "judge.reward=rules"], capsys) == (
        f"RUN: {few} is a file, and models answer this benchmark (give the folder of one)\n"
    )


NEW = {
    "uid": "a",
    "model": "m",
    "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}],
    "metadata": {"token_len": 7},
}
OLD = {
    "question_id": "a",
    "answer_id": "x",
    "model_id": "m",
    "choices": [{"index": 0, "turns": [{"content": "Yes.", "token_len": 7}]}],
    "tstamp": 1714000000.0,
}


@pytest.mark.parametrize("record", [NEW, OLD])
def test_arena_hard_of_today_and_of_2024(record: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text(json.dumps(record) + "\n")
    assert read_answers(file) == ("m", {"a": Answer("a", ("Yes.",), 7)})


def test_arena_hard_knows_its_questions(tmp_path: Path) -> None:
    question = {"uid": "b", "category": "hard_prompt", "prompt": "Why?"}
    (tmp_path / "question.jsonl").write_text(json.dumps(question) + "\n")
    file = tmp_path / "model_answer" / "o3-mini-2025-01-31.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({**NEW, "uid": key}) + "\n" for key in "ab"))
    words = ["benchmark=arena_hard_v2", f"benchmark.path={tmp_path}"]
    benchmark = open_benchmark(compose_run(words))
    assert benchmark.read_answers(file) == ("m", {"b": Answer("b", ("Yes.",), 7)})


def test_mt_bench(tmp_path: Path) -> None:
    """What was written is read; answers to one turn of two, and to other questions, are not."""
    benchmark = open_benchmark(compose_run(["benchmark=mt_bench", "benchmark.num_prompts=2"]))
    answers = {q.id: Answer(q.id, ("one", f"two {q.id}")) for q in benchmark.questions}
    benchmark.write(tmp_path, JudgedAnswers("lab/model", "nobody", answers, []))
    file = tmp_path / "model_answer" / "lab--model.jsonl"
    assert benchmark.read_answers(file) == ("lab/model", answers)
    more = [
        {"question_id": 82, "choices": [{"index": 0, "turns": ["one"]}]},
        {"question_id": 7, "choices": [{"index": 0, "turns": ["one", "two"]}]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in more))
    assert benchmark.read_answers(file) == ("lab--model", {})


def test_ifbench(tmp_path: Path) -> None:
    benchmark = open_benchmark(compose_run(["benchmark=ifbench", "benchmark.num_prompts=3"]))
    answers = {q.id: Answer(q.id, (f"Answer {q.id}.",)) for q in benchmark.questions}
    benchmark.write(tmp_path, JudgedAnswers("m", "programs", answers, []))
    assert benchmark.read_answers(tmp_path / "output.jsonl") == ("output", answers)


def test_names_of_models_are_names_of_folders(tmp_path: Path) -> None:
    run = compose_run(["benchmark=mt_bench", f"output_dir={tmp_path}"])
    names = ("a/b", "../../x", "loss.beta=2,seed=1", "gpt-4 (turbo)\n", "...")
    folders = [judged_folder(run, name).relative_to(tmp_path / "judged") for name in names]
    assert [folder.parent.as_posix() for folder in folders] == [
        *("a__b", "__..__x", "loss.beta=2,seed=1", "gpt-4_turbo_", "model")
    ]
