"""Local sweeps, and what every launcher checks before it starts a run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo.config.check import run_yaml
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, RunError
from simpo.launch.folders import LONGEST_NAME, Member
from simpo.launch.sweep import (
    NOTHING_HELD_OUT,
    _follow,
    _print_end,
    launch,
    share_of_machine,
)
from simpo.run import progress
from simpo.run.command import train_command
from simpo.run.runs import State, read_progress
from tests.support.made_runs import make
from tests.support.whole_runs import (
    assert_same_run,
    finish,
    logged,
    metrics_of,
    run,
    start,
    wait_for,
)

RUN = compose_run([])
own_overrides = st.lists(
    st.tuples(st.sampled_from(["loss.beta", "model.path", "train.seed", "data"]), st.text()),
    min_size=1,
    unique_by=lambda item: item[0],
)


def without_bar(output: str) -> list[str]:
    """The lines of a sweep but for those of its bar, which slow ones print."""
    return [line for line in output.splitlines() if not re.match(r"sweep \d+/\d+", line)]


def name_of(overrides: list[tuple[str, str]]) -> str:
    words = tuple(f"{key}={value}" for key, value in overrides)
    return Member(RUN, words, words).name


@given(own_overrides, st.randoms())
def test_a_folder_is_named_by_the_overrides_whatever_their_order(overrides, random) -> None:
    name = name_of(overrides)
    shuffled = random.sample(overrides, len(overrides))
    assert name_of(shuffled) == name
    assert re.fullmatch(r"[\w.,=+-]+", name) and len(name) <= LONGEST_NAME + 9
    key, value = overrides[0]
    assert name_of([(key, value + "x"), *overrides[1:]]) != name


def test_names_are_readable() -> None:
    assert name_of([("loss.gamma_beta_ratio", "0.3"), ("loss.beta", "2")]) == (
        "loss.beta=2,loss.gamma_beta_ratio=0.3"
    )
    assert name_of([("model.path", "a/b")]).startswith("model.path=a_b-")


@pytest.mark.parametrize(
    "name",
    ["plain-1.0+x", "beta=2,seed=1", "a b", "it's", 'so "called"', "ü", "back\\", 'a\\"b'],
)
def test_the_command_of_a_member_finds_its_folder(name: str, tmp_path: Path) -> None:
    """Its name has signs that Hydra and the shell read themselves."""
    words = shlex.split(train_command(["train.seed=3"], tmp_path / name))
    assert words[:3] == ["python", "-m", "simpo.train"]
    run = compose_run(words[3:])
    assert (run.run_dir, run.train.seed) == (str(tmp_path / name), 3)


def test_a_sweep_without_held_out_pairs_has_no_best_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "sweep" / "loss.beta=2", held_out=False)
    _print_end(tmp_path / "sweep", with_best=True)
    assert capsys.readouterr().out == (
        "best   none: no finished run has rewards/accuracies\nreport python -m simpo.report sweep\n"
    )


def test_a_sweep_without_held_out_pairs_says_so_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before members are started, and not if one has held-out pairs or is judged."""
    monkeypatch.setattr("simpo.launch.sweep._run_here", lambda *_: print("started"))
    (tmp_path / "a.jsonl").write_text("")
    none = ["data=jsonl", f"data.sources=[{{path: {tmp_path}/a.jsonl}}]"]
    for number, (words, told) in enumerate(((none, True), ([], False))):
        folder = tmp_path / str(number)
        for beta in (2, 3):
            make(folder / f"loss.beta={beta}", beta=beta, steps=4, overrides=tuple(words))
            (folder / f"loss.beta={beta}" / "status.json").unlink()
        shared = [*words, f"launcher.sweep_dir={folder}"]
        launch([member(shared, [f"loss.beta={beta}"]) for beta in (2, 3)], "x", search=True)
        first, *_ = capsys.readouterr().out.splitlines()
        assert (first == NOTHING_HELD_OUT) is told, first
    assert NOTHING_HELD_OUT == (
        "note   nothing is held out, so no member will be the best (test_split or test_path of "
        "data.sources holds pairs out)"
    )


def test_the_report_of_a_sweep_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command works from any folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    _print_end(tmp_path / "my sweep", with_best=False)
    assert capsys.readouterr().out == f"report python -m simpo.report '{tmp_path}/my sweep'\n"


@pytest.mark.process
def test_a_local_sweep(tiny_run: list[str], tmp_path: Path) -> None:
    """Two at a time; equal to the same runs alone; again, and only what is new is run."""
    sweep = tmp_path / "outputs" / "sweeps"
    command = ["-m", "launcher.parallel=2", "loss.beta=2,2.5", *tiny_run]
    output = run(command)
    (folder,) = sweep.iterdir()
    assert f"folder {folder}\n" in output
    assert "loss.beta=2.5  finished, step 6 of 6\n" in output
    assert {path.name for path in folder.iterdir()} == {"loss.beta=2", "loss.beta=2.5"}
    run([*tiny_run, "loss.beta=2.5", f"run_dir={tmp_path / 'alone'}"])
    assert_same_run(folder / "loss.beta=2.5", tmp_path / "alone", tmp_path)
    assert "\nheld out after step 6: loss " in (folder / "loss.beta=2" / "log.txt").read_text()
    found = {
        path.parent.name: json.loads(path.read_text())["eval_after"]["rewards/accuracies"]
        for path in folder.glob("*/results.json")
    }
    value = max(found.values())
    leaders = sorted(name for name in found if found[name] == value)
    best = leaders[0] if len(leaders) == 1 else f"{'; '.join(leaders)} (tied for best)"
    assert without_bar(output)[-2:] == [
        f"best   {best}: rewards/accuracies {value:.4f}",
        f"report python -m simpo.report {folder}",
    ]
    own = (folder / "loss.beta=2" / "command.txt").read_text()
    assert f'run_dir="{folder}/loss.beta=2"' in own and "launcher" not in own
    # Where and how members run makes no other sweep of it.
    output = run(["-m", "launcher.parallel=1", "tracker=console", *tiny_run, "loss.beta=3,2"])
    assert "1 of 2 members finished already\n" in output
    assert f"folder {folder}\n" in output
    assert (folder / "loss.beta=3" / "results.json").is_file()
    assert len((folder / "loss.beta=2" / "jobs.jsonl").read_text().splitlines()) == 1


@pytest.mark.matrix
def test_a_member_fails_and_the_others_go_on(
    tiny_run: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    record = '{"prompt": "a", "chosen": "b", "rejected": "b"}\n'
    (tmp_path / "bad.jsonl").write_text(record)
    good = f"{{path: {tmp_path}/train.jsonl, test_path: {tmp_path}/test.jsonl}}"
    overrides = [*tiny_run, f"launcher.sweep_dir={folder}"]
    sweep = [f"data.sources=[{{path: {tmp_path}/bad.jsonl}}],[{good}]"]
    message = run(["-m", *overrides, *sweep], code=1)
    bad, fine = sorted(folder.iterdir(), key=lambda path: "bad" not in path.name)
    assert message.splitlines()[-1] == (
        f"1 of 2 members did not finish: {bad.name} (python -m simpo.report "
        f"{folder} tells why; the same command continues them)"
    )
    place = f"{tmp_path}/bad.jsonl train record 1"
    reason = f"DataError: {place}: chosen and rejected are the same"
    states = read_progress([bad, fine])
    assert [progress.state for progress in states] == [State.failed, State.finished]
    assert states[0].note == reason
    assert f"{bad.name}  failed: {states[0].note}\n" in message


@pytest.mark.matrix
def test_a_stopped_sweep_goes_on(tiny_run: list[str], tmp_path: Path) -> None:
    """Told to stop in its first member, then by a Ctrl-C in its second; both have saved."""
    folder = tmp_path / "sweep"
    command = ["-m", "loss.beta=2,3", *tiny_run, "train.max_steps=60", "train.epochs=20"]
    command += [f"launcher.sweep_dir={folder}", "launcher.poll_s=0.2", "train.eval_every=0"]
    command += ["train.checkpoint_every=0"]
    first, second = folder / "loss.beta=2", folder / "loss.beta=3"
    process = start(command)
    wait_for(logged(first, 5), process)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: the running members have saved" in finish(process, code=75)
    states = [progress.state for progress in read_progress([first, second])]
    assert states == [State.stopped, State.pending]
    # One that failed before waits for its turn like one that is new.
    (second / "status.json").write_text('{"state": "failed", "error": "RunError: before"}')
    process = start(command)
    wait_for(logged(second, 5), process)
    process.send_signal(signal.SIGINT)
    message = finish(process, code=130)
    assert message.endswith(
        "interrupted: the running members have saved (the same command continues)\n"
    )
    states = [progress.state for progress in read_progress([first, second])]
    assert states == [State.finished, State.stopped]
    assert metrics_of(second)[-1]["step"] < 60
    assert "loss.beta=3  finished, step 60 of 60\n" in run(command)
    assert "continued after step" in (second / "log.txt").read_text()


def test_members_that_a_stopped_sweep_did_not_start_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make(tmp_path / "a", state="stopped"), tmp_path / "b", tmp_path / "c"]
    for folder in folders[1:]:
        folder.mkdir()
        shutil.copy(folders[0] / "run.yaml", folder)
    members = [Member(replace(RUN, run_dir=str(folder)), (), ()) for folder in folders]
    counted: list[int] = []

    class Bar:
        def advance(self, count: int, text: str) -> None:
            counted.append(count)

    monkeypatch.setattr(progress, "bar", lambda *_: nullcontext(Bar()))
    _follow(RUN.launcher, members, set)
    assert counted == [1]


def member(overrides: list[str], own: list[str]) -> Member:
    return Member(compose_run([*overrides, *own]), (*overrides, *own), tuple(own))


def test_refused_before_anything_is_started(tmp_path: Path) -> None:
    shared = [f"output_dir={tmp_path}/out", "run_dir=here"]
    with pytest.raises(ConfigError) as error:
        launch([member(shared, ["loss.beta=2"])], "x")
    assert str(error.value) == (
        "run_dir: each member of a sweep has its own folder, got here (set launcher.sweep_dir)"
    )
    with pytest.raises(ConfigError) as error:
        launch([member([], [f"launcher.parallel={number}"]) for number in (1, 2)], "x")
    assert str(error.value) == (
        "launcher: members of a sweep share its settings (give one value for each)"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError) as failed:
        launch([member([f"launcher.sweep_dir={tmp_path}/file"], ["loss.beta=2"])], "x")
    assert str(failed.value) == (
        f"{tmp_path}/file/loss.beta=2: Not a directory (something else lies in its place: move "
        "that away)"
    )
    # The menu changed under a sweep that was begun.
    folder = tmp_path / "sweep" / "loss.beta=2"
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(run_yaml(compose_run(["loss.beta=2", "train.epochs=3"])))
    with pytest.raises(ConfigError) as error:
        launch([member([f"launcher.sweep_dir={tmp_path}/sweep"], ["loss.beta=2"])], "x")
    assert str(error.value) == (
        f"train.epochs: the run in {folder} has 3, got 1 (restore it, or choose another folder)"
    )
    assert not (tmp_path / "out").exists()
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launcher.parallel=0"], "launcher.parallel: must be 1 or more, got 0"),
        (["launcher.poll_s=0"], "launcher.poll_s: must be above 0 and at most 3600, got 0.0"),
        (
            ["launcher=slurm", "launcher.nodes=0"],
            "launcher.nodes: must be 1 or more, got 0",
        ),
        (
            ["launcher=slurm", "launcher.gpus_per_node=0"],
            "launcher.gpus_per_node: must be 1 or more, or null, got 0",
        ),
        (
            ["launcher=slurm", "launcher.mem_gib=-1"],
            "launcher.mem_gib: must be above 0, or null, got -1.0",
        ),
        (
            ["launcher=slurm", "launcher.time_min=1", "launcher.signal_before_s=60"],
            "launcher.signal_before_s: must be below the time limit, got 60",
        ),
        (
            ["launcher=slurm", "launcher.options=[mail-type]"],
            "launcher.options: each must be of the form --key=value, got mail-type",
        ),
        (
            ["launcher=slurm", 'launcher.options=["--time=5"]'],
            "launcher.options: --time=5 is set by the launcher (set launcher.time_min)",
        ),
        (
            ["launcher=slurm", 'launcher.options=["--output=x"]'],
            "launcher.options: --output=x is set by the launcher (leave it out)",
        ),
        (
            ["launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=4"],
            "backend: single is one process, but the launcher's nodes and GPUs make 8 "
            "(backend=fsdp, or launcher.tasks_per_node=1)",
        ),
        (
            ["launcher=slurm", "launcher.nodes=2", "backend=fsdp", "backend.processes=2"],
            "backend.processes: Slurm starts the 2 processes, got 2 (leave it out)",
        ),
        (["launcher.nodes=2"], "launcher.nodes: only with launcher=slurm"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_run(overrides)
    assert str(error.value) == message


def test_members_share_out_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert share_of_machine(0, 1) == {}
    assert share_of_machine(0, 2) == {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "4,6"}
    assert share_of_machine(1, 2) == {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "5"}
    # Too few for one each: all see all.
    assert share_of_machine(3, 4) == {"OMP_NUM_THREADS": "2"}


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["stages", "optuna"])
def test_searches_by_the_objective(kind: str, tiny_run: list[str], tmp_path: Path) -> None:
    """The best run of all is told as the best, and the same search again starts nothing."""
    folder = tmp_path / "sweep"
    command = ["-m", *tiny_run, f"launcher.sweep_dir={folder}", "launcher.parallel=2"]
    command += ["monitor.metric=rewards/margins", "loss.beta=2"]
    if kind == "stages":
        command += ["experiments=sweeps/lr_then_gamma", "train.learning_rate=1e-4,1e-3"]
        command += ["loss.gamma_beta_ratio=0.3,0.5"]
    else:
        pytest.importorskip("optuna")
        command += ["experiments=sweeps/optuna_beta_gamma", "hydra.sweeper.num_trials=3"]
        command += ["hydra.sweeper.trials_at_once=2"]
    output = run(command)
    found = {
        path.parent.name: json.loads(path.read_text())["eval_after"]["rewards/margins"]
        for path in folder.glob("*/results.json")
    }
    best = max(found, key=lambda name: found[name])
    settings = " ".join(reversed(best.split(",")) if kind == "stages" else best.split(","))
    assert without_bar(output)[-1] == f"best   {settings}: rewards/margins {found[best]:.4f}"
    if kind == "stages":
        # The second stage is at the better rate of the first.
        rates = {name: found[f"train.learning_rate={name}"] for name in ("0.0001", "0.001")}
        rate = max(rates, key=lambda name: rates[name])
        assert found.keys() == {
            *(f"train.learning_rate={name}" for name in rates),
            *(f"loss.gamma_beta_ratio={r},train.learning_rate={rate}" for r in ("0.3", "0.5")),
        }
    else:
        assert len(found) == 3
    again = run(command)
    assert again.count("members finished already") == 2
    assert without_bar(again)[-1] == without_bar(output)[-1]
    assert len(list(folder.glob("*/jobs.jsonl"))) == len(found)
    lines = [len(path.read_text().splitlines()) for path in folder.glob("*/jobs.jsonl")]
    assert set(lines) == {1}


@pytest.mark.matrix
def test_the_objective_reaches_sweepers_through_other_launchers(tiny_run: list[str]) -> None:
    """Hydra's own launcher calls `main`, and takes what it returns."""
    command = ["-m", *tiny_run, "hydra/launcher=basic", "hydra/sweeper=stages"]
    command += ["monitor.metric=rewards/margins", "monitor.mode=min", "loss.beta=20,2"]
    output = run([*command, "train.max_steps=2", "train.eval_every=0"])
    assert "best   loss.beta=2: rewards/margins 0.0" in output


def test_a_sweep_whose_folder_cannot_be_made(tmp_path: Path) -> None:
    """Hydra makes it for its multirun.yaml, before any member is looked at."""
    folder = tmp_path / "sweeps"
    folder.write_text("")
    assert run(["-m", "loss.beta=2,3", f"output_dir={tmp_path}"], code=1).strip() == (
        f"{folder}: File exists (something else lies in its place: move that away)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["hydra/sweeper=stages"],
            "hydra.sweeper.stages: empty (list settings with values to try)",
        ),
        (
            ["hydra/sweeper=optuna"],
            "hydra.sweeper.params: empty (such as loss.beta: interval(1,3))",
        ),
        (
            ["launcher=slurm", "hydra/sweeper=stages", "loss.beta=2,3"],
            "launcher.wait: a search needs its results (launcher.wait=true)",
        ),
    ],
)
def test_a_search_that_cannot_be_made(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert run(["-m", *arguments, f"output_dir={tmp_path}"], code=2).strip() == message
