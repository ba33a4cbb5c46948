"""AlpacaEval 2: 805 instructions, each answer compared with that of GPT-4 Turbo.

https://github.com/tatsu-lab/alpaca_eval (Dubois et al. 2024, https://arxiv.org/abs/2404.04475).
Questions, the baseline's answers and the judge's prompt come from a checkout of it; the weighted
judge gives the chance that it names the model's answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import stdev
from typing import Any

from simpo.config.errors import ConfigError, DataError
from simpo.config.schema import RunConfig
from simpo.judging.alpaca_files import (
    OUTPUTS,
    PLACES,
    baseline_file,
    judge_prompt,
    questions_file,
    read_outputs,
    read_rows,
)
from simpo.judging.difficulty import published, read_difficulty, read_gamed
from simpo.judging.length_control import FOLDS, GamedRow, length_controlled
from simpo.judging.shapes import (
    Answer,
    Benchmark,
    JudgedAnswers,
    Judgement,
    Query,
    Question,
    Said,
    by_question,
    orders_of,
)
from simpo.judging.win_rates import PERCENT, mean_figure
from simpo.run.atomic import write_json
from simpo.run.judged import Figure

ANNOTATIONS = "annotations.json"
FIRST, SECOND = "m", "M"
"""How the prompt calls the output shown first and second."""
TOP_LOGPROBS = 5
NORMAL_95 = 1.96

PAPER_TEMPERATURES = (
    (r"llama-?3(?![\d.])", 0.9),
    (r"gemma-?2", 0.5),
    (r"mistral.*instruct", 0.5),
    (r"mistral.*base|mistral-7b-v0\.1|zephyr-7b-sft", 0.7),
)
"""Of the README of princeton-nlp/SimPO; Gemma's of its configuration in alpaca_eval."""


def paper_temperature(name_or_path: str) -> float | None:
    """The sampling temperature with which the paper's authors had a model answer AlpacaEval 2.

    Args:
        name_or_path: a hub id, or a choice of conf/model. None: the paper has no such model.
    """
    name = name_or_path.lower().replace("_", "-")
    return next((value for model, value in PAPER_TEMPERATURES if re.search(model, name)), None)


class AlpacaEval(Benchmark):
    """The questions, asked of a judge that names the better output by a letter."""

    def __init__(self, run: RunConfig) -> None:
        """
        Raises:
            ConfigError: `benchmark.path` or `benchmark.baseline` names nothing, or scikit-learn is
                not installed.
            DataError: a file is not of its format.
        """
        if find_spec("sklearn") is None:
            raise ConfigError(
                ["benchmark: the length-controlled win rate needs scikit-learn "
                 "(pip install 'simpo[judge]')"]
            )  # fmt: skip
        self.run = run
        file, self.checkout = questions_file(run)
        generator, rows = read_outputs(file)
        self.questions = [
            Question(
                id=str(index),
                prompt=({"role": "user", "content": row["instruction"]},),
                category=str(row.get("dataset", "")),
                record={"dataset": row.get("dataset", ""), "instruction": row["instruction"]},
            )
            for index, row in enumerate(rows[: run.benchmark.num_prompts])
        ]
        self.ids = {self._instruction(question): question.id for question in self.questions}
        path = baseline_file(run, file, self.checkout, generator)
        self.baseline_name, self.baseline = self.read_answers(path)
        missing = [question.id for question in self.questions if question.id not in self.baseline]
        if missing:
            raise DataError(
                f"{path}: no answer to question {missing[0]} of {file} (set benchmark.baseline, or "
                "benchmark.num_prompts to take the first ones alone)"
            )
        self.prompt, self.prompt_is_published = judge_prompt(self.checkout)
        settings = run.benchmark
        count = len(self.questions)
        self.difficulty = (
            read_difficulty(Path(settings.difficulty).expanduser(), count)
            if settings.difficulty
            else []
        )
        self.gamed = read_gamed(Path(settings.gamed).expanduser()) if settings.gamed else []

    @staticmethod
    def _instruction(question: Question) -> str:
        return str(question.record["instruction"])

    def read_answers(self, path: Path) -> tuple[str, dict[str, Answer]]:
        """The name of the generator and its answers in a model_outputs.json.

        Answers to other questions are left out.

        Raises:
            DataError: it is not one.
        """
        name, rows = read_outputs(path)
        found = [(self.ids.get(row["instruction"]), row["output"]) for row in rows]
        return name, {key: Answer(key, (text,)) for key, text in found if key is not None}

    def queries(self, answers: Mapping[str, Answer], both_orders: bool) -> list[Query]:
        """Ask about each answer in both orders, or in one that `benchmark.seed` draws."""
        asked = [
            (question, order)
            for question in self.questions
            if question.id in answers
            for order in orders_of(question.id, both_orders, self.run.benchmark.seed)
        ]
        return [self._query(question, answers[question.id], order) for question, order in asked]

    def _query(self, question: Question, answer: Answer, order: int) -> Query:
        outputs = [answer.turns[0], self.baseline[question.id].turns[0]]
        first, second = outputs if order == 0 else outputs[::-1]
        texts = {
            "instruction": self._instruction(question),
            "output_1": first,
            "output_2": second,
        }
        # In one pass and message by message, so that no answer can act as a part of the prompt.
        messages = tuple(
            {**message, "content": PLACES.sub(lambda at: texts[at[1]], message["content"])}
            for message in self.prompt
        )
        return Query(
            question.id,
            turn=0,
            order=order,
            messages=messages,
            max_tokens=1,
            temperature=1.0,
            top_logprobs=TOP_LOGPROBS,
        )

    def value(self, query: Query, said: Said) -> float | None:
        """The chance that the judge names the model's output; 0 or 1 by its letter alone."""
        of_first = _chance_of_first(said)
        return None if of_first is None else (of_first if query.order == 0 else 1 - of_first)

    def figures(
        self, judgements: Sequence[Judgement], answers: Mapping[str, Answer]
    ) -> tuple[dict[str, Figure], list[str]]:
        """`lc_win_rate` and `win_rate` in percent; the first only with enough questions.

        The interval of `lc_win_rate` resamples questions, of each its first-order effect on the
        fitted regression (see `LengthControlled.values`).
        """
        notes = []
        if not self.prompt_is_published:
            notes.append("The judge's prompt is simpo's own: alpaca_eval's was not found.")
        values = by_question(judgements)
        if not values:
            return {}, [*notes, "No verdict could be read."]
        known = list(values.values())
        win_rate = mean_figure(known)
        if len(known) > 1:
            win_rate = _official(win_rate, PERCENT * stdev(known) / len(known) ** 0.5)
        if len(known) < FOLDS:
            few = f"The length-controlled win rate needs verdicts on {FOLDS} questions."
            return {"win_rate": win_rate}, [*notes, few]
        controlled, note = self._length_controlled(judgements, values, answers)
        return {"lc_win_rate": controlled, "win_rate": win_rate}, [*notes, *note]

    def _length_controlled(
        self,
        judgements: Sequence[Judgement],
        values: Mapping[str, float],
        answers: Mapping[str, Answer],
    ) -> tuple[Figure, list[str]]:
        """The length-controlled win rate, and notes if it is approximate."""
        asked = {judgement.query.question for judgement in judgements}
        questions = [question.id for question in self.questions if question.id in asked]
        difficulty, gamed, note = self._difficulty()
        found = length_controlled(
            [values.get(question) for question in questions],
            [
                len(self.baseline[question].turns[0]) - len(answers[question].turns[0])
                for question in questions
            ],
            [difficulty[int(question)] for question in questions] if difficulty else None,
            gamed,
        )
        if not found.converged:
            note = [*note, UNCONVERGED]
        elif not any(found.weights[1:]):
            note = [*note, f"lc_win_rate is 50: in {len(values):,} questions {SHRUNK}."]
        resampled = mean_figure(found.values, scale=1)
        if resampled.low is None or resampled.high is None:
            return Figure(found.win_rate), note
        shift = found.win_rate - resampled.value
        figure = Figure(found.win_rate, resampled.low + shift, resampled.high + shift)
        # Without difficulty all predictions are the same, and their standard error says nothing.
        return (_official(figure, found.standard_error) if difficulty else figure), note

    def _difficulty(self) -> tuple[Sequence[float], Sequence[GamedRow], list[str]]:
        """Difficulty by question, gamed rows, and what is approximate about them."""
        if self.difficulty:
            if self.gamed:
                return self.difficulty, self.gamed, []
            lacks = "benchmark.gamed is not given, so the regression is not pulled to the baseline"
            return self.difficulty, [], [f"lc_win_rate is approximate: {lacks}. {SHORT}"]
        found: tuple[list[float], list[GamedRow]] = ([], [])
        if self.checkout:
            found = published(self.checkout, list(map(self._instruction, self.questions)))
        difficulty, gamed = found
        if gamed:
            return difficulty, gamed, [f"lc_win_rate is approximate: {ESTIMATED}."]
        if difficulty:
            lacks = "and the checkout lacks the judgements of the gamed baseline"
            return difficulty, [], [f"lc_win_rate is approximate: {ESTIMATED}, {lacks}. {SHORT}"]
        return [], [], [f"lc_win_rate is approximate: {MINIMAL}"]

    def write(self, folder: Path, judged: JudgedAnswers) -> None:
        """Write model_outputs.json and annotations.json; of both orders the mean preference."""
        answers = judged.answers
        asked = [question for question in self.questions if question.id in answers]
        outputs = [
            {**question.record, "output": answers[question.id].turns[0], "generator": judged.model}
            for question in asked
        ]
        write_json(folder / OUTPUTS, outputs)
        values = by_question(judged.judgements)
        said: dict[str, list[Any]] = {}
        for judgement in judged.judgements:
            query = judgement.query
            verdict = judgement.said.first_logprobs or judgement.said.text
            told = {"order": query.order, "repeat": query.repeat, "said": verdict}
            said.setdefault(query.question, []).append(told)
        annotations = [
            {
                **question.record,
                "output_1": self.baseline[question.id].turns[0],
                "generator_1": self.baseline_name,
                "output_2": answers[question.id].turns[0],
                "generator_2": judged.model,
                "annotator": judged.judge,
                "preference": 1 + values[question.id] if question.id in values else None,
                "raw_completion": said[question.id],
            }
            for question in asked
            if question.id in said
        ]
        write_json(folder / ANNOTATIONS, annotations)

    def read_annotations(self, path: Path) -> JudgedAnswers:
        """Read an annotations.json; a preference of 0 is a draw, none was not readable.

        Raises:
            DataError: it is not one, or holds preferences of another scale.
        """
        texts = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "annotator")
        answers, judgements, rows = {}, [], read_rows(path, texts)
        for key in ("generator_1", "generator_2", "annotator"):
            names = sorted({row[key] for row in rows})
            if len(names) > 1:
                raise DataError(f"{path}: {key} is {names[0]} and {names[1]} (one a file)")
        _refuse_other_scales(path, rows)
        for number, row in enumerate(rows, 1):
            if (question := self.ids.get(row["instruction"])) is None:
                if self.run.benchmark.num_prompts is not None:
                    continue
                raise DataError(f"{path}: item {number}: not an instruction of the benchmark")
            if row["output_1"] != self.baseline[question].turns[0]:
                raise DataError(
                    f"{path}: item {number}: output_1 is not the answer of {self.baseline_name} "
                    f"(benchmark.baseline={row['generator_1']})"
                )
            answers[question] = Answer(question, (row["output_2"],))
            judgements.append(_judged(question, row.get("preference")))
        return JudgedAnswers(rows[0]["generator_2"], rows[0]["annotator"], answers, judgements)


ESTIMATED = (
    "difficulty is estimated from published judgements (with it the figures of 50 published models "
    "follow from their weights within 0.3 points in the median, 0.5 at most; the estimate was "
    "tuned on these models, and untuned it was 0.4 to 0.6 in the median, 5 at most)"
)
SHORT = (
    "For published models that is 0.5 points in the median, and up to 17 where answers are much "
    "shorter than the baseline's."
)
UNCONVERGED = (
    "lc_win_rate: verdicts are so few or one-sided that the fit has not converged within "
    "alpaca_eval's 100 iterations, and another sample may give quite another figure: go by "
    "win_rate."
)
SHRUNK = (
    "the regularised regression finds no more than the effect of length, or nothing, so it says "
    "nothing about the model"
)
SCALE = (
    "write 1 where output_1 is preferred, 2 where output_2 is, 1.5 for a draw, or a number between"
)
MINIMAL = (
    "length_controlled_minimal, without difficulty and gamed rows. For published models with "
    "answers of about the baseline's length it is 0.1 to 2 points off, with much shorter ones up "
    "to 27 (benchmark.path=CHECKOUT, or benchmark.difficulty and benchmark.gamed)."
)


def _refuse_other_scales(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """
    Raises:
        DataError: a preference is none of alpaca_eval's.
    """
    for number, row in enumerate(rows, 1):
        found = row.get("preference")
        is_nan = isinstance(found, float) and math.isnan(found)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if found is None or is_nan or (is_number and (found == 0 or 1 <= found <= 2)):
            continue
        raise DataError(f"{path}: item {number}: preference is {found!r:.40} ({SCALE})")
    # Wins would be missing altogether, and equal outputs alone are sure to be draws.
    draws = [row for row in rows if row.get("preference") == 0]
    wins = any((row.get("preference") or 0) > 1 for row in rows)
    if not wins and any(row["output_1"] != row["output_2"] for row in draws):
        raise DataError(f"{path}: preferences are from 0 to 1, so 0 may be a loss ({SCALE})")


def _judged(question: str, preference: float | None) -> Judgement:
    """0 and 1.5 are draws; nan, as pandas writes None, is none."""
    value = None
    if preference is not None and not math.isnan(preference):
        value = (preference or 1.5) - 1
    query = Query(question, turn=0, order=0, messages=(), max_tokens=1, temperature=1.0)
    return Judgement(query, Said("" if preference is None else str(preference)), value)


def _chance_of_first(said: Said) -> float | None:
    first, second = (said.first_logprobs.get(name, -math.inf) for name in (FIRST, SECOND))
    if (largest := max(first, second)) > -math.inf:
        parts = [math.exp(value - largest) for value in (first, second)]
        return parts[0] / sum(parts)
    return {FIRST: 1.0, SECOND: 0.0}.get(said.text.strip().strip("\"'`.*"))


def _official(figure: Figure, standard_error: float) -> Figure:
    half = NORMAL_95 * standard_error
    return Figure(figure.value, figure.low, figure.high, figure.value - half, figure.value + half)
