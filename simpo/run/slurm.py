"""What Slurm knows of jobs, asked by its own commands. No torch: a login node runs this."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

PENDING_STATES = (
    "PENDING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
)
ACTIVE_STATES = (
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "RESIZING",
    "STAGE_OUT",
    "SUSPENDED",
    "STOPPED",
)
FIELDS = "JobArrayID:|,State:|,RestartCnt:|,exit_code:|,Reason:|"


@dataclass(frozen=True)
class Job:
    """What Slurm knows of a job.

    Attributes:
        state: in Slurm's words (PENDING, RUNNING, FAILED, CANCELLED, TIMEOUT, ...).
        exit_code: of an ended one; above 128 the number of the signal that ended it, plus 128.
        restarts: how often it was requeued, as far as Slurm still knows.
        reason: why it waits.
    """

    state: str
    exit_code: int = 0
    restarts: int = 0
    reason: str = ""


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """The jobs of these ids (`12`, or `12_3` of an array) that Slurm still knows.

    squeue knows ended jobs for some minutes only, sacct for long, but not on every cluster.
    """
    wanted = set(ids)
    found: dict[str, Job] = {}
    if not wanted:
        return found
    arrays = ",".join(sorted({name.partition("_")[0] for name in wanted}))
    squeue = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={arrays}"]
    for line in _lines([*squeue, f"--Format={FIELDS}"]):
        with suppress(ValueError):  # not a job's line: what cannot be read is not known
            name, state, restarts, code, reason, *_ = (part.strip() for part in line.split("|"))
            reason = "" if reason == "None" else reason
            found[name] = Job(state, _exit_code(int(code)), int(restarts), reason)
    if missing := ",".join(sorted(wanted - found.keys())):
        sacct = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={missing}"]
        for line in _lines([*sacct, "--format=JobID,State,ExitCode"]):
            with suppress(ValueError):
                name, state, codes = line.split("|")
                code, _, number = codes.partition(":")
                # "CANCELLED by 1000"
                found.setdefault(
                    name, Job(state.split()[0], int(code) or _code_of_signal(int(number)))
                )
    return {name: job for name, job in found.items() if name in wanted}


def cancel(job_id: str) -> None:
    """Take a job, or a whole array, out of the queue, running or not."""
    subprocess.run(["scancel", job_id], check=False, capture_output=True)


def own_job() -> str:
    """Id of the job that this process is in."""
    return os.environ["SLURM_JOB_ID"]


def end_time() -> float | None:
    """When the time limit of this process's job ends it, as time.time(); None without a limit, or
    where Slurm does not say.
    """
    epoch = _job_field("%e")
    return float(epoch) if epoch.isdecimal() else None


def requeue() -> bool:
    """Have this process's job start again; it is ended then.

    Returns:
        False where Slurm is about to end it anyhow: cancelled, or requeued by somebody else.
    """
    if _job_field("%T") != "RUNNING":
        return False
    return subprocess.run(["scontrol", "requeue", own_job()], check=False).returncode == 0


def _job_field(field: str) -> str:
    """What squeue says of this process's job; empty where it says nothing."""
    lines = _lines(["squeue", "--noheader", f"--jobs={own_job()}", f"--format={field}"])
    return lines[-1].strip() if lines else ""


def _query_environment() -> dict[str, str]:
    """Environment of a command whose answer is read: times as the epoch, and none of the formats
    and filters that users set for their own eyes.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
    return kept | {"SLURM_TIME_FORMAT": "%s"}


def _lines(command: Sequence[str]) -> list[str]:
    """What a command prints; nothing where it fails, as it does for jobs long gone."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            env=_query_environment(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def _exit_code(status: int) -> int:
    """squeue gives the status of wait()."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else _code_of_signal(-code)


def _code_of_signal(number: int) -> int:
    return number and number + 128
