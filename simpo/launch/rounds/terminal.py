"""What the terminal shows of the phases: a line as each begins and ends, and what it notes.

All that a phase prints is in its own log beside the file that says that it is done.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from simpo.config.schema import RunConfig
from simpo.launch.rounds.record import noted
from simpo.run.progress import on_terminal, say
from simpo.run.rounds import ROUNDS, Phase, done_file

PASSED_ON = re.compile(r"(note|watch|wait|judge|waiting|fetching)\b")
"""Lines of a phase that the terminal shows: what a user may have to act on, and what costs."""
CLEARED = "\r\x1b[K"
"""Removes a phase's own bar, below which its lines would begin otherwise."""


class Terminal:
    """Shows the phases of rounds, and of their lines each once, whatever the round."""

    def __init__(self, run: RunConfig, root: Path) -> None:
        self._run, self._root = run, root
        self._told: set[str] = set()
        self._logs: dict[Path, int] = {}

    def begin(self, group: Sequence[Phase]) -> None:
        """Say that phases begin; of their logs only what comes now is shown."""
        self._logs = {log: _size(log) for log in (log_file(self._root, p) for p in group)}
        say(f"{self._name(group[0])} ...")

    def follow(self) -> None:
        """Show the new lines of the phases that are to be shown."""
        for log, seen in self._logs.items():
            if _size(log) <= seen:
                continue
            with log.open("rb") as file:
                file.seek(seen)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._logs[log] = seen + len(whole)
            lines = [*self._shown(whole.decode(errors="replace").splitlines())]
            if lines:
                say(CLEARED * on_terminal() + lines[0], *lines[1:])

    def end(self, group: Sequence[Phase]) -> None:
        """Say what phases that are done have done, and how long they took."""
        done = [noted(self._root, phase) for phase in group]
        took_s = max((one.get("seconds") or 0.0 for one in done), default=0.0)
        say(f"{self._name(group[0])}: {done[0].get('text') or 'done'} ({_minutes(took_s)})")

    def _name(self, phase: Phase) -> str:
        if phase.round > self._run.rounds.number:
            return f"after round {self._run.rounds.number}: {phase.kind.value}, held-out prompts"
        return f"round {phase.round} of {self._run.rounds.number}: {phase.kind.value}"

    def _shown(self, lines: Sequence[str]) -> Iterator[str]:
        for line in lines:
            if not PASSED_ON.match(line):
                continue
            short = line.replace(f"{self._root}/", "")
            # What is noted of a round's own files is no news: rounds wrote them.
            if re.match(rf"note +{ROUNDS}/\d+/replies/", short):
                continue
            same = re.sub(rf"{ROUNDS}/\d+/", "", short)
            if same not in self._told:
                self._told.add(same)
                yield short


def log_file(root: Path, phase: Phase) -> Path:
    """The file with what a phase prints."""
    return done_file(root, phase).with_suffix(".log")


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
