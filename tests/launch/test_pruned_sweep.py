"""Searches whose hopeless trials are pruned, as whole sweeps."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from simpo.config.check import run_yaml
from simpo.config.compose import compose_run
from simpo.config.errors import Pruned, Stopped
from simpo.launch.member import run_member
from simpo.report.compare import compare
from simpo.report.text import text
from simpo.run.files import PRUNING
from simpo.run.pruning import Ended, Pruner, Pruning
from tests.support.whole_runs import metrics_of, run, status_of

pytest.importorskip("optuna")

HOPELESS = "train.learning_rate=3"
SEARCH = [
    *("hydra/sweeper=optuna", "monitor.metric=loss", "monitor.mode=min"),
    # With this seed the batches are 0.001 with 0.002, then 0.01 with 3.
    *("train.learning_rate=0.001,0.002,0.01,3", "hydra.sweeper.seed=44"),
    *("hydra.sweeper.num_trials=4", "hydra.sweeper.trials_at_once=2", "launcher.parallel=2"),
]
MEDIAN = ["hydra.sweeper.pruner=median", "hydra.sweeper.startup_trials=2"]


def line(output: str, start: str) -> str:
    (found,) = [line for line in output.splitlines() if line.startswith(start)]
    return found


@pytest.mark.matrix
def test_a_hopeless_trial_is_pruned(tiny_run: list[str], tmp_path: Path) -> None:
    """The others are as without a pruner, and so is the best; the same command starts nothing."""
    whole, folder = tmp_path / "whole", tmp_path / "sweep"
    common = ["-m", *tiny_run, *SEARCH, "sample.num_prompts=0"]
    plain = run([*common, f"launcher.sweep_dir={whole}"])
    command = [*common, *MEDIAN, f"launcher.sweep_dir={folder}"]
    output = run(command)
    pruned = folder / HOPELESS
    loss = metrics_of(whole / HOPELESS)[4]["eval/loss"]
    reason = f"loss {loss:.4f} after step 3 is hopeless by Optuna's median pruner, beside 2 trials"
    assert f"{HOPELESS}  pruned, step 3 of 6: Pruned: {reason}\n" in output
    assert "\ntrials 2 of 4, 0 pruned\n" in output and "\ntrials 4 of 4, 1 pruned\n" in output
    best = line(output, "best ")
    assert best == line(plain, "best ") and "train.learning_rate=0.01: loss " in best
    assert status_of(pruned) == {
        **{"state": "pruned", "step": 3, "total_steps": 6, "error": f"Pruned: {reason}"}
    }
    assert (pruned / "log.txt").read_text().endswith(f"{reason}\n")
    assert not (pruned / "results.json").exists() and not (pruned / "model").exists()
    assert (pruned / "held_out" / "step-000003.csv").is_file()
    steps = [line["step"] for line in metrics_of(pruned)]
    assert metrics_of(pruned) == metrics_of(whole / HOPELESS)[: len(steps)] and steps[-1] == 3
    for path in (p for p in folder.iterdir() if p != pruned):
        assert metrics_of(path) == metrics_of(whole / path.name)
    report = compare([folder])
    assert report.best is not None and report.names[report.best] == "train.learning_rate=0.01"
    shown = text(report)
    assert "| pruned, step 3 of 6" in shown and f"{HOPELESS}: Pruned: {reason}" in shown

    again = run(command)
    assert "1 of 2 members pruned already\n" in again and line(again, "best ") == best
    assert {len(p.read_text().splitlines()) for p in folder.glob("*/jobs.jsonl")} == {1}
    # As if it had been killed before it was found hopeless.
    (pruned / "status.json").write_text('{"state": "running", "step": 2, "total_steps": 6}')
    again = run(command)
    assert f"{HOPELESS}  pruned, step 3 of 6: Pruned: {reason}\n" in again
    assert line(again, "best ") == best and metrics_of(pruned)[-1]["step"] == 3
    # Its own command trains it to its end, and then it counts as the others do.
    (_, _, _, *words) = shlex.split((pruned / "command.txt").read_text())
    assert f"note   goes on to its end now; before: Pruned: {reason}\n" in run(words)
    assert metrics_of(pruned) == metrics_of(whole / HOPELESS)
    again = run(command)
    assert again.count("2 of 2 members finished already\n") == 2
    assert "\ntrials 4 of 4, 0 pruned\n" in again and line(again, "best ") == best


@pytest.mark.matrix
@pytest.mark.parametrize("many", [["backend=ddp", "backend.processes=2"], []], ids=["ddp", "one"])
def test_all_processes_end_together(many: list[str], tiny_run: list[str], tmp_path: Path) -> None:
    """The run ends with exit code 0 where rank 0 finds it hopeless, and not before."""
    folder = tmp_path / "run"
    folder.mkdir()
    # Better at step 2 than the others, and worse at step 4.
    others = tuple(Ended({2: 9.0, 4: loss, 6: loss}, loss) for loss in (0.1, 0.2, 0.3))
    (folder / PRUNING).write_text(Pruning(Pruner.median, 3, 0, others).text())
    words = [*tiny_run, *many, "monitor.metric=loss", "monitor.mode=min", f"run_dir={folder}"]
    output = run([*words, "train.eval_every=2", "sample.num_prompts=0"])
    loss = metrics_of(folder)[-1]["eval/loss"]
    assert output.endswith(
        f"loss {loss:.4f} after step 4 is hopeless by Optuna's median pruner, beside 3 trials\n"
    )
    assert (status_of(folder)["state"], status_of(folder)["step"]) == ("pruned", 4)


@pytest.mark.parametrize(
    ("error", "ended"),
    [(Pruned("hopeless"), (0, False)), (Stopped("SIGTERM", 75), (75, True))],
    ids=["pruned", "stopped"],
)
def test_a_job_is_requeued_if_it_was_stopped_alone(
    error: Exception,
    ended: tuple[int, bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(_: object, own_process: bool) -> None:
        raise error

    monkeypatch.setattr("simpo.launch.member.start", start)
    (tmp_path / "run.yaml").write_text(run_yaml(compose_run([])))
    assert run_member(tmp_path) == ended
    assert capsys.readouterr().err == f"{error}\n"
    assert not (tmp_path / "status.json").exists()


@pytest.mark.parametrize("whole", [False, True])
def test_a_pruned_member_that_is_started_again(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm requeues the job of a lost node; a sweep without a pruner wants the run whole."""
    started = []
    monkeypatch.setattr("simpo.launch.member.start", lambda *_, **__: started.append("run"))
    (tmp_path / "run.yaml").write_text(run_yaml(compose_run([])))
    status = '{"state": "pruned", "step": 3, "total_steps": 6, "error": "Pruned: hopeless"}'
    (tmp_path / "status.json").write_text(status)
    if not whole:
        (tmp_path / PRUNING).write_text(Pruning(Pruner.median, 3, 0).text())
    assert run_member(tmp_path) == (0, False)
    assert started == ["run"] * whole
    assert capsys.readouterr().out == "stays pruned: Pruned: hopeless\n" * (not whole)
    assert (tmp_path / "status.json").read_text() == status


FEW = ["hydra.sweeper.num_trials=5", "loss.beta=interval(1,2)"]
REFUSED = [
    (
        ["hydra.sweeper.pruner=best", *FEW],
        "hydra.sweeper.pruner: must be one of none, median, halving, got best",
    ),
    (
        ["hydra.sweeper.warmup_steps=-1", *FEW],
        "hydra.sweeper.warmup_steps: must be a whole number from 0, got -1",
    ),
    (
        ["hydra.sweeper.startup_trials=x", *FEW],
        "hydra.sweeper.startup_trials: must be a whole number from 0, got x",
    ),
    (
        ["hydra.sweeper.pruner=median", *FEW],
        "hydra.sweeper.startup_trials: 5 of 5 trials, so none can be pruned (set it lower, or "
        "hydra.sweeper.pruner=none)",
    ),
    (
        ["hydra.sweeper.pruner=halving", "hydra.sweeper.trials_at_once=6", *FEW],
        "hydra.sweeper.trials_at_once: 6 of 5 trials, so none can be pruned (set it lower, or "
        "hydra.sweeper.pruner=none)",
    ),
    (
        [*MEDIAN, "hydra/launcher=basic", *FEW],
        "hydra.sweeper.pruner: only simpo's launcher prunes (leave out hydra/launcher)",
    ),
    (
        [*MEDIAN, *FEW],
        "train.eval_every: 0, so trials are evaluated at their end only and none can be pruned "
        "(set it, or hydra.sweeper.pruner=none)",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_search_that_could_never_prune(words: list[str], message: str, tmp_path: Path) -> None:
    command = ["-m", "hydra/sweeper=optuna", *words, f"output_dir={tmp_path}"]
    assert run(command, code=2).strip() == message
    assert not list(tmp_path.rglob("run.yaml"))


@pytest.mark.matrix
def test_a_metric_that_evaluations_lack(tiny_run: list[str], tmp_path: Path) -> None:
    """Said by the first trial before it loads the model, not at its end."""
    folder = tmp_path / "sweep"
    words = ["-m", *tiny_run, *SEARCH, *MEDIAN, "monitor.metric=rewards/accuracy"]
    output = run([*words, f"launcher.sweep_dir={folder}"], code=1)
    assert (
        "failed: ConfigError: monitor.metric: no such held-out metric, got rewards/accuracy (did "
        "you mean rewards/accuracies?)\n"
    ) in output
    assert not list(folder.rglob("metrics.jsonl"))


@pytest.mark.matrix
def test_trials_that_are_never_asked(tiny_run: list[str], tmp_path: Path) -> None:
    """Steps follow from the data here, so this is known only when the first trials have ended."""
    words = ["-m", *tiny_run, *SEARCH, *MEDIAN, "train.eval_every=6"]
    words += ["sample.num_prompts=0", "hydra.sweeper.num_trials=3"]
    output = run([*words, f"launcher.sweep_dir={tmp_path}/sweep"])
    assert line(output, "note ") == (
        "note   the first trials had no evaluation before their end at which the pruner decides, "
        "so it may prune none (set train.eval_every or hydra.sweeper.warmup_steps lower)"
    )
    assert "\ntrials 3 of 3, 0 pruned\n" in output
