"""Programs that tests need and a machine may lack."""

from __future__ import annotations

import os
import shutil

import pytest


def skip_without(command: str, packages: str) -> None:
    """Skip a test whose program is not installed; under `.ci/run`, which installs it, fail."""
    if not shutil.which(command):
        reason = f"{command} is not installed (Debian: {packages})"
        (pytest.fail if os.environ.get("SIMPO_TESTS_SKIP_NOTHING") else pytest.skip)(reason)
