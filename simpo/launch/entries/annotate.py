"""Score the replies of simpo.generate, and make a pair of the best and the worst to each prompt.

    python -m simpo.annotate on_policy.folder=DIR on_policy.reward=RLHFlow/ArmoRM-Llama3-8B-v0.1
    python -m simpo.annotate on_policy.folder=DIR on_policy.reward=my_rewards:politeness

A function takes the messages of a prompt, some replies to it and the prompt's rule or None, and
gives a score for each reply, more being better. Scores are kept, and the same command goes on where
it was stopped.
"""

from __future__ import annotations

from simpo.config.schema import RunConfig
from simpo.launch.command import command


def _work(run: RunConfig) -> None:
    # Imported here, so that a fault in the settings is answered before torch is loaded.
    from simpo.on_policy.annotate import annotate

    folder = annotate(run)
    held_out = f", test_path: {folder}/test.jsonl" if (folder / "test.jsonl").stat().st_size else ""
    sources = f"[{{path: {folder}/train.jsonl{held_out}}}]"
    print(f"next   python -m simpo.train data=jsonl 'data.sources={sources}'")


def cli() -> None:
    """Entry of `python -m simpo.annotate` and `simpo-annotate`."""
    command(_work, __doc__)


if __name__ == "__main__":
    cli()
