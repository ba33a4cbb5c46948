"""Selection of a run's best model, and early stopping."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from simpo.config.choices import Mode
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.config.schema import MonitorConfig
from simpo.loop.train import train
from simpo.run.best import best_step, evaluations_in, evaluations_without_gain
from simpo.run.files import read_results
from tests.support.whole_runs import (
    finish,
    logged,
    metrics_of,
    run,
    start,
    state_of,
    wait_for,
    weights_of,
)

EVALUATIONS = {
    0: {"loss": 0.1, "accuracy": 0.9},
    5: {"loss": 3.0, "accuracy": 0.5},
    10: {"loss": 2.0, "accuracy": 0.8},
    15: {"loss": 2.5, "accuracy": 0.8},
    20: {"loss": 2.0, "accuracy": 0.4},
    25: {"loss": 1.5, "accuracy": 0.8},
    30: {"loss": 1.5, "accuracy": 0.8},
}


@pytest.mark.parametrize(
    ("metric", "mode", "best", "waited"),
    [
        ("loss", Mode.min, 25, 1),
        ("loss", Mode.max, 5, 5),
        ("accuracy", Mode.max, 25, 1),
        ("accuracy", Mode.min, 20, 2),
    ],
)
def test_best_step(metric: str, mode: Mode, best: int, waited: int) -> None:
    """Step 0 does not count; of equals the one with the lowest loss is the best, then the first."""
    config = MonitorConfig(metric=metric, mode=mode)
    assert best_step(config, EVALUATIONS) == best
    assert evaluations_without_gain(config, EVALUATIONS) == waited


def test_nothing_was_evaluated() -> None:
    assert best_step(MonitorConfig(), {0: {"rewards/accuracies": 0.5}}) is None
    assert evaluations_without_gain(MonitorConfig(), {}) == 0


def test_evaluations_among_logged_lines() -> None:
    lines = [
        {"step": 0, "eval/loss": 2.0, "eval/rewards/margins": 0.1},
        {"step": 1, "train/loss": 1.9},
        {"step": 1, "eval/loss": 1.5},
    ]
    assert evaluations_in(lines) == {0: {"loss": 2.0, "rewards/margins": 0.1}, 1: {"loss": 1.5}}


def overfitting(tiny_run: list[str], *more: str) -> list[str]:
    """A run whose objective, the rejected replies' log-prob, training makes ever worse."""
    return [
        *tiny_run,
        "train.epochs=3",
        "train.eval_every=3",
        "train.checkpoint_every=0",
        "train.keep_checkpoints=1",
        "sample.num_prompts=0",
        "monitor.metric=logps/rejected",
        *more,
    ]


def test_the_best_model_is_kept_and_saved(tiny_run: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(compose_run([*overfitting(tiny_run, "train.keep_best=true"), f"run_dir={folder}"]))
    after = read_results(folder)["eval_after"]
    values = {x["step"]: x["eval/logps/rejected"] for x in metrics_of(folder) if "eval/loss" in x}
    best = max((step for step in values if step), key=lambda step: values[step])
    assert best < 18, "the last model is the best: this run shows nothing"
    assert after["logps/rejected"] == values[best]
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {f"step-{best:06d}", "step-000018"}
    results = json.loads((folder / "results.json").read_text())
    assert results["train"]["model_step"] == best and results["train"]["steps"] == 18
    (folder / "checkpoints/step-000018").rename(tmp_path / "last")
    state = state_of(folder, tmp_path)
    for name, weight in weights_of(folder).items():
        assert torch.equal(weight, state[f"state.policy.model.{name}"]), name


@pytest.mark.matrix
def test_the_best_model_is_lost(tiny_run: list[str], tmp_path: Path) -> None:
    """Its checkpoint is gone when the run ends: the last model is saved, and that is said."""
    folder = tmp_path / "run"
    command = [*overfitting(tiny_run, "train.keep_best=true"), f"run_dir={folder}"]
    process = start(command)
    wait_for(logged(folder, 8), process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    shutil.rmtree(folder / "checkpoints/step-000003")
    said = (
        "the best model, after step 3, is damaged (seal.json cannot be read (FileNotFoundError)): "
    )
    assert f"{said}the last is saved\n" in run(command)
    assert json.loads((folder / "results.json").read_text())["train"]["model_step"] == 18


def test_patience_ends_a_run(tiny_run: list[str], tmp_path: Path) -> None:
    """It ends two evaluations after the best, with the weights of then, and is finished."""
    folder = tmp_path / "run"
    overrides = overfitting(tiny_run, "train.patience_evals=2")
    after = read_results(train(compose_run([*overrides, f"run_dir={folder}"])))["eval_after"]
    values = {x["step"]: x["eval/logps/rejected"] for x in metrics_of(folder) if "eval/loss" in x}
    last = max(values)
    best = max((step for step in values if step), key=lambda step: values[step])
    assert best == last - 6 and last < 18
    assert after["logps/rejected"] == values[last]
    assert max(x["step"] for x in metrics_of(folder)) == last
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", last)
    assert (folder / f"checkpoints/step-{last:06d}").is_dir()


def test_an_objective_that_nobody_measures(tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_run, "train.keep_best=true", "monitor.metric=acuracy"]
    message = (
        r"^monitor\.metric: no such held-out metric, got acuracy \(loss, rewards/chosen, .*"
        r"reply_tokens, .*\)$"
    )
    with pytest.raises(ConfigError, match=message):
        train(compose_run([*overrides, f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists(), "refused before the folder is made, and weights loaded"
