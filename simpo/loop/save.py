"""Saves the result of a run: the model, its card and curves, results.json."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from simpo.config.choices import BenchmarkKind
from simpo.config.schema import RunConfig
from simpo.loop import console
from simpo.loop.history import History
from simpo.loop.optim import change_notes, sampling
from simpo.loop.publish import export_dtype, publish
from simpo.loop.setup import Parts
from simpo.model.export import save_model
from simpo.run.progress import say


def save_results(
    run: RunConfig, parts: Parts, history: History, step: int, trained_s: float
) -> None:
    """Save the last model, or the best with train.keep_best, with its card; upload if asked to."""
    folder, backend = parts.folder, parts.backend
    kept = history.best_step or step
    if kept != step and (fault := parts.store.load(kept, parts.wrapped, parts.optimizer)):
        say(f"the best model, after step {kept}, is damaged ({fault}): the last is saved")
        kept = step
    say("saving the model ...")
    weights = backend.whole(parts.wrapped, parts.policy.saved())
    results = console.Results(
        before=history.evaluations.get(0, {}),
        after=history.evaluations.get(kept, {}),
        findings=history.findings,
    )
    samples: dict[str, Tensor] = {}
    notes: list[str] = []
    try:
        if backend.is_main:
            dtype = export_dtype(run)
            weights = sampling(weights, samples)
            save_model(parts.policy, weights, parts.chat, folder.path / "model", dtype)
            notes = change_notes(parts.sampled_before, samples, dtype)
    finally:
        # Processes gather a weight together, so all must ask for all, also after a failure.
        deque(weights, maxlen=0)
    folder.write_json(
        "results.json",
        {
            "eval_before": results.before,
            "eval_after": results.after,
            "findings": results.findings,
            "train": {"steps": step, "model_step": kept, "this_process_s": trained_s},
        },
    )
    messages = publish(run, folder.path, results) if backend.is_main else []
    if run.benchmark.kind is BenchmarkKind.none:
        folder.write_status("finished", step, parts.plan.total_steps)
    else:
        folder.write_status("running", step, parts.plan.total_steps, judging=run.benchmark.name)
    say(*notes, "", *console.end_lines(results, folder.path, kept, step), *messages)
