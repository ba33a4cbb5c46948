"""How difficult each question of AlpacaEval is, for its length-controlled win rate.

Exactly: alpaca_eval's two files, which its data set on the hub has. Else estimated from a checkout:
it has the weights of the regression of each published model, and its judgements. The difficulty of
a question is then the one unknown of that question.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from simpo.config.errors import DataError
from simpo.judging.jsonl import read_text
from simpo.judging.length_control import GamedRow

JUDGE = "weighted_alpaca_eval_gpt4_turbo"
WEIGHTS = (
    f"src/alpaca_eval/metrics/weights/{JUDGE}/length_controlled_v1/baseline_gpt4_1106_preview.csv"
)
GAMED = ("gpt4_1106_preview_verbose", "gpt4_1106_preview_concise")
"""The models that df_gamed.csv is about."""
MODELS = 60
"""About how many published models are read; more change little, and each has 5 MB."""
PRIOR = 0.3
"""Inverse variance of the difficulty before any judgement is seen, which bounds the estimate."""
NEWTON_STEPS = 100


def read_difficulty(path: Path, questions: int) -> list[float]:
    """The difficulty of each question, of an instruction_difficulty.csv.

    Raises:
        DataError: it is not such a file, or lacks a question.
    """
    rows = _read_csv(path, ("index", "instruction_difficulty"))
    found = {int(row["index"]): row["instruction_difficulty"] for row in rows}
    missing = [index for index in range(questions) if index not in found]
    if missing:
        raise DataError(
            f"{path}: no difficulty of question {missing[0]} (give the file for these questions)"
        )
    return [found[index] for index in range(questions)]


def read_gamed(path: Path) -> list[GamedRow]:
    """The lines of a df_gamed.csv.

    Raises:
        DataError: it is not such a file.
    """
    columns = ("preference", "std_delta_len", "instruction_difficulty")
    return [GamedRow(*(row[key] for key in columns)) for row in _read_csv(path, columns)]


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, float]]:
    """Columns of numbers of a table."""
    text = read_text(path)
    try:
        lines = list(csv.DictReader(StringIO(text)))
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read as a table (csv)") from error
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            row = {key: float(line[key]) for key in columns}
        except (KeyError, TypeError, ValueError):
            row = {}
        if not row or not all(map(math.isfinite, row.values())):
            raise DataError(f"{path}: line {number}: needs numbers in {', '.join(columns)}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: has no lines (needs {', '.join(columns)})")
    return rows


def published(checkout: Path, instructions: Sequence[str]) -> tuple[list[float], list[GamedRow]]:
    """The difficulty of each question estimated from a checkout, and what it has of the gamed rows.

    Both are empty if it has no weights or less than ten models' judgements of all the questions.

    Raises:
        DataError: the file of weights is damaged.
    """
    weights = _published_weights(checkout / WEIGHTS)
    available = [model for model in sorted(weights) if _file(checkout, model).is_file()]
    chosen = available[:: max(1, len(available) // MODELS)]
    judged = [
        (weights[model], rows)
        for model in chosen
        if (rows := _judged(_file(checkout, model), instructions)) is not None
    ]
    if len(judged) < 10:
        return [], []
    difficulty = _estimate(judged)
    gamed = []
    for rows in (_judged(_file(checkout, model), instructions) for model in GAMED):
        if rows is None:  # of one kind alone they would pull to one side
            return difficulty, []
        gamed += [
            GamedRow(preference, length, own)
            for (preference, length), own in zip(rows, difficulty, strict=True)
        ]
    return difficulty, gamed


def _file(checkout: Path, model: str) -> Path:
    return checkout / "results" / model / JUDGE / "annotations.json"


def _published_weights(path: Path) -> dict[str, tuple[float, float, float]]:
    """Weights of length, difficulty and the constant, by model; only where difficulty counts.

    Raises:
        DataError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        lines = list(csv.reader(StringIO(read_text(path))))[1:]
        numbers = {line[0]: tuple(map(float, line[1:4])) for line in lines if len(line) == 4}
    except (csv.Error, ValueError) as error:
        raise DataError(f"{path}: a weight is no number (restore it: git checkout)") from error
    return {model: (own[0], own[1], own[2]) for model, own in numbers.items() if own[1]}


def _judged(path: Path, instructions: Sequence[str]) -> list[tuple[float, float]] | None:
    """Preference and standardised difference in length of each question; None if not all."""
    import numpy as np

    try:
        rows: Any = json.loads(read_text(path))
        by_question: Mapping[str, Any] = {row["instruction"]: row for row in rows}
        own = [by_question[instruction] for instruction in instructions]
        preferences = [(float(row["preference"]) or 1.5) - 1 for row in own]
        delta = np.array([len(row["output_1"]) - len(row["output_2"]) for row in own], float)
    except (DataError, ValueError, KeyError, TypeError):
        return None
    if not all(0 <= value <= 1 for value in preferences) or len(own) < 2 or not delta.std():
        return None
    return list(zip(preferences, (delta / delta.std(ddof=1)).tolist(), strict=True))


def _estimate(
    judged: Iterable[tuple[tuple[float, float, float], Sequence[tuple[float, float]]]],
) -> list[float]:
    """The likeliest difficulty of each question, by Newton's method.

    Args:
        judged: weights of each model, and its preference and difference in length by question.
    """
    import numpy as np

    models = list(judged)
    length, slope, constant = np.array([weights for weights, _ in models]).T[:, :, None]
    table = np.array([rows for _, rows in models])
    fixed, wanted = length * np.tanh(table[..., 1]) + constant, table[..., 0]
    difficulty = np.zeros(table.shape[1])
    for _ in range(NEWTON_STEPS):
        chances = np.exp(-np.logaddexp(0, -(fixed + slope * difficulty)))
        gradient = (slope * (wanted - chances)).sum(axis=0) - PRIOR * difficulty
        curvature = (slope**2 * chances * (1 - chances)).sum(axis=0) + PRIOR
        step = np.clip(gradient / curvature, -1, 1)
        difficulty += step
        if abs(step).max() < 1e-10:
            break
    return difficulty.tolist()
