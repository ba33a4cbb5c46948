"""What of the rounds of a run is done, what was measured, and when they end. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simpo.config.choices import RoundStart
from simpo.config.errors import DamagedError
from simpo.config.rounds import REWARD
from simpo.config.schema import RunConfig
from simpo.data.plan import TrainPlan, build_plan
from simpo.launch.rounds.phases import phases, replies_folder
from simpo.loop.rates import changes_weights
from simpo.run.best import Evaluations, best_step, evaluations_without_gain
from simpo.run.files import read_json, read_results, read_text
from simpo.run.rounds import Kind, Phase, done_file, ended_early, run_folder

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
AT_ZERO = (
    "a run of 1 step, and the warm-up begins at learning rate 0: no weight would change (lower it, "
    "or more pairs by on_policy.num_prompts, on_policy.seeds, on_policy.max_new_tokens or "
    "rounds.prompts=all, or train.warmup_ratio=0)"
)
"""Why too few pairs teach nothing, and what helps."""
AGAINST_FIRST = ("reply_win_rate", "reply_kl")
"""Those that compare a model with the first."""


def is_done(root: Path, phase: Phase) -> bool:
    """Whether a phase is done."""
    return done_file(root, phase).is_file()


def noted(root: Path, phase: Phase) -> dict[str, Any]:
    """What a phase that is done has noted: its seconds, what it did, what later phases rely on;
    empty if it is not done.

    Raises:
        DamagedError: the file cannot be read.
    """
    remedy = "remove it: the same command writes it anew"
    found: dict[str, Any] = read_json(done_file(root, phase), remedy)
    return found


def next_phases(run: RunConfig, root: Path) -> list[Phase]:
    """The phases that come next and run at the same time; none at the end.

    Raises:
        DamagedError: ended.txt cannot be read.
    """
    every = [*phases(run)]
    if ended_early(root):
        # What was done before may have to be done again: a user removes what is damaged.
        last = max((phase.round for phase in every if is_done(root, phase)), default=0)
        every = [p for p in every if p.round < last + (p.kind is not Kind.train)]
    todo = [phase for phase in every if not is_done(root, phase) and not _is_scored(root, phase)]
    return [p for p in todo if (p.round, p.kind) == (todo[0].round, todo[0].kind)]


def _is_scored(root: Path, phase: Phase) -> bool:
    """Whether a phase generates replies that have been scored, in any number of parts."""
    return phase.kind is Kind.generate and is_done(root, Phase(phase.round, Kind.annotate))


def measured_rounds(root: Path) -> list[int]:
    """The rounds whose model has been measured; 0 is the first model."""
    found = 0
    while is_done(root, Phase(found + 1, Kind.annotate)) and (
        found == 0 or is_done(root, Phase(found, Kind.train))
    ):
        found += 1
    return list(range(found))


def measured(root: Path, number: int) -> dict[str, dict[str, float]]:
    """Metrics of the model of a round, by `eval` (held-out prompts) and `train`; 0: the first.

    Those of its replies, and the held-out metrics of the run that trained it.

    Raises:
        DamagedError: a file is not as it was written.
    """
    measures = _measures(root, number + 1)
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
        found["eval"] = {**_results(root, number)["eval_after"], **found["eval"]}
    return found


def _results(root: Path, number: int) -> dict[str, Any]:
    """What results.json holds of the run of a round.

    Raises:
        DamagedError: it is not as it was written.
    """
    try:
        found = read_results(run_folder(root, number))
    except DamagedError as error:
        path, fault, _ = error.args
        raise DamagedError(path, fault, anew(root, number)) from error
    if not found:
        path = run_folder(root, number) / "results.json"
        raise DamagedError(path, "is missing", anew(root, number))
    return found


def _measures(root: Path, number: int) -> dict[str, dict[str, float | None]]:
    """What measures.json holds of the replies with which a round begins.

    Raises:
        DamagedError: it is not as it was written.
    """
    path = replies_folder(root, number) / "measures.json"
    done = done_file(root, Phase(number, Kind.annotate))
    remedy = f"remove it and {done}: the same command writes both anew"
    if not path.is_file():
        raise DamagedError(path, "is missing", f"remove {done}: the same command writes both anew")
    measures: dict[str, dict[str, float | None]] = read_json(path, remedy)
    whole = measures.get("test") and all(
        isinstance(split, dict)
        and all(type(value) in (int, float, type(None)) for value in split.values())
        for split in measures.values()
    )
    if not whole:
        raise DamagedError(path, "lacks numbers of held-out replies", remedy)
    return measures


def anew(root: Path, number: int) -> str:
    """What to do if what training left is damaged: checkpoints are gone."""
    done = done_file(root, Phase(number, Kind.train))
    return f"remove {run_folder(root, number)} and {done}: the same command trains it anew"


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
    """
    wanted, newest = run.rounds, max(evaluations)
    for limit in exceeded(run, evaluations, newest):
        return f"the model of round {newest} {limit}"
    known = _with_metric(run, evaluations)
    if wanted.patience and evaluations_without_gain(run.monitor, known) >= wanted.patience:
        best = best_step(run.monitor, known)
        return (
            f"rounds.patience={wanted.patience} rounds without a better {run.monitor.metric} than "
            f"that of round {best}"
        )
    return ""


def _with_metric(run: RunConfig, evaluations: Evaluations) -> Evaluations:
    """The rounds that have `monitor.metric`, such as a loss of held-out pairs, if it had some."""
    return {n: found for n, found in evaluations.items() if run.monitor.metric in found}


def nothing_to_learn(run: RunConfig, pairs: int, number: int) -> str:
    """Why a round cannot train, in a line; empty if it can.

    Args:
        pairs: of its replies to train prompts.
        number: of the round.
    """
    if not pairs:
        return (
            f"no prompt of round {number} has replies with different scores: nothing to learn from"
        )
    if run.rounds.static_weight or changes_weights(run.train, plan_of(run, pairs)):
        return ""
    return (
        f"train.pairs_per_step: the replies of round {number} give {pairs} "
        f"pair{'s' * (pairs > 1)}, {AT_ZERO}"
    )


def plan_of(run: RunConfig, pairs: int) -> TrainPlan:
    """The steps of a round with so many pairs."""
    train = run.train
    return build_plan(pairs, train.pairs_per_step, train.epochs, train.max_steps, train.seed)


def pairs_of(root: Path, number: int) -> int:
    """The pairs that a round's replies to train prompts gave.

    Raises:
        DamagedError: they cannot be read.
    """
    path, done = replies_folder(root, number) / "train.jsonl", Phase(number, Kind.annotate)
    remedy = f"remove {done_file(root, done)}: the same command writes both anew"
    if (text := read_text(path, remedy)) is None:
        raise DamagedError(path, "is missing", remedy)
    return text.count("\n")


def needs_best(run: RunConfig) -> bool:
    """Whether models are compared by `monitor.metric`."""
    return run.rounds.start is RoundStart.best or run.rounds.patience > 0


def exceeded(
    run: RunConfig, evaluations: Mapping[int, Mapping[str, float]], number: int
) -> Sequence[str]:
    """The limits that a round's model is beyond, in words."""
    limits, first, now = run.rounds, evaluations[0], evaluations[number]
    found = []
    if number and REWARD not in now:
        found.append(
            "gives no held-out reply with a score: they are empty, cut off "
            "(on_policy.max_new_tokens, keep_cut) or their ratings cannot be read"
        )
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
        known = _with_metric(run, {number: evaluations[number] for number in within})
        return best_step(run.monitor, known) or within[-1]
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
