"""Starts a run: in this process, or in several that are started for it."""

from __future__ import annotations

from pathlib import Path

from simpo.config.schema import RunConfig
from simpo.run import processes, progress
from simpo.run.folder import refuse_unwritable
from simpo.run.signals import set_stopped_exit_code


def start(run: RunConfig) -> Path:
    """Train a run in this process (alone, or as a rank that a launcher started) or in processes
    that are started for it; see `simpo.loop.train.train`.
    """
    # Imported here, so that a fault in the settings is answered before torch is loaded.
    from simpo.loop.sinks import check_login

    set_stopped_exit_code(run.train.stopped_exit_code)
    refuse_unwritable(run)
    processes.join_slurm()
    progress.say(f"{run.name}: loading torch and transformers ...")
    check_login(run.tracker)
    count = processes.num_processes_to_start(run.backend)
    if count is not None:
        return processes.run_in_processes(count, run)
    from simpo.loop.train import train

    with processes.reporting_lost_ranks():
        return train(run)
