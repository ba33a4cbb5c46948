"""Submits runs to Slurm with submitit."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from simpo.config.errors import ConfigError, RunError
from simpo.config.flat import holds_secret
from simpo.config.launchers import SlurmConfig
from simpo.run import slurm

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
"""By parameter, the variables SBATCH_... that would override it."""


def submit(
    config: SlurmConfig,
    name: str,
    folder: Path,
    job: Callable[[str], None],
    runs: Sequence[Path | int],
    after: Sequence[str] = (),
) -> list[tuple[str, Path]]:
    """Put one job for each run's folder, or part of a phase, into the queue, several as one array.

    More than an array of this cluster may have become several arrays, which share out
    `launcher.array_parallelism`.

    Args:
        folder: where the submission's script and the logs are written.
        job: called with a run's folder, or the number of a part, in every process of its job.
        after: ids of jobs that must have succeeded first; if one fails, these are cancelled.

    Returns:
        For each run, in order, the job's id and the log of its first process.

    Raises:
        ConfigError: there is no Slurm here.
        RunError: Slurm refused the jobs; none is in the queue.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    size = (slurm.max_array_size() if len(runs) > 1 else None) or len(runs)
    arrays = [runs[start : start + size] for start in range(0, len(runs), size)]
    parameters = _parameters(config, name, len(runs), len(arrays))
    if after:
        parameters["dependency"] = f"afterok:{':'.join(after)}"
        parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=UNLIMITED_REQUEUES)
    except RuntimeError as error:
        raise ConfigError(
            ["launcher: srun not found (launcher=slurm works on machines of a Slurm cluster)"]
        ) from error
    if holds_secret(config):  # the script holds it too
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
    submitted: list[submitit.Job[None]] = []
    try:
        # submitit prints sbatch's errors; one line of them is enough.
        with redirect_stderr(io.StringIO()), _without_defaults(parameters):
            for array in arrays:
                submitted += executor.map_array(job, [str(run) for run in array])
    except (FailedJobError, FailedSubmissionError) as error:
        if submitted:
            slurm.cancel(*array_ids(done.job_id for done in submitted))
        messages = [line for line in str(error).splitlines() if "sbatch: error" in line]
        reason = messages[-1].removeprefix("sbatch: error: ") if messages else str(error)
        raise RunError(f"launcher: Slurm did not take the jobs: {reason}") from error
    return [(str(done.job_id), done.paths.stdout) for done in submitted]


def array_ids(job_ids: Iterable[str]) -> list[str]:
    """The ids of the arrays, or single jobs, that these jobs are of."""
    return list(dict.fromkeys(name.partition("_")[0] for name in job_ids))


def _parameters(
    config: SlurmConfig, name: str, num_runs: int, num_arrays: int = 1
) -> dict[str, Any]:
    """Parameters of submitit for a job of each run; None leaves one out."""
    options = dict(option.removeprefix("--").partition("=")[::2] for option in config.options)
    # If one process fails, the others must not wait for it. The first may judge the model when the
    # others have ended, for longer than a cluster's WaitTime.
    srun = ["--kill-on-bad-exit=1", "--wait=0"]
    if config.cpus_per_task is not None:
        # Since Slurm 22.05 srun does not inherit it from the job.
        srun.append(f"--cpus-per-task={config.cpus_per_task}")
    share = config.array_parallelism and max(1, config.array_parallelism // num_arrays)
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
        "array_parallelism": share or num_runs,
        "setup": config.setup or None,
        "stderr_to_stdout": True,
        "srun_args": srun,
        "additional_parameters": {k: v or True for k, v in options.items()} | {"requeue": True},
    }


@contextmanager
def _without_defaults(parameters: Mapping[str, object]) -> Iterator[None]:
    """Remove the variables of sbatch that would override a submission, while entered."""
    asked_for = (
        SBATCH_VARIABLES.get(key, ()) for key, value in parameters.items() if value is not None
    )
    names = [f"SBATCH_{word}" for words in asked_for for word in words]
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
