"""Checks, before training, that a model gives the same hidden states for packed rows as for
separate sequences, and that the auxiliary loss of its router is the one that is trained.

An attention kernel, a mask or a recurrent layer that does not support packed rows mixes their
sequences silently. So two short pairs are computed packed, with the run's kernel, and each sequence
alone, with transformers' eager attention; the hidden states must agree. Attention windows that are
shorter than the run's sequences are reduced for the check, so that they apply to its short
sequences too. The logits must also be those of `simpo.model.head`, since some architectures scale
them after their head.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from simpo.model.router import aux_loss, experts_per_token, routing
from simpo.run.progress import say

TOLERANCE, BF16_TOLERANCE = 1e-3, 0.05
"""Largest relative difference (of norms) of hidden states or logits that is taken for rounding."""

NOT_COMPUTED = (TypeError, ValueError, AttributeError, RuntimeError)
"""What a model raises that cannot compute what it is asked for."""

WINDOWS = ("sliding_window", "attention_chunk_size")
"""Names of settings that limit how far back a token attends."""
SMALL_WINDOW = 4


def check_packing(policy: Policy, bf16: bool, longest_tokens: int = 0, row_tokens: int = 0) -> None:
    """Compare a packed row with its sequences computed separately.

    If they differ and no prompt is shared, attention is left to transformers and they are compared
    again.

    Args:
        bf16: whether the run computes in bf16.
        longest_tokens: of the longest prompt with one response, of all pairs of the run.
        row_tokens: token budget of a row.

    Raises:
        ConfigError: the model does not support shared prompts or packing, changes its logits after
            the head, or chooses rotary frequencies by the longest sequence of a row.
    """
    say("checking that packed rows give the same as separate sequences ...")
    _check_rope(policy, longest_tokens)
    reached = longest_tokens if policy.share_prefix else max(longest_tokens, row_tokens)
    with _small_windows(policy, reached):
        try:
            _compare(policy, bf16)
        except ConfigError:
            if policy.share_prefix:
                raise
            policy.leave_attention_to_transformers()
            _compare(policy, bf16)


def _check_rope(policy: Policy, longest: int) -> None:
    """Refuse rotary frequencies that transformers chooses for a row by its longest sequence."""
    config: Any = policy.base.config.get_text_config()
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Some models have a set of frequencies for each kind of layer.
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
                    f"model.path: {type(policy.base).__name__} changes the rotary frequencies of a "
                    f"whole row ({kind}) if one of its sequences is longer than {limit} tokens, so "
                    f"pairs would affect each other; the longest here has {longest} "
                    f"(data.max_length_tokens={limit}, and max_prompt_tokens below it)"
                ]
            )


@contextmanager
def _small_windows(policy: Policy, reached: int) -> Iterator[None]:
    """Context in which attention windows shorter than `reached` tokens are `SMALL_WINDOW`."""
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
    """Compare hidden states of a packed row with those of its sequences alone, and the logits."""
    rng = np.random.default_rng(0)
    size = policy.base.config.get_text_config().vocab_size

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, size, length).astype(np.int32)

    pairs = [TokenizedPair.of(ids(5), ids(4), ids(3)), TokenizedPair.of(ids(4), ids(3), ids(6))]
    name, device = type(policy.base).__name__, next(policy.parameters()).device
    row = pack(pairs, range(len(pairs)), policy.share_prefix).to(device)
    training = policy.training
    policy.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        try:
            expected = torch.cat([_separate_hidden(policy, pair) for pair in pairs])
        except NOT_COMPUTED as error:
            fault = f"its hidden states cannot be computed: {first_line(error)}"
            raise ConfigError([f"model.path: {name}: {fault}"]) from error
        if not torch.isfinite(expected).all() or not expected.any():
            fault = f"gives hidden states that are {'NaN or infinite' if expected.any() else '0'}"
            remedy = "mend its weights, or train.precision=fp32"
            raise ConfigError([f"model.path: {name} {fault} ({remedy})"])
        try:
            got = policy.hidden(row)[row.predictors]
        except NOT_COMPUTED as error:
            raise _refusal(policy, first_line(error)) from error
        own, theirs = _logits(policy, row.input_ids[:, :9])
    policy.train(training)
    # 8-bit layers round activations by a scale that depends on the other tokens of the row.
    rounded = (
        bf16 or got.dtype is torch.bfloat16 or getattr(policy.base, "is_loaded_in_8bit", False)
    )
    tolerance = BF16_TOLERANCE if rounded else TOLERANCE
    if not (gap := _difference(got, expected)) < tolerance:
        raise _refusal(policy, f"hidden states differ by {gap:.2g} of their norm")
    if not (gap := _difference(own, theirs)) < tolerance:
        raise ConfigError(
            [
                f"model.path: {name} changes its logits after the output layer, which is not "
                f"supported: they differ by {gap:.2g} of their norm"
            ]
        )


@torch.no_grad()
def check_router(policy: Policy, bf16: bool, weight: float) -> None:
    """Compare the auxiliary loss of `simpo.model.router` with the model's own in transformers.

    Args:
        bf16: whether the run computes in bf16.
        weight: of the auxiliary loss; with 0 nothing is checked.

    Raises:
        ConfigError: the model has no experts, no auxiliary loss or another one, or it draws random
            numbers in training, so that tokens would be routed otherwise than they were counted.
    """
    if not weight:
        return
    place = f"model.router_aux_weight: {type(policy.base).__name__}"
    remedy = "(router_aux_weight=0 trains without)"
    config: Any = policy.base.config.get_text_config()
    chosen, experts = experts_per_token(config)
    if experts == 1:
        raise ConfigError([f"{place} has no experts to balance {remedy}"])
    device = next(policy.parameters()).device
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, (1, 64)))
    options: Any = {"input_ids": ids.to(device), "use_cache": False, "output_router_logits": True}
    training = policy.training
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            policy.eval()
            theirs = getattr(policy.base(**options), "aux_loss", None)
            policy.train()
            before = _random_state(device)
            logits = policy.base.get_decoder()(**options).router_logits
            random = not torch.equal(before, _random_state(device))
            own = float(aux_loss(*routing(logits, chosen)))
    except NOT_COMPUTED as error:
        fault = f"gives no router logits: {first_line(error)}"
        raise ConfigError([f"{place} {fault} {remedy}"]) from error
    finally:
        policy.train(training)
    rounded = bf16 or logits[0].dtype is torch.bfloat16
    tolerance = BF16_TOLERANCE if rounded else TOLERANCE
    if not isinstance(theirs, Tensor):
        fault = (
            "has no auxiliary loss in transformers; models like DeepSeek-V3 balance their experts "
            "by a bias instead"
        )
    elif random:
        fault = "routes tokens by random numbers in training"
    elif not abs(own - float(theirs)) < tolerance * float(theirs):
        fault = f"has an auxiliary loss of another kind: {float(theirs):.2f}, here {own:.2f}"
    else:
        return
    raise ConfigError([f"{place} {fault} {remedy}"])


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _separate_hidden(policy: Policy, pair: TokenizedPair) -> Tensor:
    """Hidden states that predict the responses of a pair, one forward per sequence, [N, D]."""
    own = policy.base.config._attn_implementation
    policy.base.set_attn_implementation("eager")
    parts = []
    for response in pair.responses:
        ids = np.concatenate([pair.prompt_ids, response]).astype(np.int64)
        tokens = torch.from_numpy(ids)[None].to(next(policy.parameters()).device)
        hidden = policy.base.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0]
        parts.append(hidden[len(pair.prompt_ids) - 1 : -1])
    policy.base.set_attn_implementation(own)
    return torch.cat(parts)


def _logits(policy: Policy, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a sequence as the loss computes them, and from the model's own forward."""
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
