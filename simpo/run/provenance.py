"""Records where a run's numbers come from: versions, machine, git commit and diff."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "simpo",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "deepspeed",
    "peft",
    "bitsandbytes",
    "hydra-core",
)


def environment(device: str) -> dict[str, Any]:
    """Versions and machine of this process, for the run's records."""
    return {
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
        "device": device,
        "cpus": os.cpu_count(),
        "git_commit": _git("rev-parse", "HEAD").decode().strip() if _in_git() else "",
    }


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of packages by name, `not installed` of those that are not."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_diff() -> bytes:
    """The diff of the source of this process against its commit; empty outside git."""
    return _git("diff", "HEAD") if _in_git() else b""


def _in_git() -> bool:
    """Whether git tracks this file: an installed copy may lie inside another project's checkout."""
    return bool(_git("ls-files", str(Path(__file__).resolve())))


def _git(*arguments: str) -> bytes:
    source = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return result.stdout if result.returncode == 0 else b""
