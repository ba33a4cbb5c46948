"""A fresh policy in, the certainty that it takes packed rows out; else its name and the remedy.

An attention kernel, a mask or a recurrent layer that does not know of packed rows mixes their
sequences without a word. So two short pairs are computed packed, by the run's own kernel, and each
sequence alone, by transformers' eager attention: the hidden states must agree. Windows that the
run's sequences outgrow are made small for it, so that these short ones outgrow them too. And the
logits must be what `simpo.model.head` computes: some architectures scale them after their head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from simpo.config.errors import ConfigError, first_line
from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.model.load import cannot_share
from simpo.model.policy import Policy

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Norm of the difference of hidden states over theirs: rounding stays below, mixing above."""

WINDOWS = ("sliding_window", "attention_chunk_size")
"""Settings that hide from a token what lies further back."""
SMALL_WINDOW = 4


def check_packing(
    policy: Policy, bf16: bool, tokens: Iterable[TokenizedPair] = (), row_tokens: int = 0
) -> None:
    """Compare packed rows with sequences on their own.

    Args:
        bf16: compute in bf16, as the run will.
        tokens: the pairs of the run, trained on and held out.
        row_tokens: how long a row may be.

    Raises:
        ConfigError: the model cannot share prompts, cannot be packed at all, makes its logits in a
            way of its own, or encodes positions by the longest sequence of a row.
    """
    longest = max((_longest(pair) for pair in tokens), default=0)
    _check_rope(policy, longest)
    with _small_windows(policy, longest if policy.share_prefix else max(longest, row_tokens)):
        _compare(policy, bf16)


def _longest(pair: TokenizedPair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def _check_rope(policy: Policy, longest: int) -> None:
    """Refuse frequencies that transformers takes anew for a whole row by its longest sequence."""
    config: Any = policy.base.config.get_text_config()
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Some models have a set of them for each kind of layer.
    sets = [s for s in found.values() if isinstance(s, dict)] or [found]
    for rope in sets:
        kind = str(rope.get("rope_type", rope.get("type")))
        if kind == "longrope":
            limit = rope.get("original_max_position_embeddings")
            limit = limit or getattr(config, "original_max_position_embeddings", None)
        elif "dynamic" not in kind:
            continue
        else:
            limit = config.max_position_embeddings
        if limit and longest > limit:
            raise ConfigError(
                [
                    f"model.path: {type(policy.base).__name__} encodes the positions of a whole "
                    f"row in another way ({kind}) where one of its sequences is longer than "
                    f"{limit} tokens, so that pairs would depend on their neighbours; the longest "
                    f"here has {longest} (data.max_length_tokens={limit}, and max_prompt_tokens "
                    "below it)"
                ]
            )


@contextmanager
def _small_windows(policy: Policy, reached: int) -> Iterator[None]:
    """Windows below so many tokens become small, in the settings and in the layers."""
    holders: list[Any] = [policy.base.config.get_text_config(), *policy.base.modules()]
    kept = [
        (holder, name, size)
        for name in WINDOWS
        for holder in holders
        if isinstance(size := getattr(holder, name, None), int) and SMALL_WINDOW < size < reached
    ]
    for holder, name, _ in kept:
        setattr(holder, name, SMALL_WINDOW)
    try:
        yield
    finally:
        for holder, name, size in kept:
            setattr(holder, name, size)


@torch.no_grad()
def _compare(policy: Policy, bf16: bool) -> None:
    """The hidden states of packed rows against those of sequences alone, and the logits."""
    rng = np.random.default_rng(0)
    size = policy.base.config.get_text_config().vocab_size

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, size, length).astype(np.int32)

    pairs = [TokenizedPair(ids(5), ids(4), ids(3)), TokenizedPair(ids(4), ids(3), ids(6))]
    device = next(policy.parameters()).device
    row = pack(pairs, range(len(pairs)), policy.share_prefix).to(device)
    training = policy.training
    policy.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        try:
            expected = torch.cat([_separate_hidden(policy, pair) for pair in pairs])
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            name = type(policy.base).__name__
            fault = f"its hidden states cannot be had, which is not supported: {first_line(error)}"
            raise ConfigError([f"model.path: {name}: {fault}"]) from error
        if not torch.isfinite(expected).all() or not expected.any():
            name = type(policy.base).__name__
            fault = f"gives hidden states that are {'NaN or infinite' if expected.any() else '0'}"
            remedy = "mend its weights, or train.precision=fp32"
            raise ConfigError([f"model.path: {name} {fault} ({remedy})"])
        try:
            got = policy.hidden(row)[row.predictors]
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise _refusal(policy, first_line(error)) from error
        own, theirs = _logits(policy, row.input_ids[:, :9])
    policy.train(training)
    # 8-bit layers round activations, by a scale that the other tokens of a row have a part in.
    rounded = (
        bf16 or got.dtype is torch.bfloat16 or getattr(policy.base, "is_loaded_in_8bit", False)
    )
    dtype = torch.bfloat16 if rounded else torch.float32
    if not (gap := _difference(got, expected)) < TOLERANCE[dtype]:
        raise _refusal(policy, f"hidden states differ by {gap:.2g} of their norm")
    if not (gap := _difference(own, theirs)) < TOLERANCE[dtype]:
        name = type(policy.base).__name__
        raise ConfigError(
            [
                f"model.path: {name} does something to its logits after its head, which is not "
                f"supported: they differ by {gap:.2g} of their norm"
            ]
        )


def _separate_hidden(policy: Policy, pair: TokenizedPair) -> Tensor:
    """Hidden states that predict the responses of a pair, each sequence in a forward of its own."""
    own = policy.base.config._attn_implementation
    policy.base.set_attn_implementation("eager")
    parts = []
    for response in (pair.chosen_ids, pair.rejected_ids):
        ids = np.concatenate([pair.prompt_ids, response]).astype(np.int64)
        tokens = torch.from_numpy(ids)[None].to(next(policy.parameters()).device)
        hidden = policy.base.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0]
        parts.append(hidden[len(pair.prompt_ids) - 1 : -1])
    policy.base.set_attn_implementation(own)
    return torch.cat(parts)


def _logits(policy: Policy, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a sequence as the loss takes them, and as the model's own forward gives them."""
    hidden = policy.base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    weight, bias, softcap = policy.head()
    own = linear(hidden, weight, bias)
    own = own if softcap is None else softcap * torch.tanh(own / softcap)
    return own, policy.base(input_ids=ids, use_cache=False).logits


def _difference(some: Tensor, other: Tensor) -> float:
    return float((some.float() - other.float()).norm() / other.float().norm())


def _refusal(policy: Policy, reason: str) -> ConfigError:
    name = type(policy.base).__name__
    if policy.share_prefix:
        return cannot_share(name, reason)
    return ConfigError([f"model.path: {name} mixes the sequences of a packed row: {reason}"])
