"""Whole runs on records with several responses: one trajectory, whatever computes it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from simpo.config.compose import compose_run
from simpo.data.demo.records import demo_records
from simpo.loop.train import train
from tests.support.whole_runs import (
    assert_same_run,
    logged,
    metrics_of,
    run,
    start,
    tiny_overrides,
    wait_for,
    weights_of,
)


def ranked(records: Iterable[dict[str, Any]], sizes: list[int]) -> str:
    """Records of so many replies, in turn, the best two of which have one score, as lines."""
    lines = []
    for number, record in enumerate(records):
        size = sizes[number % len(sizes)]
        said = record["chosen"][-1]["content"], record["rejected"][-1]["content"]
        replies = [f"{said[i % 2][: 9 + 7 * i]} {i}" for i in range(size)]
        best = max(1, size - 2)
        scores = [min(best, (7 * i + number) % size) for i in range(size)]
        lines.append({"prompt": record["prompt"], "responses": replies, "scores": scores})
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def settings(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """10 steps of 4 of 12 records of 2 to 5 replies and of 8 pairs; 6 records are held out."""
    folder = tmp_path_factory.mktemp("data")
    words = tiny_overrides(tiny_folder, folder)
    records = list(demo_records(0, "train"))
    (folder / "ranked.jsonl").write_text(ranked(records[:12], [2, 4, 3, 5]))
    (folder / "held_out.jsonl").write_text(ranked(demo_records(0, "test")[:6], [4, 2, 5]))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[20:28]))
    sources = f"{{path: {folder}/ranked.jsonl, test_path: {folder}/held_out.jsonl}}"
    return [
        *(word for word in words if not word.startswith("data.sources")),
        f"data.sources=[{sources}, {{path: {folder}/pairs.jsonl}}]",
        "loss.compare=all",
        "loss.sft_weight=0.1",
        "train.epochs=2",
        "train.eval_every=5",
        "sample.num_prompts=0",
    ]


@pytest.fixture(scope="module")
def alone(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process, on few rows."""
    folder = tmp_path_factory.mktemp("runs") / "single"
    train(compose_run([*settings, "train.tokens_per_row=2000", f"run_dir={folder}"]))
    return folder


def assert_like(folder: Path, alone: Path) -> None:
    """Every metric of every step and evaluation to 1e-5, weights to 1e-4."""
    got, expected = metrics_of(folder), metrics_of(alone)
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    assert len([line for line in got if "train/grad_norm" in line]) == 10
    assert len([line for line in got if "eval/rewards/accuracies" in line]) == 3
    for mine, theirs in zip(got, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    weights, others = weights_of(alone), weights_of(folder)
    assert all((value - others[key]).abs().max() < 1e-4 for key, value in weights.items())


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            ["train.share_prefix=false", "train.tokens_per_row=300"], marks=pytest.mark.matrix
        ),
        pytest.param(
            ["model.gradient_checkpointing=full", "train.tokens_per_row=64"],
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            ["backend=ddp", "backend.processes=2", "train.tokens_per_row=200"],
            marks=pytest.mark.matrix,
        ),
        pytest.param(
            ["backend=fsdp", "backend.processes=2", "model.gradient_checkpointing=selective"],
            marks=pytest.mark.process,
        ),
        pytest.param(
            ["backend=fsdp", "backend.processes=2", "train.share_prefix=false"],
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_one_trajectory(words: list[str], settings: list[str], alone: Path, tmp_path: Path) -> None:
    words = [*settings, *words, f"run_dir={tmp_path}/run"]
    if any(word.startswith("backend=") for word in words):
        run(words)
    else:
        train(compose_run(words))
    assert_like(tmp_path / "run", alone)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "words",
    [
        ["model.lora.rank=4", "train.share_prefix=false"],
        ["model.lora.rank=4", "backend=fsdp", "backend.processes=2"],
        ["loss=dpo"],
    ],
)
def test_continues_bit_exactly(words: list[str], settings: list[str], tmp_path: Path) -> None:
    words = [*(word for word in settings if not word.startswith("model.lora.rank")), *words]
    words += [] if any(w.startswith("model.lora.rank") for w in words) else ["model.lora.rank=0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run([*words, f"run_dir={whole}"])
    process = start([*words, f"run_dir={killed}"])
    wait_for(logged(killed, 5), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "continued after step" in run([*words, f"run_dir={killed}"])
    assert_same_run(whole, killed, tmp_path)


def test_held_out_metrics_are_those_of_all_pairs(tiny_run: list[str], tmp_path: Path) -> None:
    """Of records with the same number of comparisons the mean over all pairs is the mean of the
    records' own means."""
    (tmp_path / "ranked.jsonl").write_text(ranked(demo_records(0, "test")[:3], [4]))
    path, before = tmp_path / "ranked.jsonl", []
    for own in (["loss.compare=all"], []):
        source = f"path: {path}, test_path: {path}" + (", pairs: all" if not own else "")
        folder = tmp_path / f"run-{len(own)}"
        words = [f"data.sources=[{{{source}}}]", "sample.num_prompts=0", "train.max_steps=1"]
        words += ["train.warmup_ratio=0", "train.checkpoint_every=0", f"run_dir={folder}"]
        train(compose_run([*tiny_run, *words, *own]))
        before.append(metrics_of(folder)[0])
    compared, pairs = before
    keys = [key for key in pairs if "loss" in key or "rewards" in key]
    assert "eval/rewards/margins" in keys and "eval/loss" in keys
    for key in keys:
        assert compared[key] == pytest.approx(pairs[key], rel=1e-5, abs=1e-6), key
    # Log-probs and the NLL are those of the best and the worst reply alone.
    assert compared["eval/logps/chosen"] != pytest.approx(pairs["eval/logps/chosen"])
