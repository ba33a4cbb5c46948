"""Hidden states in, the log-probability of each response out, without a [T, V] tensor.

Only positions that predict a response token meet the vocabulary, in chunks whose logits are
dropped and computed again in the backward pass. Memory is chunk_tokens x V, whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simpo.pairs import PackedPairs, PairLogps

CHUNK_TOKENS = 512


def response_logps(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    row: PackedPairs,
    softcap: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> PairLogps:
    """Sum the token log-probabilities of each response of a row.

    Args:
        hidden: [T, D], the last hidden states, normalised as `head` wants them.
        head: [n, D] to logits [n, V]. Called as a module, so that adapters on it take part.
        row: says which position predicts which token.
        softcap: logits z become softcap * tanh(z / softcap) (Gemma-2).
        chunk_tokens: response tokens whose logits exist at once.

    Returns:
        Sums in float32 over all tokens of each response; softmax in float32.
    """
    scored = hidden[row.predictors]
    token_logps = torch.cat(
        [
            checkpoint(
                _token_logps, head, part, targets, softcap,
                use_reentrant=False, preserve_rng_state=False,
            )
            for part, targets in zip(
                scored.split(chunk_tokens), row.targets.split(chunk_tokens), strict=True
            )
        ]
    )  # fmt: skip
    sums = torch.stack([part.sum() for part in token_logps.split(row.response_tokens)])
    lengths = torch.tensor(row.response_tokens, device=sums.device)
    return PairLogps(sums[0::2], sums[1::2], lengths[0::2], lengths[1::2])


def _token_logps(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, softcap: float | None
) -> Tensor:
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
