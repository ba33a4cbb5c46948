"""`simpo generate`: write replies of a model to the prompts of a data set."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from simpo.config.compose import run_of_words
from simpo.run.command import quoted
from simpo.run.progress import say

USAGE = """
usage: simpo generate [key=value ...] [--config-dir DIR]

Write several replies of the model to each prompt of a data set. `simpo annotate` makes pairs of
them. After an interruption the same command continues.

  simpo generate model=llama3_instruct data=ultrafeedback
  simpo generate on_policy.seeds=[1,2,3] on_policy.temperature=1.0

Settings are those of `simpo train`; on_policy.* are for this command:
"""


def main(words: Sequence[str]) -> None:
    run = run_of_words(words)
    say("loading torch and transformers ...")
    # Imported here, so that a fault in the settings is answered before torch is loaded.
    from simpo.on_policy.generate import generate

    folder = generate(run)
    word = shlex.quote(f"on_policy.folder={quoted(folder)}")
    print(f"next   python -m simpo.annotate {word} on_policy.reward=...")


if __name__ == "__main__":
    from simpo.__main__ import main as dispatch

    dispatch(["generate", *sys.argv[1:]])
