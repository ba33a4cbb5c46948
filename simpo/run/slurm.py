"""Asks Slurm about jobs with its own commands. Imports no torch: login nodes run this."""

from __future__ import annotations

import os
import re
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
LIMIT = re.compile(
    r"(QOS|Assoc(iation)?|(?=Max\w+PerAccount))(?P<kind>Grp|Max|Min)?"
    r"(?P<what>Cpu|CPU|GRES|Mem|Node|Wall|SubmitJob|Job|Resource|Billing|BB|License|Energy|Unknown)\w*?"
    r"(?P<minutes>(Run)?Minutes)?(Per(?P<each>Job|Node|User|Account))?(Limit|NotSatisfied)?"
)
"""Reasons of jobs that wait for a limit of their QoS or account (Slurm's association)."""
RESOURCES = {
    "cpu": ("CPUs", "cpus_per_task"),
    "gres": ("GPUs", "gpus_per_node"),
    "mem": ("memory", "mem_gib"),
    "node": ("nodes", "nodes"),
    "wall": ("time", "time_min"),
    "submitjob": ("submitted jobs", ""),
    "job": ("jobs", ""),
}
"""What is limited, and the setting in `launcher` that asks for it."""
FIELDS = "JobArrayID:|,State:|,RestartCnt:|,exit_code:|,Reason:|"


@dataclass(frozen=True)
class Job:
    """State of a job according to Slurm.

    Attributes:
        state: in Slurm's words (PENDING, RUNNING, FAILED, CANCELLED, TIMEOUT, ...).
        exit_code: of an ended job; 128 + the signal's number if a signal ended it.
        restarts: how often it was requeued, if Slurm still knows.
        reason: why a pending job waits: Slurm's name, and if that is a limit, what to do.
    """

    state: str
    exit_code: int = 0
    restarts: int = 0
    reason: str = ""


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """The jobs with these ids (`12`, or `12_3` in an array) that Slurm still knows.

    squeue forgets ended jobs after some minutes; sacct keeps them, but not on every cluster.
    """
    wanted = set(ids)
    found: dict[str, Job] = {}
    if not wanted:
        return found
    arrays = ",".join(sorted({name.partition("_")[0] for name in wanted}))
    squeue = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={arrays}"]
    for line in _lines([*squeue, f"--Format={FIELDS}"]):
        with suppress(ValueError):  # a line that is not about a job
            name, state, restarts, code, reason, *_ = (part.strip() for part in line.split("|"))
            reason = "" if reason == "None" else _with_remedy(reason)
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


def telling(jobs: Sequence[Job]) -> Job | None:
    """The job that tells the state of a chain of jobs: one that runs, has failed, or waits, in this
    order; those after one that has failed are cancelled. None of none."""

    def order(job: Job) -> int:
        if job.state in ACTIVE_STATES:
            return 0
        if job.state in PENDING_STATES:
            return 2
        return {"CANCELLED": 3, "COMPLETED": 4}.get(job.state, 1)

    return min(jobs, key=order, default=None)


def _with_remedy(reason: str) -> str:
    """Slurm's reason; with its meaning and what to do if it is a limit of a QoS or account."""
    found = LIMIT.fullmatch(reason)
    if found is None:
        return reason
    whose = "account" if reason.startswith("Assoc") else "QoS"
    what, setting = RESOURCES.get(found["what"].lower(), ("resources", ""))
    minutes, each = found["minutes"] or "", found["each"] or ""
    if minutes:
        what, setting = f"minutes of {what}", "time_min"
    other = "launcher." + whose.lower()
    if each in ("Job", "Node") or found["kind"] == "Min":
        change = f"launcher.{setting} or {other}" if setting else other
        return (
            f"{reason}: the {whose}'s limits for a job do not allow its {what} (it never starts: "
            f"cancel it, change {change}, and give the same command)"
        )
    if minutes == "Minutes" or found["what"] == "Wall":
        return (
            f"{reason}: the {whose} has used up its {what} (ask those who run the cluster, or "
            f"cancel it, change {other}, and give the same command)"
        )
    of = {"User": " of a user", "Account": " of an account"}.get(each, "")
    return (
        f"{reason}: the {whose}'s limit on {what}{of} is reached (it starts when other jobs have "
        f"ended; another {other} may start it sooner)"
    )


def max_array_size() -> int | None:
    """Number of jobs that an array of this cluster may have; None if Slurm does not say."""
    for line in _lines(["scontrol", "show", "config"]):
        key, _, value = (part.strip() for part in line.partition("="))
        if key == "MaxArraySize" and value.isdecimal():
            return int(value) or None
    return None


def cancel(*job_ids: str) -> None:
    """Cancel jobs or whole arrays, running or not."""
    subprocess.run(["scancel", *job_ids], check=False, capture_output=True)


def is_first_task() -> bool:
    """Whether this process is the first of those of its job, or in no job."""
    return os.environ.get("SLURM_PROCID", "0") == "0"


def own_job() -> str:
    """Id of the job that this process is in."""
    return os.environ["SLURM_JOB_ID"]


def end_time() -> float | None:
    """When this process's job reaches its time limit, as time.time(); None if there is no limit or
    Slurm does not say.
    """
    epoch = _job_field("%e")
    return float(epoch) if epoch.isdecimal() else None


def requeue() -> bool:
    """End this process's job and put it back into the queue.

    Returns:
        False if Slurm is ending it already: it was cancelled, or requeued by somebody else.
    """
    if _job_field("%T") != "RUNNING":
        return False
    return subprocess.run(["scontrol", "requeue", own_job()], check=False).returncode == 0


def _job_field(field: str) -> str:
    """A field that squeue prints for this process's job; empty if it prints nothing."""
    lines = _lines(["squeue", "--noheader", f"--jobs={own_job()}", f"--format={field}"])
    return lines[-1].strip() if lines else ""


def _query_environment() -> dict[str, str]:
    """Environment for Slurm's commands: times as the epoch, and no formats or filters that users
    set.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
    return kept | {"SLURM_TIME_FORMAT": "%s"}


def _lines(command: Sequence[str]) -> list[str]:
    """The lines that a command prints; none if it fails, as it does for forgotten jobs."""
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
    """The exit code in a status of wait(), which squeue gives."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else _code_of_signal(-code)


def _code_of_signal(number: int) -> int:
    return number and number + 128
