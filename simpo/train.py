"""Trains one run, top to bottom: `python -m simpo.train model=mistral_base loss.beta=2.5`.

`main` composes and checks the settings without importing torch; `train` does the rest.
"""

from __future__ import annotations

from simpo.run.signals import exit_on_signals, set_stopped_exit_code

if __name__ == "__main__":
    exit_on_signals()  # importing what follows takes a while

import os
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from simpo.config.check import build_run, register_own_losses, trajectory
from simpo.config.composer import Composer
from simpo.config.errors import (
    INTERRUPTED,
    ConfigError,
    SimpoError,
    Stopped,
    exit_codes,
    first_line,
)
from simpo.config.explain import explain
from simpo.config.paths import config_dir
from simpo.config.renamed import rename_overrides
from simpo.config.schema import RunConfig
from simpo.run import processes
from simpo.run.folder import refuse_unwritable
from simpo.run.unused import hide_unused

USAGE = """
usage: simpo train [key=value ...] [-m] [--cfg job] [--config-dir DIR] [--help [SECTION ...]]

Train one run, or with -m a sweep of runs.

  simpo train                                            the built-in demo
  simpo train model=mistral_base data=ultrafeedback loss.beta=2.5
  simpo train ... --cfg job                              print the composed run, run nothing
  simpo train -m loss.beta=2,2.5 loss.gamma_beta_ratio=0.3,0.5     one run each
  simpo train -m launcher=slurm ...                      the same as one array of jobs
  simpo train loss=dpo --help loss                       the settings of a section
"""


def main(words: Sequence[str]) -> None:
    """Train the run or sweep of a command line, given as its words.

    Raises:
        ConfigError: the settings cannot be composed or used.
        SimpoError: the run failed or was stopped.
    """
    # Makes Hydra raise, instead of printing its own message and exiting with 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    parser = get_args_parser()
    parser.error = _refuse_options  # type: ignore[method-assign]
    # Hydra reads the command line itself.
    sys.argv[1:] = rename_overrides(words)
    arguments = parser.parse_args()
    _check_options(arguments)
    register_own_losses(arguments.overrides)
    composer = Composer(arguments.config_dir, arguments.config_name or "train")
    # Checked before the first member runs, and before Hydra prints a line of its own.
    checked = arguments.multirun or any(word.startswith("+") for word in arguments.overrides)
    if checked and (found := explain(arguments.overrides, arguments.multirun, composer)):
        raise ConfigError(found)
    try:
        run_composed()
    except SimpoError:
        raise
    # Hydra raises any type, such as TypeError for a group set to a list of numbers.
    except Exception as error:
        problems = explain(arguments.overrides, arguments.multirun, composer)
        if not problems and not isinstance(error, (HydraException, OmegaConfBaseException)):
            raise
        raise ConfigError(problems or [first_line(error)]) from error


@hydra.main(version_base="1.3", config_path=str(config_dir("conf")), config_name="train")
def run_composed(cfg: DictConfig) -> float | None:
    """Run one composed configuration and return its `monitor.metric`, for sweepers."""
    several = HydraConfig.get().mode is RunMode.MULTIRUN
    try:
        run = build_run(cfg)
    except SimpoError:
        if several:
            raise
        with exit_codes():
            raise
    # Hydra prints a heading above an exception, but not above an exit. Of several runs it goes on
    # with the others, and raises at the end.
    try:
        return start(run).get(run.monitor.metric)
    except SimpoError as error:
        if several and not isinstance(error, Stopped):
            raise
        with exit_codes():
            raise
    except Exception:
        if several:
            raise
        traceback.print_exc()
        sys.exit(1)


def start(run: RunConfig) -> dict[str, float]:
    """Train a run in this process (alone, or as a rank that a launcher started) or in processes
    that are started for it; see `train`.
    """
    from simpo.loop.tracker import check_login

    set_stopped_exit_code(run.train.stopped_exit_code)
    refuse_unwritable(run)
    check_login(run.tracker)
    processes.join_slurm()
    count = processes.num_processes_to_start(run.backend)
    if count is not None:
        return processes.run_in_processes(count, run)
    hide_unused(run)
    with processes.reporting_lost_ranks():
        return train(run)


def train(run: RunConfig) -> dict[str, float]:
    """Train, evaluate and save one run, or continue it where it stopped.

    Several processes of a run each call this; `run` is the same for all.

    Returns:
        The held-out metrics of the saved model; empty if nothing is held out.

    Raises:
        ConfigError, DataError: the settings or the data cannot be used.
        RunError: the run had to stop; the same command continues it.
        Stopped: a signal or Ctrl-C asked the run to stop; it has been saved.
    """
    # Imported here, so that a fault in the settings is answered before torch is loaded.
    from simpo.data.plan import pairs_of_step
    from simpo.loop import console
    from simpo.loop.evaluate import held_out_metrics
    from simpo.loop.history import History
    from simpo.loop.optim import learning_rate, set_learning_rate
    from simpo.loop.save import save_results
    from simpo.loop.score import summarise
    from simpo.loop.setup import set_up, with_references
    from simpo.loop.step import finite_update, speed
    from simpo.loop.tracker import Tracker
    from simpo.run.best import check_monitor
    from simpo.run.signals import StopRequest

    console.quiet_libraries()
    cfg = run.train
    parts = set_up(run)
    backend, folder, plan, store = parts.backend, parts.folder, parts.plan, parts.store
    settings = trajectory(run)
    with (
        folder.recording_failure(),
        StopRequest() as stop,
        Tracker(run.tracker, folder.path, run.name, settings, writes=backend.is_main) as tracker,
        processes.reporting_lost_ranks(),
    ):
        if run.loss.needs_reference:
            parts = with_references(run, parts, tracker)
        manifest, damaged = store.resume(parts.wrapped, parts.optimizer)
        step = manifest.step if manifest else 0
        tracker.cut_back(manifest.metrics_bytes if manifest else 0)
        history = History(run, backend.broadcast(tracker.history()), tracker, store)
        tracker.print(
            *parts.start_lines,
            *damaged,
            *dict.fromkeys([*parts.train.data.notes, *parts.test.data.notes]),
            f"run    {folder.path}" + (f", continued after step {step}" if step else ""),
        )
        folder.write_status("running", step, plan.total_steps)
        begin = time.perf_counter()
        if step == 0:
            history.log(0, "eval", held_out_metrics(run, parts, tracker, 0))
            if cfg.keep_best or cfg.patience_evals:
                check_monitor(run.monitor, history.evaluations.get(0, {}))
        while step < plan.total_steps and not history.out_of_patience:
            step_begin = time.perf_counter()
            set_learning_rate(parts.optimizer, rate := learning_rate(cfg, step, plan.total_steps))
            indices = pairs_of_step(plan, step)
            rows = list(parts.train.rows(indices))
            sums, grad_norm = finite_update(run, parts, rows, step)
            step += 1
            last = step == plan.total_steps
            metrics: dict[str, float] = {}
            if last or step % cfg.log_every == 0:
                metrics = {
                    **summarise(run.loss, backend.sum(sums), run.model.router_aux_weight),
                    "grad_norm": grad_norm,
                    "learning_rate": rate,
                    "epoch": step / plan.steps_per_epoch,
                }
                metrics |= speed(parts, indices, rows, time.perf_counter() - step_begin)
                history.log(step, "train", metrics)
            tracker.progress(step, plan.total_steps, metrics)
            if cfg.eval_every and step % cfg.eval_every == 0 and not last:
                history.log(step, "eval", held_out_metrics(run, parts, tracker, step))
            store.best = history.best_step
            store.finish_pending(wait=False)
            stopping = backend.any(bool(stop.name))
            due = cfg.checkpoint_every and step % cfg.checkpoint_every == 0
            if due or last or stopping or store.best == step or history.out_of_patience:
                store.save(step, parts.wrapped, parts.optimizer, tracker.num_bytes())
                folder.write_status("running", step, plan.total_steps)
            if stopping:
                break
        store.finish_pending(wait=True)
        trained_s = time.perf_counter() - begin
        tracker.end_progress()
        if step == plan.total_steps and not backend.any(bool(stop.name)):
            history.log(step, "eval", held_out_metrics(run, parts, tracker, step))
        if backend.any(bool(stop.name)):
            name = next(name for name in backend.gather([stop.name]) if name)
            interrupted = name == "SIGINT"
            raise Stopped(
                f"{'interrupted' if interrupted else name}: saved after step {step} in "
                f"{folder.path} (the same command continues)",
                INTERRUPTED if interrupted else cfg.stopped_exit_code,
            )
        after = save_results(run, parts, history, tracker, step, trained_s)
    backend.close()
    return after


def _refuse_options(message: str) -> NoReturn:
    """Replaces argparse's usage, which does not mention settings."""
    raise ConfigError(
        [f"{message} (settings are key=value, such as train.learning_rate=1e-6; see --help)"]
    )


def _check_options(arguments: Namespace) -> None:
    """Refuse options for which Hydra would print a traceback.

    Raises:
        ConfigError: options exclude each other, or are not supported.
    """
    modes = ("run", "multirun", "cfg", "info", "shell_completion")
    chosen = [f"--{mode.replace('_', '-')}" for mode in modes if getattr(arguments, mode)]
    if len(chosen) > 1:
        raise ConfigError([f"{', '.join(chosen)}: exclude each other (give one)"])
    if arguments.resolve and not (arguments.cfg or arguments.help):
        raise ConfigError(["--resolve: only with --cfg"])
    if arguments.experimental_rerun:
        raise ConfigError(["--experimental-rerun: not supported (see command.txt of a run)"])


if __name__ == "__main__":
    from simpo.__main__ import main as dispatch

    dispatch(["train", *sys.argv[1:]])
