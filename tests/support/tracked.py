"""Reads back what trackers were sent, with the trackers' own readers."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

Sent = list[tuple[int, str, float]]
"""(step, key, value) of every value, sorted; a value that was sent twice is there twice."""

BLOCK = 32768


def wandb_records(run_dir: Path) -> list[Any]:
    """The protobuf records of the newest .wandb file of a run, which ends with its exit."""
    file = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))[-1]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # its last lines are written after finish() returns
        records = list(_records_in(file))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{file} has no end")


def _records_in(file: Path) -> Iterator[Any]:
    """Those of the whole records in a file: a 7-byte header, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    content = file.read_bytes()
    assert content[:4] in (b"", b":W&B")
    place, payload = 7, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        if place + 7 + length > len(content):
            return
        payload += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = cast(Any, wandb_internal_pb2).Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


def sent_to_wandb(records: list[Any]) -> Sent:
    sent: Sent = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
            # One row for a step in which both training and evaluation were logged, or two.
            sent += [(row["_step"], key, row[key]) for key in row if not key.startswith("_")]
    return sorted(sent)


def tensorboard_events(run_dir: Path) -> Any:
    """TensorBoard's reader of a run's folder, which keeps all values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})


def sent_to_tensorboard(events: Any) -> Sent:
    """What the reader has after reading on."""
    events.Reload()
    keys = events.Tags()["scalars"]
    return sorted((e.step, key, e.value) for key in keys for e in events.Scalars(key))


def sent_to_trackio(project: str, run: Any) -> Sent:
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs(project, run.name, run_id=run.id)
    return sorted(
        (row["step"], key, row[key]) for row in rows for key in row.keys() - {"step", "timestamp"}
    )


def sent_to_mlflow(uri: str, run: Any) -> Sent:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    histories = [client.get_metric_history(run.info.run_id, key) for key in run.data.metrics]
    return sorted((m.step, m.key, m.value) for history in histories for m in history)


def mlflow_runs(uri: str, experiment: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))
