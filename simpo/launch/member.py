"""Trains a launched run in its folder: `python -m simpo.launch.member FOLDER`.

FOLDER holds run.yaml, which was resolved when the run was submitted.
"""

from __future__ import annotations

from simpo.run.parent import die_with_parent
from simpo.run.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # importing what follows takes a while
    die_with_parent()

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from simpo.config.check import load_run
from simpo.config.errors import INTERRUPTED, DamagedError, Pruned, SimpoError, Stopped
from simpo.launch.start import start
from simpo.run import slurm
from simpo.run.atomic import write_json
from simpo.run.files import PRUNING, last_job, status_or_none
from simpo.run.processes import end_process
from simpo.run.progress import print_all_letters
from simpo.run.runs import note_job
from simpo.run.unused import hide_unused

REQUEUE_MARGIN_S = 20.0
"""Time before its limit at which a job is requeued, saved or not."""
REQUEUE_WAIT_S = 600.0


class SlurmMember:
    """The function that every process of a Slurm job calls with the folder of its run.

    On a signal the run saves and its job is requeued, unless Slurm is ending the job. A run that
    cannot save before the time limit is requeued as well, and continues from its last checkpoint.
    """

    def __call__(self, folder: str) -> None:
        """Train the run, and end the process with its exit code."""
        work_in_job(Path(folder), lambda: run_member(Path(folder)))

    def checkpoint(self, folder: str) -> object:
        """The job to requeue; submitit calls this if a signal came before training."""
        return queued_again(self, folder)


def queued_again(job: Callable[[str], None], argument: str) -> object:
    """What submitit puts back into the queue if a signal came before the job's own work."""
    from submitit.helpers import DelayedSubmission

    return DelayedSubmission(job, argument)


def work_in_job(folder: Path, work: Callable[[], tuple[int, bool]]) -> NoReturn:
    """Do the work of a Slurm job in each of its processes, which end with its exit code.

    Args:
        folder: of the run.
        work: returns the exit code, and whether a signal stopped it, so that the job is requeued.
    """
    is_main = slurm.is_first_task()
    # Until the run handles signals, submitit requeues the job on SIGUSR2; here on SIGUSR1 too.
    signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGUSR2))
    if is_main:
        _note_start(folder)
        requeue_before_limit()
    code, stopped = work()
    if stopped and not is_main:
        # Wait for the end of the job: --kill-on-bad-exit would kill the main process first.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(REQUEUE_WAIT_S)
    if stopped:
        slurm.requeue()
    end_process(code)


def run_member(folder: Path) -> tuple[int, bool]:
    """Train or continue the run of a folder; errors are printed.

    A run that was pruned stays so: Slurm may start it again, such as after the loss of its node.
    Who wants it whole removes pruning.json first.

    Returns:
        The exit code, and whether a signal other than SIGINT stopped it after saving.
    """

    def work() -> None:
        status = status_or_none(folder)
        if status.get("state") == "pruned" and (folder / PRUNING).exists():
            print(f"stays pruned: {status.get('error')}", flush=True)
            return
        run = replace(load_run(folder / "run.yaml"), run_dir=str(folder.absolute()))
        hide_unused(run)
        start(run, own_process=True)

    return reporting(folder, work)


def reporting(folder: Path, work: Callable[[], object]) -> tuple[int, bool]:
    """Do the work on the run of a folder; errors are printed, and noted in its status.json.

    Returns:
        The exit code, and whether a signal other than SIGINT stopped it after saving.
    """
    print_all_letters()
    try:
        work()
    except SimpoError as error:
        if not error.printed:
            print(error, file=sys.stderr)
        _note_refusal(folder, error)
        by_signal = isinstance(error, Stopped) and not isinstance(error, Pruned)
        return error.exit_code, by_signal and error.exit_code != INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED, False
    return 0, False


def _note_refusal(folder: Path, error: Exception) -> None:
    """Write an error before the first step into status.json, which the run itself has not done."""
    if not slurm.is_first_task():  # several would write the file at the same moment
        return
    status = status_or_none(folder)
    # A state "running" is that of another process, which is why this one was refused.
    if status.get("state", "failed") in ("failed", "stopped") and not isinstance(error, Stopped):
        status |= {"state": "failed", "error": f"{type(error).__name__}: {error}"}
        write_json(folder / "status.json", status)


def _note_start(folder: Path) -> None:
    if restarts := int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        with suppress(DamagedError):  # shown by `simpo report`; the run goes on
            job = last_job(folder)
            if "id" in job:
                note_job(folder, **job | {"log": folder / job["log"], "restarts": restarts})


def requeue_before_limit() -> None:
    """Requeue this process's job shortly before its time limit, whatever it is doing then."""
    end = slurm.end_time()
    if end is not None:
        timer = threading.Timer(max(0.0, end - time.time() - REQUEUE_MARGIN_S), slurm.requeue)
        timer.daemon = True
        timer.start()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("python -m simpo.launch.member FOLDER", file=sys.stderr)
        sys.exit(2)
    code, _ = run_member(Path(sys.argv[1]))
    end_process(code)
