"""Style control of Arena-Hard: how often a model wins apart from the style of its answers.

A Bradley-Terry model: the log-odds of a win are the strength of the model plus four coefficients
times the differences in style, which all models share: length in tokens, and headers, lists and
bold words by length (https://lmsys.org/blog/2024-08-28-style-control/). Differences are
standardised over all games, so a strength is that at the average difference in style of all models
together, as on the leaderboards. With a single model this is its own average, which controls
little; therefore the win rate where both answers have the same style is given, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from simpo.judging.games import OFFICIAL, Games, interval
from simpo.judging.shapes import Answer
from simpo.judging.win_rates import PERCENT
from simpo.run.judged import Figure

CHARS_PER_TOKEN = 4
"""About, of English. Where lengths are compared, both are estimated with it, so it cancels."""
NEWTON_STEPS = 100
TOLERANCE = 1e-9
"""Largest mean gradient of a game at the optimum."""
CERTAIN = 15.0
"""Log-odds beyond which a win is certain, which no game is where there is an optimum."""
CONSTANT = 1e-20
"""Variance below which a feature differs by rounding alone."""

_CODE = re.compile("```([^`]*)```")
_COUNTED: dict[str, dict[str, str]] = {
    "header_count": {f"h{level}": rf"(?m)^#{{{level}}}\s" for level in range(1, 7)},
    "list_count": {"ordered": r"(?m)^\s*\d+\.\s", "unordered": r"(?m)^\s*[-*+]\s"},
    "bold_count": {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"},
}


def style_counts(text: str, tokens: int) -> dict[str, Any]:
    """Length and markdown of an answer as add_markdown_info.py counts them: `token_len`,
    `header_count`, `list_count` and `bold_count`. What stands in code blocks is not counted.
    """
    for block in _CODE.findall(text):
        text = text.replace(block, "")
    counts = {
        key: {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}
        for key, patterns in _COUNTED.items()
    }
    return {"token_len": tokens, **counts}


def style(counts: dict[str, Any]) -> list[float]:
    """Tokens, headers, lists and bold words of an answer, from its `style_counts`."""
    return [float(counts["token_len"]), *(float(sum(counts[key].values())) for key in _COUNTED)]


def styles(model: Answer, baseline: Answer) -> tuple[list[float], list[float]]:
    """`style` of both answers. Their lengths are characters if tokens of one are not known; an
    empty answer has none."""
    known = all(one.tokens > 0 or not one.turns[-1] for one in (model, baseline))
    ours, theirs = (
        style(style_counts(one.turns[-1], one.tokens if known else estimated_tokens(one)))
        for one in (model, baseline)
    )
    return ours, theirs


def estimated_tokens(answer: Answer) -> int:
    """About the tokens of an answer of which they are not known."""
    return round(len(answer.turns[-1]) / CHARS_PER_TOKEN)


def style_differences(model: Sequence[list[float]], baseline: Sequence[list[float]]) -> np.ndarray:
    """Differences in style of the model's answers from the baseline's, from -1 to 1.

    Args:
        model, baseline: `style` of both answers of each game.

    Returns:
        float64 [G, 4]: the difference in tokens as a share of their sum, and differences of the
        densities d of headers, lists and bold words as shares of their sum plus 1.
    """
    ours, theirs = np.array(model, dtype=np.float64), np.array(baseline, dtype=np.float64)
    tokens, others = ours[:, 0], theirs[:, 0]
    length = (tokens - others) / np.maximum(tokens + others, 1)
    density, other = ours[:, 1:] / (tokens[:, None] + 1), theirs[:, 1:] / (others[:, None] + 1)
    return np.column_stack([length, (density - other) / (density + other + 1)])


def style_win_rates(games: Games, differences: np.ndarray) -> tuple[Figure, ...]:
    """Win rates of model 0 of the games in percent, with style controlled. Empty if style alone
    tells the won games from the lost ones, as in few games it may: no coefficients are likeliest.

    Args:
        differences: float64 [G, 4], of `style_differences`.

    Returns:
        At the average difference in style of all games, as show_result.py has it, with its
        interval beside ours; and where both answers have the same style, which it has not.
    """
    mean, spread = _moments(differences, games.weight)
    standard = (differences - mean) / spread
    features = np.column_stack([games.model[:, None] == np.unique(games.model), standard])
    same_style = -mean / spread
    fitted = _fit(features, games.value, games.weight, np.zeros(features.shape[1]))
    if _separated(games, features @ fitted):
        return ()

    def controlled(weights: np.ndarray, official: bool = False) -> np.ndarray:
        rates = []
        for row in weights:
            coefs = _fit(features, games.value, row, fitted)
            # show_result.py standardises once and resamples then.
            average = 0 * mean if official else np.average(standard, axis=0, weights=row)
            rates.append([coefs[0] + coefs[-4:] @ point for point in (average, same_style)])
        return PERCENT * _sigmoid(np.array(rates))

    value = controlled(games.weight[None])[0].tolist()
    average, equal = map(interval, games.by_question(controlled).T)
    drawn = games.by_copy(lambda weights: controlled(weights, official=True))
    ends = np.quantile(drawn[:, 0], OFFICIAL).tolist()
    return Figure(value[0], *average, *ends), Figure(value[1], *equal)


def _separated(games: Games, log_odds: np.ndarray) -> bool:
    """Whether a model that neither won nor lost all its games has one that is certain."""
    certain = np.abs(log_odds) > CERTAIN
    return any(
        certain[own].any() and np.ptp(games.value[own]) > 0
        for own in (games.model == index for index in np.unique(games.model))
    )


def _moments(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of columns over all copies; 1 for a constant column."""
    mean = np.average(values, axis=0, weights=weights)
    variance = weights @ (values - mean) ** 2 / max(weights.sum() - 1, 1)
    return mean, np.where(variance > CONSTANT, np.sqrt(variance), 1.0)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def _fit(
    features: np.ndarray, values: np.ndarray, weights: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """Coefficients of the likeliest logistic model, by damped Newton steps.

    The damping makes each step an improvement (https://arxiv.org/abs/1703.04599). Where
    several coefficients are as likely, such as those of a constant feature, the change is least.

    Args:
        features: [G, K]; values: [G], from 0 to 1; weights: [G]; start: [K].
    """
    coefs = start.copy()
    for _ in range(NEWTON_STEPS):
        chances = _sigmoid(features @ coefs)
        gradient = features.T @ (weights * (values - chances))
        if np.abs(gradient).max() < TOLERANCE * weights.sum():
            break
        curvature = (features.T * (weights * chances * (1 - chances))) @ features
        step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]
        longest = max(np.abs(features @ step).max(), 1e-12)
        coefs += step * (np.log1p(longest) / longest)
    return coefs
