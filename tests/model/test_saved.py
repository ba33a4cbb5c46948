"""The files of a saved model: their dtype, their parts, what the base's folder asks for."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from simpo.__main__ import main
from simpo.config.choices import Dtype
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, RunError
from simpo.config.models import LoraConfig, ModelConfig
from simpo.data.chats.chat import Chat
from simpo.loop.train import train
from simpo.model import export
from simpo.model.export import save_model
from simpo.model.load import load_policy
from simpo.model.merge import merge
from simpo.model.policy import Policy
from simpo.model.pretrained import files_dtype
from simpo.model.tokenizer import load_tokenizer
from tests.support.tiny_models import EXPERTS, FAMILIES, WIDE, tiny_adapter, tiny_model
from tests.support.whole_runs import state_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def chat(tiny_folder: Path) -> Chat:
    return Chat(load_tokenizer(ModelConfig(name="tiny", path=str(tiny_folder)), tiny_folder))


def base_in(dtype: torch.dtype, tiny_folder: Path, folder: Path) -> Path:
    """The tiny model with its weights in another dtype."""
    shutil.copytree(tiny_folder, folder)
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path, lora: LoraConfig | None = None) -> Policy:
    config = ModelConfig(name="tiny", path=str(folder), lora=lora or LoraConfig(rank=0))
    return load_policy(config, Path(), CPU, 0)


def headers(folder: Path) -> dict[str, str]:
    """The dtype of each tensor as the headers of the files name it."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            found |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    return found


def settings_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


# Dtypes.


@pytest.mark.parametrize("family", FAMILIES | EXPERTS)
def test_a_base_in_bf16_comes_back_as_it_was(family: str, chat: Chat, tmp_path: Path) -> None:
    """Trained in fp32 without a change: the same names and bits; then trained weights, rounded."""
    base, folder = tmp_path / "base", tmp_path / "model"
    tiny_model(family, dtype=torch.bfloat16).save_pretrained(base)
    policy = loaded(base)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    dtype = files_dtype(str(base))
    save_model(policy, None, chat, folder, dtype)
    before = load_file(base / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert headers(folder) == headers(base) and set(headers(base).values()) == {"BF16"}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert settings_of(folder)["dtype"] == "bfloat16"

    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.003)
    save_model(policy, None, chat, folder, dtype)
    after = load_file(folder / "model.safetensors")
    assert after.keys() == before.keys()
    for name, original in before.items():
        assert torch.equal(after[name], (original.float() * 1.003).bfloat16()), name
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("choice", "name"), [("auto", "BF16"), ("float32", "F32"), ("bfloat16", "BF16")]
)
def test_the_dtype_of_a_runs_model(
    choice: str,
    name: str,
    tiny_run: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The files hold the checkpoint's fp32 weights, rounded if the base came in bf16."""
    base, run_dir = base_in(torch.bfloat16, tiny_folder, tmp_path / "base"), tmp_path / "run"
    overrides = [*tiny_run, f"model.path={base}", f"export.dtype={choice}", "train.max_steps=2"]
    train(compose_run([*overrides, "sample.num_prompts=0", f"run_dir={run_dir}"]))
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[name]
    assert set(headers(run_dir / "model").values()) == {name}
    assert settings_of(run_dir / "model")["dtype"] == str(dtype).removeprefix("torch.")
    state = state_of(run_dir, tmp_path)
    saved = load_file(run_dir / "model/model.safetensors")
    for key, weight in saved.items():
        trained = state[f"state.policy.model.{key}"]
        assert trained.dtype is torch.float32 and torch.equal(weight, trained.to(dtype)), key
    printed = capsys.readouterr().out
    assert ("\nnote   saved in bfloat16, where " in printed) is (name == "BF16")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    assert model.dtype is dtype


def test_a_model_whose_files_are_fp32_stays_fp32(tiny_folder: Path) -> None:
    assert files_dtype(str(tiny_folder)) is torch.float32


@pytest.mark.parametrize(
    ("files", "written", "expected"),
    [
        ("bfloat16", "float32", torch.bfloat16),
        ("bfloat16", None, torch.bfloat16),
        ("float16", "bfloat16", torch.float16),
        (None, "bfloat16", torch.bfloat16),
        (None, None, None),
    ],
)
def test_the_dtype_of_the_bases_files(
    files: str | None,
    written: str | None,
    expected: torch.dtype | None,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    """That of most weights, whatever config.json says; that of config.json without safetensors."""
    base = base_in(getattr(torch, files or "float32"), tiny_folder, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights |= {n: w.float() for n, w in weights.items() if n.endswith("norm.weight")}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    if files is None:
        torch.save(weights, base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    settings = settings_of(base) | {"dtype": written}
    (base / "config.json").write_text(json.dumps(settings))
    assert files_dtype(str(base)) is expected


def test_a_hub_id_that_is_not_here_has_no_dtype() -> None:
    assert files_dtype("nobody/nothing") is None


def test_weights_too_large_for_float16(chat: Chat, tiny_folder: Path, tmp_path: Path) -> None:
    policy = loaded(base_in(torch.float16, tiny_folder, tmp_path / "base"))
    save_model(policy, None, chat, tmp_path / "model", torch.float16)
    assert set(headers(tmp_path / "model").values()) == {"F16"}
    with torch.no_grad():
        policy.model.get_parameter("model.norm.weight")[3] = 70_000
    with pytest.raises(RunError) as error:
        save_model(policy, None, chat, tmp_path / "model", torch.float16)
    assert str(error.value) == (
        "export.dtype: model.norm.weight has a weight too large for float16, the dtype of the base "
        "model (the same command with export.dtype=float32 saves it)"
    )
    assert set(headers(tmp_path / "model").values()) == {"F16"}


def test_what_stays_in_fp32(chat: Chat, tiny_folder: Path, tmp_path: Path) -> None:
    """Buffers, and weights that transformers loads in fp32 whatever is asked for."""
    policy = loaded(tiny_folder)
    policy.base._keep_in_fp32_modules_strict = {"q_proj"}
    policy.base.get_submodule("model.layers.1").register_buffer("bias", torch.ones(3) / 3)
    save_model(policy, None, chat, tmp_path / "model", torch.bfloat16)
    wide = {name for name, dtype in headers(tmp_path / "model").items() if dtype == "F32"}
    assert wide == {
        *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)),
        "model.layers.1.bias",
    }
    assert settings_of(tmp_path / "model")["dtype"] == "bfloat16"


@pytest.mark.parametrize("choice", [Dtype.auto, Dtype.bfloat16])
def test_adapters(choice: Dtype, tiny_run: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    """In fp32 on a base in bf16 unless asked for; merged in the dtype of the base's files."""
    base, run_dir = base_in(torch.bfloat16, tiny_folder, tmp_path / "base"), tmp_path / "run"
    more = [f"model.path={base}", "model.lora.rank=4", f"export.dtype={choice.value}"]
    more += ["train.max_steps=2", "sample.num_prompts=0", "model.dtype=bfloat16"]
    train(compose_run([*tiny_run, *more, f"run_dir={run_dir}"]))
    expected = "F32" if choice is Dtype.auto else "BF16"
    assert set(headers(run_dir / "model").values()) == {expected}
    settings = settings_of(base) | {"dtype": "float32"}
    (base / "config.json").write_text(json.dumps(settings))
    for dtype, name in ((Dtype.auto, "BF16"), (Dtype.float32, "F32")):
        merge(run_dir, tmp_path / name, dtype, None)
        assert set(headers(tmp_path / name).values()) == {name}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert settings_of(tmp_path / name)["dtype"] == str(model.dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (float("nan"), "holds NaN or infinite weights in {name} (mend the files)"),
        (
            1e36,
            "merged into {base} gives NaN or infinite weights in float32 (dtype=float32, or an "
            "adapter with smaller weights)",
        ),
    ],
)
def test_an_adapter_that_cannot_be_merged(
    value: float, fault: str, tiny_folder: Path, tmp_path: Path
) -> None:
    adapter = tiny_adapter(tiny_folder, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    weights[name].fill_(value)
    weights[name.replace("lora_B", "lora_A")].fill_(value)
    save_file(weights, file)
    with pytest.raises(ConfigError) as error:
        merge(adapter, tmp_path / "merged", Dtype.auto, None)
    names = [f"{name[:-8]}{part}.default.weight" for part in "AB"]
    expected = fault.format(base=tiny_folder, name=", ".join(names))
    assert str(error.value) == f"RUN: {adapter} {expected}"
    assert not (tmp_path / "merged").exists()


def test_a_base_below_the_home_folder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny_adapter(tiny_folder, tmp_path / "adapter")
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    merge(adapter, tmp_path / "merged", Dtype.auto, f"~/{tiny_folder.name}")
    assert set(headers(tmp_path / "merged").values()) == {"F32"}


# Files.


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_large_model_is_written_in_parts(
    family: str, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the base's names, also where experts are stacked in memory; held one file at a time."""
    monkeypatch.setattr(export, "LARGEST_FILE_BYTES", 30_000)
    tiny_model(family, **WIDE, num_hidden_layers=4).save_pretrained(tmp_path / "base")
    policy, folder = loaded(tmp_path / "base"), tmp_path / "model"
    held, most_held = 0, 0

    def let_go(num_bytes: int) -> None:
        nonlocal held
        held -= num_bytes

    def gathered() -> Iterator[tuple[str, Tensor]]:
        nonlocal held, most_held
        for name, weight in policy.saved().items():
            copy = weight.detach().bfloat16()
            weakref.finalize(copy.untyped_storage(), let_go, copy.nbytes)
            held += copy.nbytes
            most_held = max(held, most_held)
            yield name, copy
            del copy

    save_model(policy, gathered(), chat, folder, torch.bfloat16)
    layers = [sum(2 * p.numel() for p in layer.parameters()) for layer in policy.base.model.layers]
    tensors = [2 * p.numel() for p in policy.parameters()]
    # A file, a layer, and the tensor behind it that shows its end.
    most = max(30_000, *layers) + max(layers) + max(tensors)
    assert held == 0 and most_held <= most < sum(tensors)
    assert headers(folder).keys() == headers(tmp_path / "base").keys()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == headers(folder).keys()
    assert len(set(index["weight_map"].values())) == len(list(folder.glob("*.safetensors"))) > 3
    assert index["metadata"]["total_size"] == sum(
        2 * weight.numel() for weight in policy.model.parameters()
    )
    assert files_dtype(str(folder)) is torch.bfloat16
    read: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(read[name], weight.bfloat16()), name


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("rank", [0, 4])
def test_file_modes_are_those_of_the_umask(
    umask: int, rank: int, tiny_run: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    """Of everything in the run's folder but settings with a secret."""
    base, run_dir = shutil.copytree(tiny_folder, tmp_path / "base"), tmp_path / "run"
    (base / "LICENSE").write_text("Mine.")
    (base / "LICENSE").chmod(0o440)
    more = [f"model.path={base}", f"model.lora.rank={rank}", "train.max_steps=2"]
    more += ["launcher=slurm", "launcher.setup=['export HF_TOKEN=hf_0123456789']"]
    before = os.umask(umask)
    try:
        train(compose_run([*tiny_run, *more, f"run_dir={run_dir}"]))
        if rank:
            main(["export", str(run_dir), "merge=true"])
    finally:
        os.umask(before)
    modes = {
        file.relative_to(run_dir).as_posix(): file.stat().st_mode & 0o777
        for file in run_dir.rglob("*")
        if file.is_file() and "checkpoints" not in file.parts
    }
    assert modes.pop("run.yaml") == modes.pop("command.txt") == 0o600
    assert set(modes.values()) == {0o666 & ~umask}
    files = {"model/README.md", "model/curves.png", "model/LICENSE", "samples/step-000002.json"}
    if rank:
        files |= {file.replace("model/", "model-merged/") for file in files if "model/" in file}
    assert files <= modes.keys()


def test_what_the_licence_of_the_base_wants_passed_on(
    chat: Chat, tiny_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    passed_on = ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "LICENSE-MODEL", "license.md")
    for name in (*passed_on, "README.md", "licensed.py", "notes.txt"):
        (base / name).write_text(name)
    (base / "licenses").mkdir()
    (base / "LICENSES").mkdir()
    for lora in (LoraConfig(rank=0), LoraConfig(rank=2)):
        save_model(loaded(base, lora), None, chat, tmp_path / "model")
        names = {file.name for file in (tmp_path / "model").iterdir()}
        assert {*passed_on, "chat_template.jinja"} <= names
        assert not names & {"README.md", "licensed.py", "notes.txt", "licenses", "LICENSES"}
        assert all((tmp_path / "model" / name).read_text() == name for name in passed_on)
