"""Arena-Hard of odd files: several models, lines twice, missing games, the format of 2024."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from simpo.__main__ import main
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DataError
from simpo.judging.arena_files import OWN, read_answers, read_prompts, read_questions
from simpo.judging.benchmarks import open_benchmark
from simpo.judging.judge import judge
from simpo.run.judged import Judged

BASELINE = "gpt-4-0314"
CATEGORY = "arena-hard-v0.1"
# What the second game of each question says, with the model as A, and the first, as B.
MIXED = [("A>>B", "A=B"), ("A>B", "B>>A"), ("B>A", "A>B"), ("A=B", "B>A"), ("B>>A", "A>>B")]
STYLES = ("# a\n- b", "", "**b** c d", "1. a\n2. b\n3. c", "words " * 30)


def lines(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answer(uid: str, model: str, text: str) -> dict[str, Any]:
    told = [{"role": "assistant", "content": {"answer": text}}]
    tokens = len(text.split())
    return {"uid": uid, "model": model, "messages": told, "metadata": {"token_len": tokens}}


def verdict(uid: str, model: str, games: tuple[str | None, str | None]) -> dict[str, Any]:
    second, first = (
        None if one is None else {"score": one, "judgment": {"answer": f"[[{one}]]"}}
        for one in games
    )
    names = {"model": model, "judge": "j", "baseline": BASELINE}
    return {"uid": uid, **names, "games": [first, second]}


class Folder:
    """A folder of the benchmark with ten questions, in which one judge judged models."""

    def __init__(self, path: Path) -> None:
        self.path, self.ids = path, [f"q{i}" for i in range(10)]
        questions = [{"uid": uid, "category": CATEGORY, "prompt": uid} for uid in self.ids]
        lines(path / "question.jsonl", questions)
        self.answers(BASELINE, 3)

    def text(self, number: int, shift: int) -> str:
        return f"{STYLES[number * shift % 5]} {shift}"

    def answers(self, model: str, shift: int, number: int = 10) -> Path:
        found = [answer(self.ids[i], model, self.text(i, shift)) for i in range(number)]
        return lines(self.path / "model_answer" / f"{model}.jsonl", found)

    def verdicts(self, model: str, games: Sequence[Any]) -> Path:
        path = self.path / "model_judgment" / "j" / f"{model}.jsonl"
        found = zip(self.ids, games, strict=False)
        return lines(path, [verdict(uid, model, one) for uid, one in found])

    def words(self, path: Path) -> list[str]:
        return [
            *("benchmark=arena_hard_v0.1", f"benchmark.path={self.path}"),
            *(f"judge.annotations={path}", f"output_dir={self.path}/out"),
        ]

    def judged(self, path: Path) -> Judged:
        return judge(compose_run(self.words(path)), [])[0]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def notes_of(found: Judged, word: str) -> list[str]:
    return [note for note in found.notes if word in note]


def test_what_is_left_out_is_said(folder: Folder) -> None:
    """Of ten questions three are not in the file, one has a null game and one an unreadable one;
    5 count, with 3.5 of 4 copies, 4 of 4, 0 of 2, 1.5 of 2, and 0 of 6."""
    folder.answers("m", 1)
    found = folder.judged(folder.verdicts("m", [*MIXED, ("A>B", None), ("A>B", "none")]))
    assert found.figures["score"].value == pytest.approx(100 * 9 / 18)
    assert (found.questions, found.asked, found.malformed) == (5, 13, 1)
    assert found.by_question == {"q0": 0.75, "q1": 1, "q2": 0, "q3": 0.75, "q4": 0}
    assert notes_of(found, "questions are") == [
        "5 of 10 questions are left out: a verdict is missing or cannot be read.",
        "5 questions are few: intervals are too narrow below 30, and another sample may show "
        "something else.",
    ]


def test_style_of_some_questions_alone(folder: Folder) -> None:
    folder.answers("m", 1, number=8)
    found = folder.judged(folder.verdicts("m", MIXED * 2))
    assert notes_of(found, "answers are known") == [
        "style_win_rate and equal_style_win_rate are of the 8 of 10 questions whose answers are "
        "known."
    ]


def test_no_style_figures_without_a_solution(folder: Folder) -> None:
    """The longer answer wins each game: any larger coefficient is likelier."""
    folder.answers("m", 1)
    longer = [len(folder.text(i, 1)) > len(folder.text(i, 3)) for i in range(10)]
    assert any(longer) and not all(longer)
    games = [("A>B", "B>A") if wins else ("B>A", "A>B") for wins in longer]
    found = folder.judged(folder.verdicts("m", games))
    assert found.figures.keys() == {"score"}
    assert notes_of(found, "style control") == [
        "There is no style control: in so few games style alone tells who wins, so its regression "
        "has no solution."
    ]


def test_other_models_of_the_judge(folder: Folder) -> None:
    """A copy of the judged model under another name does not count as another model; files without
    answers, or against another baseline, are left out, and a note says so."""
    for number, model in enumerate(("m", "other", "copy", "third"), 1):
        folder.answers(model, 1 if model == "copy" else number)
        path = folder.verdicts(model, MIXED * 2)
    folder.verdicts("unknown", MIXED)
    path.write_text(path.read_text().replace(BASELINE, "gpt-5"))
    judged = folder.path / "model_judgment" / "j"
    found = folder.judged(judged / "m.jsonl")
    assert notes_of(found, "other models") == [
        f"style_win_rate has 1 other models of {judged} in it."
    ]
    assert notes_of(found, "left out of style") == [
        f"2 files of {judged} are left out of style_win_rate: the answers of the model are not in "
        "model_answer/, or it was compared with another baseline."
    ]
    # Before anything is asked.
    (judged / "other.jsonl").write_text("{}\n")
    words = ["benchmark=arena_hard_v0.1", f"benchmark.path={folder.path}"]
    run = compose_run([*words, "judge.endpoint=http://localhost:1", "judge.model=j"])
    with pytest.raises(DataError) as error:
        open_benchmark(run)
    assert str(error.value) == (
        f"{judged}/other.jsonl: line 1: not a judgement with uid and two games (copy the file "
        "again)"
    )


def test_verdicts_and_questions_of_2024(folder: Folder) -> None:
    folder.answers("m", 1)
    path = folder.verdicts("m", MIXED * 2)
    today = folder.judged(path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["question_id"] = record.pop("uid")
        del record["baseline"]
        for game in record["games"]:
            game["judgment"] = game["judgment"]["answer"]
    lines(path, records)
    questions = [
        {"question_id": uid, "category": CATEGORY, "turns": [{"content": uid}]}
        for uid in folder.ids
    ]
    lines(folder.path / "question.jsonl", questions)
    assert folder.judged(path) == today


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"uid": "q0"}, "uid q0 comes twice (keep one of both lines)"),
        ({"model": "n"}, "a file has one model, got m and n (write a file of each)"),
        ({"judge": "k"}, "a file has one judge, got j and k (write a file of each)"),
        ({"model": 5}, "not a judgement with uid and two games (copy the file again)"),
        ({"baseline": ["x"]}, "not a judgement with uid and two games (copy the file again)"),
        ({"games": [None]}, "not a judgement with uid and two games (copy the file again)"),
        ({"games": [{}, {}]}, "has a game without score or judgment (copy the file again)"),
    ],
)
def test_damaged_verdicts(change: dict[str, Any], fault: str, folder: Folder) -> None:
    path = folder.verdicts("m", MIXED)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines(path, [*records[:2], records[2] | change, *records[3:]])
    with pytest.raises(DataError) as error:
        folder.judged(path)
    assert str(error.value) == f"{path}: line 3: {fault}"


def test_no_verdict_that_can_be_read(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder.verdicts("m", [("A", "B")] * 3)
    with pytest.raises(SystemExit) as ended:
        main(["judge", *folder.words(path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"{path}: none of its 6 verdicts can be read (give those of a judge that keeps to the "
        "format)\n"
    )


def test_damaged_answers(tmp_path: Path) -> None:
    """An answer that is there twice in the same words is one answer."""
    one, two = answer("a", "m", "yes"), answer("b", "m", "no")
    path = lines(tmp_path / "m.jsonl", [one, two, one])
    assert list(read_answers(path)[1]) == ["a", "b"]
    for record, fault in (
        (answer("a", "m", "no"), "uid a comes twice with other answers (keep one of both lines)"),
        (answer("c", "n", "no"), "a file has one model, got m and n (write a file of each)"),
    ):
        lines(path, [one, two, record])
        with pytest.raises(DataError) as error:
            read_answers(path)
        assert str(error.value) == f"{path}: line 3: {fault}"
    question = {"uid": "a", "category": "c", "prompt": "?"}
    with pytest.raises(DataError) as error:
        read_questions(lines(path, [question, question]))
    assert str(error.value) == f"{path}: line 2: uid a comes twice (keep one of both lines)"


def test_a_baseline_with_two_files_of_answers(folder: Folder) -> None:
    run = folder.path / "run"
    place = run / "benchmarks" / "arena_hard_v0.1" / "model_answer"
    for name in ("a.jsonl", "b.jsonl"):
        lines(place / name, [])
    words = [*folder.words(folder.path / "question.jsonl"), f"benchmark.baseline={run}"]
    with pytest.raises(ConfigError) as error:
        open_benchmark(compose_run(words))
    assert str(error.value) == (
        f"benchmark.baseline: {place} holds a.jsonl and b.jsonl (name one of the files)"
    )


def test_a_pattern_that_is_no_pattern(folder: Folder) -> None:
    clone = folder.path / "clone"
    data = clone / "data" / CATEGORY
    data.mkdir(parents=True)
    (folder.path / "question.jsonl").rename(data / "question.jsonl")
    config, settings = clone / "config" / f"{CATEGORY}.yaml", clone / "utils" / "judge_utils.py"
    for file, text in (
        (config, "{prompt_template: x, regex_patterns: ['('], temperature: 0, max_tokens: 9}"),
        (settings, f"JUDGE_SETTINGS = {{{CATEGORY!r}: {{'baseline': 'x', 'system_prompt': 'x'}}}}"),
    ):
        file.parent.mkdir()
        file.write_text(text)
    words = ["benchmark=arena_hard_v0.1", f"benchmark.path={clone}", "judge.reward=rules"]
    with pytest.raises(DataError) as error:
        open_benchmark(compose_run(words))
    assert str(error.value) == (
        f"{config}: lacks a setting, or {settings} has no JUDGE_SETTINGS as expected (restore both "
        "files: git checkout)"
    )


def test_a_folder_in_the_root_has_no_clone_around_it() -> None:
    assert read_prompts(Path("/arena")) == OWN


def test_biases_need_no_answers_of_the_baseline(folder: Folder) -> None:
    """Of the first question the answer shown first wins both games, of the second the model."""
    (folder.path / "model_answer" / f"{BASELINE}.jsonl").unlink()
    found = folder.judged(folder.verdicts("m", [("A>B", "A>B"), ("A>B", "B>A")]))
    assert (found.position_bias, found.first_share) == (0.5, 0.75)
