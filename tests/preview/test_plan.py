"""`simpo plan`: the examples of docs/plan.md, arithmetic by hand, and faults."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.config.gpus import GPUS, gpu_named
from simpo.data.flat_tokens import Tokens
from simpo.data.pairs import TokenizedPair
from simpo.data.plan import build_plan, pairs_of_step
from simpo.launch.commands import plan
from simpo.model.memory import Estimate, Memory, Place
from simpo.model.roofline import (
    STEPS_LOOKED_AT,
    Step,
    Workload,
    best_step,
    fits,
    predict,
    row_lengths,
    why,
)
from tests.support.tiny_models import SIZES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```sh\n(simpo plan .*?)\n```\n\n```text\n(.*?)\n```$", PAGE, re.M | re.S)
GPU = gpu_named("H100-80GB")


@pytest.mark.process
@pytest.mark.parametrize(("command", "printed"), EXAMPLES)
def test_an_example_of_the_page(
    command: str, printed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("\\\n", " "))[2:]
    plan.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("loading")] == printed.splitlines()


def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) == 4
    assert all(name in PAGE for name in GPUS)


def made(backend: str, processes: int, pairs_per_step: int = 32, *words: str) -> Step:
    """A step of a tiny Llama on pairs of 128 tokens, in rows of 512."""
    run = compose_run(["model.lora.rank=0", f"backend={backend}", *words])
    place = Place(torch.device("cuda"), bf16=True)
    estimate = Estimate(run, LlamaConfig(**SIZES), place)
    part = np.ones(32, dtype=np.int32)
    pair = TokenizedPair.of(np.ones(64, dtype=np.int32), part, part)
    work = Workload.of(run, build_plan(128, pairs_per_step, 1, None, 0), Tokens.of([pair]))
    return predict(estimate, run.backend, work, GPU, processes, 512)


LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
VECTORS = 5 * 32
WEIGHTS = 2 * LAYER + VECTORS + 2 * 128 * 32


def test_time_by_hand() -> None:
    """Eight rows of four pairs: six operations a weight and token, and a half of 45 %."""
    step = made("single", 1)
    scores = 4 * (96 * 96 // 2 + 32 * 64 + 32 * 32 // 2)
    row = 6 * 2 * LAYER * 512 + 6 * 128 * 32 * 256 + 3 * 4 * 32 * 2 * scores
    assert step.flops == 8 * row
    assert step.compute_s == pytest.approx(8 * row / (989e12 * 0.45 / 2))
    assert step.bytes_moved == 0
    # fp32: weights, gradients and two means are read, all but the gradients written.
    assert step.optimizer_s == pytest.approx(7 * 4 * WEIGHTS / 3350e9)


@pytest.mark.parametrize(
    ("backend", "bytes_a_weight"),
    [
        # Sent and received once each, fp32.
        ("ddp", 2 * 4),
        # Two rows: weights gathered in bf16 twice, gradients reduced in fp32.
        ("fsdp", 2 * (2 * 2 + 4)),
        ("zero3", 2 * (2 * 2 + 4)),
        # Gradients of two rows, and the updated weights once.
        ("zero2", 2 * 4 + 2),
    ],
)
def test_bytes_moved_by_hand(backend: str, bytes_a_weight: int) -> None:
    step = made(backend, 4)
    assert step.bytes_moved == pytest.approx(3 / 4 * bytes_a_weight * WEIGHTS)
    assert step.communication_s == pytest.approx(step.bytes_moved / (450e9 * 0.7))


@pytest.mark.parametrize(
    ("backend", "gathered"), [("single", 0), ("ddp", 0), ("fsdp", 2), ("zero2", 0), ("zero3", 2)]
)
def test_a_forward_more_where_a_loss_couples_the_step(backend: str, gathered: int) -> None:
    """A third of the time, and the weights of two rows in bf16 where they are sharded."""
    processes = 1 if backend == "single" else 4
    plain, coupled = (made(backend, processes, 32, f"loss={loss}") for loss in ("simpo", "amapo"))
    assert coupled.compute_s == pytest.approx(4 / 3 * plain.compute_s)
    assert coupled.bytes_moved - plain.bytes_moved == pytest.approx(gathered * 3 / 4 * 2 * WEIGHTS)


def test_between_machines_the_network_counts() -> None:
    step = made("ddp", 16)
    assert step.communication_s == pytest.approx(step.bytes_moved / (50e9 * 0.7))


def test_copies_of_the_weights_on_two_machines_by_hand() -> None:
    """Weights travel within a machine; between two, shards of gradients, after each of two rows."""
    step = made("fsdp", 16, 128, "backend.shard_processes=8")
    within = 2 * 7 / 8 * (2 * 2 + 4) * WEIGHTS
    # Of two copies each sums half a shard and receives the other half, in fp32.
    between = 2 * (2 * 1 / 2) * 4 * WEIGHTS / 8
    assert step.bytes_moved == pytest.approx(within + between)
    assert step.communication_s == pytest.approx(within / (450e9 * 0.7) + between / (50e9 * 0.7))


def test_the_best_rows() -> None:
    """The shortest within 2 % of the fastest that fits."""

    def step(tokens: int, gib: float, seconds: float) -> Step:
        return Step(tokens, Memory(1), Memory(gib), 1.0, 0.0, seconds, 0.0, 0.0)

    steps = [step(1024, 10, 1.2), step(2048, 20, 1.01), step(4096, 40, 1.0), step(8192, 80, 0.5)]
    best = best_step(steps, GPU)
    assert best is not None and best.tokens_per_row == 2048
    assert best_step(steps[3:], GPU) is None
    assert why(best, steps, GPU) == "longer rows save less than 2% of a step"
    assert why(steps[2], steps, GPU) == "8192 do not fit the memory of a H100-80GB"
    assert why(steps[3], steps, GPU) == "the longest that is planned"
    assert why(None, steps[3:], GPU) == "none fits the memory of a H100-80GB"
    # 79.1 GiB less 5 % and less 1.5 GiB
    assert fits(step(1, 73.6, 1), GPU) and not fits(step(1, 73.7, 1), GPU)


def test_rows_are_as_long_as_the_longest_pair() -> None:
    assert row_lengths(np.array([30, 3000, 7]))[:3] == [3000, 4096, 8192]
    assert row_lengths(np.array([70_000, 1])) == [70_000]


def test_memory_of_a_pair_in_a_later_step() -> None:
    """The longest pair counts, though none of the steps that are looked at has it."""
    run = compose_run(["model.lora.rank=0"])
    estimate = Estimate(run, LlamaConfig(**SIZES), Place(torch.device("cuda"), bf16=True))
    lengths = np.full(64, 100)
    plan = build_plan(64, 4, 1, None, 0)
    looked_at = {int(i) for step in range(STEPS_LOOKED_AT) for i in pairs_of_step(plan, step)}
    lengths[next(i for i in range(64) if i not in looked_at)] = 900
    pairs = [TokenizedPair.of([0] * (n // 2), [0] * (n // 4), [0] * (n // 4)) for n in lengths]
    work = Workload(plan, Tokens.of(pairs), True, False)
    step = predict(estimate, run.backend, work, GPU, 1, 200)
    assert step.memory == estimate.step(work.row([int(lengths.argmax())]))


def planned(folder: Path, settings: PreTrainedConfig, *words: str) -> None:
    settings.save_pretrained(folder)
    common = [f"model.path={folder}", "model.lora.rank=0", "pairs=3", "tokens_per_pair=40"]
    plan.main([*common, *words])


def test_only_whole_copies_of_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other numbers of processes are refused when the run starts."""
    words = "backend=fsdp", "backend.shard_processes=6"
    planned(tmp_path, LlamaConfig(**SIZES), *words)
    printed = capsys.readouterr().out
    assert "GPUs   6 H100-80GB are the smallest number that fits\n" in printed
    # There are fewer pairs than a step would have.
    assert "work   1 steps of 3 pairs: 120 tokens," in printed
    with pytest.raises(ConfigError) as error:
        planned(tmp_path, LlamaConfig(**SIZES), *words, "backend.processes=8")
    assert str(error.value) == (
        "backend.shard_processes: 8 processes do not make groups of 6 (a number that divides 8)"
    )


def test_pairs_assumed_for_a_loss_that_compares_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = (
        "note   pairs=N assumes two responses to a prompt, and the loss compares all (leave it out "
        "to read the data, or count the tokens of all in tokens_per_pair)\n"
    )
    planned(tmp_path, LlamaConfig(**SIZES))
    assert note not in capsys.readouterr().out
    planned(tmp_path, LlamaConfig(**SIZES), "loss.compare=all")
    assert capsys.readouterr().out.endswith(note)


def test_a_model_that_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        planned(tmp_path, GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))
    assert str(error.value) == (
        f"model.path: {tmp_path} cannot be planned: 'GPT2Model' object has no attribute 'layers' "
        "(simpo train needs no plan)"
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gpu=H100-80", "gpu: no such GPU, got H100-80 (did you mean H100-80GB?)"),
        ("gpu=a100-80gb", "gpu: no such GPU, got a100-80gb (did you mean A100-80GB?)"),
        ("pairs=0", "pairs: must be a whole number of 1 or more, got 0"),
        ("tokens_per_pair=3", "tokens_per_pair: must be 4 or more, got 3"),
        (
            "price_usd_per_gpu_hour=x",
            "price_usd_per_gpu_hour: must be a number of dollars, got x",
        ),
    ],
)
def test_faults(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan.main([word])
    assert str(error.value) == message
