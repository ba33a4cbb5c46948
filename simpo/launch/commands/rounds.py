"""`simpo rounds`: replies, scores and training, several times over."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from simpo.config.composer import Composer, set_in_files
from simpo.config.errors import ConfigError
from simpo.config.rounds import REWARD
from simpo.launch.commands import train

USAGE = """
usage: simpo rounds rounds=N [key=value ...] [-m] [--config-dir DIR]

Train on-policy, in rounds: the newest model replies to prompts, a reward scores the replies, and
their pairs train the next model. After an interruption the same command continues.

  simpo rounds rounds=3                                  the built-in demo, its rules as the reward
  simpo rounds rounds=3 model=llama3_instruct data=ultrafeedback \\
      on_policy.reward=RLHFlow/ArmoRM-Llama3-8B-v0.1
  simpo rounds rounds=3 -m rounds.choice=best_worst,best_random loss.beta=2,10     a sweep

Settings are those of `simpo train`; rounds.* and on_policy.* are for this command:
"""
DEFAULT = 3
"""Rounds where the command does not say."""


def main(words: Sequence[str]) -> None:
    """Run the rounds of a command line, or a sweep of them.

    Raises:
        ConfigError: the settings cannot be composed or used, or there are to be no rounds.
        SimpoError: a phase failed or was stopped.
    """
    train.main(
        [
            f"rounds.number{word.removeprefix('rounds')}" if word.startswith("rounds=") else word
            for word in words
        ],
        _defaults,
    )


def _defaults(words: Sequence[str], composer: Composer) -> list[str]:
    """The number of rounds and the metric that compares them, where neither the words nor files of
    the user's that they choose name them.

    Raises:
        ConfigError: there are to be no rounds.
    """
    number, metric = "rounds.number", "monitor.metric"
    given = {word.lstrip("+").partition("=")[0] for word in words}
    given |= set_in_files(words, (number, metric), composer)
    if f"{number}=0" in words:
        raise ConfigError([f"{number}: must be 1 or more, got 0 (simpo train trains without)"])
    found = [] if number in given else [f"{number}={DEFAULT}"]
    # A loss may have a metric of its own, of which less is better.
    return found + ([] if metric in given else [f"{metric}={REWARD}", "monitor.mode=max"])


if __name__ == "__main__":
    from simpo.__main__ import main as dispatch

    dispatch(["rounds", *sys.argv[1:]])
