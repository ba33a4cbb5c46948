"""Incomplete or damaged checkpoints, each with its message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig, MixtralConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from simpo.config.choices import Compat
from simpo.config.errors import ConfigError
from simpo.config.models import LoraConfig, ModelConfig
from simpo.model.load import load_policy
from simpo.model.policy import Policy
from simpo.model.pretrained import load_weights
from simpo.model.tokenizer import load_tokenizer
from tests.support.tiny_models import SIZES, tiny_model
from tests.support.versions import transformers_before

UP = "model.layers.0.mlp.up_proj.weight"
MEND = (
    " (mend the files or config.json; loading and saving it with transformers drops what is "
    "unexpected)"
)


def loaded(folder: Path, **settings: object) -> Policy:
    config = ModelConfig(name="mine", path=str(folder), **settings)  # type: ignore[arg-type]
    return load_policy(config, folder, torch.device("cpu"), 0)


def refusal(folder: Path, **settings: object) -> str:
    with pytest.raises(ConfigError) as error:
        loaded(folder, **settings)
    return str(error.value)


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A saved model with something done to the tensors of its file."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "change", "fault"),
    [
        ("llama", lambda w: w.pop(UP), f"missing {UP}"),
        ("llama", lambda w: w.pop("lm_head.weight"), "missing lm_head.weight"),
        (
            "llama_tied",
            lambda w: w.pop("model.embed_tokens.weight"),
            "missing lm_head.weight, model.embed_tokens.weight",
        ),
        (
            "llama",
            lambda w: w.update({UP: torch.zeros(48, 16)}),
            f"of another shape {UP} [48, 16] for [48, 32]",
        ),
        (
            "llama",
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            "unexpected model.layers.0.self_attn.q_proj.bias",
        ),
        (
            "llama",
            lambda w: w.update({f"more.{name}": w.pop(name) for name in list(w)}),
            "missing lm_head.weight, model.embed_tokens.weight, "
            "model.layers.0.input_layernorm.weight, model.layers.0.mlp.down_proj.weight and 17 "
            "more; unexpected more.lm_head.weight, more.model.embed_tokens.weight, "
            "more.model.layers.0.input_layernorm.weight, more.model.layers.0.mlp.down_proj.weight "
            "and 17 more",
        ),
    ],
    ids=["lacks one", "lacks the head", "lacks the tied", "other shape", "one more", "prefix"],
)
def test_weights_of_another_model(
    family: str, change: Callable[[dict[str, Tensor]], object], fault: str, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    assert refusal(changed(tmp_path, change)) == (
        f"model.path: {tmp_path} does not fit LlamaForCausalLM: {fault}{MEND}"
    )


def test_weights_that_may_be_more(tmp_path: Path) -> None:
    """Buffers of older versions, towers and heads that a text model does without."""
    model = tiny_model("llama_tied")
    model.save_pretrained(tmp_path)
    more = (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.encoder.weight",
        "v_head.summary.weight",
        "lm_head.weight",
    )
    table = model.get_input_embeddings().weight.detach()
    changed(tmp_path, lambda w: w.update({name: torch.ones(3) for name in more}))
    changed(tmp_path, lambda w: w.update({"lm_head.weight": table.clone()}))
    policy = loaded(tmp_path)
    assert all(
        torch.equal(p, q) for p, q in zip(policy.base.parameters(), model.parameters(), strict=True)
    )


def test_a_base_under_adapters_is_looked_at_too(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    changed(tmp_path, lambda w: w.pop(UP))
    assert refusal(tmp_path, lora=LoraConfig(rank=2)) == (
        f"model.path: {tmp_path} does not fit LlamaForCausalLM: missing {UP}{MEND}"
    )


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    config = MixtralConfig(**SIZES, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded(tmp_path)
    changed(tmp_path, lambda w: w.pop("model.layers.0.block_sparse_moe.experts.1.w1.weight"))
    assert refusal(tmp_path) == (
        f"model.path: {tmp_path} cannot be loaded: weights that are stacked into one "
        "tensor, such as those of experts, are missing or differ in shape"
    )


def test_a_reward_model_without_its_score(tmp_path: Path) -> None:
    """A language model as a reward would score by a random layer."""
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_weights("on_policy.reward", str(tmp_path), AutoModelForSequenceClassification)
    assert str(error.value) == (
        f"on_policy.reward: {tmp_path} does not fit LlamaForSequenceClassification: missing "
        f"score.weight{MEND}"
    )
    config = LlamaConfig(**SIZES | {"num_labels": 1})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    load_weights("on_policy.reward", str(tmp_path), AutoModelForSequenceClassification)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model("llama").save_pretrained(base)
    loaded(base, lora=LoraConfig(rank=2)).model.save_pretrained(adapter)
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    weights[name][0, 0] = value
    save_file(weights, file)
    assert refusal(base, lora=LoraConfig(adapter=str(adapter))) == (
        f"model.lora.adapter: {adapter} holds NaN or infinite weights in "
        f"{name.replace('.weight', '.default.weight')} (mend the files)"
    )
    changed(base, lambda w: w[UP].__setitem__((0, 0), value))
    assert refusal(base) == (
        f"model.path: {base} holds NaN or infinite weights in {UP} (mend the files)"
    )


def test_large_weights_are_numbers(tmp_path: Path) -> None:
    """Their sum is infinite, they are not."""
    tiny_model("llama").save_pretrained(tmp_path)
    loaded(changed(tmp_path, lambda w: w[UP].fill_(3e38)))


INDEX = "model.safetensors.index.json"


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def without_weight_map(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"weight_map": {}}))


@pytest.mark.parametrize(
    ("file", "damage", "fault"),
    [
        (
            "model-00002-of-00006.safetensors",
            cut,
            "SafetensorError: Error while deserializing header: incomplete metadata, file not "
            "fully covered (mend {file}, or fetch the model anew)",
        ),
        (
            "model-00002-of-00006.safetensors",
            lambda file: file.write_bytes(b""),
            "SafetensorError: Error while deserializing header: header too small (mend {file}, or "
            "fetch the model anew)",
        ),
        (
            "model-00002-of-00006.safetensors",
            Path.unlink,
            "No such file or directory: {file}",
        ),
        (
            INDEX,
            lambda file: file.write_text("{"),
            "Expecting property name enclosed in double quotes: line 1 column 2 (char 1) (mend "
            "{file}, or fetch the model anew)",
        ),
        (
            INDEX,
            lambda file: file.write_text("{}"),
            "KeyError: 'weight_map'",
        ),
        (
            INDEX,
            without_weight_map,
            "IndexError: list index out of range (mend {file}, or fetch the model anew)",
        ),
        (
            "config.json",
            lambda file: file.write_text("{"),
            "It looks like the config file at '{file}' is not a valid JSON file. (mend {file}, or "
            "fetch the model anew)",
        ),
        (
            "config.json",
            Path.unlink,
            "Unrecognized model in {file.parent}. Should have a `model_type` key in its "
            "config.json.",
        ),
    ],
    ids=["half", "empty", "gone", "index", "no index", "index of nothing", "config", "no config"],
)
def test_damaged_files(
    file: str, damage: Callable[[Path], object], fault: str, tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20kB")
    damage(tmp_path / file)
    fault = fault.format(file=tmp_path / file)
    assert refusal(tmp_path) == f"model.path: {tmp_path} cannot be loaded: {fault}"


def test_a_bin_file(tmp_path: Path) -> None:
    """The older format, whole and damaged."""
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(load_file(tmp_path / "model.safetensors"), file)
    (tmp_path / "model.safetensors").unlink()
    loaded(tmp_path)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert refusal(tmp_path).endswith(f"(mend {file}, or fetch the model anew)")


def test_an_emptied_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    assert refusal(folder) == (
        f"model.path: {folder} cannot be loaded: Unrecognized model in {folder}. Should have a "
        "`model_type` key in its config.json."
    )


def test_a_damaged_adapter(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model("llama").save_pretrained(base)
    loaded(base, lora=LoraConfig(rank=2)).model.save_pretrained(adapter)
    cut(adapter / "adapter_model.safetensors")
    assert refusal(base, lora=LoraConfig(adapter=str(adapter))) == (
        f"model.lora.adapter: {adapter} holds damaged weights: Error while deserializing header: "
        "incomplete metadata, file not fully covered"
    )
    (adapter / "adapter_config.json").write_text("{")
    assert refusal(base, lora=LoraConfig(adapter=str(adapter))) == (
        f"model.lora.adapter: {adapter} cannot be loaded: Expecting property name enclosed in "
        "double quotes: line 1 column 2 (char 1)"
    )


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (
            lambda folder: (folder / "tokenizer.json").write_text('{"version'),
            "Unterminated string starting at: line 1 column 2 (char 1) (mend "
            "{folder}/tokenizer.json, or fetch the model anew)",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
            (
                "TypeError: list indices must be integers or slices, not str"
                if transformers_before("5.18")
                else "AttributeError: 'list' object has no attribute 'get'"
            )
            + " (mend {folder}/tokenizer_config.json, or fetch the model anew)",
        ),
        (
            lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"),
            "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte (mend "
            "{folder}/chat_template.jinja, or fetch the model anew)",
        ),
        (
            lambda folder: [file.unlink() for file in folder.iterdir()],
            "it holds no tokenizer (model.tokenizer=FOLDER_OR_HUB_ID, or fetch it anew)",
        ),
    ],
    ids=["half", "another thing", "template", "emptied"],
)
def test_damaged_tokenizers(
    damage: Callable[[Path], object], fault: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(ConfigError) as error:
        load_tokenizer(ModelConfig(name="mine", path=str(folder)), tmp_path)
    told = f"model.path: {folder} cannot be loaded: {fault.format(folder=folder)}"
    assert str(error.value) == told


def test_a_tokenizer_without_eos_ends_nothing_as_the_original_does(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"], settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = ModelConfig(name="mine", path=str(folder))
    assert load_tokenizer(config, tmp_path).pad_token is None
    with pytest.raises(ConfigError) as error:
        load_tokenizer(config, tmp_path, Compat.paper)
    assert str(error.value) == (
        f"model.tokenizer: {folder} has no EOS token, with which data.compat=paper ends responses "
        "(name one as eos_token in its tokenizer_config.json)"
    )
