"""AlpacaEval's length-controlled win rate (Dubois et al. 2024, https://arxiv.org/abs/2404.04475).

A logistic regression explains the preference for the model by the difference in length, by the
difficulty of the question for the model and by a constant. The win rate is what it predicts for a
difference of 0. https://github.com/tatsu-lab/alpaca_eval, metrics/glm_winrate.py:
`length_controlled_v1`, and without difficulty `length_controlled_minimal`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # numpy is imported where it computes, so that settings are answered at once
    import numpy as np

GAMED_WEIGHT = 0.2 / 2
"""Weight of an answer of the baseline that was told to be short or long; there are two of each."""
LEAST_WEIGHT = 1e-9
"""Of a row in the fit. liblinear drops rows of weight 0, and without a row of a label it fits 0, so
that a model which lost everything would have 50 %."""
FOLDS = 5
"""Of the cross-validation that chooses the strength of the regularisation; as many questions."""


@dataclass(frozen=True)
class GamedRow:
    """An answer of the baseline's model told to be verbose or concise; a line of df_gamed.csv.

    Attributes:
        preference: for this answer over the baseline's, 0 to 1.
        std_delta_len: difference in length over its standard deviation.
    """

    preference: float
    std_delta_len: float
    instruction_difficulty: float


@dataclass(frozen=True)
class LengthControlled:
    """The figures of a model, all in percent.

    Attributes:
        win_rate: length-controlled.
        standard_error: as alpaca_eval prints it: that of the mean of the predictions. It holds the
            fitted weights for known, so it is far too small.
        values: a value of each question, such that resampling their mean is, to first order,
            resampling the questions and fitting anew at the same strength of regularisation.
        weights: of tanh(std_delta_len), of the difficulty if there is one, and the constant.
        converged: the fit ended before its limit of iterations, which is alpaca_eval's.
    """

    win_rate: float
    standard_error: float
    values: list[float]
    weights: list[float]
    converged: bool


def length_controlled(
    preferences: Sequence[float | None],
    delta_chars: Sequence[int],
    difficulty: Sequence[float] | None = None,
    gamed: Sequence[GamedRow] = (),
) -> LengthControlled:
    """Fit the regression to a model's preferences and predict them for equal lengths.

    Args:
        preferences: of each question, for the model, 0 to 1; None where there is no verdict. Such
            a question is predicted but not fitted. At least `FOLDS` are not None.
        delta_chars: length of the baseline's answer minus the model's, in characters.
        difficulty: of each question; None fits without it.
        gamed: rows that pull the weights towards the baseline's; only with difficulty.
    """
    import numpy as np

    spread = np.std(np.array(delta_chars, dtype=np.float64), ddof=1)
    lengths = np.array(delta_chars, dtype=np.float64) / (spread if spread else np.inf)
    others = [[1.0] * len(lengths)] if difficulty is None else [difficulty, [1.0] * len(lengths)]
    features = np.column_stack([np.tanh(lengths), *others])
    known = np.array([value is not None for value in preferences])
    wanted = np.array([value for value in preferences if value is not None])

    rows, targets, weights = features[known], wanted, np.ones(len(wanted))
    if gamed:
        pulling = [[np.tanh(row.std_delta_len), row.instruction_difficulty, 0.0] for row in gamed]
        rows = np.concatenate([pulling, rows])
        targets = np.concatenate([[row.preference for row in gamed], targets])
        weights = np.concatenate([np.full(len(gamed), GAMED_WEIGHT), weights])
    coefficients, converged = _fit(rows, targets, weights)

    at_equal = np.column_stack([np.zeros(len(lengths)), features[:, 1:]])
    predicted = _sigmoid(at_equal @ coefficients)
    values = predicted + _pulls(
        coefficients, (rows, weights), (features, known, wanted), (at_equal, predicted)
    )
    return LengthControlled(
        100 * float(predicted.mean()),
        100 * float(predicted.std(ddof=1)) / len(predicted) ** 0.5,
        (100 * values).tolist(),
        coefficients.tolist(),
        converged,
    )


def _fit(rows: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, bool]:
    """Coefficients [features] of the L1-regularised fit at the strength that cross-validation
    chooses, and whether it converged.

    A target between 0 and 1 is a row of each label, weighted by it; both are in the same fold.
    """
    import numpy as np
    import sklearn
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.model_selection import GroupKFold

    doubled, groups = np.concatenate([rows, rows]), np.tile(np.arange(len(rows)), 2)
    labels = np.repeat([1, 0], len(rows))
    importance = np.concatenate([targets, 1 - targets]) * np.tile(weights, 2)
    importance = np.maximum(importance, LEAST_WEIGHT)

    def log_likelihood(
        model: Any, features: np.ndarray, labels: np.ndarray, sample_weight: np.ndarray
    ) -> float:
        chances = np.clip(model.predict_proba(features), 1e-15, 1 - 1e-15)
        of_label = chances[np.arange(len(labels)), labels]
        return float((sample_weight * np.log(of_label)).sum() / len(labels))

    is_new = tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8)
    l1: dict[str, Any] = {"l1_ratio": 1.0} if is_new else {"penalty": "l1"}
    same: dict[str, Any] = {"solver": "liblinear", "fit_intercept": False, "random_state": 123}
    search = LogisticRegressionCV(
        cv=list(GroupKFold(FOLDS).split(doubled, labels, groups)),
        scoring=log_likelihood,
        **({"l1_ratios": (1.0,)} if is_new else l1),
        **same,
    )
    # With routing a scorer would not be given the weights. The FutureWarnings are about names of
    # attributes in coming versions; np.ravel reads C_ as an array and as a number. Strengths that
    # are not chosen often end without convergence, which changes no figure.
    with sklearn.config_context(enable_metadata_routing=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(doubled, labels, sample_weight=importance)
        model = LogisticRegression(C=float(np.ravel(search.C_)[0]), **l1, **same)
        model.fit(doubled, labels, sample_weight=importance)
    return model.coef_[0], bool(model.n_iter_.max() < model.max_iter)


def _pulls(
    coefficients: np.ndarray,
    fitted: tuple[np.ndarray, np.ndarray],
    own: tuple[np.ndarray, np.ndarray, np.ndarray],
    predictions: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """How much each question [questions] changes the mean prediction through the coefficients.

    A step of Newton's method from the fit: the gradient of a question's own loss times the inverse
    of the Hessian of all rows. A coefficient that L1 keeps at 0 stays there.
    """
    import numpy as np

    (rows, weights), (features, known, wanted) = fitted, own
    at_equal, predicted = predictions
    active = coefficients != 0
    pulls = np.zeros(len(features))
    if not active.any():
        return pulls
    chances = _sigmoid(rows @ coefficients)
    curvature = weights * chances * (1 - chances)
    hessian = (rows[:, active].T * curvature) @ rows[:, active]
    slope = (predicted * (1 - predicted)) @ at_equal[:, active]
    surprise = wanted - _sigmoid(features[known] @ coefficients)
    pulls[known] = surprise * (features[known][:, active] @ np.linalg.pinv(hessian) @ slope)
    return pulls - pulls.mean()


def _sigmoid(x: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.exp(-np.logaddexp(0, -x))
