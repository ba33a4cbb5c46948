"""What sbatch is asked for, with programs in the place of Slurm's that answer as it does."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, RunError
from simpo.config.launchers import SlurmConfig
from simpo.launch.member import reporting
from simpo.launch.rounds.chain import submit_chain
from simpo.launch.submit import array_ids, submit
from simpo.launch.sweep import Member, _follow, launch
from simpo.run import slurm
from simpo.run.runs import State, note_job, read_progress

AFTER = re.compile(r"--dependency=afterok:([\d:]+)")
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
    programs = {"sbatch": SBATCH, "srun": "", "scontrol": scontrol, "scancel": 'echo "$@" >> gone'}
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


def chained(here: Path) -> Path:
    """The folder of rounds as a chain: 41 checks, 42 to 44 generate, 45 scores, and so on."""
    root = here / "rounds-in-a-chain"
    root.mkdir()
    words = ["rounds.number=1", "rounds.generate_jobs=7", "launcher=slurm", "rounds.chain=true"]
    run = compose_run([*words, "monitor.metric=reply_reward", f"run_dir={root}"])
    assert isinstance(run.launcher, SlurmConfig)
    ids = submit_chain(run.launcher, run, root)
    assert ids == [str(number) for number in range(41, 51)]
    return root


@pytest.mark.parametrize("task", ["0", "1"])
def test_of_the_tasks_of_a_job_one_notes_an_error(
    task: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have it at the same moment, and would write the same file."""

    def refused() -> None:
        raise ConfigError(["loss.beta: must be above 0, got 0"])

    monkeypatch.setenv("SLURM_PROCID", task)
    assert reporting(here, refused) == (2, False)
    assert (here / "status.json").exists() == (task == "0")


def test_a_link_waits_for_all_arrays_of_the_one_before(here: Path) -> None:
    root = chained(here)
    scripts = [one.read_text() for one in (root / "slurm").glob("[0-9]*.sh")]
    waits = [found[1].split(":") for text in scripts if (found := AFTER.search(text))]
    assert sorted(waits) == [
        *([["41"]] * 3),
        ["42", "43", "44"],
        ["45"],
        *([["46"]] * 3),
        ["47", "48", "49"],
    ]


def test_a_refused_chain_takes_those_of_other_members_along(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has six jobs."""
    monkeypatch.setenv("REFUSED", "8")
    words = ["rounds.number=1", "monitor.metric=reply_reward", "rounds.chain=true"]
    members = [
        Member(compose_run([*words, "launcher=slurm", f"loss.beta={beta}"]), (), (f"b={beta}",))
        for beta in (2, 3)
    ]
    with pytest.raises(RunError) as error:
        launch(members, "sweep")
    assert str(error.value) == "launcher: Slurm did not take the jobs: no more"
    assert (here / "gone").read_text() == "47\n41 42 43 44 45 46\n"


@pytest.mark.parametrize(
    ("lines", "told", "note"),
    [
        (["41|PENDING|0|0|Priority|", "45|PENDING|0|0|Dependency|"], "pending", "Priority"),
        (["41|COMPLETED|0|0|None|", "42_1|RUNNING|2|0|None|", "45|PENDING|0|0|Dependency|"],
         "running, round 0 of 1, requeued 2 times", ""),
        (["41|COMPLETED|0|0|None|", "45|FAILED|0|512|None|", "50|CANCELLED|0|0|Dependency|"],
         "failed, round 0 of 1", "exit code 2: ConfigError: round 1, annotate: no reward"),
        (["45|CANCELLED|0|0|None|", "50|CANCELLED|0|0|None|"], "cancelled, round 0 of 1", ""),
    ],
)  # fmt: skip
def test_the_state_of_a_chain(here: Path, lines: list[str], told: str, note: str) -> None:
    root = chained(here)
    (root / "rounds").mkdir()
    status = {"state": "failed", "step": 0, "total_steps": 1}
    status["error"] = "ConfigError: round 1, annotate: no reward"
    (root / "status.json").write_text(json.dumps(status))
    queue(here, "\n".join(lines))
    (progress,) = read_progress([root])
    assert (progress.text(), progress.note) == (told, note)


WAITS = "it starts when other jobs have ended; another launcher."


@pytest.mark.parametrize(
    ("reason", "meaning"),
    [
        ("None", None),
        ("Priority", ""),
        ("QOSNotAllowed", ""),
        (
            "QOSMaxJobsPerUserLimit",
            f"the QoS's limit on jobs of a user is reached ({WAITS}qos may start it sooner)",
        ),
        (
            "AssocGrpGRES",
            f"the account's limit on GPUs is reached ({WAITS}account may start it sooner)",
        ),
        (
            "AssocGrpCPURunMinutesLimit",
            "the account's limit on minutes of CPUs is reached "
            f"({WAITS}account may start it sooner)",
        ),
        (
            "MaxMemoryPerAccount",
            f"the QoS's limit on memory of an account is reached ({WAITS}qos may start it sooner)",
        ),
        (
            "AssocGrpCPUMinutesLimit",
            "the account has used up its minutes of CPUs (ask those who run the cluster, or "
            "cancel it, change launcher.account, and give the same command)",
        ),
        (
            "QOSMaxWallDurationPerJobLimit",
            "the QoS's limits for a job do not allow its time (it never starts: cancel it, change "
            "launcher.time_min or launcher.qos, and give the same command)",
        ),
        (
            "QOSMinGRES",
            "the QoS's limits for a job do not allow its GPUs (it never starts: cancel it, change "
            "launcher.gpus_per_node or launcher.qos, and give the same command)",
        ),
        (
            "AssocMaxLicensePerJob",
            "the account's limits for a job do not allow its resources (it never starts: cancel "
            "it, change launcher.account, and give the same command)",
        ),
    ],
)
def test_why_a_job_waits(here: Path, reason: str, meaning: str | None) -> None:
    """Names of Slurm 22.05 to 24.05; those of limits come with what to do."""
    queue(here, f"41_0|PENDING|0|0|{reason}|")
    note_job(here, here / "log.txt", id="41_0")
    (progress,) = read_progress([here])
    expected = "" if meaning is None else ": ".join(filter(None, [reason, meaning]))
    assert (progress.state, progress.note) == (State.pending, expected)


def test_a_sweep_that_is_waited_for_tells_each_reason_once(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "; ".join(f"echo '41_{n}|'$state'|0|256|QOSGrpNodeLimit|'" for n in range(2))
    queue(here, "").write_text(
        "#!/bin/sh\necho >> asked\ntest $(wc -l < asked) -gt 2 && state=FAILED || state=PENDING\n"
        f"{lines}\n"
    )
    members = []
    for number in range(2):
        folder = here / f"run-{number}"
        folder.mkdir()
        note_job(folder, folder / "log.txt", id=f"41_{number}")
        members.append(Member(compose_run([f"run_dir={folder}"]), (), ()))
    _follow(SlurmConfig(poll_s=0.01), members, lambda: None)
    assert capsys.readouterr().out.splitlines() == [
        "run-0  pending: QOSGrpNodeLimit: the QoS's limit on nodes is reached "
        f"({WAITS}qos may start it sooner)",
        "run-0  failed: exit code 1: ",
        "run-1  failed: exit code 1: ",
    ]


def queue(here: Path, line: str) -> Path:
    """A squeue that prints this line."""
    program = here / "bin" / "squeue"
    program.write_text(f"#!/bin/sh\necho '{line}'\n")
    program.chmod(0o755)
    return program
