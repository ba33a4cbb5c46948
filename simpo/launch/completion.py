"""TAB completion in a shell: commands, options, groups, choices, keys and values, for `simpo` and
`python -m simpo`. Hydra's own script knows neither subcommands nor modules, and offers every folder
beside experiments/ as a group.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from importlib import import_module

from hydra.plugins.completion_plugin import DefaultCompletionPlugin
from omegaconf import BooleanNode, DictConfig, EnumNode, OmegaConf, UnionNode

from simpo.config.check import GROUPS, register_own_losses
from simpo.config.choices import AUTO
from simpo.config.compose import split_words
from simpo.config.composer import CONF, Composer, NotComposedError
from simpo.config.errors import ConfigError
from simpo.config.renamed import new_name, rename_overrides
from simpo.config.schema import RunConfig
from simpo.config.suggest import all_keys

WITH_SETTINGS = ("train", "preview", "plan", "generate", "annotate", "rounds", "judge")
OPTIONS = {
    "train": ("--cfg", "--config-dir", "--config-name", "--help", "--info", "--multirun"),
    **dict.fromkeys(WITH_SETTINGS[1:], ("--config-dir", "--help")),
    "rounds": ("--cfg", "--config-dir", "--help", "--multirun"),
    "report": ("--help", "--serve"),
}
OPTION_VALUES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--help": tuple(item.name for item in fields(RunConfig)),
}
PRINTERS = {"completion": ("bash ", "zsh "), "schema": ("loss.module=",)}
"""Commands that print a text for other programs, and what may follow them."""
BASH = r"""
_simpo_complete() {
  local line="${COMP_LINE:0:$COMP_POINT}" program="${COMP_WORDS[0]}" word strip=""
  COMPREPLY=()
  [[ "$line" == *simpo* ]] || return 1
  word="${line##* }"
  # Bash splits words at = and replaces only what follows it, but not within quotes.
  [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]] && strip="${word%=*}="
  [[ "${COMP_WORDS[COMP_CWORD]}" == [\'\"]* ]] && strip=""
  [[ "$program" == *python* ]] && program="$program -m simpo" || program="${program%-*}"
  while IFS= read -r word; do
    COMPREPLY+=("${word#"$strip"}")
  done < <(eval "$program" complete '"$line"' 2>/dev/null)
}
complete -o nospace -o default -F _simpo_complete python python3 simpo PROGRAMS
"""


def script(shell: str, commands: Sequence[str]) -> str:
    """The script that a shell evaluates to complete our commands.

    Raises:
        ConfigError: the shell is neither bash nor zsh.
    """
    text = BASH.lstrip("\n").replace("PROGRAMS", " ".join(f"simpo-{name}" for name in commands))
    scripts = {"bash": text, "zsh": f"autoload -U +X bashcompinit && bashcompinit\n{text}"}
    if shell not in scripts:
        raise ConfigError(
            [f"completion: must be one of {', '.join(scripts)}, got {shell or 'none'}"]
        )
    return scripts[shell]


def candidates(line: str, commands: Sequence[str]) -> list[str]:
    """Completions of the last word of a command line.

    Args:
        line: the text up to the cursor, such as `simpo train lo` or `python -m simpo.train lo`.
        commands: the commands of `simpo`.

    Returns:
        The words, without a quote that is open, and with a blank behind those that are complete.
    """
    found = re.search(r"(?:^|[\s/])simpo(\s+|[.-])(\w*)(\s?)(.*)$", line)
    if found is None:
        return []
    joint, command, space, text = found.groups()
    if not space and joint == ".":  # python -m simpo.train
        return [f"simpo.{name} " for name in commands if name.startswith(command)]
    if not space:
        return [f"{name} " for name in (*commands, *PRINTERS) if name.startswith(command)]
    (*before, last), quote = _words(text)
    if command in PRINTERS:
        return [word for word in PRINTERS[command] if word.startswith(last)]
    if command not in commands:
        return []
    key, equals, typed = last.partition("=")
    if equals:
        # The items of a list, or the values of a sweep, that are typed already.
        done = re.match(r"(.*[\[,])?", typed)[0]  # type: ignore[index]
        values = [f"{key}={done}{value}" for value in _values(command, before, new_name(key))]
        end = "" if quote or "[" in done else " "
        return [f"{word}{end}" for word in values if word.startswith(last)]
    if before and before[-1] in OPTION_VALUES and command in WITH_SETTINGS:
        return [f"{word} " for word in OPTION_VALUES[before[-1]] if word.startswith(last)]
    if last.startswith("-"):
        options = OPTIONS.get(command, ("--help",))
        return [f"{option} " for option in options if option.startswith(last)]
    keys = {f"{name}=" for name in _own_keys(command) if name.startswith(last)}
    if command in WITH_SETTINGS:
        keys |= {f"{group}=" for group in (*GROUPS, "experiments") if group.startswith(last)}
        config = _composed(before)
        keys |= {*([] if config is None else DefaultCompletionPlugin._get_matches(config, last))}
    return sorted(keys)


def _words(text: str) -> tuple[list[str], str]:
    """The words of a command line, the one at the cursor last, and the quote that it is within."""
    for quote in ("", "'", '"'):
        with suppress(ValueError):
            words = shlex.split(f"{text}{quote}")
            return words if words and (quote or text[-1:].strip()) else [*words, ""], quote
    return text.split(" "), ""


def _own_keys(command: str) -> Mapping[str, Sequence[str]]:
    """The keys that a command has besides settings, with their values if there are few."""
    return getattr(import_module(f"simpo.launch.commands.{command}"), "KEYS", {})


def _values(command: str, before: Sequence[str], key: str) -> Sequence[str]:
    """The choices of a group, or the values of a key; empty if they cannot be listed."""
    if key in (own := _own_keys(command)):
        return own[key]
    if command not in WITH_SETTINGS:
        return []
    with suppress(ConfigError):
        register_own_losses(before)
    if choices := _composer(before).choices(key):
        return choices
    config = _composed(before)
    if config is None or key not in all_keys(config):
        return []
    section, _, name = key.rpartition(".")
    parent = OmegaConf.select(config, section) if section else config
    node = parent._get_node(name) if isinstance(parent, DictConfig) else None
    if isinstance(node, EnumNode):
        return list(node.enum_type.__members__)
    if isinstance(node, UnionNode):
        return [AUTO]
    return ["true", "false"] if isinstance(node, BooleanNode) else []


def _composer(words: Sequence[str]) -> Composer:
    try:
        return split_words(words)[0]
    except ConfigError:
        return CONF


def _composed(words: Sequence[str]) -> DictConfig | None:
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    try:
        return _composer(words).compose(rename_overrides(overrides))
    except (NotComposedError, ConfigError):
        return None
