"""Dispatches the commands of simpo, such as `simpo train model=mistral_base loss.beta=2.5`.

`python -m simpo train`, `python -m simpo.train` and `simpo-train` are the same command. Exit codes
are those of `simpo.config.errors`.
"""

from __future__ import annotations

from simpo.run.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # importing what follows takes a while

import importlib
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from simpo.config.errors import ConfigError, did_you_mean, exit_codes
from simpo.run.progress import print_all_letters

COMMANDS = {
    "train": "train a run, or with -m a sweep of runs",
    "preview": "show what a run would be trained on, stage by stage",
    "plan": "predict memory, time and cost of a run on GPUs",
    "report": "compare runs: table, csv, json or web page",
    "generate": "write replies of a model to the prompts of a data set",
    "annotate": "score those replies, and make pairs of them",
    "rounds": "generate, annotate and train, several times over",
    "judge": "let models answer a benchmark, and a judge compare the answers",
    "chat": "talk to the model of a run in a terminal",
    "export": "merge an adapter into its base model, or upload a model",
}
PRINTERS = {
    "completion": """
usage: simpo completion bash|zsh

Print a TAB completion, which this takes into use: eval "$(simpo completion bash)"
""",
    "schema": """
usage: simpo schema [loss.module=MODULE]

Print a JSON schema of the settings for editors, with those of the losses of a module of your own.
How an editor finds it: docs/running.md
""",
}
"""Helps of the commands that print a text for other programs."""
SECTIONS = {
    "train": [],
    "generate": ["on_policy"],
    "annotate": ["on_policy"],
    "rounds": ["rounds", "on_policy"],
    "judge": ["benchmark", "judge"],
}
"""Commands whose help lists settings, with the sections listed by default ([]: all)."""
CONTINUES = "the same command continues"


def main(words: list[str] | None = None) -> None:
    """Run a command; `words` are those of the command line, without the program.

    Raises:
        SystemExit: with an exit code other than 0 if the command did not succeed.
    """
    exit_on_signals()
    print_all_letters()
    words = sys.argv[1:] if words is None else words
    with exit_codes():
        name, rest = (words[0], words[1:]) if words else ("--help", [])
        if name in ("-h", "--help", "help"):
            print(_overview())
        elif "--version" in (name, *rest):
            print(f"simpo {version('simpo')}")
        elif name in PRINTERS and {"-h", "--help"} & set(rest):
            print(PRINTERS[name].strip())
        elif name in ("complete", "completion"):
            _complete(name, " ".join(rest))
        elif name == "schema":
            _schema(rest)
        elif name not in COMMANDS:
            raise ConfigError([_unknown(name)])
        else:
            _run(name, rest)


def script() -> None:
    """Entry point of `simpo-train`, `simpo-report` and so on, named after their command."""
    main([Path(sys.argv[0]).name.removeprefix("simpo-"), *sys.argv[1:]])


def _run(name: str, words: list[str]) -> None:
    if name in ("generate", "annotate", "judge"):
        exit_on_signals(f"interrupted: {CONTINUES}", f"stopped ({CONTINUES})")
    module = importlib.import_module(f"simpo.launch.commands.{name}")
    if {"-h", "--help"} & set(words):
        settings = _settings(words, SECTIONS[name]) if name in SECTIONS else []
        print(module.USAGE.strip(), *settings, sep="\n")
        return
    # Hydra reads the words there, and a run's records quote them.
    sys.argv = [f"simpo {name}", *words]
    module.main(words)


def _settings(words: list[str], sections: list[str]) -> list[str]:
    """The part of a help on settings; words without = name the sections to show."""
    from simpo.config.compose import split_words
    from simpo.config.meanings import settings_help

    asked = [word for word in words if word not in ("-h", "--help", "-m", "--multirun")]
    composer, rest = split_words(asked)
    overrides = [word for word in rest if "=" in word]
    sections = [word for word in rest if "=" not in word] or sections
    width = min(100, shutil.get_terminal_size().columns)
    return ["", *settings_help(overrides, sections, width, composer)]


def _overview() -> str:
    lines = ["usage: simpo COMMAND ...", ""]
    lines += [f"  {name:10} {text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        "simpo COMMAND --help tells more; simpo completion bash|zsh prints a TAB completion;",
        "simpo schema prints a JSON schema of the settings for editors",
    ]
    return "\n".join(lines)


def _unknown(name: str) -> str:
    hint = did_you_mean(name, COMMANDS, f"one of {', '.join(COMMANDS)}")
    name = name or "''"
    if "=" in name:
        hint = f"settings follow a command: simpo train {name}"
    return f"{name}: no such command ({hint})"


def _complete(name: str, text: str) -> None:
    from simpo.launch.completion import candidates, script

    if name == "completion":
        print(script(text, list(COMMANDS)), end="")
    else:
        print("\n".join(candidates(text, list(COMMANDS))))


def _schema(words: list[str]) -> None:
    from simpo.config.check import register_own_losses
    from simpo.config.json_schema import schema_text

    for word in words:
        if not word.startswith("loss.module="):
            raise ConfigError([f"schema: takes only loss.module=MODULE, got {word}"])
    register_own_losses(words)
    print(schema_text(), end="")


if __name__ == "__main__":
    main()
