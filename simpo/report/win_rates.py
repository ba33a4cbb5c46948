"""Lays what judges found about runs side by side, benchmark by benchmark.

Runs are compared with the best one question by question, if the same judge compared both with the
same baseline. Figures of different judges are shown and not compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simpo.config.choices import BenchmarkKind
from simpo.report.studies import Difference, by_bootstrap, holm
from simpo.run.judged import Figure, Judged
from simpo.run.runs import Run

NAMED = 5
"""Runs that a sentence names at most."""
BEST, TIED = "best", "tied for best"
"""What a table calls a run that no other is ahead of."""
VARYING = {"questions": "{} questions", "baseline": "against {}", "judge": "judged by {}"}
"""What a caption says if it is the same for all runs, and a column of the table if not."""
BOUNDS = ("low", "high", "official_low", "official_high")
OF_BEHIND = ("low", "high", "p")
FACTS = (
    *("judge", "baseline", "questions", "asked", "malformed"),
    *("position_bias", "first_share", "agreement", "cost_usd"),
)
"""What other programs get of a figure, of a difference, and of a judgement."""


@dataclass(frozen=True)
class WinRates:
    """Runs that were judged on one benchmark.

    Attributes:
        benchmark: its name.
        judged: what was found, by the index of the run; first the runs of the judge and baseline of
            the best run, each group from its best run on.
        groups: the indices of the runs with the same judge and baseline.
        behind: how far each other run is behind the best one of its group, on the questions that
            both have, by its index: mean preference in percent, or points. p-values are Holm's
            for all runs of the group.
    """

    benchmark: str
    judged: Mapping[int, Judged]
    groups: Sequence[Sequence[int]]
    behind: Mapping[int, Difference]

    def caption(self) -> str:
        """What was asked and who judged, as far as it is the same for all runs."""
        words = [self.benchmark]
        for key, form in VARYING.items():
            values = {getattr(one, key) for one in self.judged.values()}
            if len(values) == 1 and any(values):
                words.append(form.format(*values))
        return ", ".join(words)

    def table(self, names: Sequence[str]) -> list[dict[str, str]]:
        """A line for each run, with figures and intervals as text.

        Args:
            names: of all runs of the comparison.
        """
        keys = list(dict.fromkeys(key for one in self.judged.values() for key in one.figures))
        lines = [
            {
                "run": names[index],
                **{label(key): _figure(one, key) for key in keys},
                "behind the best": self._behind(index),
                **{f"{label(key)}, official interval": _official(one, key) for key in keys},
                "position bias": _percent(one.position_bias),
                "agreement": _percent(one.agreement),
                "malformed": f"{one.malformed} of {one.asked}" if one.asked else "",
                **{f"{who}'s chars": _chars(one, who) for who in ("model", "baseline")},
                **{key: str(getattr(one, key)) for key in VARYING},
            }
            for index, one in self.judged.items()
        ]
        told = {key for key in VARYING if len({line[key] for line in lines}) == 1}
        shown = [key for key in lines[0] if key not in told and any(line[key] for line in lines)]
        return [{key: line[key] for key in shown} for line in lines]

    def _behind(self, index: int) -> str:
        words = [self._place(index)]
        if index in self.behind:
            found = self.behind[index]
            words += [in_words(found, digits(self.judged[index])), f"p {found.p:.2g}"]
        return ", ".join(filter(None, words))

    def _place(self, index: int) -> str:
        """What to call a run that no other of its group is ahead of; empty for another."""
        (group,) = (group for group in self.groups if index in group)
        best = [one for one in group if _main(self.judged[one]) == _main(self.judged[group[0]])]
        if index not in best or len(group) == 1:
            return ""
        return BEST if len(best) == 1 else TIED

    def notes(self, names: Sequence[str]) -> list[str]:
        """Sentences about how to read the table, and what each run's judgement notes."""
        found = [self._how_to_read()]
        if self.behind:
            best = self.judged[self.groups[0][0]]
            found.append(f"behind the best: {as_judged(best)}; p after Holm")
        if len(self.groups) > 1:
            whose = (self.judged[group[0]] for group in self.groups)
            found.append(
                "runs with another judge or baseline are not compared with each other: "
                + "; ".join(f"{one.judge} against {one.baseline or 'none'}" for one in whose)
            )
        by_note: dict[str, list[str]] = {}
        for index, one in self.judged.items():
            for note in one.notes:
                by_note.setdefault(note, []).append(names[index])
        for note, of in by_note.items():
            whose_note = "" if len(of) == len(self.judged) else f"{first_names(of, ', ')}: "
            found.append(whose_note + note)
        return found

    def _how_to_read(self) -> str:
        """The unit of the figures, and what their intervals are, if they have some."""
        ones = list(self.judged.values())
        figures = [figure for one in ones for figure in one.figures.values()]
        parts = ["points from 1 to 10" if ones[0].has_points else "percent"]
        if any(one.baseline for one in ones):
            parts[0] += ", a win rate of 50 is as good as the baseline"
        shown: list[Figure | Difference] = [*figures, *self.behind.values()]
        if any(one.low is not None for one in shown):
            parts.append("(low to high): 95 % interval, by resampling questions")
        if any(figure.official_low is not None for figure in figures):
            parts.append("official: as the benchmark's own script computes it")
        return "; ".join(parts)

    def columns(self, index: int) -> dict[str, Any]:
        """What is known of a run for other programs, by column, but for the figures' own values."""
        if index not in self.judged:
            return {}
        one, behind = self.judged[index], self.behind.get(index)
        found: dict[str, Any] = {
            f"{key} {bound.replace('_', ' ')}": getattr(figure, bound)
            for key, figure in one.figures.items()
            for bound in BOUNDS
        }
        if self.behind:
            found["behind best"] = behind and behind.mean
            found |= {f"behind best {key}": behind and getattr(behind, key) for key in OF_BEHIND}
        found |= {key: getattr(one, key) for key in FACTS}
        found |= {f"mean_chars {who}": number for who, number in one.mean_chars.items()}
        return {f"{self.benchmark}/{key}": value for key, value in found.items()}


def win_rates(runs: Sequence[Run]) -> list[WinRates]:
    """What was judged of runs, by benchmark."""
    names = sorted({name for run in runs for name in run.judged})
    return [
        _of_benchmark(
            name, {i: run.judged[name] for i, run in enumerate(runs) if name in run.judged}
        )
        for name in names
    ]


def _of_benchmark(name: str, judged: Mapping[int, Judged]) -> WinRates:
    groups: dict[tuple[str, str], list[int]] = {}
    for index in sorted(judged, key=lambda index: -_main(judged[index])):
        groups.setdefault((judged[index].judge, judged[index].baseline), []).append(index)
    behind: dict[int, Difference] = {}
    for best, *others in groups.values():
        behind |= _behind(judged, best, others)
    order = [index for group in groups.values() for index in group]
    return WinRates(name, {i: judged[i] for i in order}, list(groups.values()), behind)


def _main(one: Judged) -> float:
    """The figure to compare models by; the least number if there is none."""
    value = next((figure.value for figure in one.figures.values()), -math.inf)
    return value if math.isfinite(value) else -math.inf


def _behind(
    judged: Mapping[int, Judged], best: int, others: Sequence[int]
) -> dict[int, Difference]:
    scale = 1.0 if judged[best].has_points else 100.0
    values = {
        index: {key: scale * x for key, x in judged[index].by_question.items() if math.isfinite(x)}
        for index in (best, *others)
    }
    # Runs with the same questions are resampled together, which is much faster.
    by_questions: dict[tuple[str, ...], list[int]] = {}
    for index in others:
        questions = tuple(key for key in values[best] if key in values[index])
        if len(questions) > 1:
            by_questions.setdefault(questions, []).append(index)
    found: dict[int, Difference] = {}
    for questions, same in by_questions.items():
        differences = [[values[best][q] - values[index][q] for q in questions] for index in same]
        found |= zip(same, by_bootstrap(differences), strict=True)
    return dict(zip(found, holm(list(found.values())), strict=True))


def as_judged(one: Judged) -> str:
    """What the difference between two models is: it need not be that of their figures."""
    told = {
        BenchmarkKind.alpaca_eval.value: " (no control of length)",
        BenchmarkKind.arena_hard.value: " (no control of style, and >> counts as >)",
    }
    return f"mean difference on the same questions, as judged{told.get(one.kind, '')}"


def first_names(names: Sequence[str], between: str = "; ") -> str:
    """The first `NAMED` names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return between.join(names[:NAMED]) + more


def label(key: str) -> str:
    """The key of a figure in words."""
    return key.replace("_", " ").replace("lc ", "LC ")


def in_words(figure: Figure | Difference, digits: int = 1) -> str:
    """A figure with its interval, if it has one: 44.7 (41.2 to 48.1)."""
    value = figure.mean if isinstance(figure, Difference) else figure.value
    return " ".join(filter(None, (f"{value:.{digits}f}", _bounds(figure.low, figure.high, digits))))


def _bounds(low: float | None, high: float | None, digits: int) -> str:
    if low is None or high is None:
        return ""
    return f"({low:.{digits}f} to {high:.{digits}f})"


def digits(one: Judged) -> int:
    """Of figures behind the point."""
    return 2 if one.has_points else 1


def _figure(one: Judged, key: str) -> str:
    return in_words(one.figures[key], digits(one)) if key in one.figures else ""


def _official(one: Judged, key: str) -> str:
    return official_interval(one.figures[key], digits(one)) if key in one.figures else ""


def official_interval(figure: Figure, digits: int = 1) -> str:
    """The interval of the benchmark's own script; empty without one: 42.1 to 47.3."""
    return _bounds(figure.official_low, figure.official_high, digits).strip("()")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _chars(one: Judged, who: str) -> str:
    return f"{one.mean_chars[who]:.0f}" if who in one.mean_chars else ""
