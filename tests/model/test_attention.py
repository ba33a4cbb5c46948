"""Compares kernels for packed rows with dense attention, and head and loss with plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.utils import _apply_to_tensors
from torch.utils._python_dispatch import TorchDispatchMode

import simpo.model.head
from simpo.config.errors import ConfigError
from simpo.data.packing import pack
from simpo.data.pairs import KeyTable, PackedPairs, TokenizedPair
from simpo.loss import PairLogps, TokenLogps
from simpo.model import attention
from simpo.model.head import fused_loss
from tests.support.tiny_models import random_pairs, ranked_pairs

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def attention_by_hand(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None
) -> Tensor:
    """[n, heads, size] of one sequence on its own, by the textbook, query by query."""
    outputs = []
    for i in range(len(query)):
        first = 0 if window is None else max(0, i + 1 - window)
        for head in range(HEADS):
            group = head // (HEADS // KEY_HEADS)
            scores = key[first : i + 1, group] @ query[i, head] / SIZE**0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            outputs.append(scores.softmax(0) @ value[first : i + 1, group])
    return torch.stack(outputs).view(len(query), HEADS, SIZE) if outputs else query


def row_by_hand(
    row: PackedPairs, q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None
) -> Tensor:
    """Each response with its prompt as a sequence of its own; the prompt's outputs from the first.

    q, k, v: [T, heads, size].
    """
    output = torch.zeros_like(q)
    for start, prompt, *ends in row.segments:
        for begin, end in pairwise((prompt, *ends)):
            own = [*range(start, prompt), *range(begin, end)]
            whole = attention_by_hand(q[own], k[own], v[own], window, softcap)
            output[begin:end] = whole[prompt - start :]
            if begin == prompt:
                output[start:prompt] = whole[: prompt - start]
    return output


def kernel_by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: KeyTable,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """What a variable-length kernel promises: causal, the last query at the last key."""
    parts = []
    queries, keys = table.query_ends.tolist(), table.key_ends.tolist()
    for i in range(len(queries) - 1):
        k, v = key[keys[i] : keys[i + 1]], value[keys[i] : keys[i + 1]]
        q = torch.zeros(len(k), HEADS, SIZE, dtype=query.dtype)
        count = queries[i + 1] - queries[i]
        assert count <= table.longest_queries and len(k) <= table.longest_keys
        q[-count:] = query[queries[i] : queries[i + 1]]
        parts.append(attention_by_hand(q, k, v, window, softcap)[-count:])
    return torch.cat(parts)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("shortest_prompt", [0, 1])
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("block_queries", [2, 2048])
@pytest.mark.parametrize("pairs_of", [random_pairs, ranked_pairs])
def test_kernels(
    window: int | None,
    softcap: float | None,
    shortest_prompt: int,
    share_prefix: bool,
    block_queries: int,
    pairs_of: Callable[..., list[TokenizedPair]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "BLOCK_QUERIES", block_queries)
    pairs = pairs_of(np.random.default_rng(1), 3, longest=6, shortest_prompt=shortest_prompt)
    row = pack(pairs, range(3), share_prefix)
    torch.manual_seed(0)
    length = row.input_ids.shape[1]
    q, k, v = (
        torch.randn(length, n, SIZE, dtype=torch.float64) for n in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    expected = row_by_hand(row, q, k, v, window, softcap)
    by_segment, _ = attention.attend(
        "sdpa",
        torch.nn.Identity(),
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        None,
        sliding_window=window,
        softcap=softcap,
        segments=row.segments,
        keys=row.keys,
    )
    torch.testing.assert_close(by_segment[0], expected)
    by_table = kernel_by_hand(
        q, k[row.keys.index], v[row.keys.index], row.keys, None, window, softcap
    )
    torch.testing.assert_close(by_table, expected)


class LargestMask(TorchDispatchMode):
    """Most numbers in a tensor of a mask's type."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.numbers = max(self.numbers, output.numel())
        return output


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("window", [None, 100])
def test_nothing_is_quadratic(
    window: int | None, share_prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the row nor, beyond a block of queries, in a pair; and a mask is made once."""
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 64)
    pair = TokenizedPair.of([5] * 300, [6] * 200, [7] * 250)
    row = pack([pair] * 4, range(4), share_prefix)
    width = row.input_ids.shape[1]
    x = torch.randn(1, 1, width, 4, requires_grad=True)
    options: dict[str, Any] = {"segments": row.segments, "keys": row.keys}
    outputs = []
    with LargestMask() as seen:
        for _ in range(2):
            output, _ = attention.attend(
                "sdpa", torch.nn.Identity(), x, x, x, None, sliding_window=window, **options
            )
            output.sum().backward()
            outputs.append(output)
    assert torch.equal(*outputs)
    assert seen.numbers <= 64 * 550
    assert len(row.keys.masks) == (1 if share_prefix or window else 0)


def test_masks_are_shared_where_inputs_are_cast() -> None:
    """FSDP in bf16 gives each layer a copy of the row with its tensors cast."""
    row = pack(random_pairs(np.random.default_rng(0), 2), range(2))
    cast = _apply_to_tensors(lambda tensor: tensor.clone(), row)
    assert cast.keys is not row.keys
    assert cast.keys.masks is row.keys.masks


def test_variable_length_kernel_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types on the way to a kernel and back; bf16, as on a GPU."""
    monkeypatch.setattr(
        attention,
        "_variable_length",
        lambda _, *inputs: kernel_by_hand(*inputs[:-1], *inputs[-1]),
    )
    row = pack(random_pairs(np.random.default_rng(2), 2, longest=6), range(2))
    torch.manual_seed(0)
    length = row.input_ids.shape[1]
    q, k, v = (torch.randn(1, n, length, SIZE) for n in (HEADS, KEY_HEADS, KEY_HEADS))
    results = [
        attention.attend(
            kernel, torch.nn.Identity(), q, k, v, None, segments=row.segments, keys=row.keys
        )[0]
        for kernel in ("varlen", "sdpa")
    ]
    assert results[0].dtype is torch.bfloat16
    assert results[0].shape == results[1].shape
    torch.testing.assert_close(results[0].float(), results[1], rtol=0.05, atol=0.03)


def test_bf16_on_a_cpu_is_computed_wide() -> None:
    row = pack(random_pairs(np.random.default_rng(3), 2, longest=6), range(2))
    torch.manual_seed(0)
    length = row.input_ids.shape[1]
    q, k, v = (torch.randn(1, n, length, SIZE).bfloat16() for n in (HEADS, KEY_HEADS, KEY_HEADS))
    options: dict[str, Any] = {"segments": row.segments, "keys": row.keys}
    narrow, _ = attention.attend("sdpa", torch.nn.Identity(), q, k, v, None, **options)
    q, k, v = q.float(), k.float(), v.float()
    wide, _ = attention.attend("sdpa", torch.nn.Identity(), q, k, v, None, **options)
    assert narrow.dtype is torch.bfloat16
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize(
    ("kernel", "device", "bf16", "softcap", "reason"),
    [
        ("sdpa", "cpu", False, True, None),
        ("varlen", "cpu", True, False, "needs a CUDA GPU"),
        ("flash", "cpu", True, False, "needs a CUDA GPU"),
        ("varlen", "cuda", False, False, "needs bf16 (train.precision=bf16)"),
        ("varlen", "cuda", True, True, "cannot cap attention scores, as this model does"),
        ("varlen", "cuda", True, False, None),
        ("flash", "cuda", True, True, 'needs flash-attn (pip install "simpo[gpu]")'),
    ],
)
def test_unusable(kernel: str, device: str, bf16: bool, softcap: bool, reason: str | None) -> None:
    assert attention.unusable(kernel, torch.device(device), bf16, softcap) == reason


def test_a_kernel_that_is_not_there(tiny_run: list[str]) -> None:
    from simpo.config.compose import compose_run
    from simpo.loop.train import train

    with pytest.raises(ConfigError, match=r"^model\.attention: varlen needs a CUDA GPU$"):
        train(compose_run([*tiny_run, "model.attention=varlen"]))


def plain_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, row: PackedPairs, softcap: float | None
) -> Tensor:
    """Full logits, log_softmax, gather; then `some_loss`."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = logits[row.predictors].log_softmax(-1)[range(len(row.targets)), row.targets]
    total = torch.zeros((), dtype=hidden.dtype)
    ends = np.cumsum([0, *row.response_tokens])
    sums = [logps[a:b].sum() for a, b in pairwise(ends)]
    for i in range(0, len(sums), 2):
        chosen, rejected = sums[i] / row.response_tokens[i], sums[i + 1]
        total = total + torch.tanh(chosen * rejected / 30) + 0.1 * chosen
    return total


def some_loss(logps: PairLogps) -> Tensor:
    """No loss of ours: any function of a pair's log-probabilities must do."""
    return torch.tanh(logps.average_chosen * logps.rejected / 30) + 0.1 * logps.average_chosen


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    chunk_tokens=st.integers(1, 40),
    with_bias=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    shortest_prompt=st.integers(0, 1),
)
def test_fused_loss(
    seed: int, chunk_tokens: int, with_bias: bool, softcap: float | None, shortest_prompt: int
) -> None:
    """Value and all gradients in float64, however the pairs are grouped and parted."""
    rng = np.random.default_rng(seed)
    row = pack(random_pairs(rng, 3, longest=9, shortest_prompt=shortest_prompt), range(3))
    generator = torch.Generator().manual_seed(seed)
    shapes = [(row.input_ids.shape[1], 5), (128, 5), *([(128,)] if with_bias else [])]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simpo.model.head, "LOGITS_BYTES", 4 * 128 * chunk_tokens)
        for fused in (False, True):
            copies = [leaf.clone().requires_grad_() for leaf in leaves]
            hidden, weight = copies[:2]
            bias = copies[2] if with_bias else None
            if fused:
                loss, logps = fused_loss(hidden, weight, bias, row, some_loss, softcap)
                assert not logps.chosen.requires_grad
            else:
                loss = plain_loss(hidden, weight, bias, row, softcap)
            (3 * loss).backward()
            results.append([loss.detach(), *(copy.grad for copy in copies)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)


def any_weights(tokens: TokenLogps) -> Tensor:
    return tokens.logps.exp() + 0.1 * (tokens.targets % 3)


WEIGHER: Any = SimpleNamespace(weighs_tokens=True, needs_squares=True, token_weights=any_weights)


def any_ranked(logps: PairLogps) -> Tensor:
    """No loss of ours: any function of the sums over a prompt's responses must do."""
    given = logps.responses
    assert given is not None and given.weighted is not None and given.weights is not None
    assert given.log_squares is not None
    numbers = given.sums, given.tokens, given.weighted, given.weights, given.log_squares
    return ranked_by_hand([column.unbind(dim=1) for column in numbers])


def ranked_by_hand(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """From a number of each response of a pair, of each of five kinds."""
    total = torch.zeros_like(columns[0][0])
    for place, (s, n, w, of, squares) in enumerate(zip(*columns, strict=True)):
        total = total + (place + 1) * torch.tanh(s * w / (n + of + 1) / 30 + squares.exp())
    return total


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 60), st.sampled_from([None, 2.0]))
def test_fused_loss_of_ranked_responses(
    seed: int, chunk_tokens: int, softcap: float | None
) -> None:
    """With weights of tokens and sums of squares, against autograd over whole logits."""
    pairs = ranked_pairs(np.random.default_rng(seed), 3, longest=9)
    row = pack(pairs, range(3))
    generator = torch.Generator().manual_seed(seed)
    shapes = (row.input_ids.shape[1], 5), (128, 5)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    hidden, weight = (leaf.clone().requires_grad_() for leaf in leaves)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simpo.model.head, "LOGITS_BYTES", 4 * 128 * chunk_tokens)
        fused, _ = fused_loss(hidden, weight, None, row, any_ranked, softcap, weigher=WEIGHER)
    fused.backward()
    alone_hidden, alone_weight = (leaf.clone().requires_grad_() for leaf in leaves)
    logits = alone_hidden @ alone_weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    total, at = torch.zeros((), dtype=torch.float64), 0
    for pair in pairs:
        sums = []
        for ids in pair.responses:
            own = slice(at, at := at + len(ids))
            every = logits[row.predictors[own]].log_softmax(-1)
            targets = torch.from_numpy(ids.astype(np.int64))
            logps = every[range(len(ids)), targets]
            weights = (logps.exp() + 0.1 * (targets % 3)).detach()
            squares = every.detach().exp().square().sum(-1).log()
            count = torch.tensor([len(ids)])
            of = logps.sum(), count, (weights * logps).sum(), weights.sum(), squares.sum()
            sums.append([number.reshape(1) for number in of])
        zero = [torch.zeros(1, dtype=torch.float64)] * 5
        sums += [zero] * (row.num_responses - len(pair.responses))
        total = total + ranked_by_hand([*zip(*sums, strict=True)]).sum()
    total.backward()
    for one, other in (
        (fused, total), (hidden.grad, alone_hidden.grad), (weight.grad, alone_weight.grad)
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_fused_loss_of_a_frozen_head_and_without_gradients() -> None:
    row = pack(random_pairs(np.random.default_rng(4), 2), range(2))
    hidden = torch.randn(row.input_ids.shape[1], 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(128, 5, dtype=torch.float64)
    loss, _ = fused_loss(hidden, weight, None, row, some_loss)
    loss.backward()
    expected = torch.autograd.grad(plain_loss(hidden, weight, None, row, None), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)
    assert weight.grad is None
    with torch.no_grad():
        same, _ = fused_loss(hidden, weight, None, row, some_loss)
    assert same.item() == loss.item() and not same.requires_grad


def test_fused_loss_under_autocast_sums_in_float32() -> None:
    """bf16 products, float32 softmax and sums: near float64, far nearer than bf16 sums would be."""
    row = pack(random_pairs(np.random.default_rng(5), 4, longest=40), range(4))
    torch.manual_seed(0)
    hidden = torch.randn(row.input_ids.shape[1], 16, requires_grad=True)
    weight = torch.randn(128, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logps = fused_loss(hidden, weight, None, row, some_loss)
    loss.backward()
    assert logps.chosen.dtype is torch.float32
    assert hidden.grad is not None and hidden.grad.dtype is torch.float32
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    expected = plain_loss(rounded[0], rounded[1], None, row, None)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    for got, wanted in zip((hidden.grad, weight.grad), (x.grad for x in rounded), strict=True):
        assert (got - wanted).norm() / wanted.norm() < 2e-2
