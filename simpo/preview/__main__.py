"""Look at what a run would be trained on, at every stage, without its weights.

    python -m simpo.preview model=mistral_base data=ultrafeedback
    python -m simpo.preview experiments=paper/gemma2_it pairs=5 html=preview.html

Settings as for simpo.train; pairs=N shows so many pairs (3), html=FILE writes them as a page too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from simpo.config.errors import ConfigError, unwritable
from simpo.config.schema import RunConfig
from simpo.launch.command import command


def cli() -> None:
    """Entry of `python -m simpo.preview` and `simpo-preview`."""
    options = {"pairs": "3", "html": ""}
    words = sys.argv[1:]
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in options:
            options[key] = value
    sys.argv[1:] = [word for word in words if word.partition("=")[0] not in options]

    def work(run: RunConfig) -> None:
        # Imported here, so that a fault in the settings is answered before torch is loaded.
        from simpo.preview.stages import Stages, page, text

        number, file = options["pairs"], options["html"]
        if not number.isdecimal() or int(number) < 1:
            raise ConfigError([f"pairs: must be 1 or more, got {number}"])
        path = Path(file).expanduser()
        if file and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise ConfigError([f"html: must be a file in a folder that can be written, got {file}"])
        stages = Stages.of(run, int(number))
        print(text(stages, colors=sys.stdout.isatty()))
        if file:
            try:
                path.write_text(page(stages), encoding="utf-8")
            except OSError as error:
                raise unwritable(path, error) from error
            print(f"page   {path}")

    command(work, __doc__)


if __name__ == "__main__":
    cli()
