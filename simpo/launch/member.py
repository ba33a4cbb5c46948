"""One launched run: `python -m simpo.launch.member FOLDER` runs the one of a folder here.

FOLDER holds run.yaml, resolved when the run was submitted.
"""

from __future__ import annotations

from simpo.run.signals import exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # importing what follows takes a while

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from simpo.config.check import load_run
from simpo.config.errors import INTERRUPTED, DamagedError, SimpoError, Stopped
from simpo.run import slurm
from simpo.run.atomic import write_json
from simpo.run.files import last_job, status_or_none
from simpo.run.processes import die_with_parent, end_process
from simpo.run.runs import note_job
from simpo.train import start

REQUEUE_MARGIN_S = 20.0
"""Before its time limit a job is requeued, whether it has managed to save or not."""
REQUEUE_WAIT_S = 600.0


class SlurmMember:
    """What the processes of a Slurm job call, with the folder of their run.

    Told by a signal to stop, the run saves and its job is requeued, unless Slurm is ending it of
    its own accord. A run that does not get so far before the time limit is requeued all the same,
    and goes on from its last checkpoint.
    """

    def __call__(self, folder: str) -> None:
        """Run it; ends the process with the run's exit code."""
        is_main = os.environ.get("SLURM_PROCID", "0") == "0"
        # Until the run takes them, submitit has the job requeued on the signal that it asked for.
        signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGUSR2))
        if is_main:
            _note_start(Path(folder))
            requeue_before_limit()
        code, stopped = run_member(Path(folder))
        if stopped and not is_main:
            # The job ends while these wait; ending first, they might take the main one along.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(REQUEUE_WAIT_S)
        if stopped:
            slurm.requeue()
        end_process(code)

    def checkpoint(self, folder: str) -> object:
        """Asked by submitit for the job to requeue, where a signal came before the training."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, folder)


def run_member(folder: Path) -> tuple[int, bool]:
    """Train the run of a folder, or go on with it; what stops it is printed.

    Returns:
        The exit code, and whether a signal other than Ctrl-C's stopped it after it had saved.
    """
    try:
        start(load_run(folder / "run.yaml"))
    except SimpoError as error:
        if str(error):  # not where a rank has printed it
            print(error, file=sys.stderr)
        _note_refusal(folder, error)
        by_signal = isinstance(error, Stopped) and error.exit_code != INTERRUPTED
        return error.exit_code, by_signal
    except KeyboardInterrupt:
        return INTERRUPTED, False
    return 0, False


def _note_refusal(folder: Path, error: Exception) -> None:
    """In status.json, which a run that was refused before its first step has not got to."""
    status = status_or_none(folder)
    # What is running may be another process, which is the reason for the refusal.
    if status.get("state", "failed") in ("failed", "stopped") and not isinstance(error, Stopped):
        status |= {"state": "failed", "error": f"{type(error).__name__}: {error}"}
        write_json(folder / "status.json", status)


def _note_start(folder: Path) -> None:
    if restarts := int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        with suppress(DamagedError):  # a report tells it; the run goes on
            job = last_job(folder)
            if "id" in job:
                note_job(folder, folder / job["log"], id=job["id"], restarts=restarts)


def requeue_before_limit() -> None:
    """Have this process's job requeued shortly before its time limit, whatever it does then."""
    end = slurm.end_time()
    if end is not None:
        timer = threading.Timer(max(0.0, end - time.time() - REQUEUE_MARGIN_S), slurm.requeue)
        timer.daemon = True
        timer.start()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("python -m simpo.launch.member FOLDER", file=sys.stderr)
        sys.exit(2)
    die_with_parent()
    code, _ = run_member(Path(sys.argv[1]))
    end_process(code)
