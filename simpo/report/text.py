"""Formats a comparison as text for a terminal or a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simpo.report.compare import Comparison, averages
from simpo.report.findings import between_groups, findings, pruned_note, unfinished_note
from simpo.report.hub_results import CAPTION, others_figures
from simpo.report.published import judged_note, published_tables
from simpo.report.rounds import MEANINGS, SPARE, by_round, with_rounds
from simpo.run.runs import Progress, State
from simpo.run.tables import markdown_table

ROWS_SHOWN = 40
"""Lines of a table, and notes below it, that a terminal shows; a file gets all."""
ROUNDS_SHOWN = 4
"""Runs, the best ones, that a terminal tells by round."""
SHORTEST_NAME = 24

Cells = dict[str, str]


def text(report: Comparison, width: int | None = None) -> str:
    """The table of runs, the best first, with notes on their errors below it.

    Args:
        width: columns of the terminal, to which the table is cut; None cuts nothing.
    """
    rows = ROWS_SHOWN if width else len(report.runs) + len(report.damaged)
    table = full = _cells(report, brief=False)[:rows]
    keys = ""
    if width is not None and _width(full) > width:
        brief, keys = _by_values(_cells(report, brief=True)[:rows])
        table = _fitted(brief, width)
    lines = markdown_table(table)
    if report.prefix:
        lines.append(f"the runs' names begin with {report.prefix}")
    if keys:
        lines.append(f"a run's name here is its {keys}")
    if (left := len(report.runs) + len(report.damaged) - rows) > 0:
        lines.append(f"{left} more runs are in the page, and with format=csv")
    lines += _too_wide([key for key in full[0] if key not in table[0]] if table else [])
    lines += findings(report)
    notes = [*_notes(report), *damaged_lines(report)]
    lines += _cut(notes, rows, "the page, and with format=csv")
    lines += _rounds(report, width)
    for judged in report.judged:
        table, hidden = _narrowed(judged.table(_short(report))[:rows], width, 2)
        lines += ["", judged.caption(), *markdown_table(table), *_too_wide(hidden)]
        notes = judged.notes(_short(report))
        lines += _cut(notes, rows if width else len(notes), "the page")
    for setting, published in published_tables(report.runs, report.names).items():
        lines += ["", f"published results of {setting}, in percent", *markdown_table(published)]
        lines += filter(None, [judged_note(report.runs)])
    others, faults = others_figures(report)
    if others:
        table, hidden = _narrowed(others, width, 4)
        lines += ["", CAPTION, *markdown_table(table), *_too_wide(hidden)]
    lines += faults
    return "\n".join(lines) + "\n"


def _cells(report: Comparison, brief: bool) -> list[Cells]:
    """A line of the table for each run, the best first."""
    cells = []
    columns = report.columns()
    for index in report.order:
        run = report.runs[index]
        cells.append(
            {
                "run": report.names[index].removeprefix(report.prefix),
                **({} if len(report.runs) == 1 else {"": report.place(index)}),
                **{
                    label: f"{run.metrics[key]:.4f}" if key in run.metrics else ""
                    for key, label in columns.items()
                },
                "state": _brief(run.progress) if brief else run.progress.text(),
            }
        )
    empty = dict.fromkeys(cells[0] if cells else ("run", "state"), "")
    return cells + [
        empty | {"run": name.removeprefix(report.prefix), "state": "damaged"}
        for name in report.damaged
    ]


def _brief(progress: Progress) -> str:
    """The progress in few letters."""
    state = str(progress.state.value)
    if progress.state is State.finished or not progress.total_steps:
        return state
    return f"{state} {progress.step}/{progress.total_steps}"


def _by_values(cells: Sequence[Cells]) -> tuple[list[Cells], str]:
    """Names such as a=1,b=2 as 1,2 if all have the same keys; and these keys, else nothing."""
    parts = [[part.partition("=") for part in line["run"].split(",")] for line in cells]
    keys = [[key for key, equals, _ in one if equals] for one in parts]
    if len(cells) < 2 or any(own != keys[0] for own in keys) or len(keys[0]) < len(parts[0]):
        return list(cells), ""
    names = [",".join(value for *_, value in one) for one in parts]
    short = [line | {"run": name} for line, name in zip(cells, names, strict=True)]
    return short, ", ".join(keys[0])


def _fitted(cells: Sequence[Cells], width: int) -> list[Cells]:
    """The table without its last metrics, and with shortened names, if that makes it fit."""
    keys = list(cells[0])
    longest = max(len(line["run"]) for line in cells)
    while True:
        others = _width([{key: line[key] for key in keys if key != "run"} for line in cells])
        room = width - others - 3
        if room >= min(longest, SHORTEST_NAME) or len(keys) <= 3:
            break
        del keys[-2]  # the metric before the state
    return [
        {key: line[key] for key in keys} | {"run": shorten(line["run"], max(room, 8))}
        for line in cells
    ]


def _width(cells: Sequence[Cells]) -> int:
    return len(markdown_table(cells)[0])


def shorten(name: str, width: int) -> str:
    """A name of at most that many letters, with dots for what its middle has too many."""
    if len(name) <= width:
        return name
    head = (width - 3) // 2
    return f"{name[:head]}...{name[len(name) - (width - 3 - head) :]}"


def _cut(notes: Sequence[str], rows: int, where: str) -> list[str]:
    """The first notes, with a line about the others."""
    left = len(notes) - rows
    return [*notes[:rows], *([f"{left} more notes are in {where}"] if left > 0 else [])]


def _notes(report: Comparison) -> list[str]:
    return [
        f"{name}: {run.progress.note}" + (f" ({run.progress.log})" if run.progress.log else "")
        for name, run in zip(report.names, report.runs, strict=True)
        if run.progress.note
    ]


def damaged_lines(report: Comparison) -> list[str]:
    """A line for each run that cannot be read: the file, what is wrong, what to do."""
    return [f"{name}: {run.fault}" for name, run in report.damaged.items()]


def averages_text(report: Comparison, key: str, width: int | None = None) -> str:
    """The table of `averages`: means with their intervals, and how far groups are behind the best.

    Args:
        width: columns of the terminal; the last metrics that do not fit are named below the table.
            None cuts nothing.
    """
    found = averages(report, key)
    lines = [
        {
            "runs": group["runs"],
            "number": group["number"],
            **{
                label: _mean(group[metric], group[f"{metric} +-"]) if metric in group else ""
                for metric, label in report.columns().items()
                if any(metric in other for other in found)
            },
        }
        for group in found
    ]
    lines, hidden = _narrowed(lines, width, 3)
    notes = _too_wide(hidden)
    if any("±" in cell for line in lines for cell in map(str, line.values())):
        notes.append(f"±: interval of the mean over {key} at 95 %, by Student's t")
    notes += [*between_groups(report, key), *unfinished_note(report), *pruned_note(report)]
    return "\n".join([*markdown_table(lines), *notes, *damaged_lines(report)]) + "\n"


def _narrowed(
    lines: Sequence[dict[str, Any]], width: int | None, least: int, spare: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[str]]:
    """The table without columns that do not fit, and their names.

    Args:
        least: number of columns, the first, that stay.
        spare: columns that go first, in this order; then the last ones go.
    """
    if not lines:
        return [], []
    shown, keys = list(lines), list(lines[0])
    while width is not None and len(shown[0]) > least and _width(shown) > width:
        last = next((key for key in spare if key in shown[0]), list(shown[0])[-1])
        shown = [{key: line[key] for key in line if key != last} for line in shown]
    return shown, [key for key in keys if key not in shown[0]]


def _rounds(report: Comparison, width: int | None) -> list[str]:
    """A table by round for each of the best runs that have rounds."""
    lines: list[str] = []
    told = by_round(report, ROUNDS_SHOWN if width else None)
    for one in told:
        table, hidden = _narrowed(one.table, width, 2, SPARE)
        lines += ["", f"{one.name} by round", *markdown_table(table), *_too_wide(hidden)]
        lines += one.notes
    if left := len(with_rounds(report)) - len(told):
        lines += ["", f"{left} more runs have rounds: format=json tells them"]
    return [*lines, MEANINGS] if told else []


def _too_wide(hidden: Sequence[str]) -> list[str]:
    return [f"too wide for this terminal: {', '.join(hidden)}"] if hidden else []


def _short(report: Comparison) -> list[str]:
    return [name.removeprefix(report.prefix) for name in report.names]


def _mean(value: float, half: float | None) -> str:
    return f"{value:.4f}" if half is None else f"{value:.4f} ± {half:.4f}"
