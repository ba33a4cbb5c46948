"""Compares the layout and FLOPs of a step with torch's counter and with sums by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    JetMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.data.plan import TrainPlan, pairs_of_step, rows_of_pairs
from simpo.data.store import Tokens
from simpo.model import attention, cost
from simpo.model.policy import Policy
from tests.support.tiny_models import (
    EXPERTS,
    SEGMENTS,
    SIZES,
    VOCAB,
    random_pairs,
    ranked_pairs,
    tiny_model,
)
from tests.support.versions import transformers_before


def test_layout() -> None:
    """Two steps of three pairs, 30 tokens each: [20] and [10], whatever the order."""
    plan = TrainPlan(num_pairs=6, pairs_per_step=3, steps_per_epoch=2, total_steps=2, seed=0)
    planned = cost.layout(plan, np.full(6, 10), tokens_per_row=25)
    assert (planned.tokens_per_step, planned.fill, planned.largest_row_tokens) == (30, 0.6, 20)
    assert len(planned.largest_row) == 2


@pytest.mark.parametrize("share_prefix", [True, False])
def test_what_is_planned_is_what_is_packed(share_prefix: bool) -> None:
    """Of records with 2 to 5 responses."""
    pairs = ranked_pairs(np.random.default_rng(3), 40, longest=20)
    assert {len(pair.responses) for pair in pairs} == {2, 3, 4, 5}
    num_tokens = Tokens.of(pairs).num_tokens(share_prefix)
    plan = TrainPlan(num_pairs=40, pairs_per_step=20, steps_per_epoch=2, total_steps=2, seed=0)
    planned = cost.layout(plan, num_tokens, tokens_per_row=300)
    rows = [r for step in (0, 1) for r in rows_of_pairs(pairs_of_step(plan, step), num_tokens, 300)]
    sizes = [pack([pairs[i] for i in r], r, share_prefix).input_ids.shape[1] for r in rows]
    assert planned.tokens_per_step == sum(sizes) / 2
    assert planned.fill == sum(sizes) / 300 / len(rows)
    assert planned.largest_row_tokens == max(sizes)
    assert planned.largest_row == tuple(rows[sizes.index(max(sizes))])


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "qwen3_moe", "ranked"])
def test_flops(family: str, share_prefix: bool) -> None:
    """torch's own counter on a real forward and backward.

    It misses attention on a CPU, and the head's gradient, which is a product added in place.
    """
    ranked = family == "ranked"
    model = tiny_model("llama" if ranked else family)
    if family in EXPERTS:
        model.set_experts_implementation("eager")  # it misses products of groups as well
    if not share_prefix:
        model.set_attn_implementation("sdpa")
    pairs = (ranked_pairs if ranked else random_pairs)(np.random.default_rng(0), 4, longest=30)
    assert_counted(Policy(model, share_prefix), pairs, share_prefix, widths=32 + 32)


def assert_counted(
    policy: Policy, pairs: list[TokenizedPair], share_prefix: bool, widths: int
) -> None:
    """Compare with torch's counter and what it misses.

    Args:
        widths: sum over layers of query heads times the size of a head.
    """
    row = pack(pairs, range(len(pairs)), share_prefix)
    with FlopCounterMode(display=False) as counter:
        loss, _ = policy(row, lambda logps: logps.chosen)
        loss.backward()
    scores = 0
    for pair in pairs:
        prompt, *responses = (len(x) for x in (pair.prompt_ids, *pair.responses))
        scores += sum(sum(range(1, prompt + response + 1)) for response in responses)
        scores -= (len(responses) - 1) * sum(range(1, prompt + 1)) if share_prefix else 0
    # Two products (scores, values), two operations each, once forward and twice backward.
    missed = scores * 2 * 2 * 3 * widths + len(row.targets) * 2 * VOCAB * 32
    expected = counter.get_total_flops() + missed
    assert cost.Flops(policy).of_row(row) == pytest.approx(expected, rel=0.01)


@pytest.mark.skipif(transformers_before("5.23"), reason="has no settings for each layer")
def test_flops_where_layers_differ() -> None:
    """Gemma 4: another head size in full attention, and a second table of embeddings."""
    schema: Any = CONFIG_MAPPING["gemma4_text"]
    config = schema(
        **SIZES,
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        num_kv_shared_layers=0,
    )
    assert cost.heads_of_layers(config) == [(4, 2, 8), (4, 2, 16)]
    attention.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=SEGMENTS)
    pairs = random_pairs(np.random.default_rng(0), 4, longest=30)
    assert_counted(Policy(model), pairs, share_prefix=True, widths=4 * 8 + 4 * 16)


def test_flops_of_frozen_weights() -> None:
    """Four operations a weight and token where only the gradient of its input is needed."""
    policy = Policy(tiny_model("llama"))
    row = pack(random_pairs(np.random.default_rng(0), 2), range(2))
    full = cost.Flops(policy).of_row(row)
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    tokens, targets = row.input_ids.shape[1], len(row.targets)
    layers = [p for n, p in policy.named_parameters() if "layers" in n and p.ndim > 1]
    saved = 2 * tokens * sum(p.numel() for p in layers) + 2 * targets * VOCAB * 32
    assert cost.Flops(policy).of_row(row) == full - saved


MOE = {**SIZES, "num_experts_per_tok": 2}
ATTENTION = 32 * 32 + 2 * 16 * 32 + 32 * 32  # queries, keys and values of two heads, output


@pytest.mark.parametrize(
    ("config", "per_token"),
    [
        # Router, then two experts of three matrices each, in two layers.
        (MixtralConfig(**MOE, num_local_experts=8), 2 * (8 * 32 + 2 * 3 * 32 * 48 + ATTENTION)),
        (OlmoeConfig(**MOE, num_experts=8), 2 * (8 * 32 + 2 * 3 * 32 * 48 + ATTENTION)),
        # Its experts are in modules with another name; the attention has experts as well.
        (
            JetMoeConfig(**MOE, num_local_experts=8, kv_channels=8),
            2 * (8 * 32 + 2 * 3 * 32 * 48 + 8 * 32 + 2 * 2 * 32 * 16 + 2 * 16 * 32),
        ),
        # One layer of experts that are smaller, one without.
        (
            Qwen3MoeConfig(
                **MOE | {"head_dim": 8},
                num_experts=8,
                moe_intermediate_size=16,
                mlp_only_layers=[0],
            ),
            8 * 32 + 2 * 3 * 32 * 16 + 3 * 32 * 48 + 2 * ATTENTION,
        ),
        # An expert that all tokens meet, and the gate on it.
        (
            Qwen2MoeConfig(
                **MOE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24
            ),
            2 * (4 * 32 + 2 * 3 * 32 * 16 + 3 * 32 * 24 + 32 + ATTENTION),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_flops_of_experts(config: PreTrainedConfig, per_token: int) -> None:
    """Six operations a token and weight that it meets; the head and the scores are left out."""
    policy = Policy(AutoModelForCausalLM.from_config(config))
    row = pack(random_pairs(np.random.default_rng(0), 2), range(2))
    flops = cost.Flops(policy)
    flops._per_target = flops._per_score = 0
    assert flops.of_row(row) == 6 * per_token * row.input_ids.shape[1]


def test_speed_on_a_cpu() -> None:
    assert cost.speed(3e9, torch.device("cpu")) == {"gflops_per_s": 3.0}


def test_speed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert cost.speed(494.5e12, torch.device("cuda")) == {"gflops_per_s": 494500.0, "mfu": 0.5}
