"""Runs' folders in, a comparison out: `python -m simpo.report DIR... [format=text|csv|json]`.

At any moment, for one run, a sweep or several. As text it also writes DIR/report.html. With
over=train.seed runs that differ in that setting alone are averaged.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from simpo.config.errors import ConfigError, SimpoError, unwritable
from simpo.report.compare import Comparison, averages, compare
from simpo.report.published import published_tables
from simpo.run.tables import SHOWN, markdown_table

FORMATS = ("text", "csv", "json")
KEYS = ("format", "metric", "html", "over")
USAGE = (
    f"python -m simpo.report DIR... [format={'|'.join(FORMATS)}] [metric=KEY] [over=SETTING] "
    "[html=FILE|none]"
)


def text(report: Comparison) -> str:
    """The table that people read in a terminal, and what went wrong below it."""
    rows = []
    for index, (name, run) in enumerate(zip(report.names, report.runs, strict=True)):
        value = report.monitored(index)
        rows.append(
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
    rows += [
        dict.fromkeys(rows[0] if rows else (), "") | {"run": name, "state": "damaged"}
        for name in report.damaged
    ]
    lines = markdown_table(rows)
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
    """A line for each run that cannot be read: which file, what is wrong, what to do."""
    return [f"{name}: {run.fault}" for name, run in report.damaged.items()]


def averages_text(report: Comparison, key: str) -> str:
    """The table of `averages`: means, and the range behind them."""
    found = averages(report, key)
    names = dict(SHOWN)
    wanted = dict.fromkeys([report.metric, *names])
    shown = [metric for metric in wanted if any(metric in row for row in found)]
    rows = [
        {
            "runs": row["runs"],
            "number": row["number"],
            **{
                names.get(metric, metric): (
                    f"{row[metric]:.4f} ({row[f'{metric} min']:.4f} to {row[f'{metric} max']:.4f})"
                    if metric in row
                    else ""
                )
                for metric in shown
            },
        }
        for row in found
    ]
    return "\n".join([*markdown_table(rows), *damaged_lines(report)]) + "\n"


def cli() -> None:
    """Entry of `python -m simpo.report`; exits with 2 where there is nothing to report.

    Runs whose folders are damaged are told, and the others reported.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        return
    try:
        _report(*_arguments(sys.argv[1:]))
    except SimpoError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _report(folders: Sequence[Path], options: Mapping[str, str]) -> None:
    report = compare(folders, options.get("metric"))
    form, key = options.get("format", "text"), options.get("over")
    if form == "text":
        print(text(report) if key is None else averages_text(report, key), end="")
    else:
        rows = report.rows() if key is None else averages(report, key)
        sys.stderr.writelines(f"{line}\n" for line in damaged_lines(report))
    if form == "json":
        print(json.dumps(rows, indent=2))
    elif form == "csv":
        table = csv.DictWriter(sys.stdout, list(rows[0] if rows else ()), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    page = options.get("html", "none" if form != "text" else str(folders[0] / "report.html"))
    if page != "none":
        from simpo.report.page import render

        path = Path(page).expanduser()
        try:
            path.write_text(render(report), encoding="utf-8")
        except OSError as error:
            raise unwritable(path, error) from error
        print(f"page   {path}", file=sys.stderr)


def _arguments(words: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Folders and settings of a command line; a folder's name may hold an = itself."""
    options: dict[str, str] = {}
    folders: list[Path] = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in KEYS:
            options[key] = value
        else:
            folders.append(Path(word).expanduser())
    problems = [
        f"{path.name.partition('=')[0]}: no such key (report has {', '.join(KEYS)})"
        if "=" in path.name and len(path.parts) == 1
        else f"DIR: no such folder, got {path}"
        for path in folders
        if not path.is_dir()
    ]
    if not folders:
        problems.append(USAGE)
    if options.get("format", "text") not in FORMATS:
        problems.append(f"format: must be one of {', '.join(FORMATS)}, got {options['format']}")
    if problems:
        raise ConfigError(problems)
    return folders, options


if __name__ == "__main__":
    cli()
