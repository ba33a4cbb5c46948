"""A reward as a judge: it scores each answer, and the better score wins."""

from __future__ import annotations

from collections.abc import Sequence

from simpo.config.schema import RunConfig
from simpo.judging.shapes import Question
from simpo.on_policy import rewards

KEY = "judge.reward"


class ScoringReward:
    """A reward that annotate takes too; it is loaded when it first has to score."""

    def __init__(self, run: RunConfig, name: str) -> None:
        """
        Args:
            name: `rules`, `module:function`, or the folder or hub id of a reward model.

        Raises:
            ConfigError: there is no such reward.
        """
        self.name = name
        self.identity = rewards.reward_content(run, KEY, name)
        self._run = run
        self._reward: rewards.Reward | None = None

    def score(self, question: Question, texts: Sequence[str]) -> list[float]:
        """A finite score of each text as an answer to the question's first turn.

        Raises:
            ConfigError: the reward cannot be loaded.
            RunError: it failed, or gave something else.
        """
        self._reward = self._reward or rewards.open_reward(self._run, KEY, self.name)
        place = f"question {question.id}"
        return rewards.scores_of(
            self._reward, KEY, self.name, place, question.prompt, texts, question.rule
        )
