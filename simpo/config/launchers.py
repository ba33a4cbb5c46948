"""Settings of the launcher, which starts a run or the members of a sweep."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field

from simpo.config.ranges import above_zero, at_least

# Options of sbatch that the launcher sets itself, and the setting to use instead, if any.
OWN_OPTIONS = {
    "account": "account",
    "array": "array_parallelism",
    "constraint": "constraint",
    "cpus-per-task": "cpus_per_task",
    "error": "",
    "gpus-per-node": "gpus_per_node",
    "job-name": "",
    "mem": "mem_gib",
    "nodes": "nodes",
    "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "open-mode": "",
    "output": "",
    "partition": "partition",
    "qos": "qos",
    "requeue": "",
    "signal": "signal_before_s",
    "time": "time_min",
}


@dataclass(kw_only=True)
class LauncherConfig:
    """Settings that every launcher has."""

    name: str = "local"
    """Kind of launcher; set by the group."""
    sweep_dir: str | None = None
    """Folder of a sweep (-m); each member gets a subfolder named by its own settings. null:
    <output_dir>/sweeps/<name>-<hash of the settings that the members share>."""
    poll_s: float = 2.0
    """Seconds between checks of the members while waiting for a sweep."""

    def problems(self) -> Iterator[str]:
        if not 0 < self.poll_s <= 3600:
            yield f"poll_s: must be above 0 and at most 3600, got {self.poll_s}"
        if self.sweep_dir == "":
            yield "sweep_dir: must not be empty (null takes one below output_dir)"


@dataclass(kw_only=True)
class LocalConfig(LauncherConfig):
    """On this machine: a run in this process, each member of a sweep in its own."""

    parallel: int = 1
    """Members of a sweep that run at the same time; they share the GPUs and the cores."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from at_least(self, 1, "parallel")


@dataclass(kw_only=True)
class SlurmConfig(LauncherConfig):
    """Jobs of a Slurm cluster: one for a run, one array for a sweep."""

    name: str = "slurm"
    partition: str | None = None
    """Partition; null takes the cluster's default, here and below."""
    account: str | None = None
    """Account that the jobs are charged to."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    nodes: int = 1
    """Nodes of a job."""
    gpus_per_node: int | None = None
    """GPUs of each node; null asks for none."""
    tasks_per_node: int | None = None
    """Processes on each node. null: one for each GPU, or one."""
    cpus_per_task: int | None = None
    """Cores of each process."""
    mem_gib: float | None = None
    """Memory of each node."""
    time_min: int = 240
    """Time limit in minutes. A job that reaches it saves, is requeued and continues."""
    signal_before_s: int = 120
    """Seconds before the limit at which a job is told to save; a step and a save must fit in."""
    array_parallelism: int | None = None
    """Members of a sweep that run at the same time; null: as many as the cluster allows."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that a job runs before Python (module load ..., export ...)."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, as typed there: ["--mail-type=END", "--exclusive"]."""
    wait: bool = False
    """Wait for the jobs, show their progress, and fail if one fails. False: return as soon as they
    are in the queue."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if importlib.util.find_spec("submitit") is None:
            yield "name: submitit is not installed (pip install 'simpo[slurm]')"
        yield from at_least(self, 1, "nodes", "time_min", "signal_before_s", "gpus_per_node")
        yield from at_least(self, 1, "tasks_per_node", "cpus_per_task", "array_parallelism")
        yield from above_zero(self, "mem_gib")
        if self.signal_before_s >= self.time_min * 60:
            yield f"signal_before_s: must be below the time limit, got {self.signal_before_s}"
        for option in self.options:
            key = option.removeprefix("--").partition("=")[0]
            if not option.startswith("--") or not key:
                yield f"options: each must be of the form --key=value, got {option}"
            elif key in OWN_OPTIONS:
                instead = OWN_OPTIONS[key]
                remedy = f"set launcher.{instead}" if instead else "leave it out"
                yield f"options: {option} is set by the launcher ({remedy})"

    def tasks(self) -> int:
        """Processes of a job, over all its nodes."""
        return self.nodes * (self.tasks_per_node or self.gpus_per_node or 1)
