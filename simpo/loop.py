"""What `train` does in and after its steps: update, evaluate, measure, save the result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from simpo import console
from simpo.config.errors import RunError
from simpo.config.schema import RunConfig
from simpo.data.pairs import PackedPairs
from simpo.history import History
from simpo.model import cost, export
from simpo.model.generate import greedy_replies, reply_metrics
from simpo.optim import change_notes
from simpo.setup import Parts
from simpo.step import NonFiniteError, columns, evaluate, update
from simpo.tracker import Tracker


def finite_update(
    run: RunConfig, parts: Parts, rows: Sequence[PackedPairs], step: int
) -> tuple[Tensor, float]:
    """Update number `step` (from 0) on this process's rows; see `simpo.step.update`.

    Raises:
        RunError: loss or gradient is not finite; nothing was updated, and the pairs are named.
    """
    try:
        return update(parts.wrapped, parts.optimizer, rows, run.loss, parts.backend)
    except NonFiniteError as error:
        places = ", ".join(parts.train.data.pairs[i].place for i in error.pairs[:8])
        raise RunError(f"step {step + 1}: {error}; not updated; pairs: {places}") from error


def speed(
    parts: Parts, indices: np.ndarray, rows: Sequence[PackedPairs], seconds: float
) -> dict[str, float]:
    """How fast a step was: pairs and tokens of all processes, arithmetic of this one.

    Args:
        indices: the pairs of the step.
        rows: this process's rows.
    """
    flops = sum(parts.flops.of_row(row) for row in rows)
    return {
        "pairs_per_s": len(indices) / seconds,
        "tokens_per_s": int(parts.train.num_tokens[indices].sum()) / seconds,
        **cost.speed(flops / seconds, parts.backend.device),
    }


def held_out_metrics(run: RunConfig, parts: Parts, tracker: Tracker, step: int) -> dict[str, float]:
    """Metrics of the held-out pairs, and of replies to some; empty where nothing is held out.

    The numbers of each pair and the replies are kept in the run's folder.
    """
    folder, backend, test = parts.folder, parts.backend, parts.test
    sampled = test.data.pairs[: run.sample.num_prompts]
    metrics: dict[str, float] = {}
    if len(test):
        tracker.say(f"held out: {len(test)} pairs, {len(sampled)} replies ...")
        found, scores = evaluate(parts.wrapped, test.rows(), run.loss, backend)
        metrics |= found
        placed = ((test.data.pairs[i].place, numbers) for i, numbers in scores.items())
        folder.write_scores(step, columns(run.loss), placed)
    if sampled:
        with backend.replying(parts.policy):
            replies = greedy_replies(
                parts.policy, parts.chat, sampled, run.sample.max_new_tokens, backend.device
            )
        metrics |= reply_metrics(replies)
        folder.write_replies(step, replies)
    return metrics


def save_results(
    run: RunConfig, parts: Parts, history: History, tracker: Tracker, step: int, trained_s: float
) -> dict[str, float]:
    """Save the model, the best one where that was kept, with its card; upload it if asked to.

    Returns:
        The held-out metrics of the saved model; empty where nothing is held out.
    """
    folder, backend = parts.folder, parts.backend
    kept = history.best_step or step
    if kept != step and (fault := parts.store.load(kept, parts.wrapped, parts.optimizer)):
        tracker.say(f"the best model, after step {kept}, is lost ({fault}): the last is saved")
        kept = step
    weights = backend.full_weights(parts.wrapped, parts.policy)
    results = console.Results(
        before=history.evaluations.get(0, {}),
        after=history.evaluations.get(kept, {}),
        findings=history.findings,
    )
    notes: list[str] = []
    if backend.is_main:
        now = weights or dict(parts.policy.model.named_parameters())
        notes = change_notes(parts.first_weights, now)
        export.save_model(parts.policy, weights, parts.chat, folder.path / "model")
    folder.write_json(
        "results.json",
        {
            "eval_before": results.before,
            "eval_after": results.after,
            "findings": results.findings,
            "train": {"steps": step, "model_step": kept, "this_process_s": trained_s},
        },
    )
    said = export.publish(run, folder.path, results) if backend.is_main else []
    folder.write_status("finished", step, parts.plan.total_steps)
    tracker.say(*notes, "", *console.end_lines(results, folder.path, kept, step), *said)
    return results.after
