"""The settings of a run by dotted key, which of them decide its numbers, and its id."""

from __future__ import annotations

import hashlib
import re
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from simpo.config.renamed import first_name, first_value
from simpo.config.schema import RunConfig

RESULT_SECTIONS = ("model", "data", "loss", "train")
"""Sections that decide the numbers of a run. The backend changes only the order of rounding."""
ROUNDS_SECTIONS = ("rounds", "on_policy", "monitor")
"""Sections that decide them too if the run has rounds."""
MAY_DIFFER = {
    "rounds": ("generate_jobs", "chain", "generate_launcher"),
    "on_policy": ("folder", "slices", "slice", "held_out_only", "parts", "part"),
    "train": (
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_best",
        "patience_evals",
        "check_memory",
        "stopped_exit_code",
    ),
}
"""Keys of those sections that may differ between a run and its continuation."""
SECRET = re.compile(
    r"(token|key|secret|passw(or)?d|passphrase|credential|bearer|login)\w*[=:\s]+\S"
    r"|\bhf_\w{8}|\bsk-\w{8}|://[^/\s]+:[^/\s]+@",
    re.IGNORECASE,
)
"""Matches text that looks like a secret, such as `export HF_TOKEN=...`."""


def trajectory(run: RunConfig) -> dict[str, Any]:
    """The settings that decide a run's numbers, flat: dotted key to value."""
    flat: dict[str, Any] = {}
    for section in (*RESULT_SECTIONS, *(ROUNDS_SECTIONS if run.rounds.number else ())):
        _flatten(section, getattr(run, section), flat)
        for key in MAY_DIFFER.get(section, ()):
            del flat[f"{section}.{key}"]
    return flat


def settings(run: RunConfig) -> dict[str, Any]:
    """All settings of a run, flat: dotted key to value."""
    flat: dict[str, Any] = {}
    for item in fields(run):
        _flatten(item.name, getattr(run, item.name), flat)
    return flat


def holds_secret(section: Any) -> bool:
    """Whether a value of a section, or of a whole run, looks like a token, key or password."""
    flat: dict[str, Any] = {}
    _flatten("", section, flat)
    return any(SECRET.search(str(value)) for value in flat.values())


def run_id(run: RunConfig) -> str:
    """Hash, in eight hex digits, of the settings that decide a run's numbers."""
    flat = trajectory(run).items()
    named = sorted((first_name(key), first_value(key, value)) for key, value in flat)
    return hashlib.sha256(repr(named).encode()).hexdigest()[:8]


def _flatten(key: str, value: Any, into: dict[str, Any]) -> None:
    if is_dataclass(value):
        for item in fields(value):
            _flatten(f"{key}.{item.name}", getattr(value, item.name), into)
    elif isinstance(value, list) and value and is_dataclass(value[0]):
        for index, item in enumerate(value):
            _flatten(f"{key}[{index}]", item, into)
    else:
        into[key] = value.value if isinstance(value, Enum) else value
