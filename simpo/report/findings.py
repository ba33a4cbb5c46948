"""What a comparison shows beyond its table, in sentences: which differences are more than chance,
and which settings matter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from simpo.report.compare import Comparison, groups
from simpo.report.studies import Difference, by_t, holm, seeds_needed, shares
from simpo.report.win_rates import first_names
from simpo.run.runs import State
from simpo.run.tables import SHOWN

FEWEST_RUNS = 4
"""Finished runs from which on the share of a setting is told."""
MOST_SEEDS = 1000


def findings(report: Comparison) -> list[str]:
    """Lines about pruned runs, runs that may be as good as the best, and settings of a sweep."""
    return [*pruned_note(report), *_ties(report), *_shares(report)]


def pruned_note(report: Comparison) -> list[str]:
    """A line about pruned runs; nothing if there are none."""
    count = sum(run.progress.state is State.pruned for run in report.runs)
    if not count:
        return []
    were = f"{count} run{'s were' if count > 1 else ' was'} pruned"
    return [f"{were} and count{'' if count > 1 else 's'} neither for the best nor in means"]


def unfinished_note(report: Comparison) -> list[str]:
    """A line about runs that are in no mean since they have not finished; nothing if all have."""
    left = [run.progress.state for run in report.runs]
    left = [state for state in left if state not in (State.finished, State.pruned)]
    if not left:
        return []
    have = f"{len(left)} run{'s have' if len(left) > 1 else ' has'}"
    states = ", ".join(f"{n} {state.value}" for state, n in Counter(left).items())
    return [f"{have} not finished and count{'' if len(left) > 1 else 's'} in no mean ({states})"]


def _ties(report: Comparison) -> list[str]:
    behind = report.behind_best
    if not behind or report.best is None:
        return []
    pairs = len(report.runs[report.best].scores[1][report.metric])
    how = f"{_label(report)} on the same {pairs} held-out pairs, bootstrap, p < 0.05 after Holm"
    ties = [report.names[i] for i in report.order if i in behind and not behind[i].clear]
    left = len(report.known) - 1 - len(behind)
    if ties:
        names = first_names([name.removeprefix(report.prefix) for name in ties])
        found = (
            f"{len(ties)} of {len(behind)} others are not worse than the best by more than chance "
            f"({how}): {names}"
        )
    else:
        every = "each run that was compared" if left else "each other finished run"
        found = f"the best is better than {every} by more than chance ({how})"
    if not left:
        return [found]
    others = f"{left} finished run{'s were' if left > 1 else ' was'}"
    return [
        found,
        f"{others} not compared: of other held-out pairs, or without numbers of each",
    ]


def _shares(report: Comparison) -> list[str]:
    known = report.known
    if len(known) < FEWEST_RUNS:
        return []
    settings = {key: [values[i] for i in known] for key, values in report.differing.items()}
    found = shares(settings, list(known.values()))
    if not found:
        return []
    words = ", ".join(f"{key} {share:.0%}" for key, share in found.items())
    return [f"share of each setting in the variance of {_label(report)} between runs: {words}"]


def between_groups(report: Comparison, key: str) -> list[str]:
    """Lines about how far groups of runs are behind the best one.

    The runs of a group differ in one setting alone. Groups are compared by the values of that
    setting that both have; with fewer than two of them they are not compared.
    """
    means = [
        (group.name, finite)
        for group in groups(report, key)
        if (finite := {k: v for k, v in group.by_value(report.metric).items() if math.isfinite(v)})
    ]
    if len(means) < 2:
        return []
    best_name, best = max(means, key=lambda item: report.mode.sign * fmean(item[1].values()))
    behind = [
        (name, [report.mode.sign * (best[value] - own[value]) for value in best if value in own])
        for name, own in means
        if own is not best
    ]
    few = [name for name, differences in behind if len(differences) < 2]
    behind = [(name, differences) for name, differences in behind if len(differences) > 1]
    compared = holm([by_t(differences) for _, differences in behind])
    lines = [
        f"{name} is behind {best_name} in {_label(report)} by "
        f"{_in_words(key, difference, differences)}"
        for (name, differences), difference in zip(behind, compared, strict=True)
    ]
    if few:
        lines.append(
            f"not compared with {best_name}, the best in {_label(report)}, for want of two values "
            f"of {key} that both have: {first_names(few)}"
        )
    return lines


def _in_words(key: str, difference: Difference, differences: Sequence[float]) -> str:
    told = f"{difference.mean:.4f}"
    if difference.high is not None:
        told += f" ± {difference.high - difference.mean:.4f}"
    told += f" ({len(differences)} values of {key}, p {difference.p:.2g} after Holm)"
    if difference.clear or difference.high is None:
        return told
    if not difference.mean:
        return f"{told}: no difference"
    wanted = seeds_needed(differences)
    about = f"about {wanted}" if wanted <= MOST_SEEDS else f"more than {MOST_SEEDS}"
    return f"{told}: not clear, a difference of this size needs {about} values"


def _label(report: Comparison) -> str:
    return dict(SHOWN).get(report.metric, report.metric)
