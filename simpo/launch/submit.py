"""Puts runs into a Slurm cluster's queue through submitit."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from simpo.config.check import holds_secret
from simpo.config.errors import ConfigError, RunError
from simpo.config.launchers import SlurmConfig

UNLIMITED_REQUEUES = 10**6


SBATCH_VARIABLES = {
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

    parameters = _parameters(config, name, len(runs))
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
        messages = [line for line in str(error).splitlines() if "sbatch: error" in line]
        reason = messages[-1].removeprefix("sbatch: error: ") if messages else str(error)
        raise RunError(f"launcher: Slurm did not take the jobs: {reason}") from error
    return [(str(done.job_id), done.paths.stdout) for done in submitted]


def _parameters(config: SlurmConfig, name: str, num_runs: int) -> dict[str, Any]:
    """What submitit takes for a job of each run; None where nothing is asked for."""
    options = dict(option.removeprefix("--").partition("=")[::2] for option in config.options)
    # One process that fails must not leave the others waiting for it.
    srun = ["--kill-on-bad-exit=1"]
    if config.cpus_per_task is not None:
        # Slurm's later versions do not hand it down from the job to what srun starts in it.
        srun.append(f"--cpus-per-task={config.cpus_per_task}")
    return {
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
        "array_parallelism": config.array_parallelism or num_runs,
        "setup": config.setup or None,
        "stderr_to_stdout": True,
        "srun_args": srun,
        "additional_parameters": {k: v or True for k, v in options.items()} | {"requeue": True},
    }


@contextmanager
def _without_defaults(parameters: Mapping[str, object]) -> Iterator[None]:
    """While entered, what a submission asks for is not overridden by variables of sbatch."""
    asked_for = (
        SBATCH_VARIABLES.get(key, ()) for key, value in parameters.items() if value is not None
    )
    names = [f"SBATCH_{word}" for words in asked_for for word in words]
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
