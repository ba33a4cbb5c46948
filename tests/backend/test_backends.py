"""Training is the same on every backend, for any number of processes and after any restart."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from simpo.backend import Backend, build_backend
from simpo.config.choices import Precision
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.loop.train import train
from tests.support.whole_runs import (
    assert_same_run,
    finish,
    logged,
    metrics_of,
    newest_checkpoint,
    run,
    start,
    state_of,
    tiny_model_and_data,
    wait_for,
    weights_of,
)

KINDS = ["ddp", "fsdp", "zero2", "zero3"]
# name: backend, processes, tokens_per_row
RUNS = {
    "ddp-2": ("ddp", 2, 256),
    "ddp-4": ("ddp", 4, 500),
    "fsdp-2": ("fsdp", 2, 300),
    "fsdp-4": ("fsdp", 4, 90),
    "zero2-2": ("zero2", 2, 256),
    "zero3-2": ("zero3", 2, 400),
    "hsdp-4": ("fsdp backend.shard_processes=2", 4, 200),
    "fsdp-1": ("fsdp", 1, 256),
    "zero3-1": ("zero3", 1, 256),
}

FRESH = ("fsdp-2", "zero3-2")
"""Runs that are started as a user's command is; the others are forked (see `forked.py`). With ddp
`test_joins_torchrun` and `test_faults.py` start some anew."""
ESTIMATED = ("ddp-2", "fsdp-2", "zero2-2", "zero3-2", "hsdp-4")
"""Runs that estimate their memory first, which takes each rank as long as the steps."""


@pytest.fixture(scope="module")
def settings(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """10 steps of at most 6 of 25 pairs; an epoch ends with one pair, so that ranks have none."""
    folder = tmp_path_factory.mktemp("data")
    return [
        *tiny_model_and_data(tiny_folder, folder, 25, 9),
        "loss.sft_weight=0.3",
        "train.pairs_per_step=6",
        "train.epochs=2",
        "train.learning_rate=3e-4",
        "train.weight_decay=0.1",
        "train.precision=fp32",
        "train.eval_every=5",
        "train.checkpoint_every=3",
        "sample.num_prompts=2",
        "sample.max_new_tokens=8",
        f"cache_dir={folder}/cache",
        "backend.device=cpu",
        # `whole` has it, of every backend.
        "train.check_memory=false",
    ]


@pytest.fixture(scope="module")
def alone(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("runs") / "single"
    train(compose_run([*settings, "train.tokens_per_row=2000", f"run_dir={folder}"]))
    return folder


@pytest.fixture(scope="module")
def whole(settings: list[str], alone: Path) -> Callable[[str], Path]:
    """The undisturbed run of a name in RUNS, made when it is first asked for."""

    def make(name: str) -> Path:
        folder = alone.parent / name
        if not folder.exists():
            check = f"train.check_memory={str(name in ESTIMATED).lower()}"
            overrides = [*settings, *of(name), check, f"run_dir={folder}"]
            run(overrides, fresh=name in FRESH)
        return folder

    return make


# What torchrun sets for the first of two processes.
OF_TORCHRUN = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def of(name: str) -> list[str]:
    """Overrides of a run in RUNS."""
    backend, processes, tokens = RUNS[name]
    # So that ZeRO-3 leaves no weight whole, small as they are here.
    whole = ["backend.stage3_param_persistence_threshold=0"] if backend == "zero3" else []
    return [
        *whole,
        # With two processes parts of the layers are computed twice: the same numbers.
        f"model.gradient_checkpointing={'selective' if processes == 2 else 'full'}",
        *f"backend={backend}".split(),
        f"backend.processes={processes}",
        f"train.tokens_per_row={tokens}",
    ]


def table_of(path: Path) -> dict[str, list[float]]:
    """The numbers of held-out pairs, by the place of each."""
    lines = [line.rsplit(",", 10) for line in path.read_text().splitlines()[1:]]
    return {place: [float(number) for number in numbers] for place, *numbers in lines}


def assert_like(folder: Path, alone: Path, steps: int = 10) -> None:
    """Every metric of every step and evaluation to 1e-5, replies to the letter, weights to 1e-4."""
    got, expected = metrics_of(folder), metrics_of(alone)
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    assert len([line for line in got if "train/grad_norm" in line]) == steps
    for mine, theirs in zip(got, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    for sample in (alone / "samples").iterdir():
        assert (folder / "samples" / sample.name).read_text() == sample.read_text()
    for table in (alone / "held_out").iterdir():
        pairs, expected_pairs = table_of(folder / "held_out" / table.name), table_of(table)
        assert pairs.keys() == expected_pairs.keys()
        for place, numbers in expected_pairs.items():
            assert pairs[place] == pytest.approx(numbers, rel=1e-4, abs=1e-4), place
    weights = weights_of(alone)
    assert weights.keys() == weights_of(folder).keys()
    for key, value in weights_of(folder).items():
        assert (value - weights[key]).abs().max() < 1e-4, key


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.process if name == "fsdp-2" else pytest.mark.matrix)
        for name in RUNS
    ],
)
def test_one_trajectory(name: str, whole: Callable[[str], Path], alone: Path) -> None:
    assert_like(whole(name), alone)


def killed_after(step: int, overrides: list[str], folder: Path) -> None:
    """Begin a run and kill all its processes once it has logged a step."""
    process = start([*overrides, f"run_dir={folder}"])
    wait_for(logged(folder, step), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.matrix
@pytest.mark.parametrize("name", [*(f"{kind}-2" for kind in KINDS), "hsdp-4"])
def test_continues_bit_exactly(
    name: str, settings: list[str], whole: Callable[[str], Path], alone: Path, tmp_path: Path
) -> None:
    """Killed in the first of two epochs; as many processes continue bit for bit, others closely."""
    killed = tmp_path / name
    killed_after(4, [*settings, *of(name)], killed)
    assert newest_checkpoint(killed).name == "step-000003"
    fewer = tmp_path / "fewer"
    shutil.copytree(killed, fewer)
    assert "continued after step 3" in run([*settings, *of(name), f"run_dir={killed}"])
    bits = assert_same_run(whole(name), killed, tmp_path)
    print(f"{name}: {bits} bits of state compared")
    other = [*of(name), "backend.processes=1"]
    other += ["backend.shard_processes=null"] if name == "hsdp-4" else []
    assert "continued after step 3" in run([*settings, *other, f"run_dir={fewer}"])
    assert_like(fewer, alone)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_saves_in_the_background(
    kind: str, settings: list[str], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """Killed on the way; what was written meanwhile continues bit for bit."""
    overrides = [*settings, *of(f"{kind}-2"), "backend.async_save=true"]
    folder = tmp_path / kind
    killed_after(7, overrides, folder)
    assert newest_checkpoint(folder).name in ("step-000003", "step-000006")
    assert "continued after step" in run([*overrides, f"run_dir={folder}"])
    assert_same_run(whole(f"{kind}-2"), folder, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["single", *KINDS])
def test_evaluation_and_checkpoint_at_the_same_step(
    kind: str, settings: list[str], tmp_path: Path
) -> None:
    """The paper's recipe, shrunk: the best model is kept, no replies are sampled; and another that
    samples some, killed on the way. Both are the same run, bit for bit.
    """
    overrides = [
        "experiments=paper/recipe",
        *settings,
        *([] if kind == "single" else of(f"{kind}-2")),
        f"backend={kind}",
        "loss.sft_weight=0",
        "train.max_steps=4",
        "train.log_every=1",
        "train.eval_every=2",
        "train.checkpoint_every=2",
        "train.keep_best=true",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run([*overrides, "sample.num_prompts=0", f"run_dir={whole}"])
    killed_after(3, overrides, killed)
    assert "continued after step" in run([*overrides, f"run_dir={killed}"])
    silent = [
        {k: v for k, v in line.items() if not k.startswith(("eval/reply_", "eval/rule_"))}
        for line in metrics_of(killed)
    ]
    assert silent == metrics_of(whole)
    one, other = state_of(whole, tmp_path), state_of(killed, tmp_path)
    assert one.keys() == other.keys() and one
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    mine, theirs = weights_of(whole), weights_of(killed)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.matrix
def test_another_backend_continues(settings: list[str], alone: Path, tmp_path: Path) -> None:
    """single, ddp and fsdp read each other's checkpoints; DeepSpeed's are its own."""
    folder = tmp_path / "moved"
    budget = ["train.tokens_per_row=256"]
    killed_after(4, [*settings, *budget], folder)
    sharded = [*settings, *budget, "backend=fsdp", "backend.processes=2", f"run_dir={folder}"]
    message = run([*settings, *budget, "backend=zero2", "backend.processes=2", sharded[-1]], code=2)
    assert message.endswith(
        f"backend: {folder}/checkpoints/step-000003 is a dcp checkpoint, this backend reads zero2 "
        "(continue with the backend it was begun with, or start anew with run_dir=NEW)\n"
    )
    run(sharded)
    assert_like(folder, alone)


@pytest.mark.matrix
def test_joins_torchrun(settings: list[str], alone: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    overrides = [*settings, "backend=ddp", "train.tokens_per_row=256"]
    command = (*torchrun, "--nproc_per_node=2", "-m", "simpo.train")
    finish(start([*overrides, f"run_dir={tmp_path / 'run'}"], *command))
    assert_like(tmp_path / "run", alone)
    wrong = [*overrides, "backend.processes=3", f"run_dir={tmp_path / 'wrong'}"]
    message = finish(start(wrong, env=OF_TORCHRUN), code=2)
    assert "backend.processes: must be 2, which the launcher started here, got 3" in message


def test_groups_that_processes_do_not_make(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (OF_TORCHRUN | {"WORLD_SIZE": "3", "MASTER_PORT": "0"}).items():
        monkeypatch.setenv(name, value)
    config = compose_run([*settings, "backend=fsdp", "backend.shard_processes=2"]).backend
    monkeypatch.setattr(Backend, "_join", lambda *_: None)
    with pytest.raises(ConfigError) as error:
        build_backend(config, Precision.fp32)
    assert str(error.value) == (
        "backend.shard_processes: 3 processes do not make groups of 2 (a number that divides 3)"
    )


OURS = (
    *("model  ", "loss = ", "| ", "|-", "tokens ", "plan   ", "       ", "memory ", "run    "),
    *("note   only 6 steps", "note   /", "held out after step ", "prompt  ", "rule    "),
    *("before  ", "after   ", "smollm2-jsonl-sigmoid: loading torch ", "reading /"),
    *("loading the weights of /", "checking that packed rows ", "saving the model ...", "chat   "),
)
"""How the lines begin that a whole run of `tiny_run` prints."""


@pytest.mark.matrix
def test_no_library_prints_beside_a_run(tiny_run: list[str]) -> None:
    """All that two ranks of DeepSpeed print, which find out for themselves that there is no GPU."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = [word for word in tiny_run if not word.startswith("backend.device")]
    ranks = [
        start([*settings, "backend=zero3"], env=place | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    (output, errors), others = (rank.communicate(timeout=300) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [line for line in output.splitlines() if line and not line.startswith(OURS)] == []
    assert [line for line in errors.split("\n") if line and not line.startswith("train ")] == []
    assert others == ("", "")


@pytest.mark.matrix
@pytest.mark.usefixtures("slurm")
def test_joins_slurm(settings: list[str], tmp_path: Path) -> None:
    """Two tasks on one node and one on another; told to stop by Slurm, and continued."""
    folder, alone = tmp_path / "run", tmp_path / "alone"
    longer = [*settings, "train.epochs=4"]  # Slurm's signal takes a moment
    train(compose_run([*longer, "train.tokens_per_row=2000", f"run_dir={alone}"]))
    overrides = [*longer, "backend=fsdp", f"run_dir={folder}"]
    srun = ["srun", "--job-name=pairs", "--nodes=2", "--ntasks=3", sys.executable, "-m"]
    process = start(overrides, *srun, "simpo.train")
    wait_for(logged(folder, 5), process)
    scancel = ["scancel", "--signal=USR1", "--name=pairs"]
    subprocess.run(scancel, check=True)
    assert "SIGUSR1: saved after step" in finish(process, code=75)
    message = finish(start(overrides, *srun, "simpo.train"))
    assert "fp32 on 3 CPU (fsdp, 3 processes)" in message
    assert "continued after step" in message
    assert_like(folder, alone, steps=20)


@pytest.mark.matrix
def test_processes_that_nobody_started(settings: list[str], tmp_path: Path) -> None:
    """accelerate launch falls back to one process on CPUs: said, not taken for two."""
    command = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2")
    overrides = [*settings, "backend=ddp", f"run_dir={tmp_path}"]
    message = finish(start(overrides, *command, "-m", "simpo.train"), code=1)
    assert "backend.processes: has no default without a GPU (set backend.processes=N)" in message
    message = finish(start([*settings, f"run_dir={tmp_path}"], env=OF_TORCHRUN), code=2)
    assert "backend: single runs in 1 process, got 2 (backend=ddp)" in message


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
def test_tied_embeddings(kind: str, settings: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    """One weight is both ends of the model, and is gathered, updated, saved and loaded as one."""
    folder = tmp_path / "tied"
    shutil.copytree(tiny_folder, folder)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=True)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    short = [*settings, f"model.path={folder}", "train.max_steps=6"]
    alone, many = tmp_path / "alone", tmp_path / "many"
    train(compose_run([*short, f"run_dir={alone}"]))
    killed_after(4, [*short, *of(f"{kind}-2")], many)
    assert "continued after step 3" in run([*short, *of(f"{kind}-2"), f"run_dir={many}"])
    for mine, theirs in zip(metrics_of(many), metrics_of(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    got, expected = (AutoModelForCausalLM.from_pretrained(d / "model") for d in (many, alone))
    assert got.lm_head.weight is got.model.embed_tokens.weight
    for (name, weight), other in zip(got.named_parameters(), expected.parameters(), strict=True):
        assert (weight - other).abs().max() < 1e-4, name


@pytest.fixture(scope="module")
def adapters_alone(
    settings: list[str], wide_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[list[str], Path]]:
    """Overrides of a run of adapters on a base in so many bits, and that run in one process."""
    parent = tmp_path_factory.mktemp("adapters")

    def make(bits: str) -> tuple[list[str], Path]:
        overrides = [*settings, f"model.path={wide_folder}", f"model.quantization={bits}"]
        overrides += ["model.lora.rank=4", "train.max_steps=6"]
        overrides += ["train.eval_every=0", "sample.num_prompts=0"]
        folder = parent / bits
        if not folder.exists():
            train(compose_run([*overrides, f"run_dir={folder}"]))
        return overrides, folder

    return make


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        # Where each process has the whole base, its own layers are no harder than packed ones.
        *(("ddp", "nf4"), ("ddp", "int8"), ("zero2", "nf4")),
        *(("fsdp", "none"), ("fsdp", "nf4"), ("fsdp", "int8")),
        *(("zero3", "none"), ("zero3", "nf4"), ("zero3", "int8")),
    ],
)
def test_adapters(
    kind: str,
    bits: str,
    adapters_alone: Callable[[str], tuple[list[str], Path]],
    tmp_path: Path,
) -> None:
    """LoRA and QLoRA in two processes, stopped and continued: the run of one, adapters alone."""
    overrides, alone = adapters_alone(bits)
    command = [*overrides, *of(f"{kind}-2"), f"run_dir={tmp_path / 'run'}"]
    if (kind, bits) == ("fsdp", "int8"):
        assert "model.quantization: backend=fsdp cannot shard int8 layers" in run(command, code=2)
        return
    process = start(command)
    wait_for(logged(tmp_path / "run", 1), process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    assert "continued after step" in run(command)
    # 8-bit layers round by what else is in the row.
    tolerance = 3e-2 if bits == "int8" else 1e-5
    for mine, theirs in zip(metrics_of(tmp_path / "run"), metrics_of(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    got, expected = weights_of(tmp_path / "run"), weights_of(alone)
    assert got.keys() == expected.keys()
    assert all(".lora_" in name for name in got)
    moved = [name for name in got if ".lora_B" in name and got[name].abs().sum() > 0]
    assert len(moved) == len(got) / 2
    if bits != "int8":
        assert all((got[name] - expected[name]).abs().max() < 1e-4 for name in got)


@pytest.fixture(scope="module")
def short_in_fp32(
    settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """Overrides of a run of four steps, and that run in one process in fp32."""
    short = [*settings, "train.max_steps=4", "train.eval_every=0", "sample.num_prompts=0"]
    folder = tmp_path_factory.mktemp("short") / "fp32"
    train(compose_run([*short, f"run_dir={folder}"]))
    return short, folder


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["fsdp", "zero2", "zero3"])
def test_bf16_with_sums_in_fp32(
    kind: str, short_in_fp32: tuple[list[str], Path], tmp_path: Path
) -> None:
    """Weights in bf16, log-probs in fp32: losses near those of fp32, and not rounded to bf16. The
    weights that are saved are those that the optimizer keeps in fp32.
    """
    short, in_fp32 = short_in_fp32
    in_bf16 = tmp_path / "bf16"
    run([*short, *of(f"{kind}-2"), "train.precision=bf16", f"run_dir={in_bf16}"])
    expected, got = (
        [line["train/loss"] for line in metrics_of(folder) if "train/loss" in line]
        for folder in (in_fp32, in_bf16)
    )
    assert got == pytest.approx(expected, rel=0.02)
    assert all(torch.tensor(loss).bfloat16().item() != pytest.approx(loss) for loss in got)
    saved, alone = weights_of(in_bf16), weights_of(in_fp32)
    assert saved.keys() == alone.keys()
    for name, weight in saved.items():
        assert not torch.equal(weight, weight.bfloat16().float()), name
        # Four steps of at most the learning rate, in opposite directions.
        assert (weight - alone[name]).abs().max() < 8 * 3.1e-4, name
