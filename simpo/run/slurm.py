"""Slurm asked and told, by its own commands and by submitit. No torch: a login node runs this."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path

from simpo.config.check import holds_secret
from simpo.config.errors import ConfigError, RunError
from simpo.config.launchers import SlurmConfig

UNLIMITED_REQUEUES = 10**6
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
AT_WORK = ("RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "STAGE_OUT", "SUSPENDED", "STOPPED")
SETTLED = {
    "array_parallelism": ("ARRAY_INX",),
    "job_name": ("JOB_NAME",),
    "time": ("TIMELIMIT",),
    "signal_delay_s": ("SIGNAL",),
    "stderr_to_stdout": ("OUTPUT", "ERROR", "OPEN_MODE"),
    "additional_parameters": ("NO_REQUEUE", "WAIT"),
    "partition": ("PARTITION",),
    "account": ("ACCOUNT",),
    "qos": ("QOS",),
    "constraint": ("CONSTRAINT",),
    "gpus_per_node": ("GPUS_PER_NODE", "GPUS", "GRES"),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
}
"""By parameters of a submission, users' defaults for sbatch (SBATCH_...) that would outdo them."""
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
                found.setdefault(name, Job(state.split()[0], int(code) or _killed(int(number))))
    return {name: job for name, job in found.items() if name in wanted}


def submit(
    config: SlurmConfig, name: str, folder: Path, job: Callable[[str], None], runs: Sequence[Path]
) -> list[tuple[str, Path]]:
    """Put one job for each run's folder into the queue, several as one array.

    Args:
        folder: gets the submission's script, and the logs.
        job: is called with a run's folder in every process of its job.

    Returns:
        For each run, in order, the job's id and the log of its first process.

    Raises:
        ConfigError: there is no Slurm here.
        RunError: Slurm did not take it; then nothing is in the queue.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    options = dict(option.removeprefix("--").partition("=")[::2] for option in config.options)
    # One process that fails must not leave the others waiting for it.
    srun = ["--kill-on-bad-exit=1"]
    if config.cpus_per_task is not None:
        # Slurm's later versions do not hand it down from the job to what srun starts in it.
        srun.append(f"--cpus-per-task={config.cpus_per_task}")
    parameters = {
        "job_name": name,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "nodes": config.nodes,
        "gpus_per_node": config.gpus_per_node,
        "ntasks_per_node": config.tasks() // config.nodes,
        "cpus_per_task": config.cpus_per_task,
        "mem": config.mem_gib and f"{round(config.mem_gib * 1024)}M",
        "time": config.time_min,
        "signal_delay_s": config.signal_before_s,
        "array_parallelism": config.array_parallelism or len(runs),
        "setup": config.setup or None,
        "stderr_to_stdout": True,
        "srun_args": srun,
        "additional_parameters": {k: v or True for k, v in options.items()} | {"requeue": True},
    }
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=UNLIMITED_REQUEUES)
    except RuntimeError as error:
        raise ConfigError(
            ["launcher: srun is not found (is this machine of a cluster?)"]
        ) from error
    if holds_secret(config):  # then the script does
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
    try:
        # submitit repeats what sbatch says, of which a line is enough.
        with redirect_stderr(io.StringIO()), _without_defaults(parameters):
            submitted = executor.map_array(job, [str(run) for run in runs])
    except (FailedJobError, FailedSubmissionError) as error:
        said = [line for line in str(error).splitlines() if "sbatch: error" in line]
        reason = said[-1].removeprefix("sbatch: error: ") if said else str(error)
        raise RunError(f"launcher: Slurm did not take the jobs: {reason}") from error
    return [(str(done.job_id), done.paths.stdout) for done in submitted]


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
    epoch = _asked("%e")
    return float(epoch) if epoch.isdecimal() else None


def requeue() -> bool:
    """Have this process's job start again; it is ended then.

    Returns:
        False where Slurm is about to end it anyhow: cancelled, or requeued by somebody else.
    """
    if _asked("%T") != "RUNNING":
        return False
    return subprocess.run(["scontrol", "requeue", own_job()], check=False).returncode == 0


@contextmanager
def _without_defaults(parameters: Mapping[str, object]) -> Iterator[None]:
    """While entered, what a submission asks for is not overridden by variables of sbatch."""
    asked_for = (SETTLED.get(key, ()) for key, value in parameters.items() if value is not None)
    names = [f"SBATCH_{word}" for words in asked_for for word in words]
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _asked(field: str) -> str:
    """What squeue says of this process's job; empty where it says nothing."""
    lines = _lines(["squeue", "--noheader", f"--jobs={own_job()}", f"--format={field}"])
    return lines[-1].strip() if lines else ""


def _asking() -> dict[str, str]:
    """Environment of a command whose answer is read: times as the epoch, and none of the formats
    and filters that users set for their own eyes.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
    return kept | {"SLURM_TIME_FORMAT": "%s"}


def _lines(command: Sequence[str]) -> list[str]:
    """What a command prints; nothing where it fails, as it does for jobs long gone."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60, env=_asking()
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def _exit_code(status: int) -> int:
    """squeue gives the status of wait()."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else _killed(-code)


def _killed(number: int) -> int:
    return number and number + 128
