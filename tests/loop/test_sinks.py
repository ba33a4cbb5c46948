"""What each tracker was sent is read back with its own reader, and compared with metrics.jsonl."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from simpo.config.choices import WandbMode
from simpo.config.trackers import (
    MlflowConfig,
    TensorBoardConfig,
    TrackerConfig,
    TrackioConfig,
    WandbConfig,
)
from simpo.loop.tracker import Tracker
from simpo.run.files import read_metrics
from tests.support.tracked import (
    Sent,
    mlflow_runs,
    sent_to_mlflow,
    sent_to_tensorboard,
    sent_to_trackio,
    sent_to_wandb,
    tensorboard_events,
    wandb_records,
)
from tests.support.whole_runs import TIMING, finish, logged, newest_checkpoint, run, start, wait_for

SETTINGS: dict[str, Any] = {
    "loss.beta": 2.5,
    "model.lora.rank": 0,
    "train.check_memory": True,
    "data.sources[0].path": "pairs.jsonl",
    "data.filter.languages": ["en", "de"],
    "model.revision": None,
    "model.chat_template": "api_key: abc",
}
"""One value of each type; the last looks like a secret, which no tracker may get."""


@pytest.fixture(scope="module", autouse=True)
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trackio's projects are kept in a folder of the tests; it reads the variable when imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        yield


@pytest.fixture(scope="module")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; its tables take seconds to make."""
    folder = tmp_path_factory.mktemp("mlflow")
    config = MlflowConfig(tracking_uri=f"sqlite:///{folder}/made/mlflow.db")
    with Tracker(config, folder, "none", {}) as tracker:
        tracker.begin(0)
    return folder / "made" / "mlflow.db"


class Place:
    """A tracker's settings and its readers, for a run in one folder."""

    def __init__(self, kind: str, folder: Path, request: pytest.FixtureRequest) -> None:
        self.kind, self.folder, self.project = kind, folder, folder.name
        if kind == "mlflow":
            shutil.copy(request.getfixturevalue("mlflow_tables"), folder / "mlflow.db")
        if kind == "wandb":
            request.getfixturevalue("nobody")

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def config(self) -> TrackerConfig:
        if self.kind == "wandb":
            return WandbConfig(project=self.project, mode=WandbMode.offline)
        if self.kind == "trackio":
            return TrackioConfig(project=self.project)
        if self.kind == "mlflow":
            tags = {"team": "pairs"}
            return MlflowConfig(tracking_uri=self.uri, experiment=self.project, tags=tags)
        return TensorBoardConfig()

    def overrides(self) -> list[str]:
        own = {
            "wandb": ["tracker.mode=offline"],
            "trackio": [f"tracker.project={self.project}"],
            "mlflow": [f"tracker.tracking_uri={self.uri}", f"tracker.experiment={self.project}"],
        }
        return [f"tracker={self.kind}", *own.get(self.kind, [])]

    def trackio_run(self) -> Any:
        from trackio import Api

        (found,) = Api().runs(self.project)
        return found

    def mlflow_run(self) -> Any:
        (found,) = mlflow_runs(self.uri, self.project)
        return found

    def sent(self, run_dir: Path) -> Sent:
        if self.kind == "wandb":
            return sent_to_wandb(wandb_records(run_dir))
        if self.kind == "trackio":
            return sent_to_trackio(self.project, self.trackio_run())
        if self.kind == "mlflow":
            return sent_to_mlflow(self.uri, self.mlflow_run())
        return sent_to_tensorboard(tensorboard_events(run_dir))


@pytest.fixture(params=["wandb", "trackio", "tensorboard", "mlflow"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    pytest.importorskip(request.param)
    return Place(request.param, tmp_path, request)


def in_file(run_dir: Path, kind: str) -> Sent:
    """The values of metrics.jsonl; TensorBoard has them in single precision."""
    as_kept = (lambda v: float(np.float32(v))) if kind == "tensorboard" else float
    return sorted(
        (int(line["step"]), key, as_kept(line[key]))
        for line in read_metrics(run_dir / "metrics.jsonl")
        for key in line.keys() - {"step"}
    )


def test_one_curve_over_a_restart(place: Place, tmp_path: Path) -> None:
    """Begun without a tracker, then killed after more than its checkpoint holds, then continued."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with Tracker(TrackerConfig(), run_dir, "pairs", SETTINGS) as tracker:
        tracker.begin(0)
        tracker.log(0, "eval", {"loss": 0.1, "rewards/margins": -1 / 3})
        tracker.log(1, "train", {"loss": 3.25, "learning_rate": 1e-7})
        saved = tracker.num_bytes()
    with Tracker(place.config(), run_dir, "pairs", SETTINGS) as tracker:
        tracker.begin(saved)
        tracker.log(2, "train", {"loss": 2.2, "learning_rate": 2e-7})
        saved = tracker.num_bytes()
        tracker.log(3, "train", {"loss": 2.1, "learning_rate": 3e-7})
    with Tracker(place.config(), run_dir, "pairs", SETTINGS) as tracker:
        tracker.begin(saved)
        tracker.log(3, "train", {"loss": 2.15, "learning_rate": 3e-7})
        tracker.log(3, "eval", {"loss": 0.05, "rewards/margins": 4.0})
        tracker.log(4, "train", {"loss": 1.9, "learning_rate": 4e-7})
    expected = in_file(run_dir, place.kind)
    assert len(expected) == 12 and (3, "train/loss", 2.15) in in_file(run_dir, "")
    if place.kind == "mlflow":  # it keeps the first value of a step
        expected[expected.index((3, "train/loss", 2.15))] = (3, "train/loss", 2.1)
    assert place.sent(run_dir) == expected


def test_settings_and_name(place: Place, tmp_path: Path) -> None:
    run_dir = tmp_path / "beta=2.5"
    run_dir.mkdir()
    with (
        pytest.raises(RuntimeError),
        Tracker(place.config(), run_dir, "pairs", SETTINGS) as tracker,
    ):
        tracker.begin(0)
        tracker.log(1, "train", {"loss": 3.0})
        raise RuntimeError
    kept = {key: SETTINGS[key] for key in list(SETTINGS)[:-1]}
    as_text = kept | {"data.filter.languages": '["en", "de"]', "model.revision": "null"}
    if place.kind == "wandb":
        records = wandb_records(run_dir)
        (begun,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        settings = {item.key: json.loads(item.value_json) for item in begun.config.update}
        assert {key: settings[key] for key in settings if not key.startswith("_")} == kept
        assert (begun.display_name, begun.project) == ("pairs beta=2.5", place.project)
        (ended,) = [r.exit for r in records if r.WhichOneof("record_type") == "exit"]
        assert ended.exit_code == 1
    elif place.kind == "trackio":
        found = place.trackio_run()
        settings = {k: v for k, v in found.config.items() if not k.startswith("_")}
        assert len(settings.pop("simpo_run")) == 16
        assert (found.name, settings) == ("pairs beta=2.5", kept)
    elif place.kind == "mlflow":
        found = place.mlflow_run()
        renamed = {key.replace("[0]", ".0"): str(value) for key, value in as_text.items()}
        assert (found.info.run_name, found.data.params) == ("pairs beta=2.5", renamed)
        assert (found.info.status, found.data.tags["team"]) == ("FAILED", "pairs")
    else:
        assert hparams_of(run_dir) == as_text


def hparams_of(run_dir: Path) -> dict[str, Any]:
    """The hyperparameters of a run as TensorBoard's plugin reads them."""
    from tensorboard.plugins.hparams import metadata

    events = tensorboard_events(run_dir)
    events.Reload()
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in found.items()}


def test_two_runs_of_one_name_have_a_curve_each(place: Place, tmp_path: Path) -> None:
    """As members of two sweeps have."""
    for sweep, loss in (("a", 1.0), ("b", 2.0)):
        run_dir = tmp_path / sweep / "beta=2"
        run_dir.mkdir(parents=True)
        with Tracker(place.config(), run_dir, "pairs", {}) as tracker:
            tracker.begin(0)
            tracker.log(1, "train", {"loss": loss})
    if place.kind == "trackio":
        from trackio import Api

        found = [sent_to_trackio(place.project, run) for run in Api().runs(place.project)]
    elif place.kind == "mlflow":
        runs = mlflow_runs(place.uri, place.project)
        found = [sent_to_mlflow(place.uri, run) for run in runs]
    else:
        found = [place.sent(tmp_path / sweep / "beta=2") for sweep in "ab"]
    assert sorted(found) == [[(1, "train/loss", 1.0)], [(1, "train/loss", 2.0)]]


def test_an_open_tensorboard_shows_the_continued_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    events = tensorboard_events(tmp_path)
    for values in ([3.0, 2.0, 1.0], [3.0, 2.5]):
        with Tracker(TensorBoardConfig(), tmp_path, "pairs", {}) as tracker:
            tracker.begin(0)
            for step, value in enumerate(values):
                tracker.log(step, "train", {"loss": value})
        sent = [(step, "train/loss", value) for step, value in enumerate(values)]
        assert sent_to_tensorboard(events) == sent


def test_other_ranks_send_nothing(place: Place, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with Tracker(place.config(), tmp_path, "pairs", SETTINGS, writes=False) as tracker:
        tracker.begin(0)
        tracker.log(1, "train", {"loss": 3.0})
    assert sorted(tmp_path.iterdir()) == before
    if place.kind == "mlflow":
        from mlflow import MlflowClient

        assert MlflowClient(place.uri).get_experiment_by_name(place.project) is None


@pytest.mark.matrix
def test_a_killed_run(place: Place, tiny_run: list[str], tmp_path: Path) -> None:
    """Stopped between checkpoints, and continued from one that is older than what was sent."""
    folder = tmp_path / "run"
    command = [*tiny_run, "train.epochs=4", "train.checkpoint_every=4", f"run_dir={folder}"]
    command += place.overrides()
    process = start(command)
    wait_for(logged(folder, 11), process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    shutil.rmtree(newest_checkpoint(folder))
    assert "continued after step 8" in run(command)
    sent, expected = place.sent(folder), in_file(folder, place.kind)
    if place.kind == "mlflow":  # it keeps the first value of a step, and times are never the same
        sent, expected = ([v for v in values if v[1] not in TIMING] for values in (sent, expected))
    assert [step for step, key, _ in sent if key == "train/loss"] == list(range(1, 25))
    assert sent == expected


@pytest.mark.matrix
def test_two_ranks_send_once(tiny_run: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(
        [
            *tiny_run,
            "backend=ddp",
            "backend.processes=2",
            "tracker=tensorboard",
            f"run_dir={tmp_path}/run",
        ]
    )
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    sent = sent_to_tensorboard(tensorboard_events(tmp_path / "run"))
    assert sent == in_file(tmp_path / "run", "tensorboard")


BEGIN = """
import sys
from pathlib import Path
from simpo.config.trackers import MlflowConfig
from simpo.loop import sinks
from simpo.loop.tracker import Tracker
sinks.FINISH_S = 200
with Tracker(MlflowConfig(tracking_uri=sys.argv[1]), Path(sys.argv[2]), "pairs", {}) as tracker:
    tracker.begin(0)
    tracker.log(1, "train", {"loss": 2.0})
"""


@pytest.mark.matrix
def test_runs_that_begin_together_make_one_database(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    begun = []
    for name in "abc":
        (tmp_path / name).mkdir()
        words = [sys.executable, "-c", BEGIN, uri, str(tmp_path / name)]
        begun.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
    assert [process.communicate(timeout=200)[0] for process in begun] == ["", "", ""]
    sent = [sent_to_mlflow(uri, run) for run in mlflow_runs(uri, "simpo")]
    assert sent == [[(1, "train/loss", 2.0)]] * 3


def notes(config: TrackerConfig, run_dir: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What is printed of a run of two steps, which metrics.jsonl must have."""
    with Tracker(config, run_dir, "pairs", {}) as tracker:
        tracker.begin(0)
        tracker.log(1, "train", {"loss": 3.0})
        tracker.log(2, "train", {"loss": 2.0})
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == [1, 2]
    return capfd.readouterr().out.splitlines()


class Stuck:
    """A tracker that takes nothing until it is told to."""

    def __init__(self) -> None:
        self.told = Event()

    def begin(self) -> None:
        self.told.wait(100)

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self, failed: bool) -> None: ...


def test_a_tracker_that_is_stuck_holds_up_neither_steps_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stuck = Stuck()
    monkeypatch.setattr("simpo.loop.sinks.FINISH_S", 0.2)
    monkeypatch.setattr("simpo.loop.sinks._sink", lambda config, tracked: stuck)
    begin = time.monotonic()
    shown = notes(TensorBoardConfig(), tmp_path, capfd)
    assert 0.2 <= time.monotonic() - begin < 10
    stuck.told.set()
    assert shown == [
        "note   tensorboard failed, nothing more is sent: it did not take everything within 0.2 s "
        "(metrics.jsonl has everything)"
    ]


def test_a_library_that_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    (note,) = notes(MlflowConfig(tracking_uri="http://nobody"), tmp_path, capfd)
    assert note == (
        "note   mlflow failed, nothing more is sent: import of mlflow halted; None in sys.modules "
        "(metrics.jsonl has everything)"
    )


def test_no_server_at_the_address(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert notes(MlflowConfig(tracking_uri=f"http://127.0.0.1:{port}"), tmp_path, capfd) == [
        "note   mlflow failed, nothing more is sent: <urlopen error [Errno 111] Connection "
        "refused> (metrics.jsonl has everything)"
    ]


def test_a_server_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setattr("simpo.loop.sinks.SERVER_S", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert notes(MlflowConfig(tracking_uri=uri), tmp_path, capfd) == [
            "note   mlflow failed, nothing more is sent: timed out (metrics.jsonl has everything)"
        ]


def test_a_folder_that_cannot_be_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    (note,) = notes(TensorBoardConfig(), tmp_path, capfd)
    assert note == (
        "note   tensorboard failed, nothing more is sent: [Errno 17] File exists: "
        f"'{tmp_path}/tensorboard' (metrics.jsonl has everything)"
    )


def test_a_database_that_cannot_be_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "file").write_text("in the way")
    (note,) = notes(MlflowConfig(tracking_uri=f"sqlite:///{tmp_path}/file/x.db"), tmp_path, capfd)
    assert note == (
        "note   mlflow failed, nothing more is sent: [Errno 17] File exists: "
        f"'{tmp_path}/file' (metrics.jsonl has everything)"
    )
