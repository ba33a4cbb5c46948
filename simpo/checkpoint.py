"""Everything a run needs to go on, written so that a crash at any moment leaves a whole one.

A checkpoint is written aside, flushed to the disk, and only then given its name: a folder
`step-000040` is complete or does not exist.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from simpo.model import Policy


class CheckpointStore:
    """The checkpoints of one run, newest `keep` of them."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(".step-*"):
            shutil.rmtree(part)

    def latest(self, until_step: int | None = None) -> Path | None:
        """The newest complete checkpoint, or the newest of at most `until_step` updates."""
        paths = self._all()
        if until_step is not None:
            paths = [p for p in paths if int(p.name.removeprefix("step-")) <= until_step]
        return max(paths, default=None)

    def save(self, step: int, policy: Policy, optimizer: Optimizer, metrics_bytes: int) -> Path:
        """Write the state after `step` updates, then drop the oldest beyond `keep`.

        Args:
            metrics_bytes: length of metrics.jsonl, to which a continued run cuts it back.
        """
        name = f"step-{step:06d}"
        final, part = self.folder / name, self.folder / f".{name}"
        if final.exists():
            return final
        part.mkdir()
        state = {
            "step": step,
            "metrics_bytes": metrics_bytes,
            "policy": {n: p.detach() for n, p in policy.named_parameters() if p.requires_grad},
            "optimizer": optimizer.state_dict(),
            "rng": _rng_state(),
        }
        with (part / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(part)
        os.rename(part, final)
        _sync_folder(self.folder)
        for old in sorted(self._all())[: -self.keep]:
            shutil.rmtree(old)
        return final

    def load(self, path: Path, policy: Policy, optimizer: Optimizer) -> tuple[int, int]:
        """Put a checkpoint's state in place.

        Returns:
            The number of updates done, and the length of metrics.jsonl then.
        """
        state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state["policy"].pop(name))
        optimizer.load_state_dict(state["optimizer"])
        _set_rng_state(state["rng"])
        return int(state["step"]), int(state["metrics_bytes"])

    def _all(self) -> list[Path]:
        return [p for p in self.folder.iterdir() if re.fullmatch(r"step-\d{6,}", p.name)]


def _rng_state() -> dict[str, Any]:
    version, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (
            version,
            torch.from_numpy(np.asarray(keys, np.int64)),
            position,
            has_gauss,
            cached,
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    version, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
