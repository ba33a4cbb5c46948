"""Architectures that take packed rows, and the answer to those that do not."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, SEGMENTS, SIZES, tiny_model
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from simpo import attention
from simpo.errors import ConfigError
from simpo.model import Policy
from simpo.probe import check_packing

# The same sizes by the names that GPT-2 and its kin give them.
SPELLINGS = SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4}


def other_model(kind: str, share_prefix: bool) -> Policy:
    """A random model of any causal architecture that transformers has."""
    attention.register()
    schema = CONFIG_MAPPING[kind]
    known = {key: value for key, value in SPELLINGS.items() if hasattr(schema(), key)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        schema(**known),
        attn_implementation=SEGMENTS if share_prefix else None,
        dtype=torch.float32,
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return Policy(model, share_prefix)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_families(family: str, half: bool) -> None:
    check_packing(Policy(tiny_model(family)), half)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "phi3", "olmo2"])
def test_others_that_share(kind: str) -> None:
    check_packing(other_model(kind, True), half=False)
    check_packing(other_model(kind, False), half=False)


@pytest.mark.parametrize(
    ("kind", "name"), [("stablelm", "StableLmForCausalLM"), ("nemotron", "NemotronForCausalLM")]
)
def test_refused_but_served_without_sharing(kind: str, name: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^model\.path: {name} cannot share prompts in packed rows: hidden states differ by "
        r"0\.\d+ of their norm \(train\.share_prefix=false computes a prompt for each response\)$",
    ):
        check_packing(other_model(kind, True), half=False)
    check_packing(other_model(kind, False), half=False)


@pytest.mark.parametrize(
    ("kind", "name"), [("bloom", "BloomForCausalLM"), ("rwkv", "RwkvForCausalLM")]
)
def test_refused_altogether(kind: str, name: str) -> None:
    """Positions out of the mask's length, and a recurrent state that runs on into the next row."""
    with pytest.raises(
        ConfigError,
        match=rf"^model\.path: {name} mixes the sequences of a packed row: hidden states differ by",
    ):
        check_packing(other_model(kind, False), half=False)


def test_logits_that_are_scaled_after_the_head() -> None:
    """Cohere multiplies them by 0.0625; without this the loss would be of another model."""
    with pytest.raises(
        ConfigError,
        match=r"^model\.path: CohereForCausalLM does something to its logits after its head, which "
        r"is not supported: they differ by 15 of their norm$",
    ):
        check_packing(other_model("cohere", True), half=False)


def test_a_kernel_that_mixes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any kernel that lets a pair see the one before, here plain causal attention of the row."""
    whole_row = attention._by_segment

    def leaking(query, key, value, segments, *options):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )

    monkeypatch.setattr(attention, "_by_segment", leaking)
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot share prompts"):
        check_packing(Policy(tiny_model("llama")), half=True)
    monkeypatch.setattr(attention, "_by_segment", whole_row)
    check_packing(Policy(tiny_model("llama")), half=True)
