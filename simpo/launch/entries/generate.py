"""Generate several replies of the model to each prompt of a data set.

    python -m simpo.generate model=llama3_instruct data=ultrafeedback
    python -m simpo.generate on_policy.seeds=[1,2,3] on_policy.temperature=1.0

Settings as for simpo.train; those of this command are on_policy.* (docs/config.md). The same
command goes on where it was stopped. simpo.annotate makes pairs of the replies.
"""

from __future__ import annotations

from simpo.config.schema import RunConfig
from simpo.launch.command import command


def _work(run: RunConfig) -> None:
    # Imported here, so that a fault in the settings is answered before torch is loaded.
    from simpo.on_policy.generate import generate

    folder = generate(run)
    print(f"next   python -m simpo.annotate on_policy.folder={folder} on_policy.reward=...")


def cli() -> None:
    """Entry of `python -m simpo.generate` and `simpo-generate`."""
    command(_work, __doc__)


if __name__ == "__main__":
    cli()
