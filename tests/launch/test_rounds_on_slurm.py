"""Rounds on a real Slurm cluster: as a chain of jobs, and as one job."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

import pytest

from simpo.run import slurm
from simpo.run.runs import IN_PROGRESS, State, read_progress
from tests.launch.test_rounds import begin, rounds, write_reward, written
from tests.launch.test_slurm import ON_N2, halt, hurry, job_of, slurm_command, until
from tests.support.whole_runs import finish

__all__ = ["rounds"]  # a fixture
pytestmark = [pytest.mark.matrix, pytest.mark.usefixtures("slurm")]


@pytest.fixture
def long_round(rounds: list[str]) -> list[str]:
    """Overrides of one round whose training has time to be disturbed."""
    return [*rounds, "rounds=1", "train.epochs=25", "train.checkpoint_every=10"]


def test_a_chain_with_a_preempted_link(long_round: list[str], tmp_path: Path) -> None:
    root, alone = tmp_path / "chain", tmp_path / "alone"
    queued = ["launcher=slurm", ON_N2, "rounds.chain=true", "rounds.generate_jobs=2"]
    said = finish(begin([*long_round, *queued, f"run_dir={root}"], tmp_path))
    line = next(line for line in said.splitlines() if line.startswith("jobs "))
    ids = line.partition(":")[0].split()[1:]
    assert len(ids) == 6 and f"cancel scancel {' '.join(ids)}" in said
    again = finish(begin([*long_round, *queued, f"run_dir={root}"], tmp_path))
    assert "1 of 1 members pending already" in again or "running already" in again

    def ended() -> bool:
        return hurry(root) not in IN_PROGRESS

    metrics = root / "rounds/1/run/metrics.jsonl"
    until(lambda: metrics.is_file() or ended(), "training")
    halt([root / "rounds/1/run"])
    urgent = ["sbatch", "--partition=high", "--nodelist=n2", "--exclusive", "--output=/dev/null"]
    slurm_command(*urgent, "--wrap", "sleep 1")
    link = ids[3]  # after check, generate and annotate

    def started_again() -> bool:
        """Slurm's two minutes between a requeue and the next start are cut short."""
        asked = ["scontrol", "update", f"JobId={link}", "StartTime=now"]
        subprocess.run(asked, capture_output=True)
        return ended() or slurm.jobs([link])[link].restarts == 1

    until(lambda: "PENDING" in slurm.jobs([link])[link].state, "the preemption")
    until(lambda: started_again() and ended(), "the end of the chain")
    (progress,) = read_progress([root])
    assert progress.state is State.finished, progress
    finish(begin([*long_round, f"run_dir={alone}"], tmp_path))
    # The replies of two jobs are in two files.
    left, right = (
        {name: content for name, content in written(one).items() if "/responses" not in name}
        for one in (root, alone)
    )
    assert left.keys() == right.keys() and left == right


def begun(root: Path, file: Path) -> bool:
    """Whether a file is there, or will never be."""
    return file.is_file() or hurry(root) not in IN_PROGRESS


def test_one_job_for_all_rounds(long_round: list[str], tmp_path: Path) -> None:
    """Told to stop while it generates, and again while it trains; requeued both times."""
    root, alone = tmp_path / "job", tmp_path / "alone"
    write_reward(tmp_path, pause_s=0.1)
    finish(begin([*long_round, "launcher=slurm", f"run_dir={root}"], tmp_path))
    for name in ("replies/scores-own_rewards_vowels.jsonl", "run/metrics.jsonl"):
        file = root / "rounds/1" / name
        until(partial(begun, root, file), name)
        slurm_command("scancel", "--signal=USR2", job_of(root))
        until(lambda: hurry(root) is State.pending, "the requeue")
    until(lambda: hurry(root) not in IN_PROGRESS, "the end")
    (progress,) = read_progress([root])
    assert progress.text() == "finished, round 1 of 1, requeued 2 times"
    finish(begin([*long_round, f"run_dir={alone}"], tmp_path))
    assert written(root) == written(alone)
