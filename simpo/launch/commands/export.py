"""`simpo export`: merge an adapter into its base model, or upload the model of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from simpo.config.choices import Dtype
from simpo.config.errors import ConfigError
from simpo.config.schema import ExportConfig
from simpo.launch.run_words import no_folder, split_run_words

KEYS: dict[str, tuple[str, ...]] = {
    "merge": ("true",),
    "output": (),
    "dtype": tuple(choice.value for choice in Dtype),
    "base": (),
    "push_to_hub": (),
    "private": ("true", "false"),
}
"""The keys, with their values if there are few."""
USAGE = """
usage: simpo export RUN (merge=true | push_to_hub=OWNER/NAME) [key=value ...]

Merge the adapter of a run into its base model, or upload the model of a run to the hub.

  RUN              the folder of a run, or one that holds a model or an adapter

with merge=true
  output=FOLDER    where the merged model goes (RUN/model-merged); must not exist
  dtype=DTYPE      dtype of the merged weights; auto: that of the base's files
  base=MODEL       the base model, if the adapter does not name it or names another path
with push_to_hub=OWNER/NAME
  private=false    create a public repository
"""


def main(words: Sequence[str]) -> None:
    """Merge or upload.

    Raises:
        ConfigError: it cannot be done as asked.
        RunError: it failed.
    """
    run_dir, options = _arguments(words)
    # Imported here, so that a fault in the words is answered before torch is loaded.
    from simpo.loop.card import write_merged_card
    from simpo.loop.console import libraries_quiet
    from simpo.loop.publish import push
    from simpo.model.export import model_folder
    from simpo.model.merge import merge

    with libraries_quiet():
        if "merge" in options:
            output = Path(options.get("output", run_dir / "model-merged")).expanduser()
            lines = merge(run_dir, output, Dtype(options.get("dtype", "auto")), options.get("base"))
            write_merged_card(model_folder(run_dir), output)
        else:
            private = options.get("private", "true") == "true"
            lines = push(run_dir, ExportConfig(push_to_hub=options["push_to_hub"], private=private))
    print("\n".join(lines))


def _arguments(words: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """The run's folder and the settings of a command line.

    Raises:
        ConfigError: they cannot be used; with the usage if folder or settings are missing.
    """
    folders, options = split_run_words(words)
    if len(folders) != 1 or not options:
        raise ConfigError([USAGE.strip().splitlines()[0]])
    problems = [
        f"{key}: no such key (export has {', '.join(KEYS)})" for key in options if key not in KEYS
    ]
    if ("merge" in options) == ("push_to_hub" in options):
        problems += ["export: needs either merge=true or push_to_hub=OWNER/NAME"]
    if options.get("merge", "true") != "true":
        problems += [
            f"merge: must be true, got {options['merge']} (set it to true, or leave it out)"
        ]
    if options.get("private", "true") not in ("true", "false"):
        problems += [f"private: must be true or false, got {options['private']}"]
    if options.get("dtype", "auto") not in KEYS["dtype"]:
        problems += [f"dtype: must be one of {', '.join(KEYS['dtype'])}, got {options['dtype']}"]
    problems += ExportConfig(push_to_hub=options.get("push_to_hub")).problems()
    run_dir = Path(folders[0]).expanduser()
    if not run_dir.is_dir():
        problems.append(no_folder("RUN", run_dir))
    if problems:
        raise ConfigError(problems)
    return run_dir, options


if __name__ == "__main__":
    from simpo.__main__ import main as dispatch

    dispatch(["export", *sys.argv[1:]])
