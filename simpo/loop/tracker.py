"""Writes metrics to metrics.jsonl and, if configured, Weights & Biases."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from simpo.config.choices import WandbMode
from simpo.config.errors import ConfigError, DamagedError, first_line
from simpo.config.trackers import TrackerConfig, WandbConfig
from simpo.run.files import NEW_RUN, read_metrics
from simpo.run.progress import say

LOGIN_S = 20.0
"""Time that Weights & Biases may take to answer when a run begins."""


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
        """Open metrics.jsonl and, if configured, the remote run.

        Args:
            settings: stored with the remote run.
            writes: False on ranks other than 0, where methods do nothing.
        """
        self._writes = writes
        self._path = run_dir / "metrics.jsonl"
        self._file = (self._path if writes else Path(os.devnull)).open("ab")
        self._wandb = _remote_run(config, run_dir, name, settings) if writes else None

    def cut_back(self, num_bytes: int) -> None:
        """Truncate metrics.jsonl to its length when a checkpoint was saved.

        Raises:
            DamagedError: it is shorter already.
        """
        if self._writes:
            if (found := self.num_bytes()) < num_bytes:
                raise DamagedError(
                    self._path, f"holds {found} bytes, not the {num_bytes} saved", NEW_RUN
                )
            self._file.truncate(num_bytes)

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
        if self._wandb is not None:
            self._update_wandb(lambda remote: remote.log(named, step=step))
        return line

    def _update_wandb(self, update: Callable[[Any], None]) -> None:
        """Update the remote run; if that fails, print one line and go on."""
        try:
            update(self._wandb)
        except Exception as error:  # of any type: a tracker must not end training
            self._wandb = None
            say(
                f"note   wandb failed, nothing more is sent: {first_line(error)} "
                "(metrics.jsonl has everything)"
            )

    def history(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl so far, with those of earlier processes."""
        return read_metrics(self._path) if self._writes else []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the remote run, and close metrics.jsonl."""
        if self._wandb is not None:
            self._update_wandb(lambda remote: remote.finish(exit_code=int(kind is not None)))
        self._file.close()


def check_login(config: TrackerConfig) -> None:
    """Check the login of Weights & Biases before training.

    Raises:
        ConfigError: it is to track online, but there is no key, or it refuses the key.
    """
    if not isinstance(config, WandbConfig) or config.mode is not WandbMode.online:
        return
    import wandb

    try:
        wandb.setup(wandb.Settings(silent=True))
        found, reason = wandb.login(prompt=False), "no login"
    except Exception as error:  # also pydantic's, about WANDB_... variables
        found, reason = False, first_line(error)
    if not found:
        raise ConfigError(
            [f"tracker: wandb: {reason} (wandb login, or WANDB_API_KEY, or tracker.mode=offline)"]
        )


def _remote_run(
    config: TrackerConfig, run_dir: Path, name: str, settings: dict[str, Any]
) -> Any | None:
    """Start the run on Weights & Biases; offline in the run's folder if it cannot be reached."""
    if not isinstance(config, WandbConfig):
        return None
    import wandb

    def begin(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            mode=mode,
            tags=config.tags,
            name=f"{name} {run_dir.name}",
            # A restart keeps the id and so the curve; names are not unique in a sweep.
            id=hashlib.sha256(str(run_dir).encode()).hexdigest()[:16],
            resume="allow",
            dir=run_dir,
            config=settings,
            settings=wandb.Settings(init_timeout=LOGIN_S),
        )

    try:
        return begin("online" if config.mode is WandbMode.online else "offline")
    except Exception as error:  # no network, a project that this key may not write to, ...
        say(
            f"note   wandb: {first_line(error)}; tracked offline (wandb sync "
            f"{run_dir}/wandb/offline-* uploads it later)"
        )
    try:
        return begin("offline")
    except Exception as error:
        say(f"note   wandb: {first_line(error)}; not tracked there")
        return None
