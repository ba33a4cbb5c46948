"""Runs and sweeps on a real Slurm cluster: submitted, interrupted in every way, and watched.

Jobs whose results must be equal differ in `train.keep_checkpoints` only, which changes no number.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from simpo.config.check import load_run
from simpo.launch import member
from simpo.loss.simpo import SigmoidConfig
from simpo.run import slurm
from simpo.run.files import last_job, read_results
from simpo.run.runs import IN_PROGRESS, State, read_progress
from tests.support.browser import look_at
from tests.support.tiny_models import tiny_reward_model
from tests.support.whole_runs import assert_same_run, finish, logged, metrics_of, run, start

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.usefixtures("slurm"),
]

STEPS = 100
# What users set for their own reading of Slurm's answers.
OWN_TASTE = [
    ("SLURM_TIME_FORMAT", "%d %b %H:%M"),
    ("SLURM_TIME_FORMAT", "relative"),
    ("SLURM_TIME_FORMAT", "standard"),
    ("SQUEUE_FORMAT", "%i %j"),
    ("SQUEUE_FORMAT2", "JobID,Name"),
    ("SQUEUE_STATES", "PENDING"),
    ("SQUEUE_USERS", "nobody"),
    ("SQUEUE_PARTITION", "high"),
    ("SACCT_FORMAT", "JobName"),
]
ON_N1 = 'launcher.options=["--nodelist=n1"]'
ON_N2 = 'launcher.options=["--nodelist=n2"]'


def slurm_command(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def until(condition: Callable[[], bool], what: str, every_s: float = 0.5) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(every_s)


def hurry(folder: Path) -> State:
    """A run's state; Slurm's two minutes between a requeue and the next start are cut short."""
    (progress,) = read_progress([folder])
    if progress.state is State.pending and progress.note == "BeginTime" and not remains_of(folder):
        time.sleep(1)  # a start within the second of the requeue is refused
        slurm_command("scontrol", "update", f"JobId={job_of(folder)}", "StartTime=now")
    return progress.state


def ended(folder: Path) -> bool:
    return hurry(folder) not in IN_PROGRESS


def job_of(folder: Path) -> str:
    return str(last_job(folder)["id"])


def set_limit(folder: Path, minutes: int) -> None:
    """Change the time limit of a run's job."""
    slurm_command("scontrol", "update", f"JobId={job_of(folder)}", f"TimeLimit={minutes}")


def remains_of(folder: Path) -> list[str]:
    """Slurm's own processes for a run's job."""
    titles = (
        " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])
    )
    return [title for title in titles if title.startswith(f"slurmstepd: [{job_of(folder)}.")]


def log_of(folder: Path) -> str:
    return (folder / last_job(folder)["log"]).read_text()


def processes_of(folder: Path) -> list[psutil.Process]:
    """The training processes of a run: those that hold its files open."""
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if any(Path(file.path).parent == folder for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def halt(folders: Sequence[Path], step: int = 20) -> list[psutil.Process]:
    """Put runs to sleep once they have logged a step, so that none ends before it is disturbed.

    Slurm wakes a process to tell it something.
    """
    halted: dict[Path, psutil.Process] = {}

    def all_halted() -> bool:
        for folder in folders:
            if folder not in halted and logged(folder, step)():
                (halted[folder],) = processes_of(folder)
                halted[folder].suspend()
        return len(halted) == len(folders)

    names = ", ".join(folder.name for folder in folders)
    until(all_halted, f"step {step} of {names}", every_s=0.1)
    return [halted[folder] for folder in folders]


@pytest.fixture
def long_run(tiny_run: list[str]) -> list[str]:
    """Overrides of a run with time to be disturbed, evaluations and checkpoints on the way."""
    return [
        *tiny_run,
        f"train.max_steps={STEPS}",
        "train.epochs=100",
        "train.eval_every=50",
        "train.checkpoint_every=10",
    ]


def same_numbers(left: Path, right: Path, scratch: Path) -> None:
    """Bit for bit."""
    assert assert_same_run(left, right, scratch) > 0


def test_disturbed_jobs_end_as_undisturbed_ones(long_run: list[str], tmp_path: Path) -> None:
    """An array of four and a single job, each met by something else, all at the same time."""
    sweep = tmp_path / "sweep"
    queued = ["launcher=slurm", "launcher.poll_s=0.5"]
    command = ["-m", *queued, ON_N1, f"launcher.sweep_dir={sweep}"]
    output = run([*command, "train.keep_checkpoints=2,3,4,5", *long_run])
    calm, requeued, cancelled, killed = (
        sweep / f"train.keep_checkpoints={number}" for number in (2, 3, 4, 5)
    )
    array = job_of(calm).partition("_")[0]
    assert f"job    {array}: 4 members" in output
    assert f"cancel scancel {array}" in output
    assert [job_of(path) for path in (calm, killed)] == [f"{array}_0", f"{array}_3"]

    preempted = tmp_path / "preempted"
    run([*queued, ON_N2, f"run_dir={preempted}", *long_run])

    _, _, victim, _ = halt([requeued, cancelled, killed, preempted])
    urgent = ["sbatch", "--partition=high", "--nodelist=n2", "--exclusive", "--output=/dev/null"]
    slurm_command(*urgent, "--wrap", "sleep 1")
    until(lambda: read_progress([preempted])[0].requeued == 1, "preemption")

    slurm_command("scontrol", "requeue", job_of(requeued))
    slurm_command("scancel", job_of(cancelled))
    victim.send_signal(signal.SIGKILL)

    def second_life() -> bool:
        return hurry(preempted) is State.running and "continued after step" in log_of(preempted)

    until(second_life, "the preempted run's second life")
    step = read_progress([preempted])[0].step
    halt([preempted], step + 20)
    slurm_command("scontrol", "update", "NodeName=n2", "State=down", "Reason=test")
    until(lambda: read_progress([preempted])[0].requeued == 2, "the loss of its node")
    # Back before the job's remains are gone, the node would be drained for a duplicate of it.
    until(lambda: not remains_of(preempted), "the end of what ran on the node")
    subprocess.run(["scontrol", "update", "NodeName=n2", "State=resume"], capture_output=True)
    free = ["sinfo", "--noheader", "--nodes=n2", "--partition=main", "--format=%t"]
    until(lambda: slurm_command(*free).strip() == "idle", "the node's return")

    disturbed = (calm, requeued, cancelled, killed, preempted)
    until(lambda: all([ended(path) for path in disturbed]), "the end of all")
    names = ("calm", "requeued", "cancelled", "killed", "preempted")
    progress = dict(zip(names, read_progress(disturbed), strict=True))
    assert progress["calm"].text() == f"finished, step {STEPS} of {STEPS}"
    assert progress["requeued"].text() == f"finished, step {STEPS} of {STEPS}, requeued 1 time"
    assert progress["preempted"].text() == f"finished, step {STEPS} of {STEPS}, requeued 2 times"
    assert progress["cancelled"].state is State.cancelled
    assert progress["killed"].state is State.failed
    assert progress["killed"].note.startswith("exit code 137")
    for path in (requeued, preempted):
        assert "continued after step" in log_of(path)
        same_numbers(calm, path, tmp_path)

    # The same command again: only those that have not finished.
    output = run([*command, "launcher.wait=true", "train.keep_checkpoints=2,3,4,5", *long_run])
    assert "2 of 4 members finished already" in output
    assert ": 2 members" in output
    for path in (cancelled, killed):
        assert read_progress([path])[0].state is State.finished
        same_numbers(calm, path, tmp_path)


def test_time_limits(long_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm tells one job of its limit; the other's own timer requeues it, whatever it does."""
    told, busy = tmp_path / "told", tmp_path / "busy"
    for folder in (told, busy):
        times = ["launcher.time_min=30", "launcher.signal_before_s=30"]
        run(["launcher=slurm", *times, f"run_dir={folder}", *long_run])
    halted, process = halt([told, busy])
    # Lowered now and raised again, so that each life meets what it should on any machine.
    elapsed_s = time.time() - halted.create_time()
    set_limit(told, int(elapsed_s + 30) // 60 + 1)
    monkeypatch.setenv("SLURM_JOB_ID", job_of(busy))
    end = slurm.end_time()
    assert end is not None
    assert end == pytest.approx(process.create_time() + 30 * 60, abs=10)
    with monkeypatch.context() as environment:
        for name, value in OWN_TASTE:
            environment.setenv(name, value)
            assert slurm.end_time() == end, (name, value)
            assert slurm.jobs([job_of(busy)])[job_of(busy)].state == "RUNNING", (name, value)
    monkeypatch.setattr(member, "REQUEUE_MARGIN_S", end - time.time() - 0.5)
    member.requeue_before_limit()
    run([*long_run, f"run_dir={tmp_path / 'calm'}"])
    until(lambda: read_progress([told])[0].requeued == 1, "the first limit")
    set_limit(told, 30)
    until(lambda: all([ended(told), ended(busy)]), "the end of both")
    for folder, limits in ((told, "SIGUSR2"), (busy, "SIGTERM")):
        text = read_progress([folder])[0].text()
        assert text == f"finished, step {STEPS} of {STEPS}, requeued 1 time"
        assert f"{limits}: saved after step" in log_of(folder)
        assert "continued after step" in log_of(folder)
        same_numbers(tmp_path / "calm", folder, tmp_path)
    # It is nobody's to requeue any more.
    assert not slurm.requeue()


def test_a_grid_from_submission_to_heat_map(tiny_run: list[str], tmp_path: Path) -> None:
    """Two by two on fake GPUs, waited for; every metric of the page is that of its run."""
    sweep = tmp_path / "outputs" / "sweeps"
    overrides = ["launcher=slurm", "launcher.wait=true", "launcher.poll_s=0.5", *tiny_run]
    overrides += ["launcher.gpus_per_node=1", "launcher.array_parallelism=3"]
    output = run(["-m", *overrides, "loss.beta=2,10", "loss.gamma_beta_ratio=0.3,0.5"])
    (folder,) = [path for path in sweep.iterdir() if path.is_dir()]
    assert output.count("finished, step 6 of 6\n") == 4
    assert f"status python -m simpo.report {folder}\n" in output

    subprocess.run([sys.executable, "-m", "simpo.report", folder], check=True, capture_output=True)
    seen = look_at(folder / "report.html")
    assert seen.console == []
    assert all(figure["drawn"] for figure in seen.figures)
    curves, heat, histograms = seen.figures
    assert "log-prob of a chosen token" in curves["titles"]
    margins = [
        json.loads((folder / name / "results.json").read_text())["eval_after"]["rewards/accuracies"]
        for name in (
            f"loss.beta={beta},loss.gamma_beta_ratio={ratio}"
            for ratio in ("0.3", "0.5")
            for beta in ("2", "10")
        )
    ]
    assert [value for row in heat["z"] for value in row] == margins
    assert "rewards/margins" in heat["menu"]
    assert histograms["states"] == [6] * 4


def test_ranks_of_two_nodes_follow_one_process(tiny_run: list[str], tmp_path: Path) -> None:
    """FSDP on 2 x 2 tasks, one for each GPU; told to stop on the way, and requeued."""
    steps = [*tiny_run, "train.max_steps=12", "train.epochs=2"]
    run([*steps, f"run_dir={tmp_path / 'alone'}"])
    folder = tmp_path / "run"
    asked = ["launcher.nodes=2", "launcher.gpus_per_node=2", "launcher.cpus_per_task=1"]
    asked += ["launcher.mem_gib=1.5", "launcher.time_min=30", "launcher.constraint=fake"]
    asked += ["launcher.partition=main", "launcher.account=root", "launcher.qos=normal"]
    asked += ['launcher.options=["--comment=pairs","--exclusive=user"]']
    asked += ['launcher.setup=["echo GPUs: $SLURM_GPUS_ON_NODE"]']
    run(["launcher=slurm", "backend=fsdp", *asked, *steps, f"run_dir={folder}"])
    until(logged(folder, 3), "step 3")
    slurm_command("scancel", "--signal=USR2", job_of(folder))
    until(lambda: ended(folder), "the end")
    assert read_progress([folder])[0].text() == "finished, step 12 of 12, requeued 1 time"
    assert "GPUs: 2\n" in log_of(folder)
    assert "fp32 on 4 CPU (fsdp, 4 processes)" in log_of(folder)
    assert "continued after step" in log_of(folder)

    def told() -> str:
        return slurm_command("scontrol", "--oneliner", "show", "job", job_of(folder))

    until(lambda: "JobState=COMPLETED" in told(), "the end of the job, a moment after the run's")
    for words in (
        "NumNodes=2 NumCPUs=4 NumTasks=4 CPUs/Task=1",
        "TimeLimit=00:30:00",
        "Partition=main",
        "Account=root",
        "QOS=normal",
        "Features=fake",
        "MinMemoryNode=1.50G",
        "Requeue=1",
        "Comment=pairs",
        "TresPerNode=gres:gpu:2",
    ):
        assert words in told()
    lines = list(zip(metrics_of(folder), metrics_of(tmp_path / "alone"), strict=True))
    for ours, theirs in lines:
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


def test_models_are_judged_at_the_end(
    tiny_run: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    """Two members, of whose two ranks one judges; one is told to stop meanwhile, and requeued."""
    tiny_reward_model(tiny_folder, tmp_path / "reward")
    sweep = tmp_path / "sweep"
    words = ["-m", "train.seed=1,2", *tiny_run, "train.max_steps=2", "train.eval_every=0"]
    words += ["launcher=slurm", "launcher.wait=true", "launcher.poll_s=0.5", "backend=ddp"]
    words += ["launcher.gpus_per_node=2", "launcher.cpus_per_task=1", f"launcher.sweep_dir={sweep}"]
    words += ["benchmark=pairs", "benchmark.max_new_tokens=200", "on_policy.batch_prompts=1"]
    words += [f"judge.reward={tmp_path}/reward", "monitor.metric=win_rate"]
    process = start(words)
    told, calm = (sweep / f"train.seed={seed}" for seed in (1, 2))
    answers = told / "benchmarks" / "pairs" / "answers.jsonl"
    until(lambda: answers.is_file() and answers.read_text().count("\n") > 2, "some answers")
    slurm_command("scancel", "--signal=TERM", job_of(told))
    until(lambda: read_progress([told])[0].requeued == 1, "the requeue")
    before = answers.read_text()
    until(lambda: all([ended(path) for path in (told, calm)]), "the end of both")
    output = finish(process)
    assert read_progress([told])[0].text() == "finished, step 2 of 2, requeued 1 time"
    assert f"SIGTERM: trained, not yet judged, in {told}" in log_of(told)
    assert log_of(told).count("saving the model") == 1
    assert answers.read_text().startswith(before)
    rates = [read_results(path)["eval_after"]["win_rate"] for path in (told, calm)]
    best = rates.index(max(rates))
    name = f"train.seed={best + 1}"
    if rates[0] == rates[1]:
        name = "train.seed=1; train.seed=2 (tied for best)"
    assert f"best   {name}: win_rate {rates[best]:.4f}" in output


def test_a_pruned_member_stays_pruned(tiny_run: list[str], tmp_path: Path) -> None:
    """A search prunes a job; Slurm then starts it again, as after the loss of its node."""
    pytest.importorskip("optuna")
    sweep = tmp_path / "sweep"
    words = ["-m", *tiny_run, "sample.num_prompts=0", "monitor.metric=loss", "monitor.mode=min"]
    words += ["launcher=slurm", "launcher.wait=true", "launcher.poll_s=0.5"]
    # With this seed the last two are 0.01 and 3.
    words += ["hydra/sweeper=optuna", "train.learning_rate=0.001,0.002,0.01,3"]
    words += [f"launcher.sweep_dir={sweep}"]
    words += ["hydra.sweeper.seed=44", "hydra.sweeper.num_trials=4"]
    words += ["hydra.sweeper.trials_at_once=2", "hydra.sweeper.pruner=median"]
    output = run([*words, "hydra.sweeper.startup_trials=2"])
    pruned = sweep / "train.learning_rate=3"
    assert "train.learning_rate=3  pruned, step 3 of 6: Pruned: loss " in output
    assert "\ntrials 2 of 4, 0 pruned\n" in output and "\ntrials 4 of 4, 1 pruned\n" in output
    assert "\nbest   train.learning_rate=0.01: loss " in output
    status, metrics = ((pruned / name).read_text() for name in ("status.json", "metrics.jsonl"))

    until(lambda: not remains_of(pruned), "the end of the job, a moment after the run's")
    slurm_command("scontrol", "requeue", job_of(pruned))
    until(lambda: read_progress([pruned])[0].requeued == 1, "the requeue")
    until(lambda: ended(pruned), "the end of its second life")
    assert read_progress([pruned])[0].text() == "pruned, step 3 of 6, requeued 1 time"
    assert (pruned / "status.json").read_text() == status
    assert (pruned / "metrics.jsonl").read_text() == metrics
    assert log_of(pruned).endswith(f"\nstays pruned: {json.loads(status)['error']}\n")


def test_what_is_submitted_stays_as_it_was(tiny_run: list[str], tmp_path: Path) -> None:
    """A choice that is edited while its run waits in the queue; and how a waiting run looks."""
    folder, menu = tmp_path / "run", tmp_path / "menu"
    (menu / "loss").mkdir(parents=True)
    choice = menu / "loss" / "mine.yaml"
    text = "defaults: [/schema/loss/sigmoid@_here_, _self_]\nbeta: 2.5\n"
    choice.write_text(text)
    held = ["launcher=slurm", 'launcher.options=["--hold"]', f"run_dir={folder}", "loss=mine"]
    command = [f"--config-dir={menu}", *tiny_run, *held]
    assert ": 1 member\n" in run(command)
    (progress,) = read_progress([folder])
    assert (progress.text(), progress.note) == ("pending", "JobHeldUser")
    job = job_of(folder)
    assert "1 of 1 members pending already\n" in run(command)
    assert job_of(folder) == job
    choice.write_text(text.replace("2.5", "99"))
    slurm_command("scontrol", "release", job_of(folder))
    until(lambda: ended(folder), "the end")
    assert read_progress([folder])[0].state is State.finished
    loss = load_run(folder / "run.yaml").loss
    assert isinstance(loss, SigmoidConfig) and loss.beta == 2.5
    (line, *_) = metrics_of(folder)
    assert line["eval/rewards/chosen"] == pytest.approx(2.5 * line["eval/logps/chosen"])


def test_settings_outdo_the_variables_of_sbatch(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is set here holds; a variable for what is not set here is a default like any other."""
    for name, value in {
        "TIMELIMIT": "3",
        "SIGNAL": "B:TERM@7",
        "ARRAY_INX": "0-9",
        "JOB_NAME": "mine",
        "NO_REQUEUE": "1",
        "PARTITION": "high",
        "OUTPUT": f"{tmp_path}/elsewhere",
    }.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    folder = tmp_path / "run"
    held = ["launcher=slurm", 'launcher.options=["--hold"]', f"run_dir={folder}"]
    run([*held, "launcher.time_min=30", "launcher.signal_before_s=60", *tiny_run])
    told = slurm_command("scontrol", "--oneliner", "show", "job", job_of(folder))
    slurm_command("scancel", job_of(folder))
    for words in (
        "JobName=run",
        "TimeLimit=00:30:00",
        "Partition=high",
        "Requeue=1",
        f"StdOut={folder}/slurm/",
    ):
        assert words in told
    assert "ArrayTaskId" not in told


def test_a_job_that_cannot_run(tiny_run: list[str], tmp_path: Path) -> None:
    """Bad data: FAILED to Slurm too, with the exit code and the log; waited for, an error."""
    record = '{"prompt": "a", "chosen": "b", "rejected": "b"}\n'
    (tmp_path / "train.jsonl").write_text(record)
    folder = tmp_path / "run"
    command = ["launcher=slurm", "launcher.wait=true", "launcher.poll_s=0.5", f"run_dir={folder}"]
    message = run([*command, *tiny_run], code=1)
    assert "1 of 1 members did not finish: run (python -m simpo.report " in message
    (progress,) = read_progress([folder])
    assert progress.state is State.failed
    fault = "record 1: chosen and rejected are the same"
    reason = f"exit code 2: DataError: {tmp_path}/train.jsonl train {fault}"
    assert progress.note.startswith(reason), progress.note
    assert progress.log is not None and fault in progress.log.read_text()
    told = slurm_command("scontrol", "--oneliner", "show", "job", job_of(folder))
    assert "JobState=FAILED" in told and "ExitCode=2:0" in told
    # Gone from squeue, as it is after some minutes, it is in the accounts.
    kept = slurm_command("sacct", "-nPXj", job_of(folder), "--format=State,ExitCode")
    assert kept.strip() == "FAILED|2:0"


def test_without_a_controller(
    tiny_run: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Nothing is half submitted, and the message says what Slurm said; then all is well again."""
    controller = psutil.Process(
        int((request.getfixturevalue("slurm") / "slurmctld.pid").read_text())
    )
    controller.terminate()
    controller.wait(60)
    sweep = ["-m", "launcher=slurm", *tiny_run, "loss.beta=2,3"]
    try:
        process = start(sweep)
        _, errors = process.communicate(timeout=120)
    finally:
        slurm_command("slurmctld")
    assert (process.returncode, errors) == (
        1,
        "launcher: Slurm did not take the jobs: Batch job submission failed: Unable to contact "
        "slurm controller (connect failure)\n",
    )
    assert list((tmp_path / "outputs" / "sweeps").iterdir()) == []
    until(lambda: "idle" in slurm_command("sinfo", "--noheader", "--format=%t"), "the controller")
    refused = run(["launcher=slurm", "launcher.partition=none", *tiny_run], code=1)
    assert refused.strip() == (
        "launcher: Slurm did not take the jobs: Batch job submission failed: Invalid partition "
        "name specified"
    )
