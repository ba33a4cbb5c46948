"""Losses that couple the pairs of a step give one trajectory, whatever the rows and processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from simpo.config.compose import compose_run
from simpo.loop.train import train
from tests.support.whole_runs import (
    assert_same_run,
    logged,
    metrics_of,
    newest_checkpoint,
    run,
    start,
    tiny_model_and_data,
    wait_for,
    weights_of,
)

LOSSES = ("aot", "amapo", "gamma_po", "beta_dpo", "kto")
# name: backend, processes, tokens_per_row
RUNS = {
    "single": ("single", 1, 90),
    "ddp-2": ("ddp", 2, 256),
    "ddp-4": ("ddp", 4, 500),
    "fsdp-2": ("fsdp", 2, 300),
    "zero3-2": ("zero3", 2, 400),
}
ON_ALL = ("aot", "kto")
"""Losses that run on all of them: backends know a step's scalars, not which loss couples them."""
NUM_STEPS = 5


@pytest.fixture(scope="module")
def settings(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """25 pairs in steps of 6, the last of one pair, so that ranks have none."""
    folder = tmp_path_factory.mktemp("data")
    return [
        *tiny_model_and_data(tiny_folder, folder, 25, 9),
        "loss.sft_weight=0.3",
        "train.pairs_per_step=6",
        "train.learning_rate=3e-4",
        "train.precision=fp32",
        "train.eval_every=3",
        "train.checkpoint_every=4",
        "train.check_memory=false",
        "sample.num_prompts=0",
        f"cache_dir={folder}/cache",
        "backend.device=cpu",
    ]


@pytest.fixture(scope="module")
def alone(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a loss in one process with all pairs of a step in one row, made once."""
    folder = tmp_path_factory.mktemp("alone")

    def make(loss: str) -> Path:
        made = folder / loss
        if not made.exists():
            words = [f"loss={loss}", *settings, "train.tokens_per_row=4000", f"run_dir={made}"]
            train(compose_run(words))
        return made

    return make


def of(name: str) -> list[str]:
    backend, processes, tokens = RUNS[name]
    distributed = [f"backend.processes={processes}"] if processes > 1 else []
    return [f"backend={backend}", *distributed, f"train.tokens_per_row={tokens}"]


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        pytest.param(
            loss,
            name,
            marks=[pytest.mark.process if (loss, name) == ("kto", "ddp-2") else pytest.mark.matrix],
        )
        for loss in LOSSES
        for name in (RUNS if loss in ON_ALL else ("single", "ddp-2"))
    ],
)
def test_one_trajectory(
    loss: str, name: str, settings: list[str], alone: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every metric of every step and evaluation to 1e-5, weights to 1e-4."""
    folder, expected = tmp_path / name, alone(loss)
    run([f"loss={loss}", *settings, *of(name), f"run_dir={folder}"])
    got, wanted = metrics_of(folder), metrics_of(expected)
    assert [line["step"] for line in got] == [line["step"] for line in wanted]
    assert len([line for line in got if "train/loss" in line]) == NUM_STEPS
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    weights = weights_of(expected)
    for key, value in weights_of(folder).items():
        assert (value - weights[key]).abs().max() < 1e-4, key


@pytest.mark.matrix
def test_continues_bit_exactly(settings: list[str], tmp_path: Path) -> None:
    """Killed after step 6, it has the same bits in the end as a run that was not."""
    words = ["loss=kto", *settings, *of("ddp-2"), "train.epochs=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run([*words, f"run_dir={whole}"])
    process = start([*words, f"run_dir={killed}"])
    wait_for(logged(killed, 6), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert newest_checkpoint(killed).name == "step-000004"
    assert "continued after step 4" in run([*words, f"run_dir={killed}"])
    assert_same_run(whole, killed, tmp_path)


@pytest.mark.process
def test_replies_with_labels(settings: list[str], tmp_path: Path) -> None:
    """Pairs and single replies in one run: the same numbers in one process and in two."""
    for split, count in (("train", 14), ("test", 6)):
        lines = [
            {"prompt": f"Is {i} even?", "completion": "Yes.", "label": i % 2 == 0}
            for i in range(count)
        ]
        file = tmp_path / f"{split}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    labels = (
        f"{{path: {tmp_path}/train.jsonl, test_path: {tmp_path}/test.jsonl, held_out_name: labels}}"
    )
    pairs = next(word for word in settings if word.startswith("data.sources"))
    mixed = f"{pairs[:-1]}, {labels}]"
    words = ["loss=kto", *settings, mixed, "train.keep_best=true"]
    one, two = tmp_path / "one", tmp_path / "two"
    train(compose_run([*words, "train.tokens_per_row=300", f"run_dir={one}"]))
    run([*words, *of("ddp-2"), f"run_dir={two}"])
    for mine, theirs in zip(metrics_of(two), metrics_of(one), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    last = metrics_of(one)[-1]
    assert {"eval/rewards/chosen", "eval/rewards/accuracies"} < last.keys()
    assert "eval/labels/rewards/chosen" in last
    assert "eval/labels/rewards/accuracies" not in last, "no record of it has two replies"
    table = (one / "held_out/step-000000.csv").read_text().splitlines()
    assert sum(",," in line for line in table) == 6
