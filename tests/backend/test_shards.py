"""Weights that each process reads in part are those that it would read whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from simpo.config.models import LoraConfig, ModelConfig
from simpo.model.load import load_policy
from simpo.model.policy import Policy
from simpo.model.shards import probe_settings, weights_in_files
from tests.support.tiny_models import FAMILIES, WIDE, tiny_model
from tests.support.whole_runs import (
    Process,
    assert_same_run,
    finish,
    ranks_of,
    run,
    start,
    tiny_model_and_data,
    wait_for,
)

CPU = torch.device("cpu")
KINDS = ["fsdp", "zero3"]
TWO = ["backend.processes=2"]
CGROUPS = {
    Path("/sys/fs/cgroup"): "memory.max",
    Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",
}
"""Where control groups are made, and the file of a group's limit: version 2 and version 1."""
ENOUGH_BYTES = 1250 * 2**20
"""Two forked ranks, which share what they import, take up to 1050 MiB in parts, 1530 if whole."""
TOO_FEW_BYTES = 400 * 2**20
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""The C library would keep most of what a step has freed, and the limit counts that."""
KILLED = (
    "rank {rank} was killed by SIGKILL; the others were ended (the same command continues from the "
    "last checkpoint)\n"
)


def unread(folder: Path, lora: LoraConfig | None = None, seed: int = 0) -> Policy:
    config = ModelConfig(name="tiny", path=str(folder), lora=lora or LoraConfig(rank=0))
    return load_policy(config, Path(), CPU, seed, sharded=True)


def whole(folder: Path, lora: LoraConfig | None = None, seed: int = 0) -> Policy:
    config = ModelConfig(name="tiny", path=str(folder), lora=lora or LoraConfig(rank=0))
    return load_policy(config, Path(), CPU, seed)


@pytest.mark.parametrize("lora", [LoraConfig(rank=0), LoraConfig(rank=2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_the_weights_is_as_loaded_whole(
    family: str, lora: LoraConfig, tmp_path: Path
) -> None:
    """Names, shapes, buffers, adapters, settings; the files hold the rest by the same names."""
    tiny_model(family, dtype=torch.bfloat16).save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=7, do_sample=True, top_k=3).save_pretrained(tmp_path)
    got, expected = unread(tmp_path, lora), whole(tmp_path, lora)
    assert got.unread == tmp_path and expected.unread is None
    assert got.base.config.to_dict() == expected.base.config.to_dict()
    assert got.base.generation_config.to_dict() == expected.base.generation_config.to_dict()
    assert got.base.name_or_path == expected.base.name_or_path == str(tmp_path)
    buffers = dict(expected.named_buffers())
    assert buffers and dict(got.named_buffers()).keys() == buffers.keys()
    assert all(torch.equal(value, buffers[name]) for name, value in got.named_buffers())
    weights = dict(got.named_parameters())
    assert [n for n, _ in expected.named_parameters()] == list(weights)
    for name, weight in expected.named_parameters():
        assert weights[name].shape == weight.shape and weights[name].dtype is weight.dtype
        assert weights[name].requires_grad is weight.requires_grad
        if ".lora_" in name:
            assert torch.equal(weights[name], weight), name
    files = load_file(tmp_path / "model.safetensors")
    in_files = weights_in_files(expected)
    assert in_files.keys() <= files.keys()
    assert all(torch.equal(weight, files[name].float()) for name, weight in in_files.items())
    assert len(in_files) == sum(".lora_" not in name for name in weights)


def as_bin(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_prefix(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    short = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})


def lacking_one(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_one_more(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.7.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def damaged(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def twice(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "other.safetensors")


@pytest.mark.parametrize(
    "change", [as_bin, without_prefix, lacking_one, with_one_more, damaged, twice]
)
def test_files_that_cannot_be_read_in_parts(change: Callable[[Path], None], tmp_path: Path) -> None:
    """They are read whole, and what is wrong is told as ever."""
    tiny_model("llama").save_pretrained(tmp_path)
    change(tmp_path)
    try:
        expected = whole(tmp_path)
    except Exception as error:
        with pytest.raises(type(error)) as told:
            unread(tmp_path)
        assert str(told.value) == str(error)
        return
    got = unread(tmp_path)
    assert got.unread is None
    for mine, theirs in zip(got.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("factor", [1, 2])
def test_tied_weights_that_the_files_hold_twice(factor: int, tmp_path: Path) -> None:
    """They stay tied if they are equal, and are two weights if not, as when loaded whole."""
    tiny_model("llama_tied").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = factor * weights["model.embed_tokens.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    got, expected = unread(tmp_path), whole(tmp_path)
    assert got.unread is None
    assert (got.head()[0] is got.base.get_input_embeddings().weight) is (factor == 1)
    assert [n for n, _ in got.named_parameters()] == [n for n, _ in expected.named_parameters()]
    assert torch.equal(got.head()[0], weights["lm_head.weight"])


def test_models_whose_weights_are_converted_are_read_whole(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    assert unread(tmp_path).unread is None
    tiny_model("llama", **WIDE).save_pretrained(tmp_path / "llama")
    assert unread(tmp_path / "llama", LoraConfig(rank=2, dora=True)).unread is None


@pytest.mark.parametrize(
    ("family", "sizes", "layers"),
    [
        ("llama", {"num_hidden_layers": 8}, 2),
        # Every sixth layer attends to everything.
        ("gemma3", {"num_hidden_layers": 12}, 6),
        ("gemma2", {"num_hidden_layers": 8}, 2),
        ("mistral_window", {"num_hidden_layers": 8}, 2),
        # The last layers are of another kind, so that most would be needed.
        (
            "qwen3",
            {"num_hidden_layers": 8, "use_sliding_window": True, "sliding_window": 8}
            | {"max_window_layers": 6},
            None,
        ),
        ("qwen3_moe", {"num_hidden_layers": 8}, 2),
    ],
)
def test_the_probe_has_every_kind_of_layer(
    family: str, sizes: dict[str, Any], layers: int | None
) -> None:
    model = tiny_model(family, **sizes)
    small = probe_settings(model.config)
    if layers is None:
        assert small is None
        return
    assert small is not None and small.num_hidden_layers == layers
    probe = AutoModelForCausalLM.from_config(small)
    assert kinds_of(probe) == kinds_of(model) and len(probe.model.layers) == layers


def kinds_of(model: Any) -> set[tuple[str, int | None]]:
    """Modules of each layer, and its window."""
    layers = model.model.layers
    return {(str(layer), getattr(layer.self_attn, "sliding_window", None)) for layer in layers}


@pytest.fixture(scope="module")
def settings(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    return [
        *tiny_model_and_data(tiny_folder, folder, 12, 4),
        *("train.pairs_per_step=4", "train.learning_rate=1e-3", "train.checkpoint_every=2"),
        *("train.eval_every=0", "sample.num_prompts=0", f"cache_dir={folder}/cache"),
        *("backend.device=cpu", "train.precision=fp32", "train.tokens_per_row=256"),
        "train.check_memory=false",
    ]


WAYS = {
    "bf16": ["train.precision=bf16"],
    "lora": ["model.lora.rank=3", "train.precision=bf16", "model.dtype=bfloat16"],
    "reference": ["loss=dpo"],
}


@pytest.mark.matrix
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_run_bit_for_bit(
    kind: str, way: str, settings: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    """As from a .bin file, which each process loads whole."""
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    as_bin(base)
    common = [*settings, *TWO, f"backend={kind}", *WAYS[way]]
    parts, at_once = tmp_path / "parts", tmp_path / "at_once"
    run([*common, f"run_dir={parts}"])
    run([*common, f"model.path={base}", f"run_dir={at_once}"])
    assert_same_run(parts, at_once, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_no_numbers(
    kind: str, settings: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    """Found by the process that reads them, told by all."""
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    more = [*TWO, f"backend={kind}", f"model.path={base}", f"run_dir={tmp_path / 'run'}"]
    assert finish(start([*settings, *more]), code=2).endswith(
        f"model.path: {base} holds NaN or infinite weights in model.layers.1.mlp.up_proj.weight "
        "(mend the files)\n"
    )


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_is_killed_in_a_save(kind: str, settings: list[str], tmp_path: Path) -> None:
    """In that of a checkpoint, the one before stays whole; in that of the model, there is none yet.
    The same command ends as if nothing had happened.
    """
    command = [*settings, *TWO, f"backend={kind}", "train.epochs=2", "train.max_steps=4"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    run([*command, f"run_dir={whole}"])
    process = start([*command, f"run_dir={folder}"])
    wait_for(lambda: any(folder.glob("checkpoints/.step-000004/state/*")), process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert finish(process, code=1, timeout_s=60).endswith(KILLED.format(rank=1))
    assert [path.name for path in folder.glob("checkpoints/step-*")] == ["step-000002"]
    process = start([*command, f"run_dir={folder}"])
    wait_for(lambda: any(folder.glob(".model.part/*")), process)
    os.kill(ranks_of(process)[0], signal.SIGKILL)
    told = finish(process, code=1, timeout_s=60)
    assert "continued after step 2" in told and told.endswith(KILLED.format(rank=0))
    assert not (folder / "model").exists()
    assert "continued after step 4" in run([*command, f"run_dir={folder}"])
    assert not list(folder.glob(".model.*"))
    assert_same_run(whole, folder, tmp_path)


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group whose memory can be limited."""
    for root, limit in CGROUPS.items():
        folder = root / f"simpo-test-{os.getpid()}"
        with suppress(OSError):
            folder.mkdir()
            if (folder / limit).is_file():
                yield folder
                folder.rmdir()
                return
            folder.rmdir()
    pytest.skip("this machine lets nobody limit memory")


def limit(group: Path, size: int) -> None:
    """Limit the memory of a control group, without swap, to so many bytes."""
    for name, value in (("memory.swap.max", 0), ("memory.swappiness", 0)):
        if (group / name).is_file():
            (group / name).write_text(str(value))
    for name in CGROUPS.values():
        if (group / name).is_file():
            (group / name).write_text(str(size))


@pytest.fixture(scope="module")
def big(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that train one step on a few tokens, of a model of 600 MB in float32."""
    folder = tmp_path_factory.mktemp("big")
    shutil.copytree(tiny_folder, folder / "model")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
    settings = json.loads((folder / "model" / "config.json").read_text()) | sizes | heads
    (folder / "model" / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
    some = 0.02 * torch.randn(2**20)
    weights = {
        name: some.repeat(-(-w.numel() // 2**20))[: w.numel()].view(w.shape).bfloat16()
        for name, w in model.state_dict().items()
    }
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    pair = {"prompt": "One?", "chosen": "Yes.", "rejected": "No!"}
    (folder / "pairs.jsonl").write_text(2 * (json.dumps(pair) + "\n"))
    return [
        f"model.path={folder}/model",
        "data=jsonl",
        f"data.sources=[{{path: {folder}/pairs.jsonl}}]",
        *("train.pairs_per_step=2", "train.max_steps=1", "train.learning_rate=1e-3"),
        *("train.warmup_ratio=0", "train.tokens_per_row=64", "train.checkpoint_every=0"),
        *("train.eval_every=0", "sample.num_prompts=0", "model.lora.rank=1"),
        *("train.precision=bf16", "backend.device=cpu", f"cache_dir={folder}/cache"),
        "train.check_memory=false",
    ]


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_too_little_memory_for_the_whole_model(
    kind: str, group: Path, big: list[str], tmp_path: Path
) -> None:
    """Two ranks load, train and save their shards in memory in which each cannot load the whole
    model: one is then killed, as with too little for the shards. The same command works after that.
    """
    folder, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(big[0].removeprefix("model.path="), base)
    command = [*big, *TWO, f"backend={kind}", f"model.path={base}", f"run_dir={folder}"]
    limit(group, TOO_FEW_BYTES)
    assert_killed(start(command), group)
    twice(base)  # so that it is loaded whole
    limit(group, ENOUGH_BYTES)
    assert_killed(start(command, env=FREED_AT_ONCE), group)
    assert not list(folder.glob("checkpoints/*")) and not (folder / "status.json").exists()
    (base / "other.safetensors").unlink()
    process = start(command, env=FREED_AT_ONCE)
    put_ranks(process, group)
    finish(process)
    assert (folder / "model" / "adapter_model.safetensors").is_file()


def assert_killed(process: Process, group: Path) -> None:
    put_ranks(process, group)
    message = finish(process, code=1)
    print(message)
    assert message.endswith((KILLED.format(rank=0), KILLED.format(rank=1)))


def put_ranks(process: Process, group: Path) -> None:
    """Put the ranks of a run into a control group as soon as they are there."""
    wait_for(lambda: len(ranks_of(process)) == 2, process)
    for rank in ranks_of(process).values():
        (group / "cgroup.procs").write_text(str(rank))
