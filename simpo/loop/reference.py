"""Computes log-probabilities of pairs under the reference model, for losses that need them.

The reference is the policy before its first step, so one pass then suffices and no second model is
loaded. Results are cached under a hash of all they depend on: weights and settings of the model,
code, dtype, tokens, which of them are scored, and how the loss weighs them. Only the layout of the
rows and the number of processes, which change no more than rounding, are not in it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from simpo.model.policy import Policy
from simpo.run.cache import find_entry, keep_entry, sha256
from simpo.run.progress import bar
from simpo.run.provenance import package_versions

CODE = ("data", "loss", "model")
"""Folders of simpo whose code decides the log-probs of tokens."""
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "flash-attn")
NOT_HASHED = ("_name_or_path", "base_model_name_or_path")
"""Settings that name the folder of a model: a copy elsewhere is the same model."""


def model_fingerprint(policy: Policy, weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of a model with the code that computes it, 16 hex digits.

    Weights alone do not decide what a model computes: its settings hold the base of its rotary
    embeddings, those of an adapter its scale.

    Args:
        weights: its whole weights, by name and sorted by it.
    """
    digest = hashlib.blake2b(json.dumps(_computation(policy)).encode(), digest_size=8)
    for name, value in weights:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _computation(policy: Policy) -> list[Any]:
    """What besides weights and tokens decides log-probs: settings, code and versions."""
    simpo = Path(__file__).parent.parent
    files = [file for folder in CODE for file in sorted((simpo / folder).glob("*.py"))]
    # Of model.trust_remote_code.
    remote = [name for name in sorted(sys.modules) if name.startswith("transformers_modules.")]
    adapters = getattr(policy.model, "peft_config", {})
    return [
        package_versions(LIBRARIES),
        [*map(sha256, files), *map(source_sha256, remote)],
        policy.base.config._attn_implementation,
        *(_settings_text(config) for config in (policy.base.config, *adapters.values())),
    ]


def _settings_text(config: Any) -> str:
    """The settings of a model or an adapter as JSON."""
    settings = {key: value for key, value in config.to_dict().items() if key not in NOT_HASHED}
    return json.dumps(
        settings,
        sort_keys=True,
        default=lambda value: sorted(value) if isinstance(value, set) else str(value),
    )


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
        origin: `model_fingerprint` of the policy; only that of rank 0 counts.
        cache_dir: folder of the cache.
        loss: the loss, whose weights of tokens count here too.
    """
    if not len(data):
        return data
    computed = f"{type(backend).__name__} {backend.bf16} {backend.device.type}"
    settings = f"{origin} {data.fingerprint} {computed}"
    settings += _weighing(loss, data.tokens)
    name = hashlib.sha256(settings.encode()).hexdigest()[:32]
    folder = cache_dir / "reference" / name
    found, notes = find_entry(folder) if backend.is_main else (False, [])
    scores = backend.broadcast(np.load(folder / "scores.npy") if found else None)
    if scores is None:
        with bar("reference log-probs of pairs", len(data)) as shown:
            scores = _score(policy, counted(rows, shown, backend.processes), backend, loss)
        if backend.is_main:
            notes += keep_entry(folder, lambda part: np.save(part / "scores.npy", scores))
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
