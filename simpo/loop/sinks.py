"""Trackers to which the lines of metrics.jsonl are sent: wandb, trackio, TensorBoard, MLflow."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal, Protocol
from urllib.error import HTTPError
from urllib.request import urlopen

from simpo.config.choices import WandbMode
from simpo.config.errors import ConfigError, first_line
from simpo.config.trackers import (
    MlflowConfig,
    TensorBoardConfig,
    TrackerConfig,
    TrackioConfig,
    WandbConfig,
)
from simpo.run.progress import say

SERVER_S = 20.0
"""Time that a server may take to answer when a run begins, and to take the rest when it ends."""
FINISH_S = 60.0
"""Time for which the end of a run waits for its tracker."""
MOST_PARAMS = 100
"""Settings that MLflow takes at once."""
SQLITE = "sqlite:///"

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What trackers are told of a run."""

    folder: Path
    name: str
    settings: dict[str, Any]

    @property
    def title(self) -> str:
        """Its name in a tracker."""
        return f"{self.name} {self.folder.name}"

    @property
    def id(self) -> str:
        """The same over restarts, and another for each run; titles are not unique in a sweep."""
        return hashlib.sha256(str(self.folder).encode()).hexdigest()[:16]


class Sink(Protocol):
    """A tracker. Its methods may raise anything, and may take minutes.

    A continued run sends all lines of metrics.jsonl again, from the first. A sink leaves none out
    and has none twice.
    """

    def begin(self) -> None:
        """Begin the run there, or find it again."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of a line."""

    def finish(self, failed: bool) -> None:
        """Write what is left, and end the run there."""


class Sender:
    """Sends lines to a sink in a thread of its own, so that no step waits for a tracker.

    When the sink fails, it prints one line and sends nothing more.
    """

    def __init__(self, name: str, sink: Sink) -> None:
        self._name, self._sink, self._failed = name, sink, False
        self._lines: SimpleQueue[tuple[int, Metrics] | None] = SimpleQueue()
        self._thread = Thread(target=self._send, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Send the metrics of a line, later."""
        if self._thread.is_alive():
            self._lines.put((step, metrics))

    def finish(self, failed: bool) -> None:
        """Wait until all is sent, but not longer than FINISH_S."""
        self._failed = failed
        self._lines.put(None)
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            say(_given_up(self._name, f"it did not take everything within {FINISH_S:g} s"))

    def _send(self) -> None:
        try:
            self._sink.begin()
            while (line := self._lines.get()) is not None:
                self._sink.log(*line)
            self._sink.finish(self._failed)
        except Exception as error:  # of any type: a tracker must not end training
            say(_given_up(self._name, first_line(error)))


def build_sender(config: TrackerConfig, tracked: TrackedRun) -> Sender | None:
    """Begin to send to the chosen tracker; None without one, or if its library does not load."""
    try:
        # Here and not in the thread, which would import while this one does too.
        sink = _sink(config, tracked)
    except Exception as error:
        say(_given_up(config.name, first_line(error)))
        return None
    return None if sink is None else Sender(config.name, sink)


def _sink(config: TrackerConfig, tracked: TrackedRun) -> Sink | None:
    match config:
        case WandbConfig():
            return Wandb(config, tracked)
        case TrackioConfig():
            return Trackio(config, tracked)
        case TensorBoardConfig():
            return TensorBoard(tracked)
        case MlflowConfig():
            return Mlflow(config, tracked)
    return None


def _given_up(name: str, reason: str) -> str:
    return f"note   {name} failed, nothing more is sent: {reason} (metrics.jsonl has everything)"


class Wandb:
    """Weights & Biases; offline in the run's folder if it cannot be reached.

    Online it takes no step twice, so it keeps what it was sent first. Each process of a run that is
    tracked offline writes the whole curve.
    """

    def __init__(self, config: WandbConfig, tracked: TrackedRun) -> None:
        import wandb

        self._wandb, self._config, self._tracked = wandb, config, tracked
        self._run: Any = None

    def begin(self) -> None:
        if self._config.mode is WandbMode.offline:
            self._run = self._init("offline")
            return
        try:
            self._run = self._init("online")
        except Exception as error:  # no network, a project that this key may not write to, ...
            self._run = self._init("offline")
            say(
                f"note   wandb: {first_line(error)}; tracked offline (wandb sync "
                f"{self._tracked.folder}/wandb/offline-* uploads it later)"
            )

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        return self._wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            mode=mode,
            tags=self._config.tags,
            name=self._tracked.title,
            id=self._tracked.id,
            resume="allow",
            dir=self._tracked.folder,
            config=self._tracked.settings,
            settings=self._wandb.Settings(init_timeout=SERVER_S, finish_timeout=SERVER_S),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        if step >= self._run.step:
            self._run.log(metrics, step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


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


class Trackio:
    """Trackio, in its database on this machine. A continued run replaces its own curve."""

    def __init__(self, config: TrackioConfig, tracked: TrackedRun) -> None:
        import trackio

        self._trackio, self._project, self._tracked = trackio, config.project, tracked
        self._run: Any = None

    def begin(self) -> None:
        settings = {"simpo_run": self._tracked.id, **self._tracked.settings}
        for run in self._runs():
            if (run.config or {}).get("simpo_run") == self._tracked.id:
                run.delete()
        self._run = self._trackio.init(
            project=self._project,
            name=self._tracked.title,
            config=settings,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def _runs(self) -> list[Any]:
        try:
            return list(self._trackio.Api().runs(self._project))
        except ValueError:  # no such project yet
            return []

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish()


class TensorBoard:
    """TensorBoard's events in the run's folder, in single precision.

    A continued run writes a file with the whole curve, which replaces that of earlier files.
    """

    def __init__(self, tracked: TrackedRun) -> None:
        from torch.utils import tensorboard

        self._library, self._tracked = tensorboard, tracked
        self._writer: Any = None

    def begin(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        folder = self._tracked.folder / "tensorboard"
        # purge_step makes TensorBoard drop the events of earlier files. One that is open would not
        # go on if the files were removed.
        self._writer = self._library.SummaryWriter(folder, purge_step=0)
        values = {key: _plain(value) for key, value in self._tracked.settings.items()}
        _, settings, _ = hparams(values, {})
        self._writer.file_writer.add_summary(settings)

    def log(self, step: int, metrics: Metrics) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self, failed: bool) -> None:
        self._writer.close()


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)


class Mlflow:
    """MLflow. It deletes no values, so a continued run sends only the steps that it lacks."""

    def __init__(self, config: MlflowConfig, tracked: TrackedRun) -> None:
        # A run that is tracked in a file should talk to nobody.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._mlflow, self._config, self._tracked = mlflow, config, tracked
        self._client: Any = None
        self._run_id = ""
        self._last_steps: dict[str, int] = {}

    def begin(self) -> None:
        with _reachable(self._config.tracking_uri) as uri:
            self._client = self._mlflow.MlflowClient(uri)
        experiment_id = self._experiment_id()
        found = self._client.search_runs(
            [experiment_id], f"tags.simpo_run = '{self._tracked.id}'", max_results=1
        )
        if found:
            self._continue(found[0])
        else:
            self._create(experiment_id)

    def _experiment_id(self) -> str:
        name = self._config.experiment
        try:
            return self._client.create_experiment(name)
        except self._mlflow.MlflowException:  # it exists, perhaps made by a run beside this one
            if (found := self._client.get_experiment_by_name(name)) is None:
                raise
            return found.experiment_id

    def _create(self, experiment_id: str) -> None:
        tags = {**self._config.tags, "simpo_run": self._tracked.id}
        run = self._client.create_run(experiment_id, run_name=self._tracked.title, tags=tags)
        self._run_id = run.info.run_id
        params = [
            self._mlflow.entities.Param(key.replace("[", ".").replace("]", ""), str(_plain(value)))
            for key, value in self._tracked.settings.items()
        ]
        for begin in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._run_id, params=params[begin : begin + MOST_PARAMS])

    def _continue(self, run: Any) -> None:
        self._run_id = run.info.run_id
        self._client.update_run(self._run_id, status="RUNNING")
        for key in run.data.metrics:
            history = self._client.get_metric_history(self._run_id, key)
            self._last_steps[key] = max(metric.step for metric in history)

    def log(self, step: int, metrics: Metrics) -> None:
        now_ms = int(time.time() * 1000)
        lacking = [
            self._mlflow.entities.Metric(key, value, now_ms, step)
            for key, value in metrics.items()
            if step > self._last_steps.get(key, -1)
        ]
        if lacking:
            self._client.log_batch(self._run_id, metrics=lacking)

    def finish(self, failed: bool) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


@contextmanager
def _reachable(uri: str) -> Iterator[str]:
    """The same address, once a server answers there or the folder of a SQLite file exists.

    MLflow itself would ask a server that is not there for minutes, and two runs that begin together
    would both make the tables of a new file.
    """
    if uri.startswith("http"):
        with suppress(HTTPError):  # it answers; MLflow says better what it has against us
            urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_S).close()
        yield uri
    elif uri.startswith(SQLITE):
        file = Path(uri.removeprefix(SQLITE)).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_name(f"{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield f"{SQLITE}{file}"
    else:
        yield uri
