"""Runs that would train almost nothing are refused or reported; small data sets do train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpo.config.check import check_training
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.data.demo.records import demo_records
from simpo.loop.train import train


def own_pairs(tiny_run: list[str], folder: Path, count: int) -> list[str]:
    """The tiny run on a file of so many pairs, with the steps that data=jsonl brings."""
    rows = demo_records(0, "train")[:count]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [word for word in tiny_run if not word.startswith(("data.", "train.pairs", "train.e"))]
    return [*kept, f"data.sources=[{{path: {folder}/own.jsonl}}]", "sample.num_prompts=0"]


def changed_weights(run_dir: Path, base: Path) -> int:
    """How many weights of a run's model differ from those it started from."""
    old, new = (load_file(f / "model.safetensors") for f in (base, run_dir / "model"))
    return sum(int((old[name] != new[name]).sum()) for name in new)


def test_fifty_pairs_train_by_default(
    tiny_run: list[str], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own = own_pairs(tiny_run, tmp_path, 50)
    train(compose_run([*own, "train.learning_rate=1e-6", f"run_dir={tmp_path}/run"]))
    printed = capsys.readouterr().out
    assert "plan   7 steps of 8 pairs, 1.00 passes over the train pairs\n" in printed
    assert (
        "note   only 7 steps, 1 of them at learning rate 0 (fewer train.pairs_per_step or more "
        "train.epochs make more)\n"
    ) in printed
    assert "no weight has changed" not in printed
    # fp32 weights below 2**-24 / 1e-6 feel an update of 1e-6: all of them. Adam moves those alone
    # that have a gradient, which tokens that no pair holds have not.
    assert changed_weights(tmp_path / "run", tiny_folder) > 30_000


@pytest.mark.parametrize("settings", ["train.pairs_per_step=128", "train.max_steps=1"])
def test_one_step_at_rate_0_is_refused(settings: str, tiny_run: list[str], tmp_path: Path) -> None:
    own = own_pairs(tiny_run, tmp_path, 50)
    with pytest.raises(ConfigError, match=r"^train\.pairs_per_step: 50 pairs in steps of \d+ give"):
        train(compose_run([*own, settings]))
    assert not (tmp_path / "outputs").exists()
    run_dir = tmp_path / "run"
    train(compose_run([*own, settings, "train.warmup_ratio=0", f"run_dir={run_dir}"]))
    assert (run_dir / "model" / "model.safetensors").is_file()


def test_experiments_and_hub_data_keep_their_steps() -> None:
    sources = "data.sources=[{path: builtin:demo}]"
    own = compose_run(["data=jsonl", sources])
    assert (own.data.name, own.train.pairs_per_step, own.train.epochs) == ("jsonl", 8, 1)
    paper = ["experiments=paper/llama3_instruct", "data=jsonl", sources]
    assert compose_run(paper).train.pairs_per_step == 128
    assert compose_run(["data=ultrafeedback"]).train.pairs_per_step == 128


BF16 = (
    "model.dtype: bfloat16 rounds updates away where all weights are trained (leave it at auto: "
    "fp32 weights, computed in bf16 with train.precision=bf16)"
)


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ("model.lora.rank=0", True),
        ("model.lora.rank=0 backend=ddp", True),
        ("model.lora.rank=0 backend=fsdp", True),
        ("model.lora.rank=0 backend=zero2 train.precision=fp32", True),
        ("model.lora.rank=0 backend=zero3 train.precision=bf16", False),
        ("model.lora.rank=0 backend=zero3", False),
        ("model.lora.rank=16", False),
        ("model.lora.rank=0 model.lora.adapter=me/mine", False),
    ],
)
def test_weights_in_bf16(settings: str, refused: bool) -> None:
    """Adapters are in fp32 whatever their base is in, and DeepSpeed keeps fp32 copies."""
    run = compose_run(["model.dtype=bfloat16", *settings.split()])
    if refused:
        with pytest.raises(ConfigError) as error:
            check_training(run)
        assert str(error.value) == BF16
    else:
        check_training(run)


def test_weights_in_bf16_are_refused_before_anything_is_loaded(tiny_run: list[str]) -> None:
    """4 steps at 1e-6 would change 129 of 40,096 weights."""
    run = compose_run([*tiny_run, "model.dtype=bfloat16", "model.path=no/such_model"])
    with pytest.raises(ConfigError) as error:
        train(run)
    assert str(error.value) == BF16


def test_what_bf16_weights_lose(tiny_folder: Path) -> None:
    """The figure behind the refusal: an update of 1e-6 on the weights of the tiny model."""
    weights = torch.cat(
        [w.flatten() for w in load_file(tiny_folder / "model.safetensors").values()]
    )
    shares = {
        dtype: float((weights.to(dtype) - 1e-6 != weights.to(dtype)).float().mean())
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert shares[torch.float32] > 0.99
    assert shares[torch.bfloat16] < 0.01


def test_a_rate_below_every_rounding_is_refused(tiny_run: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        train(compose_run([*tiny_run, "train.learning_rate=1e-30"]))
    assert str(error.value) == (
        "train.learning_rate: 1e-30 is lost in the rounding of 100% of the weights, which would "
        "not change (raise it)"
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [(["train.adam_epsilon=1e30"], True), (["model.lora.rank=2"], False), ([], False)],
    ids=["an optimizer that does nothing", "adapters", "all weights"],
)
def test_no_change_is_told_at_the_end(
    settings: list[str], told: bool, tiny_run: list[str], capsys: pytest.CaptureFixture
) -> None:
    train(compose_run([*tiny_run, *settings, "train.max_steps=2", "sample.num_prompts=0"]))
    assert (
        "\nnote   no weight has changed: gradients were 0, or" in capsys.readouterr().out
    ) is told
