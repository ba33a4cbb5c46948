"""Figures that lie in model folders as the model hub has them: `.eval_results/*.yaml`.

They are of whoever wrote the file, and say nothing of how they were measured beyond their source
and notes. See https://huggingface.co/docs/hub/eval-results.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from simpo.config.errors import first_line
from simpo.report.compare import Comparison

if TYPE_CHECKING:  # the library is imported where there are such files
    from huggingface_hub import EvalResultEntry

FOLDER = ".eval_results"
CAPTION = (
    "figures of others, from .eval_results in the folders of models; simpo has not checked them"
)
LONGEST_SHOWN = 100
"""Letters of a text of a file."""


def others_figures(report: Comparison) -> tuple[list[dict[str, str]], list[str]]:
    """A line for each figure of the runs' models, of the models that they began with, and of the
    folders that the user named; and a sentence for each file or entry that cannot be read.

    A file that `simpo judge` wrote of a benchmark which is in the report is left out.
    """
    lines: list[dict[str, str]] = []
    faults: list[str] = []
    for folder, (name, known) in _folders(report).items():
        for file in sorted((folder / FOLDER).glob("*.yaml")):
            if file.stem in known:
                continue
            for found in _results(file):
                if isinstance(found, str):
                    faults.append(found)
                else:
                    lines.append({"model": name, **found})
    shown = [key for key in (lines[0] if lines else ()) if any(line[key] for line in lines)]
    return [{key: line[key] for key in shown} for line in lines], faults


def _folders(report: Comparison) -> dict[Path, tuple[str, Mapping[str, Any]]]:
    """Folders that may hold figures, each once, with its name and what simpo judged of it."""
    found: dict[Path, tuple[str, Mapping[str, Any]]] = {}
    for name, run in zip(report.names, report.runs, strict=True):
        for folder in (run.folder, run.folder / "model"):
            found.setdefault(folder.resolve(), (name, run.judged))
    bases = [run.config.model.path for run in report.runs]
    for name in (*map(str, report.folders), *bases):
        found.setdefault(Path(name).expanduser().resolve(), (name, {}))
    return found


def _results(file: Path) -> Iterator[dict[str, str] | str]:
    """The results in a file, or what is wrong with it or with one of them, in a sentence."""
    from huggingface_hub import parse_eval_result_entries

    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        yield f"{file}: cannot be read: {first_line(error)}"
        return
    except (yaml.YAMLError, ValueError, RecursionError):
        yield f"{file}: is not YAML (mend or remove it)"
        return
    if not isinstance(data, list):
        yield f"{file}: must be a list of results (mend or remove it)"
        return
    for number, item in enumerate(data, 1):
        try:
            (entry,) = parse_eval_result_entries([{"data": item}])
            _check(entry)
            yield _cells(entry)
        except (AttributeError, LookupError, TypeError, ValueError):
            yield (
                f"{file}: entry {number}: needs dataset with id and task_id, a value, and if it "
                "has a source, its url (mend or remove it)"
            )


def _check(entry: EvalResultEntry) -> None:
    """Check the types of what a file holds, which is any YAML.

    Raises:
        TypeError: one is wrong.
    """
    required = (entry.dataset_id, entry.task_id)
    optional = (entry.source_url, entry.source_name, entry.source_user, entry.source_org)
    texts = [*required, *(text for text in (*optional, entry.notes) if text is not None)]
    is_value = isinstance(entry.value, int | float | str) and not isinstance(entry.value, bool)
    is_dated = isinstance(entry.date, str | date | None)  # YAML makes dates of some texts
    if not all(isinstance(text, str) for text in texts) or not is_value or not is_dated:
        raise TypeError


def _cells(entry: EvalResultEntry) -> dict[str, str]:
    who = entry.source_name or entry.source_org or entry.source_user
    cells = {
        "data set": entry.dataset_id,
        "figure": entry.task_id,
        "value": entry.value,
        "date": entry.date or "",
        "source": ", ".join(filter(None, (who, entry.source_url))),
        "notes": entry.notes or "",
    }
    return {key: _shown(str(value)) for key, value in cells.items()}


def _shown(text: str) -> str:
    """A text of a stranger in one line, without what could steer a terminal or end a cell."""
    text = "".join(letter if letter.isprintable() and letter != "|" else " " for letter in text)
    return textwrap.shorten(text, LONGEST_SHOWN, placeholder=" ...")
