"""Style control and the score of Arena-Hard: by hand, by another optimiser, by show_result.py."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from simpo.judging.games import Game, Games
from simpo.judging.shapes import Answer
from simpo.judging.style_control import (
    style,
    style_counts,
    style_differences,
    style_win_rates,
    styles,
)

BENCHMARK = "arena-hard-v0.1"
BASELINE = "gpt-4-0314"
LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")
TEXT = """# One
##Not one
### Two
1. first
  2. second
- third
**bold** and __bold__ and **not
bold**
```
# code
**code**
```
"""


def test_counts_by_hand() -> None:
    counts = style_counts(TEXT, 40)
    headers = {"h1": 1, "h2": 0, "h3": 1, "h4": 0, "h5": 0, "h6": 0}
    assert counts == {
        "token_len": 40,
        "header_count": headers,
        "list_count": {"ordered": 2, "unordered": 1},
        "bold_count": {"**": 1, "__": 1},
    }
    assert style(counts) == [40, 2, 3, 2]


def test_differences_by_hand() -> None:
    found = style_differences([[30.0, 31.0, 0.0, 0.0]], [[10.0, 0.0, 0.0, 11.0]])
    assert found.tolist() == [[0.5, 1 / 2, 0.0, -1 / 2]]
    assert style_differences([[0.0] * 4], [[0.0] * 4]).tolist() == [[0.0] * 4]


def test_characters_where_tokens_are_not_known() -> None:
    known, unknown = Answer("q", ("x" * 80,), 7), Answer("q", ("x" * 40,), 0)
    assert [one[0] for one in styles(known, known)] == [7, 7]
    assert [one[0] for one in styles(known, unknown)] == [20, 10]
    # No tokens of an empty answer are known tokens.
    empty, bold = Answer("q", ("",), 0), Answer("q", ("**x** is it",), 9)
    assert styles(empty, bold) == ([0, 0, 0, 0], [9, 0, 0, 1])


def test_score_by_hand() -> None:
    """A>>B for the model, a loss; a draw, a win: (3 + 0 + 0.5 + 1) of 6 copies."""
    games = Games.of([[Game("a", 1, 3), Game("a", 0, 1), Game("b", 0.5, 1), Game("b", 1, 1)]])
    found = games.score()
    assert found.value == pytest.approx(75)
    # Both questions have 75 %, so resampling them tells nothing; single copies do.
    assert (found.low, found.high) == (None, None)
    assert found.official_low < 60 < 90 < found.official_high


def planted(models: int, seed: int = 0, questions: int = 60) -> list[dict[str, Any]]:
    """Games of several models whose wins depend on their strength and their style."""
    draw = np.random.default_rng(seed)
    base = draw.integers((50, 0, 0, 0), (900, 9, 30, 20), size=(questions, 4))
    rows = []
    for model in range(models):
        counts = draw.integers((100, 0, 0, 0), (1400, 12, 40, 30), size=(questions, 4))
        lengths = (counts[:, 0] - base[:, 0]) / (counts[:, 0] + base[:, 0])
        for question in range(questions):
            mean = 0.4 - 0.5 * model + 1.5 * lengths[question]
            for order in (1, 0):
                strong = mean + draw.logistic()
                level = int(np.digitize(strong, [-1.5, -0.2, 0.2, 1.5]))
                label = LABELS[4 - level] if order == 0 else LABELS[level]
                rows.append(
                    {
                        "model": model,
                        "question": question,
                        "order": order,
                        "label": label,
                        "value": (0, 0, 0.5, 1, 1)[level],
                        "copies": 3 if ">>" in label else 1,
                        "style": counts[question].tolist(),
                        "base": base[question].tolist(),
                    }
                )
    return rows


def as_games(rows: list[dict[str, Any]]) -> tuple[Games, np.ndarray]:
    models = sorted({row["model"] for row in rows})
    games = Games.of(
        [
            [Game(str(r["question"]), r["value"], r["copies"]) for r in rows if r["model"] == m]
            for m in models
        ]
    )
    return games, style_differences([r["style"] for r in rows], [r["base"] for r in rows])


def features_of_copies(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Style features and outcomes in float64, a row a copy, as the blog post writes them down."""
    copies = [row for row in rows for _ in range(row["copies"])]
    ours = torch.tensor([row["style"] for row in copies], dtype=torch.float64)
    theirs = torch.tensor([row["base"] for row in copies], dtype=torch.float64)
    length = (ours[:, :1] - theirs[:, :1]) / (ours[:, :1] + theirs[:, :1])
    a, b = ours[:, 1:] / (ours[:, :1] + 1), theirs[:, 1:] / (theirs[:, :1] + 1)
    raw = torch.cat([length, (a - b) / (a + b + 1)], dim=1)
    return raw, torch.tensor([row["value"] for row in copies], dtype=torch.float64)


def optimum(features: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """Coefficients by torch's L-BFGS with a line search, until the gradient is 0."""
    coefs = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [coefs],
        max_iter=2000,
        tolerance_grad=1e-11,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(features @ coefs, outcomes)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert coefs.grad is not None and coefs.grad.abs().max() < 1e-9
    return coefs.detach()


@pytest.mark.parametrize("models", [1, 3])
def test_style_win_rates_by_another_optimiser(models: int) -> None:
    rows = planted(models)
    raw, outcomes = features_of_copies(rows)
    owner = torch.tensor([row["model"] for row in rows for _ in range(row["copies"])])
    strengths = (owner[:, None] == torch.arange(models)).double()
    standard = (raw - raw.mean(0)) / raw.std(0)
    by_average = optimum(torch.cat([strengths, standard], 1), outcomes)[0]
    # Without the mean taken off, a strength is that at no difference in style.
    by_none = optimum(torch.cat([strengths, raw / raw.std(0)], 1), outcomes)[0]
    average, equal = style_win_rates(*as_games(rows))
    assert average.value == pytest.approx(100 * torch.sigmoid(by_average).item(), abs=1e-6)
    assert equal.value == pytest.approx(100 * torch.sigmoid(by_none).item(), abs=1e-5)
    assert average.low < average.official_low < average.value < average.official_high
    assert equal.official_low is None and equal.low < equal.value < equal.high


def test_style_that_wins_is_taken_out() -> None:
    """Longer answers win, and the model's are always longer: alone it is no better."""
    draw = np.random.default_rng(1)
    tokens = draw.integers(200, 800, size=400)
    lengths = (tokens - 250) / (tokens + 250)
    values = (draw.random(400) < 1 / (1 + np.exp(-4 * lengths))).astype(float)
    games = Games.of([[Game(str(i), value, 1) for i, value in enumerate(values)]])
    differences = style_differences([[t, 0, 0, 0] for t in tokens], [[250.0, 0, 0, 0]] * 400)
    average, equal = style_win_rates(games, differences)
    score = games.score().value
    assert score > 70
    # At its own average the model's style is not controlled, so both nearly agree.
    assert abs(average.value - score) < 4
    assert equal.low < 50 < equal.high and equal.value < score - 15


@pytest.mark.parametrize(("value", "rate"), [(0.0, 0.0), (0.5, 50.0), (1.0, 100.0)])
def test_every_game_alike(value: float, rate: float) -> None:
    rows = [row | {"value": value} for row in planted(1, questions=10)]
    games, differences = as_games(rows)
    for found in (games.score(), *style_win_rates(games, differences)):
        assert found.value == pytest.approx(rate, abs=1e-3)
        assert (found.low, found.high) == (None, None)


def test_intervals_of_simulated_studies() -> None:
    """Ours hold as often as they say; the official ones, of 90 %, far less often."""
    studies, questions = 300, 80
    draw = np.random.default_rng(2)
    truth, found = [], []
    for _ in range(studies):
        # What a question is worth, seen by the judge in both orders with little noise.
        worth = 0.3 + 1.5 * draw.standard_normal(questions)
        seen = worth[:, None] + 0.4 * draw.standard_normal((questions, 2))
        value = np.select([seen < -0.2, seen < 0.2], [0.0, 0.5], 1.0)
        copies = np.where(np.abs(seen) > 1.5, 3, 1)
        truth.append(((value * copies).sum(), copies.sum()))
        games = [
            Game(str(i), value[i, j], int(copies[i, j])) for i in range(questions) for j in (0, 1)
        ]
        found.append(Games.of([games]).score())
    true = 100 * sum(top for top, _ in truth) / sum(bottom for _, bottom in truth)
    ours = sum(one.low <= true <= one.high for one in found) / studies
    official = sum(one.official_low <= true <= one.official_high for one in found) / studies
    assert 0.92 <= ours <= 0.98
    assert official < 0.75


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """show_result.py of a clone of lmarena/arena-hard-auto."""
    clone = os.environ.get("SIMPO_ARENA_HARD")
    if clone is None:
        pytest.skip("SIMPO_ARENA_HARD names no clone of lmarena/arena-hard-auto")
    monkeypatch.syspath_prepend(clone)
    names = ("utils", "utils.judge_utils", "utils.math_utils", "show_result")
    yield importlib.import_module("show_result")
    for name in names:
        sys.modules.pop(name, None)


def write_official(folder: Path, rows: list[dict[str, Any]]) -> None:
    data = folder / "data" / BENCHMARK
    for kind in ("model_answer", "model_judgment/judge"):
        (data / kind).mkdir(parents=True)

    def answer(row: dict[str, Any], key: str, model: str) -> str:
        names = ("token_len", "header_count", "list_count", "bold_count")
        metadata = dict(zip(names, row[key], strict=True))
        return json.dumps({"uid": f"q{row['question']}", "model": model, "metadata": metadata})

    for model in {row["model"] for row in rows}:
        own = [row for row in rows if row["model"] == model]
        firsts, seconds = own[0::2], own[1::2]
        name = f"model_{model}"
        answers = "\n".join(answer(row, "style", name) for row in firsts)
        (data / "model_answer" / f"{name}.jsonl").write_text(answers)
        base = "\n".join(answer(row, "base", BASELINE) for row in firsts)
        (data / "model_answer" / f"{BASELINE}.jsonl").write_text(base)
        lines = [
            {
                "uid": f"q{first['question']}",
                "category": BENCHMARK,
                "model": name,
                "games": [{"score": first["label"]}, {"score": second["label"]}],
            }
            for first, second in zip(firsts, seconds, strict=True)
        ]
        text = "\n".join(map(json.dumps, lines))
        (data / "model_judgment" / "judge" / f"{name}.jsonl").write_text(text)


def rate(coefs: torch.Tensor) -> float:
    """Win rate of model 0 by coefficients of baseline, models and style."""
    return 100 * torch.sigmoid(coefs[1] - coefs[0]).item()


@pytest.mark.parametrize("models", [1, 3])
def test_figures_of_show_result(
    models: int,
    official: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The score is its exact mean; the style win rate the optimum of its features and outcomes,
    from which its own 50 steps end a fraction of a point away."""
    rows = planted(models)
    write_official(tmp_path, rows)
    monkeypatch.chdir(tmp_path)
    battles = official.load_judgments(["judge"], BENCHMARK)
    games, differences = as_games(rows)
    own = battles[battles.model == "model_0"].scores.astype(float)
    single = as_games([row for row in rows if row["model"] == 0])[0].score()
    assert single.value == pytest.approx(100 * own.mean(), abs=1e-9)
    given: dict[str, Any] = {}

    def capture(features: torch.Tensor, outcomes: torch.Tensor, loss_type: str) -> Any:
        given.update(features=features, outcomes=outcomes)
        return torch.zeros(1, features.shape[1]), None

    monkeypatch.setattr(official, "bootstrap_pairwise_model", capture)
    controls = ["length", "markdown"]
    official.print_leaderboard_with_style_features(battles, BENCHMARK, BENCHMARK, controls)
    features, outcomes = given["features"], given["outcomes"]
    coefs = optimum(features.double(), outcomes.double())
    average, _ = style_win_rates(games, differences)
    # The features are of single precision.
    assert average.value == pytest.approx(rate(coefs), abs=1e-3)
    stopped, _ = sys.modules["utils.math_utils"].fit_pairwise_model(features, outcomes)
    print(f"{models} models: {rate(stopped) - average.value:+.4f} points from its optimum")
    assert abs(rate(stopped) - average.value) < 1
