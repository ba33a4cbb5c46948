"""`simpo annotate`: score the replies of `simpo generate`, and make pairs of them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from simpo.config.choices import ReplyChoice
from simpo.config.compose import run_of_words
from simpo.config.models import BUILTIN
from simpo.config.own_code import is_function, load_function
from simpo.run.command import quoted
from simpo.run.progress import say

USAGE = """
usage: simpo annotate on_policy.folder=DIR on_policy.reward=REWARD [key=value ...]

Score the replies of `simpo generate`, and pair the best with the worst reply to each prompt.
Scores are kept: after an interruption the same command continues.

  simpo annotate on_policy.folder=DIR on_policy.reward=RLHFlow/ArmoRM-Llama3-8B-v0.1
  simpo annotate on_policy.folder=DIR on_policy.reward=my_rewards:politeness
  simpo annotate on_policy.folder=DIR on_policy.reward=judge judge.local=JUDGE_MODEL
  simpo annotate on_policy.folder=DIR on_policy.reward=judge \\
      judge.endpoint=http://localhost:8000/v1 judge.model=NAME

A function takes the messages of a prompt, some replies to it and the prompt's rule or None. It
returns a score for each reply; higher is better.

A judge rates each reply from 1 to 10, as in MT-Bench. docs/judging.md tells more.

Settings are those of `simpo train`; on_policy.* and judge.* are for this command:
"""


def main(words: Sequence[str]) -> None:
    run = run_of_words(words)
    if is_function(name := run.on_policy.reward or ""):
        load_function("on_policy.reward", name)
    say("loading torch and transformers ...")
    # Imported here, so that a fault in the settings is answered before torch is loaded.
    from simpo.judging.ratings import open_ratings
    from simpo.on_policy.annotate import annotate

    folder = annotate(run, open_ratings(run))
    if (folder / "train.jsonl").stat().st_size:  # else held-out prompts alone
        print(f"next   {_training_command(folder, run.on_policy.choice)}")


def _training_command(folder: Path, choice: ReplyChoice) -> str:
    """The command that trains on the records of a folder, as they were made."""
    from simpo.on_policy.files import read_settings

    train, test = (folder / f"{split}.jsonl" for split in ("train", "test"))
    held_out = f", test_path: {quoted(test)}" if test.stat().st_size else ""
    words = ["data=jsonl", shlex.quote(f"data.sources=[{{path: {quoted(train)}{held_out}}}]")]
    replied = read_settings(folder).get("model.path", BUILTIN)
    if replied != BUILTIN:
        words.insert(0, "model=...")  # a path alone would not name its template and adapters
    if choice is ReplyChoice.ranked:
        words.append("loss.compare=all")
    return " ".join(["python -m simpo.train", *words])


if __name__ == "__main__":
    from simpo.__main__ import main as dispatch

    dispatch(["annotate", *sys.argv[1:]])
