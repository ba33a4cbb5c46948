"""Compares adapters with sums by hand, a padded implementation, and models merged by peft."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from simpo.config.errors import ConfigError
from simpo.config.models import LoraConfig, ModelConfig
from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.loss import pair_losses
from simpo.loss.simpo import SigmoidConfig
from simpo.model.load import load_policy
from simpo.model.policy import Policy
from tests.support.tiny_models import SIZES, WIDE, gradients, loss_by_hand, random_pairs, tiny_model

CPU = torch.device("cpu")
LOSS = SigmoidConfig(beta=2.0, gamma_beta_ratio=0.5)
PAIRS = random_pairs(np.random.default_rng(3), 5, longest=20)


def saved(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, sizes: Mapping[str, int] = WIDE
) -> str:
    """Folder of a tiny model."""
    tiny_model(family, dtype=dtype, **sizes).save_pretrained(folder / family)
    return str(folder / family)


def loaded(path: str, bf16: bool = False, **settings: Any) -> Policy:
    settings = {"lora": LoraConfig(rank=4, alpha=8.0)} | settings
    return load_policy(ModelConfig(name="tiny", path=path, **settings), Path(), CPU, 0, bf16=bf16)


def trained(policy: Policy) -> Policy:
    """The policy with adapters as large as after training: B starts at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def step(policy: Policy, pairs: list[TokenizedPair] = PAIRS) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of pairs in one packed row, and its gradients by name."""
    policy.train()
    policy.zero_grad()
    row = pack(pairs, range(len(pairs)))
    loss, _ = policy(row, lambda logps: pair_losses(LOSS, logps) / len(pairs))
    loss.backward()
    return loss.detach(), gradients(policy.model)


def padded_step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of an adapted model by the plain way, in float64."""
    reference = copy.deepcopy(model).double()
    loss = loss_by_hand(reference.get_base_model(), PAIRS, LOSS)
    loss.backward()
    return loss.detach(), gradients(reference)


def adapted(policy: Policy) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in policy.model.named_modules()
        if isinstance(module, LoraLayer)
    }


# Scales and forms.


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_scale_by_hand(rslora: bool, scale: float, tmp_path: Path) -> None:
    """alpha / rank, or with rslora alpha / sqrt(rank)."""
    lora = LoraConfig(rank=4, alpha=8.0, rslora=rslora)
    policy = trained(loaded(saved("llama", tmp_path), lora=lora))
    layer = adapted(policy)["model.layers.1.mlp.up_proj"]
    x = torch.randn(3, 64)
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.weight.T + scale * (x @ low.T @ high.T)
    torch.testing.assert_close(layer(x), expected)


def test_dora_by_hand(tmp_path: Path) -> None:
    """magnitude * (W + scale B A) / its norm, row by row; at the start that is W itself."""
    path = saved("llama", tmp_path)
    policy = loaded(path, lora=LoraConfig(rank=4, alpha=8.0, dora=True))
    x = torch.randn(3, 64)
    layer: Any = adapted(policy)["model.layers.0.self_attn.q_proj"]
    weight = layer.base_layer.weight
    torch.testing.assert_close(layer(x), x @ weight.T)
    trained(policy)
    moved = weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    lengths = layer.lora_magnitude_vector["default"].weight / moved.norm(dim=1)
    torch.testing.assert_close(layer(x), x @ (lengths[:, None] * moved).T)
    assert (layer(x) - x @ weight.T).norm() > 0.1 * (x @ weight.T).norm()


@pytest.mark.parametrize("form", [{}, {"rslora": True}, {"dora": True}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral_window", "gemma2"])
def test_loss_and_gradients(family: str, form: dict[str, Any], tmp_path: Path) -> None:
    """The packed row against the padded path, which calls the adapted layers as peft does."""
    policy = trained(loaded(saved(family, tmp_path), lora=LoraConfig(rank=4, alpha=8.0, **form)))
    expected, wanted = padded_step(policy.model)
    loss, got = step(policy)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert got.keys() == wanted.keys() and len(got) == 2 * 7 * (3 if "dora" in form else 2)
    for name, gradient in wanted.items():
        # DoRA holds the norm for a constant, so a B's gradient may nearly cancel.
        assert (got[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-7, name
    merged = Policy(policy.model.merge_and_unload())
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    assert step(merged)[0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "attention", "mlp"),
    [
        *(
            (kind, "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj")
            for kind in ("llama", "mistral", "gemma2", "gemma3_text", "qwen2", "qwen3")
        ),
        ("phi3", "qkv_proj o_proj", "gate_up_proj down_proj"),
    ],
)
def test_kinds_of_layers(kind: str, attention: str, mlp: str) -> None:
    """All layers of both kinds, by the names that each family has for them."""
    from simpo.model.adapters import add_adapters

    for targets, names in (
        (["attention"], attention),
        (["mlp"], mlp),
        (["mlp", "o_proj"], f"{mlp} o_proj"),
        (["all-linear"], f"{attention} {mlp}"),
    ):
        schema = CONFIG_MAPPING[kind]
        model = AutoModelForCausalLM.from_config(schema(**SIZES | {"head_dim": 8}))
        policy = Policy(add_adapters(model, LoraConfig(rank=2, targets=targets), None))
        found = [name.split(".") for name in adapted(policy)]
        assert sorted(name[-1] for name in found) == sorted(2 * names.split())
        assert {name[2] for name in found} == {"0", "1"}


@pytest.mark.parametrize(
    ("family", "lora", "message"),
    [
        (
            "llama",
            LoraConfig(rank=2, targets=["mlp", "qproj"]),
            "model.lora.targets: LlamaForCausalLM has no qproj (its linear layers: down_proj, "
            "gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj)",
        ),
        (
            "llama",
            LoraConfig(rank=2, targets=["lm_head"], dora=True),
            "model.lora.targets: lm_head cannot have DoRA (leave it out, or lora.dora=false)",
        ),
        *(
            (
                "llama_tied",
                LoraConfig(rank=2, targets=[end]),
                "model.lora.targets: LlamaForCausalLM has one weight for embeddings and lm_head, "
                "an adapter on one of them could not be merged (leave it out)",
            )
            for end in ("lm_head", "embed_tokens")
        ),
    ],
)
def test_targets_that_cannot_be(
    family: str, lora: LoraConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(saved(family, tmp_path), lora=lora)
    assert str(error.value) == message


def test_a_target_that_takes_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.lora\.targets: Target module LlamaRMSNorm"):
        loaded(saved("llama", tmp_path), lora=LoraConfig(rank=2, targets=["input_layernorm"]))


def test_adapters_are_in_fp32(tmp_path: Path) -> None:
    """Also on a base in bf16, where peft makes them in bf16 first."""
    policy = loaded(saved("llama", tmp_path, torch.bfloat16), dtype="bfloat16", bf16=True)
    dtypes = {(p.requires_grad, p.dtype) for p in policy.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


# A saved adapter trained on.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [{}, {"dora": True}, {"rslora": True}], ids=str)
def test_an_adapter_goes_on_exactly(
    form: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    path, name = saved("llama", tmp_path, dtype), str(dtype).removeprefix("torch.")
    lora = LoraConfig(
        rank=4, alpha=8.0, targets=["attention", "lm_head"][: 1 if form else 2], **form
    )
    policy = trained(loaded(path, lora=lora, dtype=name))
    policy.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = loaded(path, lora=LoraConfig(adapter=str(tmp_path / "adapter")), dtype=name)
    before = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    after = {n: p for n, p in again.named_parameters() if p.requires_grad}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], p) and after[n].dtype is p.dtype for n, p in before.items())
    assert torch.equal(step(again)[0], step(policy)[0])


def test_an_adapter_names_the_base_that_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder as it is found from anywhere, also where the adapter named another before."""
    path, file = Path(saved("llama", tmp_path)), tmp_path / "adapter" / "adapter_config.json"
    monkeypatch.chdir(tmp_path)
    loaded(path.name).model.save_pretrained(tmp_path / "adapter")
    assert json.loads(file.read_text())["base_model_name_or_path"] == str(path)
    settings = json.loads(file.read_text())
    elsewhere = {"base_model_name_or_path": "/home/other/base", "revision": "v1"}
    file.write_text(json.dumps(settings | elsewhere))
    loaded(path.name, lora=LoraConfig(adapter="adapter")).model.save_pretrained("again")
    again = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert again["base_model_name_or_path"] == str(path) and again["revision"] is None


def spoilt(folder: Path, spoil: str) -> None:
    """A saved adapter made unfit."""
    settings = folder / "adapter_config.json"
    weights = load_file(folder / "adapter_model.safetensors")
    if spoil == "lacking":
        weights.pop("base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight")
    elif spoil == "deeper":
        name = "base_model.model.model.layers.{}.self_attn.o_proj.lora_B.weight"
        weights[name.format(2)] = weights[name.format(1)].clone()
    elif spoil == "other rank":
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"r": 2}))
    elif spoil == "no settings":
        settings.write_text("{}")
    save_file(weights, folder / "adapter_model.safetensors")
    if spoil == "no weights":
        (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            "lacking",
            "does not fit LlamaForCausalLM: 1 weights are in only one of the two, such as "
            "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight",
        ),
        (
            "deeper",
            "does not fit LlamaForCausalLM: 1 weights are in only one of the two, such as "
            "base_model.model.model.layers.2.self_attn.o_proj.lora_B.weight",
        ),
        ("other rank", "does not fit LlamaForCausalLM: size mismatch for base_model.model.model"),
        ("no weights", "does not fit LlamaForCausalLM: "),
        ("no settings", "is none"),
    ],
)
def test_adapters_that_do_not_fit(spoil: str, message: str, tmp_path: Path) -> None:
    path, folder = saved("llama", tmp_path), tmp_path / "adapter"
    loaded(path).model.save_pretrained(folder)
    spoilt(folder, spoil)
    with pytest.raises(ConfigError) as error:
        loaded(path, lora=LoraConfig(adapter=str(folder)))
    kind = "must be a LoRA adapter, " if spoil == "no settings" else ""
    assert str(error.value).startswith(f"model.lora.adapter: {kind}{folder} {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            PeftLoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
            "trains whole modules besides adapters, which is not supported, got lm_head "
            "(python -m simpo.export ADAPTER merge=true)",
        ),
        (
            PeftLoraConfig(r=2, target_modules=["lm_head"], use_dora=True),
            "lm_head cannot have DoRA (leave it out, or lora.dora=false)",
        ),
        (
            PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
            "must be a LoRA adapter, {folder} is PROMPT_TUNING",
        ),
    ],
    ids=["whole modules", "DoRA on the head", "no LoRA"],
)
def test_adapters_of_others_that_are_refused(settings: Any, message: str, tmp_path: Path) -> None:
    path, folder = saved("llama", tmp_path), tmp_path / "adapter"
    get_peft_model(tiny_model("llama", **WIDE), settings).save_pretrained(folder)
    with pytest.raises(ConfigError) as error:
        loaded(path, lora=LoraConfig(adapter=str(folder)))
    assert str(error.value) == f"model.lora.adapter: {message.format(folder=folder)}"
