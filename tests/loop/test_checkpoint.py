"""A checkpoint in the background is written and hashed while training goes on."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from simpo.backend import build_backend
from simpo.config.backends import SingleConfig
from simpo.config.choices import Device, Precision
from simpo.loop import checkpoint
from simpo.loop.checkpoint import CheckpointStore
from simpo.run.cache import flush_and_hash
from simpo.run.files import read_manifest


def test_hashes_are_made_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for them but the seal, which has the hash of every file."""
    may_hash, threads = threading.Event(), set()

    def hash_when_told(path: Path) -> tuple[int, str]:
        threads.add(threading.current_thread())
        assert may_hash.wait(60)
        return flush_and_hash(path)

    monkeypatch.setattr(checkpoint, "flush_and_hash", hash_when_told)
    backend = build_backend(SingleConfig(device=Device.cpu), Precision.fp32)
    module = nn.Linear(4, 3)
    optimizer = AdamW(module.parameters())
    (tmp_path / "metrics.jsonl").write_text("")
    store = CheckpointStore(tmp_path / "checkpoints", 1, backend, background=True)
    saved = module.weight.detach().clone()
    store.save(7, module, optimizer, 0)
    with torch.no_grad():
        module.weight.zero_()
    store.finish_pending(wait=False)
    assert store.newest(7) is None
    may_hash.set()
    store.finish_pending(wait=True)
    assert threads and threading.main_thread() not in threads
    folder = store.newest(7)
    assert folder == tmp_path / "checkpoints/step-000007"
    files = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "seal.json"
    }
    sealed = {name: tuple(entry) for name, entry in read_manifest(folder).files.items()}
    assert sealed == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()
    }
    assert len(files) == 3 and store.load(7, module, optimizer) is None
    assert torch.equal(module.weight, saved)


def test_steps_beyond_six_digits_are_in_order(tmp_path: Path) -> None:
    """By their names, step-1000000 would be the oldest: deleted first, and not continued from."""
    backend = build_backend(SingleConfig(device=Device.cpu), Precision.fp32)
    module = nn.Linear(4, 3)
    optimizer = AdamW(module.parameters())
    (tmp_path / "metrics.jsonl").write_text("")
    store = CheckpointStore(tmp_path / "checkpoints", 2, backend)
    store.best = 999_997
    for step in (999_997, 999_998, 999_999, 1_000_000):
        with torch.no_grad():
            module.weight.fill_(step - 999_990)
        store.save(step, module, optimizer, 0)
    kept = {path.name for path in store.folder.iterdir()}
    assert kept == {"step-999997", "step-999999", "step-1000000"}
    for until, newest in ((2_000_000, "step-1000000"), (999_999, "step-999999")):
        assert store.newest(until) == store.folder / newest
    assert store.newest(999_996) is None
    with torch.no_grad():
        module.weight.zero_()
    assert store.resume(module, optimizer) == (1_000_000, 0, [])
    assert module.weight.unique().item() == 10
