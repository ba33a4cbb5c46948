"""What differs between the versions of libraries that pyproject.toml admits."""

from __future__ import annotations

import transformers
from packaging.version import Version

_TRANSFORMERS = Version(transformers.__version__)


def transformers_before(version: str) -> bool:
    """Whether the transformers that runs is older than a version."""
    return Version(version) > _TRANSFORMERS
