"""Saves the result of a run: the model, its card and curves, results.json."""

from __future__ import annotations

from simpo.config.schema import RunConfig
from simpo.loop import console
from simpo.loop.history import History
from simpo.loop.optim import change_notes
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
    weights = backend.full_weights(parts.wrapped, parts.policy)
    results = console.Results(
        before=history.evaluations.get(0, {}),
        after=history.evaluations.get(kept, {}),
        findings=history.findings,
    )
    notes: list[str] = []
    if backend.is_main:
        now = weights or dict(parts.policy.model.named_parameters())
        dtype = export_dtype(run)
        notes = change_notes(parts.sampled_before, now, dtype)
        save_model(parts.policy, weights, parts.chat, folder.path / "model", dtype)
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
    folder.write_status("finished", step, parts.plan.total_steps)
    say(*notes, "", *console.end_lines(results, folder.path, kept, step), *messages)
