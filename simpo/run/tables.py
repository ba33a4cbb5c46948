"""Rows in; a table for people out. Also which held-out metrics people are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHOWN = (
    ("loss", "loss"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "margin"),
    ("rule_pass_rate", "rule pass rate"),
    ("reply_repetition", "repetition in replies"),
)
"""Held-out metrics shown to people, with the names they get."""


def markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows with the same keys as the lines of a Markdown table, columns aligned."""
    if not rows:
        return ["(none)"]
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {count}" for key, count in value.items())
    return str(value)


def html_page(template: Path, **values: Any) -> str:
    """The HTML that a Jinja template gives; it escapes values unless it says otherwise."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent), autoescape=True
    )
    return environment.get_template(template.name).render(**values)
