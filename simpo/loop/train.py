"""Trains one run, top to bottom."""

from __future__ import annotations

import time
from pathlib import Path

from simpo.backend import build_backend
from simpo.config.choices import BenchmarkKind
from simpo.config.errors import Pruned, Stopped
from simpo.config.flat import trajectory
from simpo.config.schema import RunConfig
from simpo.data.loader import steps_ahead
from simpo.loop import console
from simpo.loop.evaluate import held_out_metrics
from simpo.loop.history import History
from simpo.loop.optim import set_learning_rate
from simpo.loop.rates import learning_rate
from simpo.loop.save import save_results
from simpo.loop.score import summarise
from simpo.loop.setup import Parts, set_up, with_references
from simpo.loop.step import finite_update, speed
from simpo.loop.tracker import Tracker
from simpo.run import processes, progress
from simpo.run.folder import trained_folder
from simpo.run.pruning import Pruning, read_pruning, trained_values
from simpo.run.signals import StopRequest, stopped_by


@console.libraries_quiet()
def train(run: RunConfig) -> Path:
    """Train, evaluate and save one run, or continue it where it stopped. Nothing is done if its
    model is saved and has yet to be judged.

    Several processes of a run each call this; `run` is the same for all.

    Returns:
        The run's folder, with the model and results.json.

    Raises:
        ConfigError, DataError: the settings or the data cannot be used.
        RunError: the run had to stop; the same command continues it.
        Stopped: a signal or Ctrl-C asked the run to stop; it has been saved.
        Pruned: a search found the run hopeless.
    """
    cfg = run.train
    backend = build_backend(run.backend, cfg.precision, cfg.max_grad_norm)
    if run.benchmark.kind is not BenchmarkKind.none:
        # Rank 0 decides for all: a rank that starts late could find the model judged meanwhile.
        trained = backend.broadcast(trained_folder(run) if backend.is_main else None)
        if trained is not None:
            backend.close()
            return trained
    parts = set_up(run, backend)
    folder, plan, store = parts.folder, parts.plan, parts.store
    settings = trajectory(run)
    pruning = backend.broadcast(read_pruning(folder.path) if backend.is_main else None)
    pruned = ""
    with (
        folder.recording_failure(),
        StopRequest() as stop,
        Tracker(run.tracker, folder.path, run.name, settings, writes=backend.is_main) as tracker,
        progress.bar("train", plan.total_steps, "step", stays=True) as bar,
        processes.reporting_lost_ranks(),
    ):
        if run.loss.needs_reference:
            parts = with_references(run, parts)
        step, metrics_bytes, damaged = store.resume(parts.wrapped, parts.optimizer)
        tracker.begin(metrics_bytes)
        history = History(run, backend.broadcast(tracker.history()), tracker, store)
        progress.say(
            *parts.start_lines,
            *damaged,
            *dict.fromkeys([*parts.train.data.notes, *parts.test.data.notes]),
            f"run    {folder.path}" + (f", continued after step {step}" if step else ""),
        )
        folder.write_status("running", step, plan.total_steps)
        begin = time.perf_counter()
        if step == 0:
            history.log(0, "eval", held_out_metrics(run, parts, 0))
        bar.begin_at(step)
        packed = steps_ahead(plan, parts.train, step, in_thread=backend.on_gpu)
        while step < plan.total_steps and not history.out_of_patience:
            step_begin = time.perf_counter()
            rate = learning_rate(cfg, step, plan.total_steps)
            set_learning_rate(parts.optimizer, rate)
            indices, rows = next(packed)
            sums, grad_norm = finite_update(run, parts, rows, step)
            step += 1
            last = step == plan.total_steps
            metrics: dict[str, float] = {}
            if last or step % cfg.log_every == 0:
                metrics = {
                    **summarise(run.loss, sums, run.model.router_aux_weight),
                    "grad_norm": grad_norm,
                    "learning_rate": rate,
                    "epoch": step / plan.steps_per_epoch,
                }
                metrics |= speed(parts, indices, rows, time.perf_counter() - step_begin)
                history.log(step, "train", metrics)
            took_s = time.perf_counter() - step_begin
            bar.advance(text=console.metrics_text(metrics) or None, took_s=took_s)
            if cfg.eval_every and step % cfg.eval_every == 0 and not last:
                history.log(step, "eval", held_out_metrics(run, parts, step))
                if pruning and (pruned := _pruned(run, parts, history, pruning)):
                    folder.write_status("running", step, plan.total_steps)
                    break
            store.best = history.best_step
            store.finish_pending(wait=False)
            stopping = backend.any(bool(stop.name))
            due = cfg.checkpoint_every and step % cfg.checkpoint_every == 0
            if due or last or stopping or store.best == step or history.out_of_patience:
                store.save(step, parts.wrapped, parts.optimizer, tracker.num_bytes())
                folder.write_status("running", step, plan.total_steps)
            if stopping:
                break
        packed.close()
        store.finish_pending(wait=True)
        trained_s = time.perf_counter() - begin
        bar.close()
        if pruned:
            raise Pruned(pruned)
        if step == plan.total_steps and not backend.any(bool(stop.name)):
            history.log(step, "eval", held_out_metrics(run, parts, step))
        if backend.any(bool(stop.name)):
            raise _stopped(run, parts, stop, f"saved after step {step}")
        save_results(run, parts, history, step, trained_s)
        if run.benchmark.kind is not BenchmarkKind.none and backend.any(bool(stop.name)):
            raise _stopped(run, parts, stop, "trained, not yet judged,")
    backend.close()
    return folder.path


def _pruned(run: RunConfig, parts: Parts, history: History, pruning: Pruning) -> str:
    """Why the run is hopeless after its newest evaluation, in a line; empty if it is not.

    All processes call it and get what rank 0 finds.
    """
    reason = ""
    if parts.backend.is_main:
        values = trained_values(run.monitor.metric, history.evaluations)
        if values and pruning.is_hopeless(run.monitor.mode, values):
            step = max(values)
            reason = (
                f"{run.monitor.metric} {values[step]:.4f} after step {step} is hopeless by "
                f"Optuna's {pruning.pruner.value} pruner, beside {len(pruning.trials)} trials"
            )
    return parts.backend.broadcast(reason)


def _stopped(run: RunConfig, parts: Parts, stop: StopRequest, done: str) -> Stopped:
    """The error after a signal in any process; all processes call it."""
    name = next(name for name in parts.backend.gather([stop.name]) if name)
    return stopped_by(name, f"{done} in {parts.folder.path}", run.train.stopped_exit_code)
