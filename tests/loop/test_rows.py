"""train.tokens_per_row=auto: the plan's number on a GPU, kept by a run that continues."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import simpo.loop.rows
import simpo.loop.step
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DamagedError
from simpo.config.gpus import GPUS, Gpu, gpu_like, gpu_named
from simpo.data.flat_tokens import Tokens
from simpo.data.pairs import TokenizedPair
from simpo.data.plan import build_plan
from simpo.launch.commands import plan as plan_command
from simpo.loop.rows import choose_rows
from simpo.loop.train import train
from simpo.model import roofline
from simpo.model.pretrained import load_settings
from tests.support.whole_runs import assert_same_run

AUTO = "train.tokens_per_row=auto"


def recorded(folder: Path) -> Any:
    return json.loads((folder / "data.json").read_text())["tokens_per_row"]


def test_a_run_keeps_the_number_it_began_with(
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It stops at a step, continues where another number would be chosen, and nothing differs."""
    overrides = [word for word in tiny_run if "tokens_per_row" not in word]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    monkeypatch.setattr(simpo.loop.rows, "row_lengths", lambda _: [90, 2000])
    train(compose_run([*overrides, AUTO, f"run_dir={whole}"]))
    chosen = "rows   train.tokens_per_row=90 (auto): longer rows save no time on a CPU"
    assert chosen in capsys.readouterr().out
    assert recorded(whole) == 90

    real, steps = simpo.loop.step.update, iter(range(3))

    def failing(*args: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(simpo.loop.step, "update", failing)
    with pytest.raises(KeyboardInterrupt):
        train(compose_run([*overrides, AUTO, f"run_dir={halved}"]))
    monkeypatch.undo()
    monkeypatch.setattr(simpo.loop.rows, "row_lengths", lambda _: [2000])
    train(compose_run([*overrides, AUTO, f"run_dir={halved}"]))
    begun = "rows   train.tokens_per_row=90 (auto): as this run began"
    assert begun in capsys.readouterr().out
    assert recorded(halved) == 90
    assert_same_run(whole, halved, tmp_path)


def test_auto_and_a_number_are_other_settings(tiny_run: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_run, "train.max_steps=2", f"run_dir={tmp_path / 'run'}"]
    train(compose_run([*overrides, AUTO]))
    # No pair is longer than the shortest rows that are chosen from.
    assert recorded(tmp_path / "run") == 1024
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace("finished", "running"))
    refusal = (
        f"train.tokens_per_row: the run in {tmp_path / 'run'} has auto, got 1024 (restore it, or "
        "choose another folder)"
    )
    # An error that is kept would keep the folder's lock.
    with pytest.raises(ConfigError, match=f"^{re.escape(refusal)}$"):
        train(compose_run([*overrides, "train.tokens_per_row=1024"]))
    data = tmp_path / "run" / "data.json"
    data.write_text(data.read_text().replace('"tokens_per_row": 1024', '"tokens_per_row": "x"'))
    with pytest.raises(DamagedError, match=f"^{re.escape(str(data))}: tokens_per_row is no number"):
        train(compose_run([*overrides, AUTO]))


def decided(overrides: list[str], gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The number that a run of 64 pairs of 926 tokens would choose on a GPU, and the line."""
    monkeypatch.setattr(roofline, "ROW_LENGTHS_TOKENS", (1024, 2048))
    run = compose_run([*overrides, AUTO])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: f"NVIDIA {gpu.name}")
    size = SimpleNamespace(total_memory=int(gpu.memory_gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: size)
    backend: Any = SimpleNamespace(
        is_main=True,
        on_gpu=True,
        device=torch.device("cuda"),
        processes=getattr(run.backend, "processes", 1),
        bf16=True,
        broadcast=lambda value: value,
    )
    cfg = run.train
    lengths = np.array([222, 352, 352])  # as `simpo plan pairs=64` assumes
    pair = TokenizedPair.of(*([0] * n for n in lengths))
    steps = build_plan(64, cfg.pairs_per_step, cfg.epochs, cfg.max_steps, cfg.seed)
    folder: Any = SimpleNamespace(tokens_per_row=lambda: None)
    settings = load_settings(run.model, Path(run.cache_dir))
    number, (line,) = choose_rows(run, backend, settings, steps, Tokens.of([pair]), folder)
    assert line.startswith(f"rows   train.tokens_per_row={number} (auto): ")
    return number, line.partition("): ")[2]


@pytest.mark.parametrize("words", [[], ["backend=fsdp", "backend.processes=2"]], ids=len)
def test_the_plan_and_the_run_choose_the_same(
    words: list[str],
    tiny_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [*tiny_run, "train.precision=bf16", "train.pairs_per_step=32", *words]
    gpu = gpu_named("L40S-48GB")
    number, reason = decided(overrides, gpu, monkeypatch)
    assert (number, reason) == (2048, "the longest that is planned")
    plan_command.main([*overrides, AUTO, "pairs=64", f"gpu={gpu.name}"])
    printed = capsys.readouterr().out
    assert re.findall(r"train\.tokens_per_row=(\d+)", printed) == ["2048", "2048"]
    assert f" GiB; {reason}\n" in printed


def test_a_gpu_that_is_too_small_for_any_rows(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shortest are tried, and `train.check_memory` refuses them."""
    gpu = Gpu("small one", 0.1, 0.001, 100, 32)
    monkeypatch.setattr(simpo.loop.rows, "gpu_like", lambda *_: gpu)
    found = decided(tiny_run, gpu, monkeypatch)
    assert found == (1024, "none fits the memory of a small one")


def test_a_model_whose_memory_is_not_estimated(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("it looks at values")

    monkeypatch.setattr(simpo.loop.rows, "Estimate", fails)
    found = decided(tiny_run, gpu_named("H100-80GB"), monkeypatch)
    assert found == (1024, "the shortest, as memory is not estimated: it looks at values")


@pytest.mark.parametrize(
    ("name", "memory_gib", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, GPUS["H100-80GB"]),
        ("NVIDIA H200", 139.8, GPUS["H200-141GB"]),
        ("NVIDIA A100-PCIE-40GB", 39.5, GPUS["A100-40GB"]),
        ("NVIDIA A100-SXM4-80GB", 79.3, GPUS["A100-80GB"]),
        ("NVIDIA GeForce RTX 4090", 23.6, GPUS["RTX4090-24GB"]),
        # A slice of one, and a kind that is not known.
        ("NVIDIA H100 MIG 1g.10gb", 9.8, Gpu("NVIDIA H100 MIG 1g.10gb", 9.8, 989, 3350, 450)),
        ("Tesla V100-SXM2-32GB", 31.7, Gpu("Tesla V100-SXM2-32GB", 31.7, 312, 1555, 300)),
    ],
)
def test_the_gpu_that_a_device_is(name: str, memory_gib: float, gpu: Gpu) -> None:
    assert gpu_like(name, memory_gib) == gpu
