"""`simpo report`: compare runs, finished or not."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simpo.config.errors import ConfigError, unwritable
from simpo.launch.run_words import no_folder, split_settings
from simpo.report.compare import averages, compare
from simpo.report.text import averages_text, damaged_lines, text
from simpo.run.signals import ALL

SERVE = "--serve"
PORT = 8642
"""The first port that --serve tries."""
FORMATS = ("text", "csv", "json")
KEYS: dict[str, tuple[str, ...]] = {
    "format": FORMATS,
    **dict.fromkeys(("metric", "html", "over", "port"), ()),
}
"""The keys, with their values if there are few."""
USAGE = f"""
usage: simpo report DIR... [format={"|".join(FORMATS)}] [metric=KEY] [over=SETTING] [html=FILE|none]
       simpo report DIR... --serve [metric=KEY] [port=N]

Compare the runs in folders: the settings that differ, their progress, and which is the best.
As text it also writes DIR/report.html. Works at any moment, for one run, a sweep or several.

  format=csv     the table for other programs
  metric=KEY     the held-out metric that decides which run is best (monitor.metric of the runs)
  over=SETTING   average the runs that differ in this setting alone, such as over=train.seed
  html=FILE      where to write the page; none writes no page
  --serve        show the page in a browser on this machine, live, until Ctrl-C
  port=N         the port that --serve takes (the first free one from {PORT} on)
"""


def main(words: Sequence[str]) -> None:
    """Print the comparison; runs with damaged folders are named and left out.

    Raises:
        ConfigError: there is no run, or the arguments cannot be used.
    """
    folders, options = _arguments(words)
    if SERVE in words:
        _serve(folders, options)
        return
    report = compare(folders, options.get("metric"))
    form, key = options.get("format", "text"), options.get("over")
    if form == "text":
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(text(report, width) if key is None else averages_text(report, key, width), end="")
    else:
        lines = report.lines() if key is None else averages(report, key)
        sys.stderr.writelines(f"{line}\n" for line in damaged_lines(report))
    if form == "json":
        # JSON has no NaN, which a diverged run may have.
        valid = [{key: _finite(value) for key, value in line.items()} for line in lines]
        # Lines of damaged runs come last.
        for line, run in zip(valid, report.runs if key is None else (), strict=False):
            if run.config.rounds.number:
                line["rounds"] = [
                    {"round": number, **{key: _finite(value) for key, value in metrics.items()}}
                    for number, metrics in sorted(run.evaluations.items())
                ]
        print(json.dumps(valid, indent=2))
    elif form == "csv":
        table = csv.DictWriter(sys.stdout, list(lines[0] if lines else ()), lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
    page = options.get("html", "none" if form != "text" else str(folders[0] / "report.html"))
    if page != "none":
        from simpo.report.page import render

        path = Path(page).expanduser()
        try:
            # The name of a folder may hold bytes that are no text.
            path.write_text(render(report), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise unwritable(path, error) from error
        print(f"page   {path}", file=sys.stderr)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _serve(folders: Sequence[Path], options: Mapping[str, str]) -> None:
    """Serve the page until Ctrl-C or another signal, which end it without an error."""
    from simpo.report.serve import Source, start

    port = int(options.get("port", PORT))
    source = Source(folders, options.get("metric"))
    with start(source, port, others="port" not in options) as server:
        for number in ALL:
            signal.signal(number, signal.default_int_handler)
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            print(f"live   {address} (Ctrl-C ends it)", flush=True)
            source.look()  # takes a while with many runs; a browser waits
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended", flush=True)


def _arguments(words: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Folders and settings of a command line; a folder's name may hold an = itself."""
    others, options = split_settings([word for word in words if word != SERVE], KEYS)
    folders = [Path(word).expanduser() for word in others]
    problems = [
        f"{path.name.partition('=')[0]}: no such key (report has {', '.join(KEYS)})"
        if "=" in path.name and len(path.parts) == 1
        else no_folder("DIR", path)
        for path in folders
        if not path.is_dir()
    ]
    if not folders:
        problems.append(USAGE.strip().splitlines()[0])
    if options.get("format", "text") not in FORMATS:
        problems.append(f"format: must be one of {', '.join(FORMATS)}, got {options['format']}")
    if options.get("html") == "":
        problems.append("html: must not be empty (none writes no page)")
    serves = SERVE in words
    port = options.get("port", str(PORT))
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        problems.append(f"port: must be a number from 1 to {2**16 - 1}, got {port}")
    elif "port" in options and not serves:
        problems.append("port: is for --serve alone (add --serve)")
    problems += [
        f"{key}: --serve shows the page alone (leave out {key}=)"
        for key in ("format", "html", "over")
        if serves and key in options
    ]
    if problems:
        raise ConfigError(problems)
    return folders, options
