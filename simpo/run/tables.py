"""Formats tables and web pages, and names the held-out metrics that they show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SHOWN = (
    ("loss", "loss"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "margin"),
    ("rewards/chosen", "reward of desirable"),
    ("rewards/rejected", "reward of undesirable"),
    ("rewards/rank_correlation", "rank correlation"),
    ("rewards/best_accuracies", "best response first"),
    ("reply_reward", "reward of replies"),
    ("reply_pass_rate", "pass rate of replies"),
    ("reply_win_rate", "replies that beat the first model's"),
    ("rule_pass_rate", "rule pass rate"),
    ("reply_repetition", "repetition in replies"),
)
"""Held-out metrics that tables show, with their labels; see `shown_metrics`."""
REWARDS = ("rewards/chosen", "rewards/rejected")
"""Shown of single replies; of pairs their accuracy and margin tell more."""


def shown_metrics(known: Iterable[str]) -> dict[str, str]:
    """Those of `SHOWN` that are known, with their labels; no `REWARDS` where pairs are compared."""
    known = set(known)
    left_out = REWARDS if "rewards/accuracies" in known else ()
    return {key: label for key, label in SHOWN if key in known and key not in left_out}


def metric_labels(known: Iterable[str]) -> dict[str, str]:
    """The held-out metrics that tables show, among those that are known, with their labels.

    Several held-out sets add the accuracy of each (its loss if no reply is rejected) and the mean.
    """
    known = list(known)
    labels = shown_metrics(known)
    of_sets = "rewards/accuracies" if "rewards/accuracies" in known else "loss"
    for key in known:
        name, _, metric = key.partition("/")
        if metric == of_sets:
            labels[key] = f"{dict(SHOWN)[metric]}, {name}"
    return labels


def result_lines(before: Mapping[str, float], after: Mapping[str, float]) -> list[dict[str, Any]]:
    """A line for each held-out metric that tables show, with its values before and after."""
    return [
        {
            "held out": label,
            "before": f"{before[key]:.3f}" if key in before else "-",
            "after": f"{after[key]:.3f}",
        }
        for key, label in metric_labels(after).items()
    ]


def markdown_table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Format lines with the same keys as a Markdown table with aligned columns."""
    if not lines:
        return ["(none)"]
    cells = [
        list(map(_cell, lines[0])),
        *([_cell(value) for value in line.values()] for line in lines),
    ]
    widths = [max(len(words[i]) for words in cells) for i in range(len(cells[0]))]
    header, *others = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(words, widths, strict=True)) + " |"
        for words in cells
    ]
    return [header, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *others]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key}: {count}" for key, count in value.items())
    # A | or a new line would end the cell, and control characters move a terminal's cursor.
    plain = re.sub(r"[\0-\x1f\x7f\u2028\u2029]+", " ", str(value))
    return re.sub(r"(?<!\\)\|", r"\\|", plain)


def html_page(template: Path, **values: Any) -> str:
    """Render a Jinja template to HTML; values are escaped unless the template says otherwise."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent), autoescape=True
    )
    return environment.get_template(template.name).render(**values)
