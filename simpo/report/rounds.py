"""Runs with rounds, told by round: how the replies of each model are, and how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from simpo.config.benchmarks import FIGURES
from simpo.config.choices import BenchmarkKind
from simpo.config.errors import DamagedError
from simpo.report.compare import Comparison
from simpo.run.rounds import Kind, ended_early, seconds_of
from simpo.run.runs import Run

COLUMNS = (
    ("reply_reward", "reward"),
    ("reply_reward_spread", "spread"),
    ("reply_pass_rate", "pass rate"),
    ("reply_win_rate", "beats the first"),
    ("reply_gain_rate", "beats the last"),
    *((key, f"judged {key.replace('_', ' ')}") for key in FIGURES),
    ("reply_tokens", "tokens"),
    ("reply_repetition", "repetition"),
    ("reply_distinct", "distinct"),
    ("reply_cut", "cut off"),
    ("reply_entropy", "entropy"),
    ("reply_kl", "KL"),
    ("reply_without_pair", "no pair"),
)
"""Metrics of a round's model on held-out prompts, with their labels."""
SPARE = (
    *("distinct", "cut off", "repetition", "annotate, min", "entropy", "spread"),
    *("beats the last", "train, min", "no pair", "generate, min"),
)
"""Columns that a narrow terminal leaves out before others, in this order."""
PHASES = (Kind.generate, Kind.annotate, Kind.train)
MEANINGS = (
    "Of replies to held-out prompts. beats: share of prompts and seeds with a higher reward than "
    "the first model's reply, or the last round's (ties half). judged: on the benchmark's "
    "questions, as a share (MT-Bench: points). entropy, KL from the first model: nats per token. "
    "no pair: share of prompts whose replies give none."
)
"""How to read the tables."""


@dataclass(frozen=True)
class ByRound:
    """One run by round.

    Attributes:
        name: of the run.
        table: a line for each model, from the first (0); values as texts.
        notes: lines below it.
    """

    name: str
    table: list[dict[str, str]]
    notes: list[str]


def with_rounds(report: Comparison) -> list[int]:
    """Indices of the runs with rounds, in the order of the table of runs."""
    return [
        index
        for index in report.order
        if report.runs[index].config.rounds.number and report.runs[index].evaluations
    ]


def by_round(report: Comparison, most: int | None = None) -> list[ByRound]:
    """The runs with rounds, in the order of the table of runs; at most so many."""
    return [_told(report.names[index], report.runs[index]) for index in with_rounds(report)[:most]]


def _told(name: str, run: Run) -> ByRound:
    known = {key for metrics in run.evaluations.values() for key in metrics}
    columns = [(key, label) for key, label in COLUMNS if key in known]
    in_points = run.config.benchmark.kind is BenchmarkKind.mt_bench
    kept = run.results["train"]["model_step"] if run.results else None
    faults: list[str] = []
    table = []
    for number, metrics in sorted(run.evaluations.items()):
        table.append(
            {
                "round": str(number),
                "": "kept" if number == kept else "",
                **{label: _number(metrics, key, in_points) for key, label in columns},
                **_minutes(run.folder, number, faults),
            }
        )
    last = max(run.evaluations)
    took = _seconds(run.folder, last + 1, faults)
    replies_s = sum(took.get(kind, 0.0) for kind in (Kind.generate, Kind.annotate))
    notes = []
    if replies_s:
        minutes = f"{replies_s / 60:.1f} minutes"
        notes.append(f"{minutes} for the replies after round {last}, by which it is measured")
    try:
        ended = ended_early(run.folder)
    except DamagedError as error:
        faults.append(str(error))
        ended = ""
    notes += [f"ended after round {last}: {ended}"] if ended else []
    return ByRound(name, table, [*notes, *dict.fromkeys(faults)])


def _number(metrics: Mapping[str, float], key: str, in_points: bool) -> str:
    if key not in metrics:
        return ""
    if key == "reply_tokens" or (key in FIGURES and in_points):
        return f"{metrics[key]:.1f}"
    return f"{metrics[key] / 100 if key in FIGURES else metrics[key]:.3f}"


def _minutes(folder: Path, number: int, faults: list[str]) -> dict[str, str]:
    """How long the round that made a model took, by phase; nothing for the first model."""
    seconds = _seconds(folder, number, faults) if number else {}
    return {
        f"{kind.value}, min": f"{seconds[kind] / 60:.1f}" if kind in seconds else ""
        for kind in PHASES
    }


def _seconds(folder: Path, number: int, faults: list[str]) -> dict[Kind, float]:
    try:
        return seconds_of(folder, number)
    except DamagedError as error:
        faults.append(str(error))
        return {}
