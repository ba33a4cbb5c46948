"""A fresh policy in, the certainty that it takes packed rows out; else its name and the remedy.

An attention kernel, a mask or a recurrent layer that does not know of packed rows mixes their
sequences without a word. So two short pairs are computed packed, by the run's own kernel, and each
sequence alone, by transformers' eager attention: the hidden states must agree. And the logits must
be what `simpo.logps` takes them for: some architectures scale them after their head.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from simpo.data.packing import pack
from simpo.errors import ConfigError, first_line
from simpo.model import Policy, cannot_share
from simpo.pairs import TokenizedPair

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Norm of the difference of hidden states over theirs: rounding stays below, mixing above."""


@torch.no_grad()
def check_packing(policy: Policy, half: bool) -> None:
    """Compare packed rows with sequences on their own.

    Args:
        half: compute in bf16, as the run will.

    Raises:
        ConfigError: the model cannot share prompts, cannot be packed at all, or makes its logits in
            a way of its own.
    """
    rng = np.random.default_rng(0)
    size = policy.base.config.get_text_config().vocab_size

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, size, length).astype(np.int32)

    pairs = [TokenizedPair(ids(5), ids(4), ids(3)), TokenizedPair(ids(4), ids(3), ids(6))]
    device = next(policy.parameters()).device
    row = pack(pairs, range(len(pairs)), policy.share_prefix).to(device)
    training = policy.training
    policy.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        expected = torch.cat([_alone(policy, pair) for pair in pairs])
        try:
            got = policy.hidden(row)[row.predictors]
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise _refusal(policy, first_line(error)) from error
        own, theirs = _logits(policy, row.input_ids[:, :9])
    policy.train(training)
    # 8-bit layers round activations, by a scale that the other tokens of a row have a part in.
    rounded = (
        half or got.dtype is torch.bfloat16 or getattr(policy.base, "is_loaded_in_8bit", False)
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


def _alone(policy: Policy, pair: TokenizedPair) -> Tensor:
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
