"""Writes and reads checkpoints; a crash at any moment leaves the last one whole.

All processes write a checkpoint to a temporary folder and flush it to the disk. Rank 0 adds the
manifest and then renames the folder, so `step-000040` is complete or does not exist.

    step-000040/
        seal.json      the manifest: step, length of metrics.jsonl, size and sha256 of every file
        state/         trained weights and optimizer, in the backend's own format
        random-0.pt    random states of rank 0, and so on
"""

from __future__ import annotations

import os
import random
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from simpo.backend import Backend, not_written
from simpo.config.errors import ConfigError, DamagedError, RunError, first_line, unwritable
from simpo.run.cache import file_fault, files_in, flush_and_hash
from simpo.run.files import (
    Manifest,
    check_metrics,
    checkpoint_step,
    checkpoints_in,
    metrics_sha256,
    read_manifest,
)

Hashes = list[tuple[str, tuple[int, str]]]
"""Name, size in bytes and sha256 of files."""


class CheckpointStore:
    """The checkpoints of one run, of which the newest `keep` and the best are kept.

    All processes call every method at the same time.

    Attributes:
        best: the step whose checkpoint is never deleted.
    """

    def __init__(self, folder: Path, keep: int, backend: Backend, background: bool = False) -> None:
        """Delete what an interrupted save left.

        Args:
            background: `save` returns once the state is copied; files are written and hashed in
                threads, and a later `finish_pending` completes the checkpoint.

        Raises:
            RunError: the folder cannot be written.
        """
        self.folder = folder
        self.best: int | None = None
        self._keep = keep
        self._backend = backend
        self._background = background
        self._hashing = ThreadPoolExecutor(1, "hashes of a checkpoint")
        self._pending: tuple[Future[Hashes], int, int] | None = None
        if backend.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for part in folder.glob(".step-*"):
                    shutil.rmtree(part)
            except OSError as error:
                raise unwritable(error.filename or folder, error) from error
        backend.wait()

    def newest(self, until_step: int) -> Path | None:
        """The newest checkpoint with at most `until_step` updates."""
        found = [p for p in checkpoints_in(self.folder) if checkpoint_step(p) <= until_step]
        return found[-1] if found else None

    def resume(self, wrapped: nn.Module, optimizer: Optimizer) -> tuple[int, int, list[str]]:
        """Load the newest checkpoint that is whole; damaged ones are renamed to `damaged-*`.

        Returns:
            The updates done before it and the length of metrics.jsonl then, 0 without a
            checkpoint; and a line for each damaged one.

        Raises:
            ConfigError: it was written by a backend whose checkpoints this one cannot read.
            DamagedError: metrics.jsonl does not begin as it was when the checkpoint was saved.
        """
        messages: list[str] = []
        for path in reversed(checkpoints_in(self.folder)):
            found = self._check(path)
            if isinstance(found, Manifest):
                self._check_metrics(found)
                self._load(path, found, wrapped, optimizer)
                return found.step, found.metrics_bytes, messages
            messages.append(f"{path} is damaged and left out: {found}")
            self._quarantine(path)
        return 0, 0, messages

    def load(self, step: int, wrapped: nn.Module, optimizer: Optimizer) -> str | None:
        """Load the checkpoint after `step` updates; if it is damaged, return what is wrong."""
        path = self._path(step)
        found = self._check(path)
        if isinstance(found, str):
            return found
        self._load(path, found, wrapped, optimizer)
        return None

    def save(self, step: int, wrapped: nn.Module, optimizer: Optimizer, metrics_bytes: int) -> None:
        """Write the state after `step` updates, then delete the oldest beyond those kept.

        Raises:
            RunError: it could not be written; earlier ones stay.
        """
        self.finish_pending(wait=True)
        if self._path(step).exists():
            return
        part = self._part(step)
        try:
            if self._backend.is_main:
                (part / "state").mkdir(parents=True)
            self._backend.wait()
            with (part / f"random-{self._backend.rank}.pt").open("wb") as file:
                torch.save(_random_states(), file)
            future = self._backend.save_state(part / "state", wrapped, optimizer, self._background)
            if future is None:
                self._backend.wait()
                self._commit(step, metrics_bytes, self._hash(part))
            else:
                hashes = self._hashing.submit(self._hash, part, future)
                self._pending = hashes, step, metrics_bytes
        except (OSError, CheckpointException) as error:
            raise self._failure(step, error) from error

    def finish_pending(self, wait: bool) -> None:
        """Complete a checkpoint that is written in the background, if its files are hashed.

        Args:
            wait: wait until they are.

        Raises:
            RunError: it could not be written.
        """
        if self._pending is None:
            return
        hashes, step, metrics_bytes = self._pending
        if not wait and self._backend.any(not hashes.done()):
            return
        self._pending = None
        try:
            self._commit(step, metrics_bytes, hashes.result())
        except (OSError, CheckpointException) as error:
            raise self._failure(step, error) from error

    def _hash(self, part: Path, written: Future[Any] | None = None) -> Hashes:
        """Flush and hash this process's share of a checkpoint's files.

        Args:
            written: is done when the files of all processes are complete; None if they are.
        """
        if written is not None:
            written.result()
        return [(name, flush_and_hash(part / name)) for name in self._my_share(files_in(part))]

    def _commit(self, step: int, metrics_bytes: int, hashes: Hashes) -> None:
        part, backend = self._part(step), self._backend
        files = dict(backend.gather(hashes))
        if backend.is_main:
            manifest = Manifest(
                step,
                metrics_bytes,
                metrics_sha256(self.folder.parent, metrics_bytes),
                backend.checkpoint_format,
                backend.processes,
                files,
            )
            with (part / "seal.json").open("w") as file:
                file.write(manifest.text())
                file.flush()
                os.fsync(file.fileno())
            for folder in (part, *(path for path in part.rglob("*") if path.is_dir())):
                _sync_folder(folder)
            os.rename(part, self._path(step))
            _sync_folder(self.folder)
            for old in checkpoints_in(self.folder)[: -self._keep]:
                if checkpoint_step(old) != self.best:
                    shutil.rmtree(old)
        backend.wait()

    def _check(self, path: Path) -> Manifest | str:
        """The manifest of a checkpoint, or what is wrong with it; each process checks a share of
        the files."""
        try:
            manifest = read_manifest(path)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            return f"seal.json cannot be read ({type(error).__name__})"
        if manifest.step != checkpoint_step(path):
            return f"seal.json is of step {manifest.step}"
        mine = self._my_share(sorted(manifest.files))
        found = [file_fault(path, name, *manifest.files[name]) for name in mine]
        faults = self._backend.gather([fault for fault in found if fault is not None])
        return faults[0] if faults else manifest

    def _check_metrics(self, manifest: Manifest) -> None:
        """Raise, in all processes, the fault that rank 0 finds in metrics.jsonl."""
        found: DamagedError | None = None
        if self._backend.is_main:
            try:
                check_metrics(self.folder.parent, manifest)
            except DamagedError as error:
                found = error
        found = self._backend.broadcast(found)
        if found is not None:
            raise found

    def _load(
        self, path: Path, manifest: Manifest, wrapped: nn.Module, optimizer: Optimizer
    ) -> None:
        if manifest.format != self._backend.checkpoint_format:
            raise ConfigError(
                [
                    f"backend: {path} is a {manifest.format} checkpoint, this backend reads "
                    f"{self._backend.checkpoint_format} (continue with the backend it was begun "
                    "with, or start anew with run_dir=NEW)"
                ]
            )
        self._backend.load_state(path / "state", wrapped, optimizer, manifest.processes)
        states = path / f"random-{self._backend.rank}.pt"
        if states.is_file():
            _set_random_states(torch.load(states, weights_only=True))

    def _failure(self, step: int, error: BaseException) -> RunError:
        if self._backend.is_main:
            shutil.rmtree(self._part(step), ignore_errors=True)
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        reason = first_line(error)
        if not_written(error):
            reason = "a file could not be written whole, the disk may be full"
        earlier = checkpoints_in(self.folder)
        stays = f"{earlier[-1].name} stays" if earlier else "there is none before it"
        return RunError(
            f"step {step}: the checkpoint could not be written: {reason} ({stays}; make room, and "
            "the same command continues)"
        )

    def _quarantine(self, path: Path) -> None:
        if self._backend.is_main:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
        self._backend.wait()

    def _my_share(self, names: list[str]) -> list[str]:
        return names[self._backend.rank :: self._backend.processes]

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _part(self, step: int) -> Path:
        return self.folder / f".step-{step:06d}"


def _random_states() -> dict[str, Any]:
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
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_states(state: dict[str, Any]) -> None:
    version, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
