"""What of the rounds of a run is done, what was measured, and when they end. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simpo.config.choices import RoundStart
from simpo.config.schema import RunConfig
from simpo.launch.rounds.phases import Phase, phases, replies_folder, run_folder
from simpo.run import rounds
from simpo.run.best import best_step, check_monitor, evaluations_without_gain
from simpo.run.files import NEW_RUN, read_json, read_results
from simpo.run.rounds import Kind

MEASURES = {
    "reward": "reply_reward",
    "reward_spread": "reply_reward_spread",
    "pass_rate": "reply_pass_rate",
    "win_rate": "reply_win_rate",
    "gain_rate": "reply_gain_rate",
    "reply_tokens": "reply_tokens",
    "repetition": "reply_repetition",
    "entropy": "reply_entropy",
    "kl": "reply_kl",
    "distinct": "reply_distinct",
    "cut": "reply_cut",
    "without_pair": "reply_without_pair",
}
"""Metrics of a model's replies: key in measures.json, and in metrics.jsonl."""
SHOWN = {
    "reward": "reply_reward",
    "pass rate": "reply_pass_rate",
    "win rate": "reply_win_rate",
    "tokens": "reply_tokens",
    "KL": "reply_kl",
}
"""What is printed after a round, and its key in metrics.jsonl."""
AGAINST_FIRST = ("reply_win_rate", "reply_kl")
"""Those that compare a model with the first."""


def done_file(root: Path, phase: Phase) -> Path:
    """The file that says that a phase is done."""
    return rounds.done_file(root, phase.round, phase.kind, phase.part)


def is_done(root: Path, phase: Phase) -> bool:
    """Whether a phase is done."""
    return done_file(root, phase).is_file()


def next_phases(run: RunConfig, root: Path) -> list[Phase]:
    """The phases that come next and run at the same time; none at the end."""
    todo = [] if rounds.ended_early(root) else [p for p in phases(run) if not is_done(root, p)]
    return [p for p in todo if (p.round, p.kind) == (todo[0].round, todo[0].kind)]


def measured_rounds(root: Path) -> list[int]:
    """The rounds whose model has been measured; 0 is the first model."""
    found = 0
    while is_done(root, Phase(found + 1, Kind.annotate)):
        found += 1
    return list(range(found))


def measured(root: Path, number: int) -> dict[str, dict[str, float]]:
    """Metrics of the model of a round, by `eval` (held-out prompts) and `train`; 0: the first.

    Those of its replies, and the held-out metrics of the run that trained it.

    Raises:
        DamagedError: a file is not as it was written.
    """
    measures: Mapping[str, Any] = read_json(
        replies_folder(root, number + 1) / "measures.json", NEW_RUN
    )
    found = {
        prefix: {
            MEASURES[key]: value
            for key, value in split.items()
            if key in MEASURES and value is not None
        }
        for prefix, name in (("eval", "test"), ("train", "train"))
        if (split := measures.get(name))
    }
    if number:
        trained = read_results(run_folder(root, number))
        found["eval"] = {**trained.get("eval_after", {}), **found.get("eval", {})}
    return found


def measured_line(root: Path, number: int) -> str:
    """What the held-out replies of a round's model are like, in a line.

    Raises:
        DamagedError: a file is not as it was written.
    """
    ((model, *values),) = _shown({number: measured(root, number)["eval"]})
    shown = ", ".join(f"{name} {value}" for name, value in values)
    return f"{model[1]}: held-out replies: {shown}"


def rounds_table(evaluations: Mapping[int, Mapping[str, float]]) -> list[dict[str, str]]:
    """The models of all rounds compared by their held-out replies, a line each.

    Args:
        evaluations: held-out metrics by round; 0: the first model.
    """
    lines = [dict(line) for line in _shown(evaluations)]
    names = [name for name in ("model", *SHOWN) if any(name in line for line in lines)]
    return [{name: line.get(name, "-") for name in names} for line in lines]


def _shown(evaluations: Mapping[int, Mapping[str, float]]) -> list[list[tuple[str, str]]]:
    """Names and values of what is shown of each model; the first is not compared with itself."""
    return [
        [
            ("model", f"round {number}" if number else "first model"),
            *(
                (name, f"{metrics[key]:.3f}")
                for name, key in SHOWN.items()
                if key in metrics and (number or key not in AGAINST_FIRST)
            ),
        ]
        for number, metrics in sorted(evaluations.items())
    ]


def reason_to_end(run: RunConfig, evaluations: Mapping[int, Mapping[str, float]]) -> str:
    """Why no further round begins, in a line; empty if one does.

    Args:
        evaluations: held-out metrics by round.

    Raises:
        ConfigError: the rounds are compared by a metric that they do not have.
    """
    wanted, newest = run.rounds, max(evaluations)
    if newest and needs_best(run):
        check_monitor(run.monitor, [*evaluations[newest]])
    for limit in exceeded(run, evaluations, newest):
        return f"the model of round {newest} {limit}"
    if wanted.patience and evaluations_without_gain(run.monitor, evaluations) >= wanted.patience:
        best = best_step(run.monitor, evaluations)
        return (
            f"rounds.patience={wanted.patience} rounds without a better {run.monitor.metric} than "
            f"that of round {best}"
        )
    return ""


def nothing_to_learn(root: Path, train: Mapping[str, float], number: int) -> str:
    """Why a round cannot train, in a line; empty if it can.

    Args:
        train: metrics of its replies to train prompts.
        number: of the round.

    Raises:
        DamagedError: a file is not as it was written.
    """
    if train.get("reply_without_pair") != 1:
        return str(
            read_json(done_file(root, Phase(number, Kind.annotate)), NEW_RUN).get("ends", "")
        )
    return f"no prompt of round {number} has replies with different scores: nothing to learn from"


def needs_best(run: RunConfig) -> bool:
    """Whether models are compared by `monitor.metric`."""
    return run.rounds.start is RoundStart.best or run.rounds.patience > 0


def exceeded(
    run: RunConfig, evaluations: Mapping[int, Mapping[str, float]], number: int
) -> Sequence[str]:
    """The limits that a round's model is beyond, in words."""
    limits, first, now = run.rounds, evaluations[0], evaluations[number]
    found = []
    if number and limits.max_kl is not None and now.get("reply_kl", 0.0) > limits.max_kl:
        found.append(
            f"is {now['reply_kl']:.3f} nats per token from the first, beyond rounds.max_kl="
            f"{limits.max_kl}"
        )
    length = now.get("reply_tokens", 0.0) / (first.get("reply_tokens") or 1.0)
    if number and limits.max_length_ratio is not None and length > limits.max_length_ratio:
        found.append(
            f"writes {length:.2f} times as much as the first, beyond rounds.max_length_ratio="
            f"{limits.max_length_ratio}"
        )
    return found


def kept_round(run: RunConfig, evaluations: Mapping[int, Mapping[str, float]]) -> int:
    """The round whose model is kept: the best, or the newest; within the limits, if one is."""
    trained = [number for number in sorted(evaluations) if number]
    within = [number for number in trained if not exceeded(run, evaluations, number)] or trained[:1]
    if needs_best(run):
        best = best_step(run.monitor, {number: evaluations[number] for number in within})
        return best or within[-1]
    return within[-1]


def metric_lines(
    evaluations: Mapping[int, Mapping[str, Mapping[str, float]]],
) -> list[tuple[int, str, dict[str, float]]]:
    """What metrics.jsonl gets: round, prefix and metrics."""
    return [
        (number, prefix, dict(found[prefix]))
        for number, found in sorted(evaluations.items())
        for prefix in ("train", "eval")
        if found.get(prefix)
    ]
