"""Games of Arena-Hard, its score, and resampling for intervals.

A game is a verdict about a question with the answers in one order. `>>` in a verdict makes three
copies of its game, as show_result.py of lmarena/arena-hard-auto does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from simpo.judging.win_rates import PERCENT
from simpo.run.judged import Figure

RESAMPLES = 1000
AT_ONCE = 2_000_000
"""Games drawn at once, which bounds the memory of resampling to some 16 MB an array."""
OURS = (0.025, 0.975)
OFFICIAL = (0.05, 0.95)
"""Ends of show_result.py's interval, which it prints as CI."""

SAME = 1e-6
"""Percent within which resampled numbers differ by rounding, or the tolerance of a fit, alone."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps weights of the games [R, G] to numbers [R, S]."""


class Game(NamedTuple):
    """A readable verdict: its question, the preference for the model, and its copies."""

    question: str
    value: float
    copies: int


def interval(drawn: np.ndarray) -> tuple[float | None, float | None]:
    """Our interval from resampled numbers [R]; None twice if all are the same, which a width of 0
    would show as certainty."""
    if np.ptp(drawn) < SAME:
        return None, None
    low, high = np.quantile(drawn, OURS).tolist()
    return low, high


@dataclass(frozen=True)
class Games:
    """Judged games, an entry each.

    Attributes:
        question: int64 [G], index of its question; every index up to the largest has a game.
        value: float64 [G], preference for the model: 0, 0.5 or 1.
        weight: float64 [G], its copies: 3 if the verdict has `>>`, else 1.
        model: int64 [G], whose game: 0 is the judged model, others are of its leaderboard.
    """

    question: np.ndarray
    value: np.ndarray
    weight: np.ndarray
    model: np.ndarray

    @staticmethod
    def of(models: Sequence[Sequence[Game]]) -> Games:
        """The games of several models, those of the judged one first."""
        rows = [(index, game) for index, games in enumerate(models) for game in games]
        number = {key: i for i, key in enumerate(dict.fromkeys(game.question for _, game in rows))}
        return Games(
            question=np.array([number[game.question] for _, game in rows]),
            value=np.array([game.value for _, game in rows]),
            weight=np.array([game.copies for _, game in rows], dtype=np.float64),
            model=np.array([index for index, _ in rows]),
        )

    def by_question(self, statistic: Statistic) -> np.ndarray:
        """Numbers of resampled questions [RESAMPLES, S]: all games of a question together."""
        questions = int(self.question.max()) + 1
        chances = np.full(questions, 1 / questions)
        return self._drawn(questions, chances, lambda draw: draw[:, self.question], statistic)

    def by_copy(self, statistic: Statistic) -> np.ndarray:
        """Numbers of resampled copies of games [RESAMPLES, S], as show_result.py draws them.

        It takes for independent what is not: both games of a question, and copies.
        """
        copies = self.weight.sum()
        return self._drawn(
            int(copies), self.weight / copies, lambda draw: draw / self.weight, statistic
        )

    def _drawn(
        self,
        number: int,
        chances: np.ndarray,
        factors: Callable[[np.ndarray], np.ndarray],
        statistic: Statistic,
    ) -> np.ndarray:
        def chunks() -> Iterator[np.ndarray]:
            draw = np.random.default_rng(0)
            at_once = max(1, AT_ONCE // len(self.value))
            for done in range(0, RESAMPLES, at_once):
                size = min(at_once, RESAMPLES - done)
                drawn = factors(draw.multinomial(number, chances, size=size))
                yield statistic(drawn * self.weight)

        return np.concatenate(list(chunks()))

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """The weighted mean value in percent [R, 1]."""
        return (PERCENT * (weights @ self.value) / weights.sum(axis=1))[:, None]

    def score(self) -> Figure:
        """The mean value of all copies in percent, with our interval and the official one."""
        ends = interval(self.by_question(self.mean)[:, 0])
        official = np.quantile(self.by_copy(self.mean)[:, 0], OFFICIAL).tolist()
        return Figure(self.mean(self.weight[None]).item(), *ends, *official)
