"""The upload to the hub: what is sent, and that the token stays where it was; merged adapters."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.compose import compose_run
from simpo.config import Dtype
from simpo.errors import ConfigError
from simpo.export import cli, merge
from simpo.tables import markdown_table
from simpo.train import train

TOKEN = "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"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Calls that would have gone to the hub, which is not reachable from a test."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Commit:
        commit_url = "https://hub.example/me/model/commit/1"

    def create_repo(self: object, repo_id: str, **options: Any) -> None:
        calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def upload_folder(self: object, **options: Any) -> Commit:
        options["files"] = sorted(p.name for p in Path(options["folder_path"]).iterdir())
        calls.append(("upload_folder", options))
        return Commit()

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return calls


@pytest.mark.parametrize(("extra", "private"), [([], True), (["export.private=false"], False)])
def test_push_to_hub(
    extra: list[str],
    private: bool,
    hub: list[tuple[str, dict[str, Any]]],
    tiny_run: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    train(compose_run([*tiny_run, "export.push_to_hub=me/model", *extra, f"run_dir={folder}"]))
    (create, made), (upload, sent) = hub
    assert (create, upload) == ("create_repo", "upload_folder")
    assert made["repo_id"] == sent["repo_id"] == "me/model"
    assert made["private"] is private
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "curves.png"} <= set(
        sent["files"]
    )
    assert "https://hub.example/me/model/commit/1" in capsys.readouterr().out
    for file in folder.rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file


def test_nothing_is_uploaded_unless_asked_for(
    hub: list[tuple[str, dict[str, Any]]], tiny_run: list[str]
) -> None:
    train(compose_run(tiny_run))
    assert hub == []


def test_markdown_table() -> None:
    rows = [{"a": 1, "b": {"x": 2}}, {"a": 22, "b": 0}]
    assert markdown_table(rows) == [
        "| a  | b    |",
        "|----|------|",
        "| 1  | x: 2 |",
        "| 22 | 0    |",
    ]


def merged_by_hand(base: str, adapter: Path) -> Any:
    """W + scale * B A for each layer, from the files alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    for name, low in weights.items():
        if name.endswith("lora_A.weight"):
            high = weights[name.replace("lora_A", "lora_B")]
            layer = model.get_submodule(
                name.removeprefix("base_model.model.")[: -len(".lora_A.weight")]
            )
            layer.weight.data += (
                settings["lora_alpha"] / settings["r"] * (high.double() @ low.double())
            )
    return model


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merge(quantization: str, tiny_run: list[str], wide_folder: Path, tmp_path: Path) -> None:
    """A process of its own, against W + scale B A from the files."""
    run_dir = tmp_path / "run"
    overrides = [*tiny_run, f"model.path={wide_folder}", f"model.quantization={quantization}"]
    overrides += ["model.lora.rank=4", "train.learning_rate=1e-2", "sample.num_prompts=0"]
    overrides += [f"run_dir={run_dir}"]
    train(compose_run(overrides))
    command = [sys.executable, "-m", "simpo.export", str(run_dir), "merge=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    # Not alone where DeepSpeed is installed, which speaks when it is imported.
    assert done.stdout.endswith(f"model  {run_dir}/model-merged\n")
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "model-merged")
    assert type(merged).__name__ == "LlamaForCausalLM" and merged.dtype is torch.float32
    assert not hasattr(merged.config, "quantization_config") and merged.config.use_cache
    assert merged.generation_config.eos_token_id in (2, [2])
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model-merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(wide_folder).chat_template

    ids = torch.arange(3, 60)[None]
    expected = merged_by_hand(str(wide_folder), run_dir / "model")(ids).logits
    torch.testing.assert_close(merged(ids).logits.double(), expected, rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(wide_folder)
    assert (base(ids).logits - merged(ids).logits).abs().max() > 0.01

    # A base that has moved, and weights of another type.
    moved = shutil.copytree(wide_folder, tmp_path / "moved")
    merge(run_dir, tmp_path / "b", Dtype.bfloat16, str(moved))
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert narrow.dtype is torch.bfloat16
    assert (narrow(ids).logits - merged(ids).logits).norm() < 0.05 * merged(ids).logits.norm()

    with pytest.raises(ConfigError) as error:
        merge(run_dir, run_dir / "model-merged", Dtype.auto, None)
    assert str(error.value) == (
        f"output: must not exist, got {run_dir}/model-merged (choose another)"
    )
    with pytest.raises(ConfigError, match=rf"^base: {tmp_path}/no cannot be loaded: .*$"):
        merge(run_dir, tmp_path / "c", Dtype.auto, f"{tmp_path}/no")
    settings = run_dir / "model/adapter_config.json"
    nameless = json.loads(settings.read_text()) | {"base_model_name_or_path": None}
    settings.write_text(json.dumps(nameless))
    with pytest.raises(ConfigError, match=r"^base: the adapter does not name it \(base=FOLDER"):
        merge(run_dir, tmp_path / "c", Dtype.auto, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "python -m simpo.export RUN merge=true [output=FOLDER] "),
        (["here", "merge=yes"], "merge: must be true, got yes (it is all there is)\n"),
        (["here"], "merge: must be true, got nothing (it is all there is)\n"),
        (["here", "merge=true", "mrege=1"], "mrege: no such key (export has merge, output, "),
        (["here", "merge=true", "dtype=fp8"], "dtype: must be one of auto, float32, bfloat16, got"),
        (["nowhere", "merge=true"], "RUN: no such folder, got nowhere\n"),
        (
            ["here", "merge=true"],
            "RUN: must hold an adapter, got here (no here/adapter_config.json",
        ),
    ],
    ids=str,
)
def test_merge_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli()
    assert exit.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(message) and errors.count("\n") == 1
