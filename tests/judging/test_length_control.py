"""The length-controlled win rate against alpaca-eval's own function, and its interval."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from simpo.judging.length_control import GamedRow, length_controlled

Planted = dict[str, Any]


def planted(seed: int, questions: int, length_effect: float = -1.5) -> Planted:
    """Answers of a model whose judge likes length, and of the gamed baseline."""
    draw = np.random.default_rng(seed)
    difficulty = draw.normal(size=questions)
    baseline, model = (draw.integers(200, 3000, questions) for _ in range(2))
    delta = baseline - model
    scores = length_effect * np.tanh(delta / delta.std(ddof=1)) + 0.7 * difficulty - 0.4
    chances = 1 / (1 + np.exp(-scores))
    gamed = [
        GamedRow(float(draw.beta(2, 2)), float(draw.normal()), float(own))
        for own in [*difficulty, *difficulty]
    ]
    return {
        "preferences": [float(value) for value in draw.beta(4 * chances, 4 * (1 - chances))],
        "baseline": baseline.tolist(),
        "model": model.tolist(),
        "difficulty": difficulty.tolist(),
        "gamed": gamed,
    }


def is_preference(value: float, is_allow_nan: bool) -> bool:
    return 1 <= value <= 2


@pytest.fixture(scope="module")
def official() -> Any:
    """alpaca-eval's module of the regression, without the rest of its package."""
    pytest.importorskip("patsy")
    found = find_spec("alpaca_eval")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps alpaca-eval")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("", ".types", ".constants", ".utils", ".metrics"):
            module = ModuleType(f"alpaca_eval{name}")
            patch.setitem(sys.modules, module.__name__, module)
            if name:
                setattr(sys.modules["alpaca_eval"], name[1:], module)
        stand_ins: Any = sys.modules
        stand_ins["alpaca_eval"].__path__ = []
        stand_ins["alpaca_eval.metrics"].__path__ = [str(Path(found.origin).parent / "metrics")]
        stand_ins["alpaca_eval.types"].AnyLoadableDF = Any
        for name in ("DATASETS_TOKEN", "DATASETS_FORCE_DOWNLOAD", "DEFAULT_CACHE_DIR"):
            setattr(stand_ins["alpaca_eval.constants"], name, None)
        stand_ins["alpaca_eval.utils"].convert_to_dataframe = pd.DataFrame
        stand_ins["alpaca_eval.utils"].validate_alpacaeval_preference = is_preference
        yield importlib.import_module("alpaca_eval.metrics.glm_winrate")
        for name in ("glm_winrate", "winrate", "helpers"):
            del sys.modules[f"alpaca_eval.metrics.{name}"]


@pytest.fixture
def of_alpaca_eval(
    official: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dict[str, float]]]:
    """Computes the figures of planted data with alpaca-eval's own function."""

    def figures(data: Planted, glm_name: str) -> dict[str, float]:
        rows = zip(data["gamed"], [*range(len(data["difficulty"]))] * 2, strict=True)
        table = [{**vars(row), "index": i, "not_gamed_baseline": False} for row, i in rows]
        pd.DataFrame(table).assign(model="gamed").to_csv(tmp_path / "df_gamed.csv", index=False)
        monkeypatch.setattr(official, "hf_hub_download", lambda **_: tmp_path / "df_gamed.csv")
        annotations = [
            {
                "preference": value if value is None else 1 + value,
                "output_1": "b" * ours,
                "output_2": "m" * theirs,
                "generator_1": "baseline",
                "generator_2": "model",
                "annotator": "judge",
            }
            for value, ours, theirs in zip(
                data["preferences"], data["baseline"], data["model"], strict=True
            )
        ]
        return official.get_length_controlled_winrate(
            annotations, glm_name, save_weights_dir=None, is_warn_extreme_changes=False
        )

    yield figures
    importlib.import_module("sklearn").set_config(enable_metadata_routing=False)


def ours(data: Planted, glm_name: str) -> Any:
    delta = [a - b for a, b in zip(data["baseline"], data["model"], strict=True)]
    with_difficulty = glm_name != "length_controlled_minimal"
    return length_controlled(
        data["preferences"],
        delta,
        data["difficulty"] if with_difficulty else None,
        data["gamed"] if glm_name == "length_controlled_v1" else (),
    )


@pytest.mark.filterwarnings("ignore")  # scikit-learn's, about how alpaca-eval calls it
@pytest.mark.parametrize(
    "glm_name",
    ["length_controlled_v1", "length_controlled_noreg", "length_controlled_minimal"],
)
@pytest.mark.parametrize(("seed", "questions", "effect"), [(0, 60, -1.5), (1, 83, 0.0)])
def test_equals_alpaca_eval(
    of_alpaca_eval: Callable[..., dict[str, float]],
    glm_name: str,
    seed: int,
    questions: int,
    effect: float,
) -> None:
    data = planted(seed, questions, effect)
    if seed:
        data["preferences"][7] = None
    wanted, found = of_alpaca_eval(data, glm_name), ours(data, glm_name)
    assert found.win_rate == pytest.approx(wanted["length_controlled_winrate"], abs=1e-9)
    assert found.standard_error == pytest.approx(wanted["lc_standard_error"], abs=1e-9)
    # The answers differ: length control does something.
    assert effect == 0 or abs(found.win_rate - wanted["win_rate"]) > 1e-3


def test_length_is_controlled() -> None:
    """A judge that likes length alone prefers neither answer at equal lengths."""
    draw = np.random.default_rng(0)
    delta = draw.integers(-1500, 500, 400)
    chances = 1 / (1 + np.exp(2 * np.tanh(delta / delta.std(ddof=1))))
    found = length_controlled(chances.tolist(), delta.tolist())
    assert 100 * chances.mean() > 60
    assert found.win_rate == pytest.approx(50, abs=0.1)


def test_all_won_and_equal_lengths() -> None:
    won = length_controlled([1.0] * 20, [*range(20)])
    assert won.win_rate > 90
    same = length_controlled([0.25] * 20, [0] * 20)
    assert same.win_rate == pytest.approx(25, abs=0.5)


def test_interval_is_that_of_fitting_anew() -> None:
    """The spread of resampled values against fits to resampled questions."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    data = planted(3, 300)
    found = ours(data, "length_controlled_noreg")
    delta = np.subtract(data["baseline"], data["model"])
    features = np.column_stack(
        [np.tanh(delta / delta.std(ddof=1)), data["difficulty"], np.ones(300)]
    )
    targets, draw = np.array(data["preferences"]), np.random.default_rng(0)
    refits = []
    for _ in range(300):
        chosen = draw.integers(0, 300, 300)
        rows, wanted = features[chosen], targets[chosen]
        model = LogisticRegression(C=1e4, fit_intercept=False)
        with threadpool_limits(1):  # on small matrices other threads only spin
            model.fit(
                np.concatenate([rows, rows]),
                np.repeat([1, 0], 300),
                sample_weight=np.concatenate([wanted, 1 - wanted]),
            )
        at_equal = rows @ (model.coef_[0] * [0, 1, 1])
        refits.append(100 * np.mean(1 / (1 + np.exp(-at_equal))))
    spread = np.std(found.values) / 300**0.5
    assert np.mean(found.values) == pytest.approx(found.win_rate, abs=1e-6)
    assert spread == pytest.approx(np.std(refits), rel=0.1)
    # That of the predictions alone, which alpaca-eval prints, is something else.
    assert found.standard_error < 0.8 * spread or found.standard_error > 1.25 * spread


@pytest.mark.parametrize(
    "preferences", [[0.0] * 20, [1.0] * 20, [0.0] * 19 + [1.0], [1.0] * 19 + [0.0]]
)
@pytest.mark.parametrize("chars", [[0] * 20, list(range(-900, 1100, 100))])
def test_one_sided_preferences_are_near_the_win_rate(
    preferences: list[float], chars: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    found = length_controlled(preferences, chars)
    assert found.win_rate == pytest.approx(100 * sum(preferences) / 20, abs=6)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("preferences", "chars", "converged"),
    [
        ([0, 1, 0, 0, 0, 1, 0, 1, 0], [9, 9, -1, 9, -3, 9, 1, 9, 9], False),  # needs 237 iterations
        # Only at strengths that are not chosen is there no convergence.
        ([0, 0, 1, 1, 0, 0], [6, -1, 8, -2, -3, 6], True),
    ],
)
def test_a_fit_that_has_not_converged_is_told(
    preferences: list[float], chars: list[int], converged: bool
) -> None:
    """And scikit-learn says nothing of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert length_controlled(preferences, chars).converged is converged
