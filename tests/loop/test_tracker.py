"""metrics.jsonl, the login of Weights & Biases, and trackers that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, Pruned, Stopped
from simpo.config.trackers import TrackerConfig, WandbConfig
from simpo.launch.start import start as start_here
from simpo.loop.sinks import check_login
from simpo.loop.tracker import Tracker
from simpo.loop.train import train
from simpo.run.files import read_metrics


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("WANDB_API_KEY", "a" * 40 + "\n", "API key cannot start or end with whitespace"),
        ("WANDB_BASE_URL", "not a url", "1 validation error for Settings"),
    ],
)
def test_variables_that_cannot_be_are_told_in_a_line(
    variable: str, value: str, reason: str, nobody: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        check_login(compose_run(["tracker=wandb"]).tracker)
    assert str(caught.value) == (
        f"tracker: wandb: {reason} (wandb login, or WANDB_API_KEY, or tracker.mode=offline)"
    )


def test_online_without_a_login_is_refused_before_anything_is_loaded(
    nobody: None, tiny_run: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        start_here(compose_run([*tiny_run, "tracker=wandb"]))
    assert str(caught.value) == (
        "tracker: wandb: no login (wandb login, or WANDB_API_KEY, or tracker.mode=offline)"
    )
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "cache").exists()
    assert capfd.readouterr().err == ""
    check_login(compose_run(["tracker=wandb", "tracker.mode=offline"]).tracker)


def test_the_login_is_looked_for_once(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before processes are started, and not in each of them."""
    seen: list[object] = []
    monkeypatch.setattr("simpo.loop.sinks.check_login", seen.append)

    def run_in_processes(count: int, run: object) -> Path:
        seen.append(count)
        return tmp_path

    monkeypatch.setattr("simpo.run.processes.run_in_processes", run_in_processes)
    two = compose_run([*tiny_run, "backend=ddp", "backend.processes=2"])
    start_here(two)
    assert seen == [two.tracker, 2]
    train(compose_run(tiny_run))
    assert seen == [two.tracker, 2]


def test_a_server_that_does_not_answer(
    nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The run is tracked offline, and says so."""
    import wandb

    begun: list[str] = []
    real = wandb.init

    def init(**settings: Any) -> Any:
        begun.append(settings["mode"])
        if settings["mode"] == "online":
            raise wandb.errors.CommError("no route to host\nand more")
        return real(**settings)

    monkeypatch.setattr(wandb, "init", init)
    config = WandbConfig()
    with Tracker(config, tmp_path, "x", {}) as tracker:
        tracker.begin(0)
        tracker.log(1, "train", {"loss": 3.0})
    assert begun == ["online", "offline"]
    assert capsys.readouterr().out == (
        f"note   wandb: no route to host; tracked offline (wandb sync {tmp_path}/wandb/offline-* "
        "uploads it later)\n"
    )
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_neither_online_nor_offline(
    nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A run that could not be tracked offline either does not say that it is."""

    def init(**settings: Any) -> None:
        raise OSError(f"no {settings['mode']}")

    monkeypatch.setattr("wandb.init", init)
    with Tracker(WandbConfig(), tmp_path, "x", {}) as tracker:
        tracker.begin(0)
    assert capsys.readouterr().out == (
        "note   wandb failed, nothing more is sent: no offline (metrics.jsonl has everything)\n"
    )


@pytest.mark.parametrize(
    ("error", "code"), [(Pruned("hopeless"), 0), (Stopped("SIGTERM", 75), 1)], ids=str
)
def test_a_pruned_run_has_not_failed(
    error: Exception, code: int, nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []

    class Sink:
        def finish(self, exit_code: int) -> None:
            codes.append(exit_code)

    monkeypatch.setattr("wandb.init", lambda **_: Sink())
    with (
        pytest.raises(type(error)),
        Tracker(WandbConfig(), tmp_path, "x", {}) as tracker,
    ):
        tracker.begin(0)
        raise error
    assert codes == [code]


def test_a_tracker_that_fails_midway_ends_nothing(
    nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Broken:
        step = 0

        def log(self, *_: object, **__: object) -> None:
            raise OSError("disk of wandb full")

        def finish(self, **_: object) -> None:
            raise AssertionError("told once")

    monkeypatch.setattr("wandb.init", lambda **_: Broken())
    with Tracker(WandbConfig(), tmp_path, "x", {}) as tracker:
        tracker.begin(0)
        tracker.log(1, "train", {"loss": 3.0})
        tracker.log(2, "train", {"loss": 2.0})
    assert capsys.readouterr().out == (
        "note   wandb failed, nothing more is sent: disk of wandb full "
        "(metrics.jsonl has everything)\n"
    )
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_continued_run_leaves_neither_holes_nor_doubles(tmp_path: Path) -> None:
    with Tracker(TrackerConfig(), tmp_path, "x", {}) as tracker:
        tracker.begin(0)
        tracker.log(1, "train", {"loss": 3.0})
        saved = tracker.num_bytes()
        tracker.log(2, "train", {"loss": 2.0})
    with Tracker(TrackerConfig(), tmp_path, "x", {}) as tracker:
        tracker.begin(saved)
        tracker.log(2, "train", {"loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": 2.5},
    ]
