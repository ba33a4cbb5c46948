"""Reads the logs of runs that were launched."""

from __future__ import annotations

import re
from pathlib import Path

PROGRESS = re.compile(r"\d+%\||^[\w() -]+ \d+/\d+(, |$)")
"""A progress bar in a log."""


def last_line(log: Path | None) -> str:
    """The last line that tells why a run ended, without progress bars; empty if there is none."""
    if log is None or not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2**14))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]|(?=srun: |slurmstepd: )", text)]
    lines = [line for line in lines if line and not PROGRESS.search(line)]
    # Slurm's lines report the end, the run's own lines its cause.
    own_lines = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
    return (own_lines or lines or [""])[-1]
