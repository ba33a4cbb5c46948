"""TAB completion in a shell: commands, groups, choices, keys and values, for `simpo` and
`python -m simpo`. Hydra's own script knows neither subcommands nor modules, and offers every folder
beside experiments/ as a group.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.plugins.completion_plugin import DefaultCompletionPlugin
from omegaconf import BooleanNode, DictConfig, EnumNode, OmegaConf

from simpo.config.check import GROUPS
from simpo.config.composer import CONF, NotComposedError
from simpo.config.errors import ConfigError
from simpo.config.renamed import new_name, rename_overrides
from simpo.launch.commands import chat

WITH_SETTINGS = ("train", "preview", "generate", "annotate")
BASH = r"""
_simpo_complete() {
  local line="${COMP_LINE:0:$COMP_POINT}" program="${COMP_WORDS[0]}" word strip=""
  COMPREPLY=()
  [[ "$line" == *simpo* ]] || return 1
  word="${line##* }"
  # Bash splits words at = and replaces only what follows it.
  [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]] && strip="${word%=*}="
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
    """
    found = re.search(r"(?:^|[\s/])simpo(?:\s+|[.-])(\w*)(\s?)(.*)$", line)
    if found is None:
        return []
    command, space, words = found.groups()
    if not space:
        return [f"{name} " for name in commands if name.startswith(command)]
    *before, last = words.split(" ")
    key, equals, start = last.partition("=")
    if command == "chat" and last:
        values = {"base": ["true"], **chat.CHOICES}.get(key, []) if equals else []
        offered = [f"{key}={value} " for value in values] or [f"{name}=" for name in chat.KEYS]
        return [word for word in offered if word.startswith(last)]
    if command not in WITH_SETTINGS:
        return []
    if equals:
        values = _values(before, new_name(key))
        return [f"{key}={word} " for word in values if word.startswith(start)]
    groups = [f"{group}=" for group in (*GROUPS, "experiments") if group.startswith(last)]
    config = _composed(before)
    keys = [] if config is None else DefaultCompletionPlugin._get_matches(config, last)
    return sorted({*groups, *keys})


def _values(overrides: Sequence[str], key: str) -> list[str]:
    """The choices of a group, or the values of a key; empty if they cannot be listed."""
    if choices := CONF.choices(key):
        return choices
    section, _, name = key.rpartition(".")
    config = _composed(overrides)
    parent = OmegaConf.select(config, section) if section and config is not None else config
    node = parent._get_node(name) if isinstance(parent, DictConfig) else None
    if isinstance(node, EnumNode):
        return [str(choice.value) for choice in node.enum_type]
    return ["true", "false"] if isinstance(node, BooleanNode) else []


def _composed(overrides: Sequence[str]) -> DictConfig | None:
    try:
        return CONF.compose(rename_overrides([word for word in overrides if "=" in word]))
    except (NotComposedError, ConfigError):
        return None
