"""Every shape of record in every kind of file: the pairs are those written here by hand."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import feather, parquet

from simpo.config.data import DataConfig, SourceConfig
from simpo.data.mixture import load_mixture
from tests.support.real_tokenizers import assistant, system, user

ASKED = (user("Hi."), assistant("Hello."), user("Name a bird, in é."))
HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Name a bird, in é.\n\nAssistant: "
ORDER = ["human", "gpt", "human"]
SHARED = [{"from": who, "value": turn["content"]} for who, turn in zip(ORDER, ASKED, strict=True)]
RECORDS: dict[str, tuple[dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "pair": ({"prompt": "Why?", "chosen": 'A "wren".\nYes.', "rejected": "007"}, (user("Why?"),)),
    "pair of messages": (
        {
            "prompt": list(ASKED),
            "chosen": [assistant('A "wren".\nYes.')],
            "rejected": [assistant("007")],
        },
        ASKED,
    ),
    "dialogues": (
        {
            "chosen": [*ASKED, assistant('A "wren".\nYes.')],
            "rejected": [*ASKED, assistant("007")],
        },
        ASKED,
    ),
    "ultrafeedback": (
        {
            "prompt": "Why?",
            "chosen": [user("Why?"), assistant('A "wren".\nYes.')],
            "rejected": [user("Why?"), assistant("007")],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        },
        (user("Why?"),),
    ),
    "hh_rlhf": ({"chosen": HH + 'A "wren".\nYes.', "rejected": HH + "007"}, ASKED),
    "orca": (
        {
            "system": "Be kind.",
            "question": "Why?",
            "chosen": 'A "wren".\nYes.',
            "rejected": "007",
        },
        (system("Be kind."), user("Why?")),
    ),
    "alpaca": (
        {"instruction": "Name it.", "input": "A bird", "output": ['A "wren".\nYes.', "007"]},
        (user("Name it.\nA bird"),),
    ),
    "sharegpt": (
        {
            "conversations": SHARED,
            "chosen": {"from": "gpt", "value": 'A "wren".\nYes.'},
            "rejected": {"from": "gpt", "value": "007"},
        },
        ASKED,
    ),
    "openai": (
        {
            "input": {"messages": list(ASKED)},
            "preferred_output": [assistant('A "wren".\nYes.')],
            "non_preferred_output": [assistant("007")],
        },
        ASKED,
    ),
    "comparison": (
        {
            "prompt": "Why?",
            "response_0": "007",
            "response_1": 'A "wren".\nYes.',
            "better_response_id": 1,
        },
        (user("Why?"),),
    ),
    "replies": (
        {
            "prompt": "Why?",
            "responses": ["007", 'A "wren".\nYes.', "A crow."],
            "scores": [1.0, 9.0, 5.0],
        },
        (user("Why?"),),
    ),
}


def json_lines(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def table(record: dict[str, Any], separator: str) -> bytes:
    """Lists and objects as JSON, as people write them into cells."""
    text = io.StringIO()
    cells = {
        key: value if isinstance(value, str | int | float) else json.dumps(value)
        for key, value in record.items()
    }
    writer = csv.DictWriter(text, list(cells), delimiter=separator)
    writer.writeheader()
    writer.writerow(cells)
    return text.getvalue().encode()


def columnar(write: Callable[[pa.Table, Path], object]) -> Callable[[dict[str, Any]], bytes]:
    def content(record: dict[str, Any]) -> bytes:
        path = Path("written")
        write(pa.Table.from_pylist([record]), path)
        return path.read_bytes()

    return content


FILES: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "a.jsonl": json_lines,
    "a.json": lambda record: json.dumps([record], indent=1).encode(),
    "named.json": lambda record: json.dumps({"version": 1, "data": [record]}).encode(),
    "marked.jsonl": lambda record: b"\xef\xbb\xbf" + json_lines(record),
    "a.jsonl.gz": lambda record: gzip.compress(json_lines(record)),
    "a.jsonl.zst": lambda record: pa.compress(json_lines(record), "zstd", asbytes=True),
    "a.csv": lambda record: table(record, ","),
    "a.csv.gz": lambda record: gzip.compress(table(record, ",")),
    "a.tsv": lambda record: table(record, "\t"),
    "a.parquet": columnar(parquet.write_table),
    "a.arrow": columnar(lambda rows, path: feather.write_feather(rows, str(path))),
}


def pairs_of(path: str, **source: Any) -> list[tuple[Any, ...]]:
    mixture = load_mixture(DataConfig(name="x", sources=[SourceConfig(path=path, **source)]))
    return [(pair.prompt, *pair.responses) for pair in mixture.train]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("shape", RECORDS)
def test_shape_by_file(shape: str, name: str) -> None:
    record, prompt = RECORDS[shape]
    Path(name).write_bytes(FILES[name](record))
    expected = [(prompt, (assistant('A "wren".\nYes.'),), (assistant("007"),))]
    assert pairs_of(name) == expected
    assert pairs_of(name, format=shape.partition(" ")[0]) == expected


@pytest.mark.parametrize("shape", RECORDS)
def test_shape_by_folder(shape: str) -> None:
    record, prompt = RECORDS[shape]
    expected = [(prompt, (assistant('A "wren".\nYes.'),), (assistant("007"),))]
    Path("files").mkdir()
    Path("files/train-00000-of-00001.jsonl").write_bytes(json_lines(record))
    Dataset.from_list([record]).save_to_disk("saved")
    assert pairs_of("files", test_split=None) == expected
    assert pairs_of("saved", test_split=None) == expected
    assert pairs_of("files/*.jsonl") == expected
