"""Writes metrics to metrics.jsonl, and sends them to a tracker if one is configured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from simpo.config.errors import DamagedError, Pruned
from simpo.config.flat import holds_secret
from simpo.config.trackers import TrackerConfig
from simpo.loop.sinks import Sender, TrackedRun, build_sender
from simpo.run.files import NEW_RUN, read_metrics


class Tracker:
    """Writes the metrics of a run.

    metrics.jsonl has a line for each logged step and each evaluation: `step` is the number of
    updates done, keys start with `train/` or `eval/`.
    """

    def __init__(
        self,
        config: TrackerConfig,
        run_dir: Path,
        name: str,
        settings: dict[str, Any],
        writes: bool = True,
    ) -> None:
        """Open metrics.jsonl.

        Args:
            settings: stored with the run in its tracker, without those that look like a secret.
            writes: False on ranks other than 0, where methods do nothing.
        """
        self._writes, self._config = writes, config
        shown = {key: value for key, value in settings.items() if not holds_secret(value)}
        self._tracked = TrackedRun(folder=run_dir, name=name, settings=shown)
        self._path = run_dir / "metrics.jsonl"
        self._file = (self._path if writes else Path(os.devnull)).open("ab")
        self._sender: Sender | None = None

    def begin(self, num_bytes: int) -> None:
        """Cut metrics.jsonl back to its length when a checkpoint was saved, and begin to send.

        Raises:
            DamagedError: it is shorter already.
        """
        if not self._writes:
            return
        if (found := self.num_bytes()) < num_bytes:
            raise DamagedError(
                self._path, f"holds {found} bytes, not the {num_bytes} saved", NEW_RUN
            )
        self._file.truncate(num_bytes)
        self._sender = build_sender(self._config, self._tracked)
        if self._sender is not None:
            for line in self.history():
                self._sender.log(int(line.pop("step")), line)

    def num_bytes(self) -> int:
        """Length of metrics.jsonl, after flushing it to the disk."""
        self._file.flush()
        if self._writes:
            os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def log(self, step: int, prefix: str, metrics: dict[str, float]) -> dict[str, float]:
        """Write metrics with keys `prefix`/..., and return the line written."""
        named = {f"{prefix}/{key}": value for key, value in metrics.items()}
        line = {"step": step, **named}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        if self._sender is not None:
            self._sender.log(step, named)
        return line

    def history(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl so far, with those of earlier processes."""
        return read_metrics(self._path) if self._writes else []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the run in its tracker, and close metrics.jsonl."""
        if self._sender is not None:
            self._sender.finish(failed=kind is not None and not issubclass(kind, Pruned))
        self._file.close()
