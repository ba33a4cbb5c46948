"""Architectures that support packed rows, and the messages for those that do not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.config.models import ModelConfig
from simpo.data.flat_tokens import Tokens
from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.loop.train import train
from simpo.model import attention
from simpo.model.check import check_packing
from simpo.model.load import load_probe
from simpo.model.policy import Policy
from tests.support.tiny_models import FAMILIES, SEGMENTS, SIZES, random_pairs, tiny_model
from tests.support.versions import transformers_before

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
        attn_implementation=SEGMENTS,
        dtype=torch.float32,
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return Policy(model, share_prefix)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_families(family: str, bf16: bool) -> None:
    check_packing(Policy(tiny_model(family)), bf16)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "phi3", "olmo2"])
def test_others_that_share(kind: str) -> None:
    check_packing(other_model(kind, True), bf16=False)
    check_packing(other_model(kind, False), bf16=False)


@pytest.mark.parametrize(
    ("kind", "name"), [("stablelm", "StableLmForCausalLM"), ("nemotron", "NemotronForCausalLM")]
)
def test_refused_but_served_without_sharing(kind: str, name: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^model\.path: {name} cannot share prompts in packed rows: hidden states differ by "
        r"1\.\d+ of their norm \(train\.share_prefix=false computes a prompt for each response\)$",
    ):
        check_packing(other_model(kind, True), bf16=False)
    check_packing(other_model(kind, False), bf16=False)


@pytest.mark.parametrize(
    ("kind", "name"), [("bloom", "BloomForCausalLM"), ("rwkv", "RwkvForCausalLM")]
)
def test_refused_altogether(kind: str, name: str) -> None:
    """Positions out of the mask's length, and a recurrent state that runs on into the next row."""
    with pytest.raises(
        ConfigError,
        match=rf"^model\.path: {name} mixes the sequences of a packed row: hidden states differ by",
    ):
        check_packing(other_model(kind, False), bf16=False)


def test_logits_that_are_scaled_after_the_head() -> None:
    """Cohere multiplies them by 0.0625; without this the loss would be of another model."""
    with pytest.raises(
        ConfigError,
        match=r"^model\.path: CohereForCausalLM changes its logits after the output layer, which "
        r"is not supported: they differ by 15 of their norm$",
    ):
        check_packing(other_model("cohere", True), bf16=False)


@pytest.mark.skipif(transformers_before("5.23"), reason="its settings are others")
def test_a_soft_cap_in_the_settings_of_the_text() -> None:
    """Gemma 4 as it is published, with settings for images; transformers caps its logits."""
    text = SIZES | {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": SIZES["vocab_size"],
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 1.0,
        "initializer_range": 0.2,
    }
    schema: Any = CONFIG_MAPPING["gemma4"]
    config = schema(text_config=text, vision_config=None, audio_config=None)
    attention.register()
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config, attn_implementation=SEGMENTS))
    check_packing(policy, bf16=False)


def test_a_kernel_that_mixes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any kernel that lets a pair see the one before, here plain causal attention of the row."""
    whole_row = attention._by_segment

    def leaking(query, key, value, segments, *options):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )

    monkeypatch.setattr(attention, "_by_segment", leaking)
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot share prompts"):
        check_packing(Policy(tiny_model("llama")), bf16=True)
    monkeypatch.setattr(attention, "_by_segment", whole_row)
    check_packing(Policy(tiny_model("llama")), bf16=True)


# On a small copy, where the weights are unread.


def small_copy(kind: str, share_prefix: bool, layers: int = 8, **more: Any) -> Policy | None:
    """What is checked of a model of a kind, with as many layers, before its weights are read."""
    schema = CONFIG_MAPPING[kind]
    sizes = SPELLINGS | {"n_layer": layers, "num_hidden_layers": layers} | more
    known = {key: value for key, value in sizes.items() if hasattr(schema(), key)}
    config = ModelConfig(name="tiny", path="tiny")
    options = {"bf16": False, "share_prefix": share_prefix}
    return load_probe(config, schema(**known), torch.device("cpu"), **options)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "phi3", "olmo2", "llama"])
def test_a_small_copy_that_shares(kind: str) -> None:
    for share_prefix in (True, False):
        policy = small_copy(kind, share_prefix, layers=12)
        assert policy is not None and policy.base.config.num_hidden_layers < 12
        check_packing(policy, bf16=False)


@pytest.mark.parametrize(
    ("kind", "share_prefix"),
    [("stablelm", True), ("nemotron", True), ("bloom", False), ("rwkv", False), ("cohere", True)],
)
def test_a_small_copy_is_refused_as_the_whole(kind: str, share_prefix: bool) -> None:
    """In the same words but for the number; or there is none, and the whole model is checked."""
    policy = small_copy(kind, share_prefix)
    if policy is None:
        assert kind in ("bloom", "rwkv")
        return
    told = []
    for checked in (policy, other_model(kind, share_prefix)):
        with pytest.raises(ConfigError) as error:
            check_packing(checked, bf16=False)
        told.append(str(error.value).partition(" differ by ")[0])
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("kind", "share_prefix", "settings"),
    [
        ("opt", True, {"word_embed_proj_dim": 32, "ffn_dim": 48, "layerdrop": 0.5}),
        ("biogpt", True, {"attention_probs_dropout_prob": 0.5}),
        # Its attention is transformers' own.
        ("stablelm", False, {"attention_dropout": 0.5}),
    ],
)
def test_nothing_is_random_in_training(
    kind: str, share_prefix: bool, settings: dict[str, Any]
) -> None:
    """Rates of dropout that are numbers of a layer, in its config.json or by default."""
    policy = small_copy(kind, share_prefix, **settings)
    assert policy is not None
    check_packing(policy, bf16=False)
    row = pack(random_pairs(np.random.default_rng(0), 2), range(2), share_prefix)
    evaluated = policy.eval().hidden(row)
    before = torch.get_rng_state()
    assert torch.equal(policy.train().hidden(row), evaluated)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kernel_that_forgets_windows_is_found_on_a_small_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = small_copy("gemma3_text", True, layers=12, sliding_window=1000, head_dim=16)
    assert policy is not None
    check_packing(policy, False, 1001, 0)
    whole = attention._by_segment

    def forgetting(query, key, value, segments, table, form):
        return whole(query, key, value, segments, table, form._replace(window=None))

    monkeypatch.setattr(attention, "_by_segment", forgetting)
    with pytest.raises(ConfigError, match=r"ForCausalLM cannot share prompts in packed rows: hidd"):
        check_packing(policy, False, 1001, 4096)


def policy_of(config: PreTrainedConfig, share_prefix: bool = True) -> Policy:
    attention.register()
    torch.manual_seed(0)
    kernel = SEGMENTS if share_prefix else None
    return Policy(
        AutoModelForCausalLM.from_config(config, attn_implementation=kernel), share_prefix
    )


def longest_of(tokens: int) -> int:
    """Of a short pair beside one whose longer response ends at so many tokens."""
    ids = np.ones(tokens, dtype=np.int32)
    pairs = [
        TokenizedPair.of(ids[:3], ids[:2], ids[:2]),
        TokenizedPair.of(ids[:-4], ids[:2], ids[:4]),
    ]
    return Tokens.of(pairs).longest_sequence()


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
ROPES: dict[str, tuple[PreTrainedConfig, str]] = {
    "longrope": (
        Phi3Config(**SIZES, original_max_position_embeddings=80, rope_parameters=LONGROPE),
        "Phi3ForCausalLM",
    ),
    "dynamic": (
        LlamaConfig(
            **SIZES,
            max_position_embeddings=80,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        ),
        "LlamaForCausalLM",
    ),
    # One set for each kind of layer.
    "longrope in some layers": (
        Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            rope_parameters={
                "full_attention": {**LONGROPE, "original_max_position_embeddings": 80},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        "Gemma3ForCausalLM",
    ),
}


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", ROPES)
def test_positions_that_depend_on_the_longest_sequence(kind: str, share_prefix: bool) -> None:
    """Beyond the length that the model names, and there only, a row would not be its sequences."""
    config, name = ROPES[kind]
    policy = policy_of(config, share_prefix)
    check_packing(policy, False, longest_of(80), 4096)
    with pytest.raises(ConfigError) as error:
        check_packing(policy, False, longest_of(81), 4096)
    assert str(error.value) == (
        f"model.path: {name} changes the rotary frequencies of a whole row ({kind.split()[0]}) if "
        "one of its sequences is longer than 80 tokens, so pairs would affect each other; the "
        "longest here has 81 (data.max_length_tokens=80, and max_prompt_tokens below it)"
    )


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_positions_that_do_not(kind: str) -> None:
    rope = {
        "rope_type": kind,
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 80,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    config = LlamaConfig(**SIZES, max_position_embeddings=320, rope_parameters=rope)
    check_packing(policy_of(config), False, longest_of(300), 4096)


@pytest.mark.parametrize("family", ["mistral_window", "gemma3"])
def test_windows_of_any_size_are_outgrown(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forgets the window is found where the data reaches it, and not before."""
    policy = Policy(tiny_model(family, sliding_window=1000))
    check_packing(policy, False, longest_of(1001), 0)
    whole = attention._by_segment

    def forgetting(query, key, value, segments, table, form):
        return whole(query, key, value, segments, table, form._replace(window=None))

    monkeypatch.setattr(attention, "_by_segment", forgetting)
    check_packing(policy, False, longest_of(1000), 4096)
    with pytest.raises(ConfigError, match=r"ForCausalLM cannot share prompts in packed rows: hidd"):
        check_packing(policy, False, longest_of(1001), 4096)
    kept = {getattr(holder, "sliding_window", None) for holder in policy.modules()}
    assert policy.base.config.sliding_window == 1000 and kept <= {None, 1000}


def test_a_model_that_hides_its_hidden_states() -> None:
    config = Llama4TextConfig(
        **SIZES, intermediate_size_mlp=48, num_local_experts=2, head_dim=8, use_qk_norm=False
    )
    with pytest.raises(ConfigError) as error:
        check_packing(policy_of(config), False)
    output = (
        "CausalLMOutputWithPast" if transformers_before("5.19") else "MoeCausalLMOutputWithPast"
    )
    assert str(error.value) == (
        "model.path: Llama4ForCausalLM: its hidden states cannot be computed: "
        f"'{output}' object has no attribute 'last_hidden_state'"
    )


def test_hidden_states_that_are_no_numbers() -> None:
    """Not the packing is to blame for it."""
    policy = Policy(tiny_model("llama"))
    for value, told in ((float("nan"), "NaN or infinite"), (0.0, "0")):
        torch.nn.init.constant_(cast(Tensor, policy.base.get_input_embeddings().weight), value)
        with pytest.raises(ConfigError) as error:
            check_packing(policy, False)
        assert str(error.value) == (
            f"model.path: LlamaForCausalLM gives hidden states that are {told} (mend its "
            "weights, or train.precision=fp32)"
        )


def test_a_run_whose_pairs_go_beyond_is_refused(
    tiny_run: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    """Whatever tokens_per_row is: alone in their rows the short pairs would be ranked otherwise."""
    folder = shutil.copytree(tiny_folder, tmp_path / "phi")
    (folder / "model.safetensors").unlink()
    sizes = SIZES | {"vocab_size": 384}
    config = Phi3Config(**sizes, original_max_position_embeddings=80, rope_parameters=LONGROPE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for tokens_per_row in (128, 4096):
        own = [f"model.path={folder}", f"train.tokens_per_row={tokens_per_row}"]
        with pytest.raises(ConfigError, match=r"^model\.path: Phi3ForCausalLM changes the rotary "):
            train(compose_run([*tiny_run, *own]))
