"""Compares a step, split into rows in any way, with a padded float64 step with full logits."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import simpo.model.head
from simpo.backend import Backend
from simpo.config.backends import SingleConfig
from simpo.config.choices import Device, Precision
from simpo.data.packing import pack
from simpo.data.pairs import PackedPairs, TokenizedPair
from simpo.data.plan import rows_of_pairs
from simpo.loop.score import COLUMNS, summarise
from simpo.loop.step import NonFiniteError, update
from simpo.loss.simpo import HingeConfig, SigmoidConfig, SimpoConfig
from simpo.model import attention
from simpo.model.policy import Policy
from tests.support.tiny_models import (
    FAMILIES,
    SEGMENTS,
    VOCAB,
    gradients,
    loss_by_hand,
    padded_logps,
    random_pairs,
    tiny_model,
)

LOSSES = [
    SigmoidConfig(beta=2.0, gamma_beta_ratio=0.5),
    SigmoidConfig(beta=2.5, gamma_beta_ratio=0.3, label_smoothing=0.1, sft_weight=0.7),
    HingeConfig(beta=2.0, gamma_beta_ratio=0.8),
    HingeConfig(beta=10.0, gamma_beta_ratio=0.3, sft_weight=0.2),
]


@pytest.fixture
def backend() -> Backend:
    return Backend(SingleConfig(device=Device.cpu), Precision.fp32)


def rows_of(pairs: list[TokenizedPair], tokens_per_row: int) -> list[PackedPairs]:
    lengths = np.array([p.num_tokens() for p in pairs])
    rows = rows_of_pairs(range(len(pairs)), lengths, tokens_per_row)
    return [pack([pairs[i] for i in row], row) for row in rows]


class Recorder(SGD):
    """Keeps the gradients of a step in float64, and the weights as they are."""

    def step(self) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        self.gradients = [None if p.grad is None else p.grad.double() for p in parameters]


def gradients_of_step(
    policy: Policy, rows: list[PackedPairs], loss: SimpoConfig, backend: Backend
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What one update would follow, by name of the weight, and its metrics."""
    recorder = Recorder(policy.parameters(), lr=1.0)
    sums, grad_norm = update(policy, recorder, rows, loss, backend)
    metrics = summarise(loss, sums) | {"grad_norm": grad_norm}
    names = [name for name, _ in policy.named_parameters()]
    found = zip(names, recorder.gradients, strict=True)
    return {name: gradient for name, gradient in found if gradient is not None}, metrics


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shortest_prompt", [0, 1])
def test_logps_of_a_packed_row(family: str, shortest_prompt: int) -> None:
    model = tiny_model(family)
    pairs = random_pairs(np.random.default_rng(1), 6, longest=20, shortest_prompt=shortest_prompt)
    with torch.no_grad():
        _, logps = Policy(model)(pack(pairs, range(6)), lambda logps: logps.chosen)
        expected, lengths = padded_logps(copy.deepcopy(model).double(), pairs)
    got = torch.cat([logps.chosen, logps.rejected])
    assert torch.cat([logps.chosen_tokens, logps.rejected_tokens]).tolist() == lengths.tolist()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
def test_loss_and_gradients(family: str, loss: SimpoConfig, backend: Backend) -> None:
    """fp32 against the padded float64 path: loss and relative gradient difference below 1e-5."""
    model = tiny_model(family)
    pairs = random_pairs(np.random.default_rng(2), 5)
    reference = copy.deepcopy(model).double()
    expected = loss_by_hand(reference, pairs, loss)
    expected.backward()
    moved, metrics = gradients_of_step(Policy(model), rows_of(pairs, 60), loss, backend)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    wanted = gradients(reference)
    for name, gradient in wanted.items():
        scale = gradient.abs().max()
        assert (moved[f"model.{name}"] - gradient).abs().max() < 2e-5 * max(scale, 1e-2), name
    norm = torch.cat([g.flatten() for g in wanted.values()]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("seed", range(200))
def test_random_batches(seed: int, backend: Backend) -> None:
    """Lengths from 1, prompts from 0, also two identical responses: loss and gradient to 1e-5.

    Where the pairs' gradients cancel, fp32 itself is worse; then the padded path in fp32 measures.
    """
    rng = np.random.default_rng(seed)
    pairs = random_pairs(rng, int(rng.integers(1, 7)), longest=16, shortest_prompt=seed % 2)
    same = random_pairs(rng, 1, shortest_prompt=1)[0]
    pairs.append(TokenizedPair.of(same.prompt_ids, same.chosen_ids, same.chosen_ids))
    loss = LOSSES[seed % len(LOSSES)]
    model = tiny_model(list(FAMILIES)[seed % len(FAMILIES)], seed)
    reference, narrow = copy.deepcopy(model).double(), copy.deepcopy(model)
    rows = rows_of(pairs, int(rng.integers(20, 120)))
    moved, metrics = gradients_of_step(Policy(model), rows, loss, backend)
    expected = loss_by_hand(reference, pairs, loss)
    expected.backward()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    loss_by_hand(narrow, pairs, loss).backward()
    wanted = gradients(reference)
    ours = {name: moved[f"model.{name}"] for name in wanted}
    norm = distance(wanted, {name: torch.zeros_like(g) for name, g in wanted.items()})
    assert distance(ours, wanted) <= max(1e-5 * norm, 2 * distance(gradients(narrow), wanted))


def distance(some: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((some[name] - g).square().sum()) for name, g in other.items()) ** 0.5


@pytest.mark.parametrize("kernel", ["eager", SEGMENTS])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_for_each_response_gives_the_same(
    family: str, kernel: str, backend: Backend
) -> None:
    """train.share_prefix=false: transformers' own attention on packed sequences, and ours."""
    shared = tiny_model(family, dtype=torch.float64)
    pairs = random_pairs(np.random.default_rng(8), 4, longest=20)
    expected, metrics = gradients_of_step(Policy(shared), rows_of(pairs, 90), LOSSES[0], backend)
    shared.set_attn_implementation(kernel)
    rows = [pack(pairs[:3], range(3), False), pack(pairs[3:], [3], False)]
    moved, other = gradients_of_step(Policy(shared, False), rows, LOSSES[0], backend)
    assert other == pytest.approx(metrics, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(moved[name], gradient, rtol=1e-4, atol=1e-6)


def test_adapters_on_the_head(backend: Backend) -> None:
    """LoRA on lm_head against the padded path, which calls the adapted head as a module."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["lm_head"]))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    pairs = random_pairs(np.random.default_rng(9), 4)
    reference = copy.deepcopy(adapted).double()
    expected = loss_by_hand(cast(PreTrainedModel, reference.get_base_model()), pairs, LOSSES[1])
    expected.backward()
    moved, metrics = gradients_of_step(Policy(adapted), rows_of(pairs, 60), LOSSES[1], backend)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    trained = {n: p.grad for n, p in reference.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    for name, gradient in trained.items():
        assert (moved[f"model.{name}"] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("loss", LOSSES[1:3], ids=str)
def test_any_factoring_gives_the_same_update(loss: SimpoConfig, backend: Backend) -> None:
    """7 pairs in one row, in seven rows, and by budgets in between."""
    policy = Policy(tiny_model("llama"))
    pairs = random_pairs(np.random.default_rng(3), 7)
    whole, metrics = gradients_of_step(policy, rows_of(pairs, 10_000), loss, backend)
    for budget in (1, 30, 45, 70):
        rows = rows_of(pairs, budget)
        assert len(rows) > 1
        moved, other = gradients_of_step(policy, rows, loss, backend)
        assert other == pytest.approx(metrics, rel=1e-5)
        for name, gradient in whole.items():
            torch.testing.assert_close(moved[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2"])
def test_gradient_checkpointing_changes_nothing(
    family: str, reentrant: bool, backend: Backend
) -> None:
    """Both modes recompute with the same attention: the reentrant one would be silently wrong."""
    pairs = random_pairs(np.random.default_rng(4), 4, longest=20)
    plain = Policy(tiny_model(family))
    expected, _ = gradients_of_step(plain, rows_of(pairs, 80), LOSSES[0], backend)
    model = tiny_model(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    rows = rows_of(pairs, 80)
    moved, _ = gradients_of_step(Policy(model), rows, LOSSES[0], backend)
    assert len(calls) == 2 * len(rows), "the layer was not computed again"
    for name, gradient in expected.items():
        torch.testing.assert_close(moved[name], gradient, rtol=1e-5, atol=1e-7)


def test_nothing_is_updated_when_the_loss_is_not_finite(backend: Backend) -> None:
    policy = Policy(tiny_model("llama"))
    pairs = random_pairs(np.random.default_rng(5), 4)
    rows = rows_of(pairs, 1)
    with torch.no_grad():
        policy.model.model.embed_tokens.weight[int(pairs[2].chosen_ids[0])] = float("nan")
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(NonFiniteError, match="the loss is not finite") as error:
        update(policy, SGD(policy.parameters(), lr=1.0), rows, LOSSES[0], backend)
    assert 2 in error.value.pairs and len(error.value.pairs) < 4
    for name, weight in policy.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, equal_nan=True)


def test_clipping_scales_the_whole_gradient(backend: Backend) -> None:
    policy = Policy(tiny_model("llama"))
    rows = rows_of(random_pairs(np.random.default_rng(6), 3), 100)
    whole, metrics = gradients_of_step(policy, rows, LOSSES[0], backend)
    before = copy.deepcopy(policy.state_dict())
    clip = metrics["grad_norm"] / 4
    clipping = Backend(SingleConfig(device=Device.cpu), Precision.fp32, max_grad_norm=clip)
    update(policy, SGD(policy.parameters(), lr=1.0), rows, LOSSES[0], clipping)
    for name, weight in policy.named_parameters():
        moved = (before[name] - weight.detach()).double()
        torch.testing.assert_close(moved, whole[name] / 4, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 20])
def test_parts_change_nothing(
    chunk_tokens: int, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    """All pairs at once, against groups of them and parts of one whose logits are made twice."""
    policy = Policy(tiny_model("gemma2"))
    rows = rows_of(random_pairs(np.random.default_rng(7), 4), 100)
    whole, metrics = gradients_of_step(policy, rows, LOSSES[1], backend)
    monkeypatch.setattr(simpo.model.head, "LOGITS_BYTES", 4 * VOCAB * chunk_tokens)
    moved, other = gradients_of_step(policy, rows, LOSSES[1], backend)
    assert other == pytest.approx(metrics, rel=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(moved[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("vocabulary", "pairs"), [(128_256, 20), (262_144, 20)])
def test_no_logits_twice_on_a_large_gpu(
    vocabulary: int, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 GB hold those of a pair of 2 x 2,048 tokens; short pairs are still grouped by 256 MiB."""
    gpu = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    head = simpo.model.head
    assert head.largest_logits_bytes(torch.device("cpu")) == head.LOGITS_BYTES == 256 * 2**20
    largest = head.largest_logits_bytes(torch.device("cuda")) // (4 * vocabulary)
    chunk = head.LOGITS_BYTES // (4 * vocabulary)
    lengths = (2048, 2048, *[50] * 2 * pairs)
    groups = list(head._groups(lengths, 2, chunk, largest))
    assert [len(parts) for _, parts in groups] == [1] * len(groups)
    assert groups[0][0] == (2048, 2048)
    assert all(chunk - 100 < sum(group) <= chunk for group, _ in groups[1:-1])
    assert sum((group for group, _ in groups), ()) == lengths


@pytest.mark.parametrize("largest_tokens", [5, 1000])
def test_a_larger_pair_changes_nothing(
    largest_tokens: int, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    """As on a GPU: groups of few tokens, and pairs beyond them at once or in larger parts."""
    policy = Policy(tiny_model("gemma2"))
    rows = rows_of(random_pairs(np.random.default_rng(7), 4), 100)
    whole, metrics = gradients_of_step(policy, rows, LOSSES[1], backend)
    monkeypatch.setattr(simpo.model.head, "LOGITS_BYTES", 4 * VOCAB * 3)
    size = 4 * VOCAB * largest_tokens
    monkeypatch.setattr(simpo.model.head, "largest_logits_bytes", lambda _: size)
    moved, other = gradients_of_step(policy, rows, LOSSES[1], backend)
    assert other == pytest.approx(metrics, rel=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(moved[name], gradient, rtol=1e-4, atol=1e-6)


class LargestLogits(TorchDispatchMode):
    """Most rows that any [rows, vocabulary] tensor had, the weight's own transpose left out."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if not isinstance(tensor, torch.Tensor) or tensor.shape[-1:] != (VOCAB,):
                continue
            if tensor.untyped_storage().nbytes() != 4 * VOCAB * 32:
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return output


def test_logits_never_outgrow_their_memory(
    monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    """However long the row; the plain way, for comparison, has as many rows as tokens."""
    monkeypatch.setattr(simpo.model.head, "LOGITS_BYTES", 4 * VOCAB * 10)
    policy = Policy(tiny_model("llama"))
    rows = rows_of(random_pairs(np.random.default_rng(10), 8, longest=60), 10_000)
    with LargestLogits() as ours:
        gradients_of_step(policy, rows, LOSSES[1], backend)
    assert ours.rows == 10
    with LargestLogits() as plain:
        policy.model(input_ids=rows[0].input_ids)
    assert plain.rows == rows[0].input_ids.shape[1] > 200


def without_numbers(row: PackedPairs, fake: FakeTensorMode) -> PackedPairs:
    def hollow(part: Any) -> Any:
        tensors = {n: x for n, x in vars(part).items() if torch.is_tensor(x)}
        return replace(part, **{n: fake.from_tensor(x) for n, x in tensors.items()})

    return hollow(replace(row, keys=hollow(row.keys)))


class WaitedError(Exception):
    """Numbers of the device were asked for."""


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize(
    ("family", "kernel"),
    [
        *((family, "sdpa") for family in ("llama", "mistral_window", "gemma2", "gemma3")),
        *((family, "varlen") for family in ("llama", "mistral_window", "gemma3")),
    ],
)
def test_a_step_waits_once(
    family: str, kernel: str, share_prefix: bool, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without numbers, where every look at one raises: for the sums of all rows.

    Tensors without numbers need no GPU for its kernel.
    """
    pairs = random_pairs(np.random.default_rng(11), 4)
    rows = [pack(pairs[:2], [0, 1], share_prefix), pack(pairs[2:], [2, 3], share_prefix)]
    sums: list[torch.Tensor] = []

    def no_numbers(values: torch.Tensor) -> Any:
        sums.append(values)
        if len(sums) == 1:  # the counts, which were the host's all along
            return SimpleNamespace(tolist=lambda: [4, 30, 90])
        raise WaitedError

    monkeypatch.setattr(backend, "sum", no_numbers)
    # transformers leaves out its look at the positions where tensors have no numbers.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", None)
    with FakeTensorMode() as fake:
        dtype = torch.bfloat16 if kernel == "varlen" else torch.float32
        policy = Policy(tiny_model(family, dtype=dtype), share_prefix)
        policy.base.set_attn_implementation(attention.NAMES[kernel])
        hollow = [without_numbers(row, fake) for row in rows]
        with pytest.raises(DataDependentOutputException):
            hollow[0].targets[0].item()
        with pytest.raises(WaitedError):
            update(policy, SGD(policy.parameters(), lr=1.0), hollow, LOSSES[1], backend)
    # Pairs that are not finite, the norm, the columns, and how many numbers each has.
    assert sums[1].shape == (1 + 1 + 2 * len(COLUMNS),)
    assert all(isinstance(p.grad, FakeTensor) for p in policy.parameters())
