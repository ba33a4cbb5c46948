"""Computes log-probabilities of pairs under the reference model, for losses that need them.

The reference is the policy before its first step, so one pass then suffices and no second model is
loaded. Results are cached under a hash of the weights, the tokens, which of them are scored, how
the loss weighs them, and the dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from simpo.backend import Backend
from simpo.config.own_code import source_sha256
from simpo.data.flat_tokens import Tokens
from simpo.data.pairs import PackedPairs, padded
from simpo.data.store import TokenizedSet
from simpo.loop.score import counted, score_pairs
from simpo.loss import LossConfig, PairLogps
from simpo.model.head import no_loss
from simpo.run.cache import find_entry, keep_entry
from simpo.run.progress import bar


def weights_fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of a model's whole weights, given by name and sorted by it: 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in weights:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def with_reference(
    policy: nn.Module,
    data: TokenizedSet,
    rows: Iterable[PackedPairs],
    origin: str,
    cache_dir: Path,
    backend: Backend,
    loss: LossConfig,
) -> TokenizedSet:
    """Give every pair its `reference_logps`.

    A damaged cache entry is made anew; if the cache cannot be written, nothing is cached. The
    `notes` of the result say so.

    Args:
        policy: as `Backend.prepare` wrapped it, before its first step.
        rows: this process's share of the rows with all pairs of `data`; not read if the cache has
            the result.
        origin: `weights_fingerprint` of the policy.
        cache_dir: folder of the cache.
        loss: the loss, whose weights of tokens count here too.
    """
    if not len(data):
        return data
    settings = f"{origin} {data.fingerprint} {backend.bf16} {backend.device.type}"
    settings += _weighing(loss, data.tokens)
    name = hashlib.sha256(settings.encode()).hexdigest()[:32]
    folder = cache_dir / "reference" / name
    found, notes = find_entry(folder) if backend.is_main else (False, [])
    scores = backend.broadcast(np.load(folder / "scores.npy") if found else None)
    if scores is None:
        with bar("reference log-probs of pairs", len(data)) as shown:
            scores = _score(policy, counted(rows, shown, backend.processes), backend, loss)
        if backend.is_main:
            notes += keep_entry(folder, partial(_write, scores=scores))
    tokens = replace(data.tokens, reference_logps=scores)
    return replace(data, tokens=tokens, notes=(*data.notes, *notes))


def _weighing(loss: LossConfig, tokens: Tokens) -> str:
    """What decides which tokens count, and how much; empty if all of the responses do."""
    found = ""
    if tokens.scored is not None:
        found += f" {hashlib.sha256(np.ascontiguousarray(tokens.scored).data).hexdigest()}"
    if loss.weighs_tokens:
        found += f" {loss.weighing()}"
        found += f" {source_sha256(loss.module)}" if loss.module else ""
    return found


def _score(
    policy: nn.Module, rows: Iterable[PackedPairs], backend: Backend, loss: LossConfig
) -> np.ndarray:
    """Summed log-probabilities of the responses of the pairs of all processes, [pairs, K]; weighted
    as the loss weighs tokens."""
    sums = score_pairs(policy, rows, no_loss, _sums, backend, weigher=loss).values()
    most = max(map(len, sums))
    return np.array([padded(line, most, 0.0) for line in sums], dtype=np.float32)


def _sums(logps: PairLogps) -> Tensor:
    responses = logps.responses
    assert responses is not None
    return responses.sums if responses.weighted is None else responses.weighted


def _write(folder: Path, scores: np.ndarray) -> None:
    np.save(folder / "scores.npy", scores)
