"""The settings of a run by dotted key, which of them decide its numbers, and its id."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
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
    sections = (*RESULT_SECTIONS, *(ROUNDS_SECTIONS if run.rounds.number else ()))
    may_differ = {f"{name}.{key}" for name, keys in MAY_DIFFER.items() for key in keys}
    flat = (pair for name in sections for pair in _flat(name, getattr(run, name)))
    return {key: value for key, value in flat if key not in may_differ}


def settings(run: RunConfig) -> dict[str, Any]:
    """All settings of a run, flat: dotted key to value."""
    return dict(pair for item in fields(run) for pair in _flat(item.name, getattr(run, item.name)))


def holds_secret(section: Any) -> bool:
    """Whether a value of a section, or of a whole run, looks like a token, key or password."""
    return any(SECRET.search(str(value)) for _, value in _flat("", section))


def run_id(run: RunConfig) -> str:
    """Hash, in eight hex digits, of the settings that decide a run's numbers."""
    flat = trajectory(run).items()
    named = sorted((first_name(key), first_value(key, value)) for key, value in flat)
    return hashlib.sha256(repr(named).encode()).hexdigest()[:8]


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value):
        for item in fields(value):
            yield from _flat(f"{key}.{item.name}", getattr(value, item.name))
    elif isinstance(value, list) and value and is_dataclass(value[0]):
        for index, item in enumerate(value):
            yield from _flat(f"{key}[{index}]", item)
    else:
        yield key, value.value if isinstance(value, Enum) else value
