"""Hidden states in, the log-probability of each response out, without a [T, V] tensor.

Only positions that predict a response token meet the vocabulary. More of them than a chunk are
taken chunk by chunk, whose logits are dropped and computed again in the backward pass: memory is
CHUNK_TOKENS x V, whatever the length.
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
) -> PairLogps:
    """Sum the token log-probabilities of each response of a row.

    Args:
        hidden: [T, D], the last hidden states, normalised as `head` wants them.
        head: [n, D] to logits [n, V]. Called as a module, so that adapters on it take part.
        row: says which position predicts which token.
        softcap: logits z become softcap * tanh(z / softcap) (Gemma-2).

    Returns:
        Sums in float32 over all tokens of each response; softmax in float32.
    """
    scored = hidden[row.predictors]
    if len(scored) <= CHUNK_TOKENS:
        token_logps = _token_logps(head, scored, row.targets, softcap)
    else:
        parts = zip(scored.split(CHUNK_TOKENS), row.targets.split(CHUNK_TOKENS), strict=True)
        token_logps = torch.cat(
            [
                checkpoint(
                    _token_logps, head, part, targets, softcap,
                    use_reentrant=False, preserve_rng_state=False,
                )
                for part, targets in parts
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
