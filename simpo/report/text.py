"""Formats a comparison as text for a terminal."""

from __future__ import annotations

from simpo.report.compare import Comparison, averages
from simpo.report.published import published_tables
from simpo.run.tables import SHOWN, markdown_table


def text(report: Comparison) -> str:
    """The table of runs, with notes on their errors below it."""
    cells: list[dict[str, str]] = []
    for index, (name, run) in enumerate(zip(report.names, report.runs, strict=True)):
        value = report.monitored(index)
        cells.append(
            {
                "run": name,
                "state": run.progress.text(),
                **({} if len(report.runs) == 1 else {"": "best" if index == report.best else ""}),
                report.metric: "" if value is None else f"{value:.4f}",
                **{
                    label: f"{run.metrics[key]:.4f}" if key in run.metrics else ""
                    for key, label in SHOWN
                    if key != report.metric and any(key in other.metrics for other in report.runs)
                },
            }
        )
    cells += [
        dict.fromkeys(cells[0] if cells else (), "") | {"run": name, "state": "damaged"}
        for name in report.damaged
    ]
    lines = markdown_table(cells)
    lines += [
        f"{name}: {run.progress.note}" + (f" ({run.progress.log})" if run.progress.log else "")
        for name, run in zip(report.names, report.runs, strict=True)
        if run.progress.note
    ]
    lines += damaged_lines(report)
    for setting, table in published_tables(report.runs, report.names).items():
        lines += ["", f"published results of {setting}, in percent", *markdown_table(table)]
    return "\n".join(lines) + "\n"


def damaged_lines(report: Comparison) -> list[str]:
    """A line for each run that cannot be read: the file, what is wrong, what to do."""
    return [f"{name}: {run.fault}" for name, run in report.damaged.items()]


def averages_text(report: Comparison, key: str) -> str:
    """The table of `averages`: means with their ranges."""
    found = averages(report, key)
    names = dict(SHOWN)
    wanted = dict.fromkeys([report.metric, *names])
    shown = [metric for metric in wanted if any(metric in group for group in found)]
    lines = [
        {
            "runs": group["runs"],
            "number": group["number"],
            **{
                names.get(metric, metric): (
                    f"{group[metric]:.4f} "
                    f"({group[f'{metric} min']:.4f} to {group[f'{metric} max']:.4f})"
                    if metric in group
                    else ""
                )
                for metric in shown
            },
        }
        for group in found
    ]
    return "\n".join([*markdown_table(lines), *damaged_lines(report)]) + "\n"
