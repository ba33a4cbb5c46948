"""Counts the train pairs that each check of `data.filter` finds, with examples and reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo.config.data import DataConfig
from simpo.config.errors import shown
from simpo.data.cleaning.filter import CHECKS, Check
from simpo.data.mixture import Mixture
from simpo.data.pairs import Pair, kind_of_pairs
from simpo.data.reading.messages import all_text
from simpo.run.tables import html_page, markdown_table

EXAMPLES_ON_PAGE = 10
EXAMPLES_AS_TEXT = 2
LONGEST_SHOWN = 2000
LONGEST_LINE = 160


@dataclass(frozen=True)
class Example:
    """A pair that a check finds: its place, why, and its messages as (role, content)."""

    place: str
    why: str
    messages: list[tuple[str, str]]


@dataclass(frozen=True)
class Finding:
    """What one check finds among all train pairs, on its own.

    Attributes:
        setting: its setting, as the command line takes it: the run's, or else a suggested one.
        on: whether the run uses it.
        meaning: which pairs it finds, after "pairs".
        missing: why nothing could be counted; empty if it could.
        pairs: number of train pairs that it finds.
        held_out: number of held-out pairs that it finds among themselves; None if that is nothing.
        examples: the first of the train pairs.
    """

    setting: str
    on: bool
    meaning: str
    missing: str
    pairs: int
    held_out: int | None
    examples: list[Example]


@dataclass(frozen=True)
class Cleaning:
    """What all checks find.

    Attributes:
        kind: what the pairs are, see `kind_of_pairs`.
        num_pairs: good train pairs of all sources.
        num_found: those that at least one check finds.
        findings: a check each, in the order in which a run applies them.
        bad: number of bad records by fault.
        bad_places: the first of them, as (place, fault).
    """

    kind: str
    num_pairs: int
    num_found: int
    findings: list[Finding]
    bad: dict[str, int]
    bad_places: list[tuple[str, str]]

    @staticmethod
    def of(config: DataConfig, mixture: Mixture) -> Cleaning:
        """Let every check look at all train pairs, also those that the run leaves out.

        Raises:
            DataError: a file of benchmark prompts cannot be read.
        """
        found: set[int] = set()
        findings = []
        for check in CHECKS:
            finding, indices = _finding(check, config, mixture)
            findings.append(finding)
            found.update(indices)
        return Cleaning(
            kind_of_pairs({len(pair.responses) for pair in mixture.read}),
            len(mixture.read),
            len(found),
            findings,
            dict(Counter(fault for _, fault in mixture.faults)),
            mixture.faults[:EXAMPLES_ON_PAGE],
        )

    def table(self) -> list[dict[str, object]]:
        """A line for each check."""
        return [
            {
                "check": finding.setting,
                "in this run": "on" if finding.on else "off",
                self.kind: "-" if finding.missing else finding.pairs,
                "share": "-" if finding.missing else f"{finding.pairs / self.num_pairs:.1%}",
                "held out": "-" if finding.held_out is None else finding.held_out,
            }
            for finding in self.findings
        ]

    def summary(self) -> str:
        """How many pairs would go in all."""
        return f"{self.num_found:,} of {self.num_pairs:,} train {self.kind} are found by a check"


def text(cleaning: Cleaning) -> list[str]:
    """The table, and the first examples of each check."""
    lines = [*markdown_table(cleaning.table()), f"       {cleaning.summary()}"]
    for finding in cleaning.findings:
        if finding.missing:
            lines.append(f"       {finding.setting}: {finding.missing}")
        for example in finding.examples[:EXAMPLES_AS_TEXT]:
            line = " ".join(f"       {example.place}: {example.why}".rstrip().splitlines())
            lines.append(line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 3]}...")
    return lines


def page(cleaning: Cleaning) -> str:
    """A self-contained page: what would go and why."""
    template = Path(__file__).with_name("cleaning.html.jinja")
    return html_page(template, cleaning=cleaning)


def _finding(check: Check, config: DataConfig, mixture: Mixture) -> tuple[Finding, list[int]]:
    """What a check finds, and the indices of the train pairs."""
    own = check.setting(config)
    setting = check.suggested if own is None else own
    missing = _missing(check, setting, mixture)
    reasons: Sequence[str | None] = []
    held_out = None
    if not missing:
        reasons = check.find(mixture.read, setting, mixture.test)
        if check.key != "drop_overlap":
            held_out = sum(map(bool, check.find(mixture.test, setting, [])))
    indices = [index for index, why in enumerate(reasons) if why]
    examples = [
        Example(mixture.read[i].place, str(reasons[i]), list(map(_short, spoken(mixture.read[i]))))
        for i in indices[:EXAMPLES_ON_PAGE]
    ]
    value = "[FILE]" if setting is None else shown(setting)
    name = f"data.{check.key}={value}"
    finding = Finding(
        name, own is not None, check.meaning, missing, len(indices), held_out, examples
    )
    return finding, indices


def _missing(check: Check, setting: Any, mixture: Mixture) -> str:
    """Why a check cannot count anything; empty if it can."""
    if setting is None:
        return "no file is named"
    if check.key == "drop_overlap" and not mixture.test:
        return "nothing is held out"
    if check.key == "filter.min_score_margin" and all(
        pair.score_margin is None for pair in mixture.read
    ):
        return "no pair has scores"
    return ""


def spoken(pair: Pair) -> list[tuple[str, str]]:
    """All turns as (role, text); the role of a reply is the name of its response, with its score if
    the responses are ranked."""
    found = [(turn["role"], all_text(turn)) for turn in pair.prompt]
    names = pair.names
    if pair.scores:
        ranked = zip(names, pair.scores, strict=True)
        names = tuple(f"{name} (score {score:g})" for name, score in ranked)
    for name, turns in zip(names, pair.responses, strict=True):
        for turn in turns:
            found.append((name if turn["role"] == "assistant" else turn["role"], all_text(turn)))
    return found


def _short(said: tuple[str, str]) -> tuple[str, str]:
    role, content = said
    if (more := len(content) - LONGEST_SHOWN) > 0:
        content = f"{content[:LONGEST_SHOWN]} ... and {more:,} more characters"
    return role, content
