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
