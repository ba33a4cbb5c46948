"""Where simpo's own files lie: conf/, experiments/ and the chat templates."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
TEMPLATES = PACKAGE / "data" / "templates"


def config_dir(name: str) -> Path:
    """The folder `conf` or `experiments`: inside an installed package, beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def shipped_templates() -> list[str]:
    """The names of the chat templates that come with simpo."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def template_file(name_or_path: str) -> Path:
    """The file of a chat template: one shipped under that name, else the path itself."""
    shipped = TEMPLATES / f"{name_or_path}.jinja"
    return shipped if shipped.is_file() else Path(name_or_path).expanduser()


def looks_local(path: str) -> bool:
    """Whether a path cannot be a hub id, so that it is never sent to the hub."""
    return path.startswith((".", "~", os.sep)) or path.count("/") > 1
