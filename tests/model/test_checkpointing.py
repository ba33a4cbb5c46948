"""Recomputed activations: the same bits as kept ones, and no product of a layer twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simpo.config.choices import Checkpointing
from simpo.config.models import LoraConfig
from simpo.data.packing import pack
from simpo.data.pairs import PackedPairs
from simpo.loss import pair_losses
from simpo.loss.simpo import SigmoidConfig
from simpo.model import checkpointing
from simpo.model.adapters import add_adapters
from simpo.model.policy import Policy
from tests.support.tiny_models import EXPERTS, FAMILIES, random_pairs, tiny_model

LOSS = SigmoidConfig(beta=2.0, gamma_beta_ratio=0.5)
PAIRS = random_pairs(np.random.default_rng(0), 4, longest=20)


class Calls(TorchDispatchMode):
    """Counts the calls of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.of[func.name()] += 1
        return func(*args, **(kwargs or {}))


def step(policy: Policy, row: PackedPairs, bf16: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a row."""
    policy.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _ = policy(row, lambda logps: pair_losses(LOSS, logps))
    loss.backward()
    return loss, [p.grad for p in policy.parameters() if p.grad is not None]


def checkpointed(model: Any, kind: Checkpointing, share_prefix: bool = True) -> Policy:
    checkpointing.enable(model, kind)
    return Policy(model, share_prefix)


def model_of(family: str, adapters: bool) -> Any:
    model = tiny_model(family)
    return add_adapters(model, LoraConfig(rank=2), None) if adapters else model


@pytest.mark.parametrize("kind", [Checkpointing.selective, Checkpointing.full])
@pytest.mark.parametrize(
    ("family", "adapters"),
    [*((name, False) for name in (*FAMILIES, *EXPERTS)), ("llama", True), ("qwen2_moe", True)],
)
def test_the_same_bits(family: str, adapters: bool, kind: Checkpointing) -> None:
    for share, bf16 in ((True, False), (True, True), (False, False)):
        row = pack(PAIRS, range(4), share)
        models = [model_of(family, adapters) for _ in range(2)]
        if not share:
            for model in models:
                model.set_attn_implementation("eager")
        wanted = step(Policy(models[0], share), row, bf16)
        got = step(checkpointed(models[1], kind, share), row, bf16)
        assert torch.equal(got[0], wanted[0])
        assert len(got[1]) == len(wanted[1])
        assert all(torch.equal(a, b) for a, b in zip(got[1], wanted[1], strict=True))


def test_products_are_not_computed_again() -> None:
    """Selectively, only norms, rotary embeddings and gates are; in full, all but the last one."""
    calls = {}
    for kind in Checkpointing:
        policy = checkpointed(tiny_model("llama"), kind)
        with Calls() as counted:
            step(policy, pack(PAIRS, range(4)))
        calls[kind] = counted.of
    none, selective, full = (calls[kind] for kind in Checkpointing)
    for name in ("aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert selective[name] == none[name] < full[name]
    assert selective["aten::silu"] == full["aten::silu"] == 2 * none["aten::silu"] == 4


def test_the_small_product_of_an_adapter_is_computed_again() -> None:
    """Its output is as large as that of the layer it adapts."""
    small, large = torch.ones(4, 2), torch.ones(2, 64)
    product = torch.ops.aten.mm.default
    assert not checkpointing.is_kept(product, (small, large))
    assert checkpointing.is_kept(product, (large.T, small.T))
    assert checkpointing.is_kept(torch.ops.aten.addmm.default, (torch.ones(4), small.T, small))
