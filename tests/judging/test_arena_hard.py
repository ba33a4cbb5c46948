"""Arena-Hard: its files read, queries, verdicts, the score by hand, files written and read back."""

from __future__ import annotations

import codecs
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpo.config.benchmarks import BenchmarkConfig, JudgeConfig
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DataError
from simpo.judging.arena_files import read_answers
from simpo.judging.arena_hard import ArenaHard
from simpo.judging.results import judged_as
from simpo.judging.shapes import Answer, JudgedAnswers, Judgement, Said

SETTINGS = """raise SystemExit("must not run")
TOLD = "Judge {both}."
JUDGE_SETTINGS = {
    "hard_prompt": {"baseline": "base", "system_prompt": TOLD},
    "creative_writing": {"baseline": "poet", "system_prompt": "Read."},
}
"""
CONFIG = r"""
temperature: 0.5
max_tokens: 77
regex_patterns: ['\[\[([AB<>=]+)\]\]', '\[([AB<>=]+)\]']
prompt_template: "Q {QUESTION} A {ANSWER_A} B {ANSWER_B}"
"""


def lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answer(uid: str, text: str) -> dict[str, Any]:
    return {"uid": uid, "messages": [{"role": "assistant", "content": {"answer": text}}]}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name, text in {
        "config/arena-hard-v2.0.yaml": CONFIG,
        "utils/judge_utils.py": SETTINGS,
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    data = tmp_path / "data" / "arena-hard-v2.0"
    questions = [
        {"uid": uid, "category": category, "prompt": f"ask {uid}"}
        for uid, category in [("a", "hard_prompt"), ("b", "hard_prompt"), ("c", "creative_writing")]
    ]
    lines(data / "question.jsonl", *questions)
    lines(data / "model_answer" / "base.jsonl", answer("a", "{old} a"), answer("b", "old b"))
    return tmp_path


def opened(path: Path, judge: JudgeConfig | None = None, **given: Any) -> ArenaHard:
    config = BenchmarkConfig(name="arena_hard_v2", path=str(path), **given)
    run: Any = SimpleNamespace(benchmark=config, judge=judge or JudgeConfig())
    return ArenaHard(run)


ANSWERS = {key: Answer(key, (f"new {key}",), 5) for key in "ab"}


def judged(found: ArenaHard, said: list[str]) -> list[Judgement]:
    queries = found.queries(ANSWERS, both_orders=True)
    pairs = [(query, Said(text)) for query, text in zip(queries, said, strict=True)]
    return [Judgement(query, one, found.value(query, one)) for query, one in pairs]


def test_queries(clone: Path) -> None:
    found = opened(clone)
    assert [question.id for question in found.questions] == ["a", "b"]
    assert found.notes == ("1 questions without an answer of the baseline are left out.",)
    first, second, *_ = found.queries(ANSWERS, both_orders=True)
    assert (first.order, second.order) == (1, 0)
    assert first.messages[0] == {"role": "system", "content": "Judge {both}."}
    assert first.messages[1]["content"] == "Q ask a A {old} a B new a"
    assert second.messages[1]["content"] == "Q ask a A new a B {old} a"
    assert (first.temperature, first.max_tokens) == (0.5, 77)
    assert len(found.queries(ANSWERS, both_orders=False)) == 2


def test_files_may_begin_with_a_byte_order_mark(clone: Path) -> None:
    wanted = opened(clone).queries(ANSWERS, both_orders=True)
    for file in [path for path in clone.rglob("*") if path.is_file()]:
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert opened(clone).queries(ANSWERS, both_orders=True) == wanted


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[[A>B]] no, [[b>>a]]", 0.0),
        ("so [A<B]", 0.0),
        ("[[B<<A]]", 1.0),
        ("[[A=B]] [A>B]", 0.5),
        ("[[A]]", None),
        ("[[A>B] none", 1.0),
        ("A>B", None),
    ],
)
def test_verdicts(text: str, value: float | None, clone: Path) -> None:
    found = opened(clone)
    first, second, *_ = found.queries(ANSWERS, both_orders=True)
    assert found.value(second, Said(text)) == value
    assert found.value(first, Said(text)) == (None if value is None else 1 - value)


def test_score_by_hand_and_files_read_back(clone: Path, tmp_path: Path) -> None:
    """Won by far, lost, drawn, won: (3 + 0 + 0.5 + 1) of 6 copies."""
    found = opened(clone)
    judgements = judged(found, ["[[B>>A]]", "[[B>A]]", "[[A=B]]", "[[A>B]]"])
    figures, _ = found.figures(judgements, ANSWERS)
    assert next(iter(figures)) == "score"
    assert figures["score"].value == figures["score_hard_prompt"].value == pytest.approx(75)
    assert figures["score"].official_low is None
    out = tmp_path / "out"
    found.write(out, JudgedAnswers("me/model", "judge", ANSWERS, judgements))
    path = out / "model_judgment" / "judge" / "me__model.jsonl"
    other = opened(clone, JudgeConfig(annotations=str(path)))
    model, judge, answers, read = other.read_annotations(path)
    assert (model, judge, answers) == ("me/model", "judge", ANSWERS)
    assert [(one.query.order, one.said.text, one.value) for one in read] == [
        (one.query.order, one.said.text, one.value) for one in judgements
    ]
    assert other.figures(read, answers)[0] == figures


def test_a_question_with_an_unreadable_verdict_counts_nowhere(clone: Path) -> None:
    found = opened(clone)
    judgements = judged(found, ["[[B>>A]]", "none", "[[A=B]]", "[[A>B]]"])
    figures, _ = found.figures(judgements, ANSWERS)
    assert figures["score"].value == pytest.approx(75)
    assert found.by_question(judgements, ANSWERS) == {"b": 0.75}
    run = compose_run(["benchmark=arena_hard_v2", f"benchmark.path={clone}"])
    told = judged_as(run, found, JudgedAnswers("m", "j", ANSWERS, judgements))
    assert told.questions == 1
    assert "1 of 2 questions are left out: a verdict is missing or cannot be read." in told.notes
    assert found.figures([replace(one, value=None) for one in judgements], ANSWERS)[0] == {}


def test_faults(clone: Path) -> None:
    data = clone / "data" / "arena-hard-v2.0"
    with pytest.raises(ConfigError) as config_error:
        opened(clone / "utils")
    assert str(config_error.value) == (
        f"benchmark.path: {clone}/utils/data/arena-hard-v2.0/question.jsonl is not there "
        "(git clone https://github.com/lmarena/arena-hard-auto)"
    )
    with pytest.raises(DataError) as error:
        opened(clone, baseline="nobody")
    assert str(error.value) == (
        f"{data}/model_answer/nobody.jsonl: no answers of the baseline "
        "(get the file, or set benchmark.baseline)"
    )
    lines(data / "model_answer" / "base.jsonl", answer("a", "x"), {"uid": "b"})
    with pytest.raises(DataError) as error:
        opened(clone)
    assert str(error.value) == (
        f"{data}/model_answer/base.jsonl: line 2: not an answer with uid and messages "
        "(copy the file again)"
    )
    outputs = data / "model_outputs.json"
    outputs.write_text('[{"instruction": "a", "output": "b"}]')
    with pytest.raises(DataError) as error:  # a list, which has no lines
        read_answers(outputs)
    assert str(error.value) == (
        f"{outputs}: not an answer with uid and messages (copy the file again)"
    )
