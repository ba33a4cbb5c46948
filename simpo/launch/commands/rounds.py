"""`simpo rounds`: replies, scores and training, several times over."""

from __future__ import annotations

import sys
from collections.abc import Sequence

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
        ConfigError: the settings cannot be composed or used.
        SimpoError: a phase failed or was stopped.
    """
    named = [
        f"rounds.number{word.removeprefix('rounds')}" if word.startswith("rounds=") else word
        for word in words
    ]
    defaults = {"rounds.number": DEFAULT, "monitor.metric": REWARD}
    given = {word.partition("=")[0].lstrip("+") for word in named}
    missing = [f"{key}={value}" for key, value in defaults.items() if key not in given]
    train.main([*missing, *named])


if __name__ == "__main__":
    from simpo.__main__ import main as dispatch

    dispatch(["rounds", *sys.argv[1:]])
