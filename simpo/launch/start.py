"""Starts a run: in this process, or in several that are started for it."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from simpo.config.choices import BenchmarkKind
from simpo.config.schema import RunConfig
from simpo.run import processes, progress
from simpo.run.folder import refuse_unwritable, trained_folder
from simpo.run.imports import kept_imports
from simpo.run.signals import set_stopped_exit_code


def start(run: RunConfig, own_process: bool = False) -> Path:
    """Train a run in this process (alone, or as a rank that a launcher started) or in processes
    that are started for it; see `simpo.loop.train.train`. Then judge its model, if `benchmark` is
    set: in this process, once those that trained are done.

    Args:
        own_process: this process does nothing but the run.
    """
    # Imported here, so that a fault in the settings is answered before torch is loaded.
    from simpo.loop.sinks import check_login

    set_stopped_exit_code(run.train.stopped_exit_code)
    refuse_unwritable(run)
    if run.rounds.number:
        from simpo.launch.rounds.driver import run_rounds

        return run_rounds(run)
    processes.join_slurm()
    progress.say(f"{run.name}: loading torch and transformers ...")
    check_login(run.tracker)
    count = processes.num_processes_to_start(run.backend)
    if run.benchmark.kind is BenchmarkKind.none:
        return _train(run, count, own_process)
    is_main, launched = os.environ.get("RANK", "0") == "0", "WORLD_SIZE" in os.environ
    folder = trained_folder(run)
    if is_main and folder is None:
        from simpo.judging.judge import check

        check(run)
    if folder is None or launched:  # then the ranks find out together
        folder = _train(run, count, own_process)
    if is_main:
        from simpo.judging.after_training import judge_trained

        processes.drop_rank_variables()
        judge_trained(run, folder)
    return folder


def _train(run: RunConfig, count: int | None, own_process: bool) -> Path:
    if count is not None:
        return processes.run_in_processes(count, run)
    with kept_imports() if own_process else nullcontext():
        from simpo.loop.train import train

    with processes.reporting_lost_ranks():
        return train(run)
