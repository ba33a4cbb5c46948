"""Mixtures of experts: the router's auxiliary loss against transformers' own, over whole steps."""

from __future__ import annotations

import copy
import shutil
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from simpo.backend import Backend
from simpo.config.backends import SingleConfig
from simpo.config.choices import Device, Precision
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.config.models import LoraConfig, ModelConfig
from simpo.data.packing import pack, placeholder_row
from simpo.data.pairs import PackedPairs, TokenizedPair
from simpo.data.plan import rows_of_pairs
from simpo.loop.score import evaluate, summarise
from simpo.loop.step import update
from simpo.loss.simpo import SigmoidConfig
from simpo.model import attention
from simpo.model.adapters import add_adapters
from simpo.model.check import check_packing, check_router
from simpo.model.load import load_policy
from simpo.model.policy import Policy
from tests.support.tiny_models import (
    EXPERTS,
    SEGMENTS,
    SIZES,
    gradients,
    loss_by_hand,
    random_pairs,
    tiny_model,
)
from tests.support.versions import transformers_before
from tests.support.whole_runs import metrics_of, run, tiny_model_and_data

LOSS = SigmoidConfig(beta=2.0, gamma_beta_ratio=0.5)
WEIGHT = 3.0
"""Larger than in use, so that the auxiliary loss has a part in every gradient."""


@pytest.fixture
def backend() -> Backend:
    return Backend(SingleConfig(device=Device.cpu), Precision.fp32)


def precise(family: str) -> PreTrainedModel:
    """A tiny model in float64, for which torch has no product of groups."""
    model = tiny_model(family, dtype=torch.float64)
    model.set_experts_implementation("eager")
    return model


def rows_of(
    pairs: Sequence[TokenizedPair], tokens_per_row: int, share_prefix: bool = True
) -> list[PackedPairs]:
    lengths = np.array([p.num_tokens(share_prefix) for p in pairs])
    rows = rows_of_pairs(range(len(pairs)), lengths, tokens_per_row)
    return [pack([pairs[i] for i in row], row, share_prefix) for row in rows]


def aux_loss_of_transformers(
    model: PreTrainedModel, pairs: Sequence[TokenizedPair], share_prefix: bool
) -> Tensor:
    """Of all tokens together; each sequence is computed alone, by transformers' eager attention.

    With a shared prompt its tokens count once, as they are computed once.
    """
    model.set_attn_implementation("eager")
    by_layer: list[tuple[Tensor, ...]] = []
    for pair in pairs:
        for response in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, response]).astype(np.int64))
            output: Any = model.get_decoder()(
                input_ids=ids[None], use_cache=False, output_router_logits=True
            )
            seen = len(pair.prompt_ids) * (share_prefix and response is pair.rejected_ids)
            by_layer.append(tuple(logits[seen:] for logits in output.router_logits))
    model.set_attn_implementation(SEGMENTS)
    logits = tuple(torch.cat(layer) for layer in zip(*by_layer, strict=True))
    theirs = sys.modules[type(model).__module__].load_balancing_loss_func
    return theirs(logits, model.num_experts, model.num_experts_per_tok)


class Recorder(SGD):
    """Keeps the gradients of a step in float64, and the weights as they are."""

    def step(self) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        self.gradients = [None if p.grad is None else p.grad.double() for p in parameters]


def step_of(
    policy: Policy, rows: list[PackedPairs], backend: Backend, weight: float = WEIGHT
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of one update by name of the weight, and its metrics."""
    found, sums = gradients_of_process(policy, rows, backend, weight)
    return found, summarise(LOSS, sums, weight)


def gradients_of_process(
    policy: Policy, rows: list[PackedPairs], backend: Backend, weight: float = WEIGHT
) -> tuple[dict[str, Tensor], Tensor]:
    recorder = Recorder(policy.parameters(), lr=1.0)
    sums, _ = update(policy, recorder, rows, LOSS, backend, weight)
    found = zip((n for n, _ in policy.named_parameters()), recorder.gradients, strict=True)
    return {n.removeprefix("model."): g for n, g in found if g is not None}, sums


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-5: norms and routers of transformers round to float32 in float64 too."""
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("family", EXPERTS)
def test_loss_and_gradients(family: str, share_prefix: bool, backend: Backend) -> None:
    """In float64, in one row and in several, against transformers' own loss on all tokens."""
    model = precise(family)
    pairs = random_pairs(np.random.default_rng(0), 6)
    reference = copy.deepcopy(model)
    aux = aux_loss_of_transformers(reference, pairs, share_prefix)
    expected = loss_by_hand(reference, pairs, LOSS) + WEIGHT * aux
    expected.backward()
    (without,) = torch.autograd.grad(
        loss_by_hand(reference, pairs, LOSS), [reference.get_decoder().layers[1].mlp.gate.weight]
    )
    wanted = gradients(reference)
    router = wanted["model.layers.1.mlp.gate.weight"]
    assert (router - without).norm() > 0.1 * router.norm(), "the auxiliary loss has no part in it"
    if not share_prefix:
        model.set_attn_implementation("sdpa")
    for budget in (10_000, 60, 1):
        rows = rows_of(pairs, budget, share_prefix)
        got, metrics = step_of(Policy(model, share_prefix), rows, backend)
        assert metrics["aux_loss"] == pytest.approx(aux.item(), rel=1e-6)
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
        assert_close(got, wanted)


def test_the_mean_over_rows_would_be_another_loss(backend: Backend) -> None:
    """What a trainer computes that balances each row alone: the test above tells them apart."""
    model = precise("qwen3_moe")
    pairs = random_pairs(np.random.default_rng(0), 6)
    whole = aux_loss_of_transformers(model, pairs, True).item()
    alone = [aux_loss_of_transformers(model, [pair], True).item() for pair in pairs]
    assert sum(alone) / len(alone) > 1.05 * whole


def test_off_computes_nothing_of_it(backend: Backend) -> None:
    policy = Policy(tiny_model("mixtral"))
    rows = rows_of(random_pairs(np.random.default_rng(1), 4), 60)
    calls: list[Any] = []
    policy.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    _, metrics = step_of(policy, rows, backend, weight=0.0)
    assert "aux_loss" not in metrics
    assert len(calls) == len(rows) > 1 and not any("output_router_logits" in c for c in calls)


def test_only_rows_behind_the_first_are_counted_beforehand(backend: Backend) -> None:
    policy = Policy(tiny_model("mixtral"))
    pairs = random_pairs(np.random.default_rng(1), 4)
    calls: list[bool] = []
    policy.model.get_decoder().register_forward_hook(
        lambda *_: calls.append(torch.is_grad_enabled())
    )
    step_of(policy, rows_of(pairs, 10_000), backend)
    assert calls == [True]
    calls.clear()
    rows = rows_of(pairs, 1)
    step_of(policy, rows, backend)
    assert calls == [False] * (len(rows) - 1) + [True] * len(rows)


def test_a_placeholder_row_counts_nowhere(backend: Backend) -> None:
    policy = Policy(precise("mixtral"))
    pairs = random_pairs(np.random.default_rng(2), 4)
    rows = rows_of(pairs, 60)
    wanted, metrics = step_of(policy, rows, backend)
    for index in (0, len(rows)):
        more = [*rows[:index], placeholder_row(pairs[0]), *rows[index:]]
        got, other = step_of(policy, more, backend)
        assert other == pytest.approx(metrics, rel=1e-9)
        assert_close(got, wanted)
        evaluated, _ = evaluate(policy, more, LOSS, backend, WEIGHT)
        assert evaluated == pytest.approx(metrics, rel=1e-9)


class Together(Backend):
    """One of two processes, here threads, whose sums are over both."""

    def __init__(self, own: int, sent: list[Tensor], barrier: threading.Barrier) -> None:
        super().__init__(SingleConfig(device=Device.cpu), Precision.fp32)
        self._own, self._sent, self._barrier = own, sent, barrier

    def sum(self, values: Tensor) -> Tensor:
        self._sent[self._own] = values
        self._barrier.wait(timeout=60)
        total = self._sent[0] + self._sent[1]
        self._barrier.wait(timeout=60)
        return total


def test_two_processes(backend: Backend) -> None:
    """Their gradients sum to those of one process, also if one has only a placeholder row more."""
    model = precise("qwen2_moe")
    pairs = random_pairs(np.random.default_rng(3), 5)
    rows = [pack([pair], [index]) for index, pair in enumerate(pairs)]
    wanted, metrics = step_of(Policy(model), rows, backend)
    parts = rows[0::2], [*rows[1::2], placeholder_row(pairs[0])]
    assert len(parts[0]) == len(parts[1]) == 3
    sent, barrier = [torch.empty(0)] * 2, threading.Barrier(2)
    both = [Together(rank, sent, barrier) for rank in (0, 1)]
    policies = [Policy(copy.deepcopy(model)) for _ in both]
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(gradients_of_process, policies, parts, both)
    assert_close({name: one[0][name] + other[0][name] for name in wanted}, wanted)
    for _, sums in (one, other):
        assert summarise(LOSS, sums, WEIGHT) == pytest.approx(metrics, rel=1e-9)


@pytest.mark.parametrize("budget", [10_000, 40])
def test_held_out(budget: int, backend: Backend) -> None:
    """Over all held-out tokens, however they are packed."""
    model = precise("olmoe")
    pairs = random_pairs(np.random.default_rng(4), 6)
    expected = aux_loss_of_transformers(model, pairs, True).item()
    rows = rows_of(pairs, budget)
    plain, _ = evaluate(Policy(model), rows, LOSS, backend)
    metrics, _ = evaluate(Policy(model), rows, LOSS, backend, WEIGHT)
    assert metrics["aux_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["loss"] == pytest.approx(plain["loss"] + WEIGHT * expected, rel=1e-6)
    assert "aux_loss" not in plain


def test_gradient_checkpointing(backend: Backend) -> None:
    pairs = random_pairs(np.random.default_rng(5), 4)
    wanted, _ = step_of(Policy(tiny_model("qwen3_moe")), rows_of(pairs, 60), backend)
    model = tiny_model("qwen3_moe")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got, _ = step_of(Policy(model), rows_of(pairs, 60), backend)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)


def test_adapters_with_a_frozen_router(backend: Backend) -> None:
    """All linear layers get adapters; experts and router, which are not, stay frozen."""
    adapted = add_adapters(precise("qwen2_moe"), LoraConfig(rank=2), None).double()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and not any(".experts." in n or ".gate.weight" in n for n in trained)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    pairs = random_pairs(np.random.default_rng(6), 4)
    reference: Any = copy.deepcopy(adapted)
    base = reference.get_base_model()
    aux = aux_loss_of_transformers(base, pairs, True)
    (loss_by_hand(base, pairs, LOSS) + WEIGHT * aux).backward()
    got, metrics = step_of(Policy(adapted), rows_of(pairs, 60), backend)
    assert metrics["aux_loss"] == pytest.approx(aux.item(), rel=1e-6)
    assert_close(got, gradients(reference))


def policy_of(kind: str, **settings: Any) -> Policy:
    attention.register()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES | {"num_experts_per_tok": 2} | settings)
    return Policy(AutoModelForCausalLM.from_config(config, attn_implementation=SEGMENTS))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", EXPERTS)
def test_families_that_are_balanced(family: str, bf16: bool) -> None:
    policy = Policy(tiny_model(family))
    check_packing(policy, bf16)
    check_router(policy, bf16, WEIGHT)


@pytest.mark.parametrize(
    ("kind", "settings", "fault"),
    [
        ("llama", {}, "LlamaForCausalLM has no experts to balance"),
        (
            "glm4_moe",
            {"n_routed_experts": 4, "n_group": 1, "first_k_dense_replace": 1},
            "Glm4MoeForCausalLM gives no router logits: 'BaseModelOutputWithPast' object has no "
            "attribute 'router_logits'"
            if transformers_before("5.19")
            else "Glm4MoeForCausalLM has no auxiliary loss in transformers; models like "
            "DeepSeek-V3 balance their experts by a bias instead",
        ),
        (
            "phimoe",
            {"num_local_experts": 4},
            "PhimoeForCausalLM routes tokens by random numbers in training",
        ),
        (
            "doge",
            {"is_moe": True, "num_experts": 16},
            "DogeForCausalLM gives no router logits: dropout(): argument 'input' (position 1) must "
            "be Tensor, not tuple"
            if transformers_before("5.23")
            else "DogeForCausalLM has an auxiliary loss of another kind: 1.00, here 2.00",
        ),
    ],
)
def test_refused(kind: str, settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_router(policy_of(kind, **settings), bf16=False, weight=WEIGHT)
    remedy = "(router_aux_weight=0 trains without)"
    assert str(error.value) == f"model.router_aux_weight: {fault} {remedy}"


def test_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError) as error:
        compose_run(["model.router_aux_weight=-0.1"])
    assert str(error.value) == "model.router_aux_weight: must be 0 (off) or more, got -0.1"


def test_no_jitter(tmp_path: Path) -> None:
    """Noise on the router's input would route a token otherwise than it was counted."""
    model = tiny_model("mixtral")
    model.config.router_jitter_noise = 0.5
    model.save_pretrained(tmp_path)
    config = ModelConfig(name="moe", path=str(tmp_path), router_aux_weight=0.1)
    policy = load_policy(config, tmp_path, torch.device("cpu"), seed=0)
    check_router(policy, bf16=False, weight=WEIGHT)
    row = rows_of(random_pairs(np.random.default_rng(0), 2), 100)[0]
    policy.train()
    assert torch.equal(policy.hidden(row), policy.hidden(row))


@pytest.mark.matrix
def test_one_loss_on_every_backend(tiny_folder: Path, tmp_path: Path) -> None:
    """Whole runs of two processes: the losses of one, also with layers that are sharded."""
    folder = shutil.copytree(tiny_folder, tmp_path / "moe")
    (folder / "model.safetensors").unlink()
    tiny_model("qwen3_moe", vocab_size=384).save_pretrained(folder)
    overrides = [
        *tiny_model_and_data(folder, tmp_path, 25, 9),
        "model.router_aux_weight=0.5",
        "train.pairs_per_step=6",
        "train.max_steps=3",
        "train.learning_rate=3e-4",
        "train.precision=fp32",
        "train.log_every=1",
        "train.check_memory=false",
        "sample.num_prompts=0",
        f"cache_dir={tmp_path}/cache",
        "backend.device=cpu",
    ]
    run([*overrides, "train.tokens_per_row=2000", f"run_dir={tmp_path}/single"])
    expected = metrics_of(tmp_path / "single")
    assert [line["step"] for line in expected if "train/aux_loss" in line] == [1, 2, 3]
    assert [line["step"] for line in expected if "eval/aux_loss" in line] == [0, 3]
    for kind in ("ddp", "fsdp", "zero2", "zero3"):
        several = [f"backend={kind}", "backend.processes=2", "train.tokens_per_row=256"]
        several += ["backend.stage3_param_persistence_threshold=0"] * (kind == "zero3")
        run([*overrides, *several, f"run_dir={tmp_path}/{kind}"])
        for mine, theirs in zip(metrics_of(tmp_path / kind), expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5), kind
