"""Reads the files of FastChat's MT-Bench: questions, reference answers, answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simpo.config.errors import DataError
from simpo.judging.jsonl import ONE_LINE, fault, records
from simpo.judging.shapes import Question

QUESTIONS = "mt_bench/question.jsonl"
REFERENCES = "mt_bench/reference_answer/gpt-4.jsonl"

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose judge sees a reference answer."""
TURNS = 2


def read_answers(path: Path) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Question, model (empty if not known) and turns of each line of a file of answers.

    Raises:
        DataError: a line is no answer, or answers a question in other words than an earlier one.
    """
    seen: dict[tuple[str, str], tuple[str, ...]] = {}
    for line, record in records(path):
        match record:
            case {"question_id": int() | str() as key, "choices": [{"turns": [*texts]}, *_]} if all(
                isinstance(text, str) for text in texts
            ):
                model, turns = str(record.get("model_id") or ""), tuple(texts)
            case _:
                raise fault(path, line, "must be an answer with question_id, choices and turns")
        if seen.setdefault((str(key), model), turns) != turns:
            raise fault(path, line, f"question {key} comes twice with other answers", ONE_LINE)
        yield str(key), model, turns


def read_questions(
    path: Path, references: Mapping[str, tuple[str, ...]], temperature: float | None
) -> dict[str, Question]:
    """The questions by id.

    Raises:
        DataError: a line is no question, comes twice, or lacks reference answers.
    """
    found: dict[str, Question] = {}
    for line, record in records(path):
        match record:
            case {
                "question_id": int() | str() as key,
                "category": str(),
                "turns": [str(), *others],
            } if len(others) < TURNS and all(isinstance(text, str) for text in others):
                if str(key) in found:
                    raise fault(path, line, f"question {key} comes twice", ONE_LINE)
                reference = references.get(str(key), ())
                found[str(key)] = _question(record, reference, temperature, path)
            case _:
                what = f"must be a question with question_id, category and 1 or {TURNS} turns"
                raise fault(path, line, what)
    return found


def _question(
    record: Mapping[str, Any],
    reference: tuple[str, ...],
    temperature: float | None,
    path: Path,
) -> Question:
    first, *others = record["turns"]
    category = record["category"]
    if temperature is None:
        temperature = TEMPERATURES.get(category, OTHER_TEMPERATURE)
    if category in WITH_REFERENCE and len(reference) < 1 + len(others):
        raise DataError(
            f"{path}: question {record['question_id']} has no reference answer to each turn in "
            f"{REFERENCES} (copy both again)"
        )
    return Question(
        id=str(record["question_id"]),
        prompt=({"role": "user", "content": first},),
        follow_ups=tuple(others),
        category=category,
        references=reference if category in WITH_REFERENCE else (),
        temperature=temperature,
        record=record,
    )
