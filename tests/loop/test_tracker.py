"""Weights & Biases offline: its file is read back and compared."""

from __future__ import annotations

import json
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.config.trackers import TrackerConfig, WandbConfig
from simpo.launch.start import start as start_here
from simpo.loop.tracker import Tracker, check_login
from simpo.loop.train import train
from simpo.run.files import read_metrics
from tests.support.whole_runs import TIMING, finish, logged, newest_checkpoint, run, start, wait_for

BLOCK = 32768


def wandb_records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file: a 7-byte header, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content.startswith(b":W&B")
    place, payload = 7, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        payload += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = cast(Any, wandb_internal_pb2).Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


def sent_by_step(records: list[Any]) -> dict[tuple[float, str], float]:
    """What was logged, by step and key."""
    sent: dict[tuple[float, str], float] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
            # One row for a step in which both training and evaluation were logged, or two.
            sent |= {(row["_step"], key): value for key, value in row.items()}
    return sent


@pytest.mark.matrix
def test_one_curve_over_a_restart(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between checkpoints: the same id, no hole, and steps sent twice are the same."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads its variables once in a process
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "run"
    command = [*tiny_run, "train.epochs=4", "train.checkpoint_every=4", "tracker=wandb"]
    command += ["tracker.mode=offline", f"run_dir={folder}"]
    process = start(command)
    wait_for(logged(folder, 11), process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    # As a kill would have it: the newest checkpoint is older than what was logged.
    shutil.rmtree(newest_checkpoint(folder))
    continued = run(command)
    first, second = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name
    before, after = (sent_by_step(list(wandb_records(file))) for file in (first, second))
    began = min(step for step, _ in after)
    assert f"continued after step {began - 1}" in continued
    again = before.keys() & after.keys()
    assert again
    for step, key in again:
        if not key.startswith("_") and key not in TIMING:
            assert before[step, key] == after[step, key]
    whole = before | after
    assert sorted({step for step, key in whole if key == "train/loss"}) == list(range(1, 25))
    for line in read_metrics(folder / "metrics.jsonl"):
        for key, value in line.items():
            if key != "step" and key not in TIMING:
                assert whole[line["step"], key] == pytest.approx(value), key


@pytest.mark.matrix
def test_wandb_offline_without_a_key(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "run"
    train(
        compose_run(
            [
                *tiny_run,
                "tracker=wandb",
                "tracker.mode=offline",
                "tracker.project=pairs",
                "tracker.tags=[tiny]",
                f"run_dir={folder}",
            ]
        )
    )
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    records = list(wandb_records(file))
    sent = sent_by_step(records)
    (started,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (started.project, list(started.tags)) == ("pairs", ["tiny"])
    settings = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert settings["loss.beta"] == 2.0
    for line in read_metrics(folder / "metrics.jsonl"):
        for key, value in line.items():
            if key != "step":
                assert sent[line["step"], key] == pytest.approx(value), key
    (ended,) = [r.exit for r in records if r.WhichOneof("record_type") == "exit"]
    assert ended.exit_code == 0


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without a login."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads its variables once in a process
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


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


def test_the_login_is_looked_for_once(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before processes are started, and not in each of them."""
    seen: list[object] = []
    monkeypatch.setattr("simpo.loop.tracker.check_login", seen.append)

    def run_in_processes(count: int, run: object) -> dict[str, float]:
        seen.append(count)
        return {}

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
        tracker.log(1, "train", {"loss": 3.0})
    assert begun == ["online", "offline"]
    assert capsys.readouterr().out == (
        f"note   wandb: no route to host; tracked offline (wandb sync {tmp_path}/wandb/offline-* "
        "uploads it later)\n"
    )
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_tracker_that_fails_midway_ends_nothing(
    nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Broken:
        def log(self, *_: object, **__: object) -> None:
            raise OSError("disk of wandb full")

        def finish(self, **_: object) -> None:
            raise AssertionError("told once")

    monkeypatch.setattr("wandb.init", lambda **_: Broken())
    with Tracker(WandbConfig(), tmp_path, "x", {}) as tracker:
        tracker.log(1, "train", {"loss": 3.0})
        tracker.log(2, "train", {"loss": 2.0})
    assert capsys.readouterr().out == (
        "note   wandb failed, nothing more is sent: disk of wandb full "
        "(metrics.jsonl has everything)\n"
    )
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_continued_run_leaves_neither_holes_nor_doubles(tmp_path: Path) -> None:
    with Tracker(TrackerConfig(), tmp_path, "x", {}) as tracker:
        tracker.log(1, "train", {"loss": 3.0})
        saved = tracker.num_bytes()
        tracker.log(2, "train", {"loss": 2.0})
    with Tracker(TrackerConfig(), tmp_path, "x", {}) as tracker:
        tracker.cut_back(saved)
        tracker.log(2, "train", {"loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": 2.5},
    ]
