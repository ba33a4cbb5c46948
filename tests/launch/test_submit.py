"""What sbatch is asked for, with programs in the place of Slurm's that answer as it does."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from simpo.config.errors import RunError
from simpo.config.launchers import SlurmConfig
from simpo.launch.submit import array_ids, submit
from simpo.run import slurm

SBATCH = """
echo "$@" >> calls
grep -h -e '--array' "$1" >> arrays
number=$(wc -l < calls)
test $number -lt ${REFUSED:-99} || { echo "sbatch: error: no more" >&2; exit 1; }
echo "Submitted batch job $((number + 40))"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a Slurm whose arrays have 3 jobs at most."""
    scontrol = 'test "$*" = "show config" && echo "MaxArraySize            = 3"'
    programs = {"sbatch": SBATCH, "srun": "", "scontrol": scontrol, "scancel": 'echo "$@" > gone'}
    for name, text in programs.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submitted(here: Path, number: int, config: SlurmConfig) -> tuple[list[str], list[str]]:
    """The ids of the jobs of that many runs, and what --array was given."""
    runs = [here / f"run-{index}" for index in range(number)]
    jobs = submit(config, "name", here / "slurm", print, runs)
    assert len({log for _, log in jobs}) == number
    text = (here / "arrays").read_text() if (here / "arrays").exists() else ""
    return [name for name, _ in jobs], re.findall("--array=(.*)", text)


def test_more_jobs_than_an_array_may_have(here: Path) -> None:
    ids, arrays = submitted(here, 7, SlurmConfig())
    assert ids == ["41_0", "41_1", "41_2", "42_0", "42_1", "42_2", "43"]
    assert arrays == ["0-2%3", "0-2%3"]
    assert array_ids(ids) == ["41", "42", "43"]


def test_arrays_share_out_what_runs_at_a_time(here: Path) -> None:
    assert submitted(here, 6, SlurmConfig(array_parallelism=5))[1] == ["0-2%2", "0-2%2"]


def test_as_many_as_an_array_may_have(here: Path) -> None:
    assert submitted(here, 3, SlurmConfig(array_parallelism=2)) == (
        ["41_0", "41_1", "41_2"],
        ["0-2%2"],
    )


def test_a_refused_array_takes_the_others_along(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED", "3")
    with pytest.raises(RunError) as error:
        submitted(here, 7, SlurmConfig())
    assert str(error.value) == "launcher: Slurm did not take the jobs: no more"
    assert (here / "gone").read_text() == "41 42\n"


@pytest.mark.parametrize(
    ("answer", "size"),
    [
        ("MaxArraySize = 1001", 1001),
        ("MaxArraySize=0", None),
        ("MaxJobCount = 9", None),
        ("", None),
    ],
)
def test_the_size_that_scontrol_tells(here: Path, answer: str, size: int | None) -> None:
    (here / "bin" / "scontrol").write_text(f"#!/bin/sh\necho '{answer}'\n")
    assert slurm.max_array_size() == size
