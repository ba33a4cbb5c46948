"""Rounds as a chain of Slurm jobs: one for each phase, each after the one before."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from simpo.config.errors import SimpoError, Stopped
from simpo.config.launchers import SlurmConfig
from simpo.config.rounds import launcher_of_replies
from simpo.config.schema import RunConfig
from simpo.launch.member import queued_again, reporting, work_in_job
from simpo.launch.rounds.driver import settle
from simpo.launch.rounds.phases import phases
from simpo.launch.rounds.process import load, run_phase
from simpo.launch.rounds.record import is_done
from simpo.launch.submit import array_ids, submit
from simpo.run import slurm
from simpo.run.atomic import write_json
from simpo.run.files import status_or_none
from simpo.run.folder import RunFolder
from simpo.run.rounds import Kind, Phase, ended_early
from simpo.run.runs import note_job


class SlurmLink:
    """The function that every process of a phase's job calls with the number of its part."""

    def __init__(self, root: str, number: int, kind: Kind) -> None:
        self._root, self._number, self._kind = root, number, kind

    def __call__(self, part: str) -> None:
        """Run the phase, and end the process with its exit code."""
        root, phase = Path(self._root), Phase(self._number, self._kind, int(part))
        work_in_job(root, lambda: reporting(root, lambda: _run_link(root, phase)))

    def checkpoint(self, part: str) -> object:
        """The job to requeue; submitit calls this if a signal came before the phase."""
        return queued_again(self, part)


def submit_chain(config: SlurmConfig, run: RunConfig, root: Path) -> list[str]:
    """Queue a job for each phase that is not done; parts that generate are one array.

    Returns:
        The ids of the jobs and arrays, in order.

    Raises:
        ConfigError: there is no Slurm here.
        RunError: Slurm refused a job; none is in the queue.
    """
    others = launcher_of_replies(config, run.rounds)
    todo = [phase for phase in phases(run) if not is_done(root, phase)]
    ids: list[str] = []
    links: list[str] = []
    before: list[str] = []
    try:
        for (number, kind), group in groupby(todo, key=lambda phase: (phase.round, phase.kind)):
            jobs = submit(
                config if kind is Kind.train else others,
                f"{root.name}-{number}-{kind.value}",
                root / "slurm",
                SlurmLink(str(root), number, kind),
                [phase.part for phase in group],
                after=before,
            )
            before = array_ids(job_id for job_id, _ in jobs)
            ids += before
            for job_id, log in jobs:
                links.append(job_id)
                note_job(root, log, id=job_id, chain=" ".join(links))
    except BaseException:
        slurm.cancel(*ids)
        raise
    return ids


def _run_link(root: Path, phase: Phase) -> None:
    """Run a phase in its job, unless the rounds have ended, and decide how they go on."""
    if ended_early(root):
        return
    run = load(root)
    is_main = slurm.is_first_task()
    try:
        if not is_done(root, phase):
            run_phase(run, root, phase, is_main)
        if is_main and phase.kind is Kind.annotate:
            folder = RunFolder(run)
            with folder.recording_failure():
                settle(run, folder, 0.0)
    except SimpoError as error:
        if is_main and not isinstance(error, Stopped):
            status = status_or_none(root)
            reason = f"{type(error).__name__}: {phase.text()}: {error}"
            write_json(root / "status.json", status | {"state": "failed", "error": reason})
        raise
