"""`simpo preview`: show what a run would be trained on, at every stage, without its weights."""

from __future__ import annotations

if __name__ == "simpo.preview":  # would take the place of the function
    raise ImportError("simpo.preview is a function (from simpo import preview)")

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from simpo.config.compose import run_of_words
from simpo.config.errors import ConfigError, unwritable
from simpo.launch.run_words import split_settings
from simpo.run.progress import say

USAGE = """
usage: simpo preview [key=value ...] [pairs=N] [html=FILE] [cleaning=FILE|none]

Show what a run would be trained on: messages, template text, tokens and packed rows of some pairs,
without loading the model's weights. Count what each check of data.filter would leave out.

  simpo preview model=mistral_base data=ultrafeedback
  simpo preview experiments=paper/gemma2_it pairs=5 html=preview.html

pairs=N shows N pairs (3). html=FILE also writes them as a web page. cleaning=FILE (cleaning.html)
writes a page with what each check would leave out, and why; none writes none. Settings are those of
`simpo train` (see its --help).
"""

DEFAULTS = {"pairs": "3", "html": "", "cleaning": "cleaning.html"}
"""The keys besides settings, with their default values."""
KEYS: dict[str, tuple[str, ...]] = {"pairs": (), "html": ("none",), "cleaning": ("none",)}
"""The same keys with their values if there are few."""


def main(words: Sequence[str]) -> None:
    """Print the stages of some pairs, and write them as a page if asked to.

    Raises:
        ConfigError: the settings cannot be used.
    """
    settings, given = split_settings(words, DEFAULTS)
    options = DEFAULTS | given
    run = run_of_words(settings)
    number = options["pairs"]
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError([f"pairs: must be 1 or more, got {number}"])
    paths = {key: _page(key, options[key]) for key in ("cleaning", "html")}
    say("loading torch and transformers ...")
    # Imported here, so that a fault in the settings is answered before torch is loaded.
    from simpo.previewing import cleaning
    from simpo.previewing.stages import Stages, page, text

    stages = Stages.of(run, int(number))
    print(text(stages, colors=_shows_colors()))
    for path, write in (
        (paths["cleaning"], partial(cleaning.page, stages.cleaning)),
        (paths["html"], partial(page, stages)),
    ):
        if path:
            try:
                path.write_text(write(), encoding="utf-8")
            except OSError as error:
                raise unwritable(path, error) from error
            print(f"page   {path}")


def _shows_colors() -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def _page(key: str, file: str) -> Path | None:
    """Where a page is written; None for no page.

    Raises:
        ConfigError: it cannot be written there.
    """
    if file in ("", "none"):
        return None
    path = Path(file).expanduser()
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        fault = f"{key}: must be a file in a folder that can be written, got {file}"
        raise ConfigError([f"{fault} ({key}=none writes none)"])
    return path


if __name__ == "__main__":
    from simpo.__main__ import main as dispatch

    dispatch(["preview", *sys.argv[1:]])
