"""Log-probabilities of pairs under the model that a run starts from, for objectives with a
reference. One pass before the first step gives them; the policy is that model then, so no second
one is ever loaded. They are kept by content: of the weights, of the tokens and of the arithmetic.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from simpo.backend import Backend
from simpo.data.chat import TokenizedSet
from simpo.pairs import PackedPairs


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of all weights of a model that is whole on this process: 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def with_reference(
    policy: nn.Module,
    data: TokenizedSet,
    rows: Iterable[PackedPairs],
    origin: str,
    cache_dir: Path,
    backend: Backend,
) -> TokenizedSet:
    """Give every pair its `reference_logps`.

    Args:
        policy: as `Backend.prepare` wrapped it, before its first step.
        rows: this process's share of rows that hold all pairs of `data`; not looked at where the
            cache has the result.
        origin: `weights_fingerprint` of the policy.
        cache_dir: scores are kept below it.
    """
    if not data.pairs:
        return data
    settings = f"{origin} {data.fingerprint()} {backend.half} {backend.device.type}"
    name = hashlib.sha256(settings.encode()).hexdigest()[:32]
    file = cache_dir / "reference" / f"{name}.npy"
    scores = backend.broadcast(_read(file, len(data.pairs)) if backend.is_main else None)
    if scores is None:
        scores = _score(policy, rows, backend)
        if backend.is_main:
            _write(file, scores)
    tokens = [
        replace(pair, reference_logps=(float(chosen), float(rejected)))
        for pair, (chosen, rejected) in zip(data.tokens, scores, strict=True)
    ]
    return replace(data, tokens=tokens)


@torch.no_grad()
def _score(policy: nn.Module, rows: Iterable[PackedPairs], backend: Backend) -> np.ndarray:
    """Summed log-probabilities of both responses of each pair of all processes, [pairs, 2]."""
    policy.eval()
    scored: list[tuple[int, list[float]]] = []
    for row in rows:
        logps = policy(row.to(backend.device), lambda logps: 0.0 * logps.chosen)[1]
        sums = torch.stack([logps.chosen, logps.rejected], dim=1).tolist()
        scored += zip(row.pairs, sums[: len(row.pairs)], strict=True)
    return np.array([sums for _, sums in sorted(backend.gather(scored))], dtype=np.float32)


def _read(file: Path, num_pairs: int) -> np.ndarray | None:
    try:
        scores: np.ndarray = np.load(file)
    except (OSError, ValueError, EOFError):  # not there, or cut short
        return None
    return scores if scores.shape == (num_pairs, 2) else None


def _write(file: Path, scores: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npy", delete=False) as part:
        np.save(part, scores)
    os.replace(part.name, file)
