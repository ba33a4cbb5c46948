"""Every kind of file is read to the same records; what cannot be read is told in one line.

The files are written by hand or by another library than the one that reads them.
"""

import csv
import io
import json
import lzma
import os
import random
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pandas
import pyarrow
import pytest
from datasets.data_files import DataFilesDict, get_data_patterns
from huggingface_hub import constants
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pyarrow import feather, ipc

from simpo.config.compose import compose_run
from simpo.config.data import SourceConfig
from simpo.config.data_path import is_hub_id, kind
from simpo.config.errors import ConfigError, DataError
from simpo.data import hub
from simpo.data.reading.records import RecordFault
from simpo.data.reading.sources import raw_records

ROWS = [
    {"prompt": "Why?", "chosen": "So,\nas I said.", "rejected": "007"},
    {"prompt": "Größe: 1e5", "chosen": 'a "quote"; and\ta tab', "rejected": None},
    {"prompt": "NA", "chosen": "None", "rejected": "true"},
]
JSON_ROWS = (
    '{"prompt": "Why?", "chosen": "So,\\nas I said.", "rejected": "007"}',
    '{"prompt": "Größe: 1e5", "chosen": "a \\"quote\\"; and\\ta tab", "rejected": null}',
    '{"prompt": "NA", "chosen": "None", "rejected": "true"}',
)
LINES = "\n".join(JSON_ROWS) + "\n"
TABLE = (
    'prompt,chosen,rejected\r\nWhy?,"So,\nas I said.",007\r\n'
    'Größe: 1e5,"a ""quote""; and\ta tab",\r\nNA,None,true\r\n'
)
TABS = (
    'prompt\tchosen\trejected\nWhy?\t"So,\nas I said."\t007\n'
    'Größe: 1e5\t"a ""quote""; and\ta tab"\t\nNA\tNone\ttrue\n'
)
SEMICOLONS = (
    'prompt;chosen;rejected\nWhy?;"So,\nas I said.";007\n'
    'Größe: 1e5;"a ""quote""; and\ta tab";\nNA;None;true\n'
)
INDENTED = "".join(json.dumps(row, indent=2, ensure_ascii=False) + "\n" for row in ROWS)
TEXTS = {
    "a.jsonl": LINES,
    "a.ndjson": "\ufeff" + LINES,
    "a.jsonlines": LINES.replace("\n", "\r\n\r\n"),
    "lines.json": LINES,
    "list.json": f"[{', '.join(JSON_ROWS)}]",
    "indented.json": json.dumps(ROWS, indent=2),
    "data.json": f'{{"data": [{", ".join(JSON_ROWS)}]}}',
    "keys.json": json.dumps({"version": 2, "tags": ["a"], "pairs": ROWS, "empty": []}, indent=1),
    "a.csv": TABLE,
    "bom.csv": "\ufeff" + TABLE,
    "quoted.csv": TABLE.replace("prompt,chosen", '"prompt", "chosen"', 1).replace(
        '"chosen"', "chosen"
    ),
    "semicolons.csv": SEMICOLONS,
    "tabs.csv": TABS,
    "blank.csv": f"\r\n \r\n{TABLE}",
    "blank_semicolons.csv": f"\n{SEMICOLONS}",
    "excel.csv": f"\ufeffsep=;\r\n{SEMICOLONS}",
    "excel_quoted.csv": f'"sep=|"\n{SEMICOLONS.replace("; and", "@").replace(";", "|")}'.replace(
        "@", "; and"
    ),
    "a.tsv": TABS,
}


def zstd(data: bytes) -> bytes:
    """Frames of zstandard with a stored block each (RFC 8878): nothing that a library wrote."""
    frames = []
    for begin in range(0, len(data), 255):
        block = data[begin : begin + 255]
        header = (len(block) << 3 | 1).to_bytes(3, "little")
        frames.append(b"\x28\xb5\x2f\xfd" + b"\x20" + bytes([len(block)]) + header + block)
    return b"".join(frames)


def by_arrow(codec):
    def compressed(data):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return compressed


COMPRESS = {
    ".gz": by_arrow("gzip"),
    ".bz2": by_arrow("bz2"),
    ".xz": lzma.compress,
    ".zst": zstd,
}


def write_stream(table, path):
    with ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


def write_blocks(table, path):
    with ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=2)


COLUMNAR = {
    "a.parquet": lambda table, path: table.to_pandas().to_parquet(path),
    "blocks.arrow": write_blocks,
    "stream.arrow": write_stream,
    "a.feather": lambda table, path: feather.write_feather(table, path, compression="zstd"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(files):
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def placed(path, split="train", **source):
    """Records with their places; a fault as its text."""
    found = raw_records(SourceConfig(path=path, **source), split, split == "test", 0)
    return [(at, str(r) if isinstance(r, RecordFault) else r) for at, r in found]


def read(path, split="train", **source):
    return [record for _, record in placed(path, split, **source)]


def refusal(path, split="train", **source):
    with pytest.raises(DataError) as caught:
        read(path, split, **source)
    return str(caught.value)


@pytest.mark.parametrize("name", TEXTS)
def test_text(name):
    put({name: TEXTS[name]})
    assert list(SourceConfig(path=name).problems()) == []
    assert read(name) == ROWS


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "data.json", "a.csv", "a.tsv"])
def test_compressed_text(name, suffix):
    put({name + suffix: COMPRESS[suffix](TEXTS[name].encode())})
    assert list(SourceConfig(path=name + suffix).problems()) == []
    assert read(name + suffix) == ROWS


@pytest.mark.parametrize("name", COLUMNAR)
def test_columnar(name):
    COLUMNAR[name](pyarrow.Table.from_pylist(ROWS), name)
    assert list(SourceConfig(path=name).problems()) == []
    assert read(name) == ROWS


def test_an_arrow_file_of_datasets():
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    assert read("saved/data-00000-of-00001.arrow") == ROWS == read("./saved")


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1)
KEYS = ("prompt", "chosen", "rejected")
RECORDS = st.lists(
    st.tuples(*[st.none() | WORDS] * 3).map(lambda texts: dict(zip(KEYS, texts, strict=True))),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(RECORDS)
def test_the_same_records_come_through_every_kind(tmp_path_factory, rows):
    """Texts of any characters, by writers that are not the readers."""
    root = tmp_path_factory.mktemp("kinds")
    schema = pyarrow.schema([(key, pyarrow.string()) for key in KEYS])
    table = pyarrow.Table.from_pylist(rows, schema)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    wrapped = json.dumps({"data": rows})
    # With fewer quotes pandas writes a lone carriage return so that it ends the row.
    commas = pandas.DataFrame(rows).to_csv(index=False, quoting=csv.QUOTE_ALL)
    tabs = io.StringIO(newline="")
    csv.writer(tabs, delimiter="\t", quoting=csv.QUOTE_ALL).writerows(
        [KEYS, *([value or "" for value in row.values()] for row in rows)]
    )
    texts = {".jsonl": lines, ".json": wrapped, ".csv": commas, ".tsv": tabs.getvalue()}
    for suffix, text in texts.items():
        (root / f"a{suffix}").write_bytes(text.encode())
        for last, compress in COMPRESS.items():
            (root / f"a{suffix}{last}").write_bytes(compress(text.encode()))
    for name, write in COLUMNAR.items():
        write(table, str(root / name))
    assert {path.name: read(str(path)) for path in root.iterdir()} == {
        path.name: rows for path in root.iterdir()
    }


def test_faults_of_lines_are_the_same_in_compressed_text():
    lines = [JSON_ROWS[0], "", '{"prompt": }', '{"a": "caf\udce9"}', JSON_ROWS[2]]
    data = "\n".join(lines).encode(errors="surrogateescape")
    expected = [
        ("record 1", ROWS[0]),
        ("record 2 (line 3)", "not JSON: Expecting value at column 12"),
        ("record 3 (line 4)", "not UTF-8 at column 11"),
        ("record 4 (line 5)", ROWS[2]),
    ]
    put({f"a.jsonl{last}": press(data) for last, press in COMPRESS.items()} | {"a.jsonl": data})
    for name in ("a.jsonl", *(f"a.jsonl{last}" for last in COMPRESS)):
        assert placed(name) == expected


def test_faults_of_rows():
    """Told with the line where the row begins; the rows beside it are read."""
    put({"a.csv": b'prompt,chosen\n"one\ntwo",a\nb\n\nc,d,e\ncaf\xe9,f\ng,h\n'})
    assert placed("a.csv") == [
        ("record 1 (line 2)", {"prompt": "one\ntwo", "chosen": "a"}),
        ("record 2 (line 4)", "has 1 cells where the header has 2"),
        ("record 3 (line 6)", "has 3 cells where the header has 2"),
        ("record 4 (line 7)", "not UTF-8 (convert the file to UTF-8)"),
        ("record 5 (line 8)", {"prompt": "g", "chosen": "h"}),
    ]


def test_lines_before_a_header_are_counted():
    put({"a.csv": "sep=;\n\nprompt;chosen, or not\n\na;b\nc\n"})
    assert placed("a.csv") == [
        ("record 1 (line 5)", {"prompt": "a", "chosen, or not": "b"}),
        ("record 2 (line 6)", "has 1 cells where the header has 2"),
    ]


def test_a_byte_order_mark_between_joined_files():
    mark = "a byte order mark inside the file, as cat of two files leaves it, at "
    whole = ("\ufeff" + '{"a": 1}\n') * 2
    put({"a.jsonl": whole, "a.json": whole, "a.csv": "\ufeffa,b\n1,2\n" * 2})
    for name in ("a.jsonl", "a.json"):
        assert read(name) == [{"a": 1}, f"{mark}column 1 (remove it)"]
    put({"b.json": "[1,\n\ufeff2]"})
    assert refusal("b.json") == (f"b.json train: cannot be read: {mark}line 2 column 1 (remove it)")
    assert read("a.csv") == [
        {"a": "1", "b": "2"}, f"{mark}column 1 (remove it)", {"a": "1", "b": "2"},
    ]  # fmt: skip


def test_a_large_cell():
    put({"a.csv": f"a,b\n{'x' * 20_000_000},y\n"})
    (row,) = read("a.csv")
    assert (len(row["a"]), row["b"]) == (20_000_000, "y")


def test_frames_of_zstd_without_data():
    """As pzstd writes them before each frame."""
    for first in (0x50, 0x5F):
        empty = bytes([first]) + b"\x2a\x4d\x18" + b"\x04\x00\x00\x00" + b"size"
        put({"a.jsonl.zst": (empty + zstd(LINES.encode())) * 2})
        assert read("a.jsonl.zst") == ROWS * 2


def test_line_ends_inside_a_cell_are_kept():
    put({"a.csv": 'prompt,chosen\r\n"a\r\nb","a\rb"\r\nc,"d\n"\r\n'})
    assert placed("a.csv") == [
        ("record 1 (line 2)", {"prompt": "a\r\nb", "chosen": "a\rb"}),
        ("record 2 (line 5)", {"prompt": "c", "chosen": "d\n"}),
    ]


def test_columns_without_a_name():
    """The index that pandas writes, and empty columns of a spreadsheet."""
    pandas.DataFrame([{"prompt": "a", "chosen": "b"}]).to_csv("index.csv")
    assert read("index.csv") == [{"Unnamed: 0": "0", "prompt": "a", "chosen": "b"}]
    put({"sheet.csv": "prompt, chosen,,\na,b,,\n"})
    assert read("sheet.csv") == [
        {"prompt": "a", "chosen": "b", "Unnamed: 2": None, "Unnamed: 3": None}
    ]


def test_one_record_in_a_json_file():
    """Its messages are no list of records."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in ({"messages": turns}, {"chosen": turns, "rejected": turns}, ROWS[0]):
        for indent in (None, 2):
            put({"one.json": json.dumps(row, indent=indent)})
            assert read("one.json") == [row]


LONG = "So it is and here is why: " + "because " * 12
UNREADABLE = {
    "utf16.jsonl": (LINES.encode("utf-16"), "it is UTF-16 or UTF-32 text (convert it to UTF-8)"),
    "be.csv": (TABLE.encode("utf-16-be"), "it is UTF-16 or UTF-32 text (convert it to UTF-8)"),
    "utf32.json": (LINES.encode("utf-32"), "it is UTF-16 or UTF-32 text (convert it to UTF-8)"),
    "utf16.jsonl.gz": (
        COMPRESS[".gz"](LINES.encode("utf-16")),
        "it is UTF-16 or UTF-32 text (convert it to UTF-8)",
    ),
    "gz.jsonl": (COMPRESS[".gz"](b"{}"), "it is compressed (name it gz.jsonl.gz)"),
    "gz.csv.zst": (COMPRESS[".gz"](b"{}"), "it is compressed (name it gz.csv.gz)"),
    "plain.jsonl.gz": (LINES, "it is not compressed (name it plain.jsonl)"),
    "empty.csv.zst": (b"", "it is not compressed (name it empty.csv)"),
    "parquet.csv": (b"PAR1", "it is a parquet file (name it .parquet)"),
    "arrow.json": (b"ARROW1", "it is an Arrow file (name it .arrow)"),
    "sheet.csv": (
        b"PK\x03\x04",
        "it is a zip archive or an Excel workbook (unpack it, or save it as CSV)",
    ),
    "list.jsonl": (TEXTS["list.json"], "it is one JSON list and not JSON lines (name it .json)"),
    "long.jsonl": (
        TEXTS["indented.json"],
        "it is one JSON list and not JSON lines (name it .json)",
    ),
    "objects.jsonl": (
        INDENTED,
        "its objects span several lines (write each on one line, such as with jq -c .)",
    ),
    "objects.json": (
        INDENTED,
        "its objects span several lines (write each on one line, such as with jq -c .)",
    ),
    "cut.json": (
        '[{"prompt": "a"},\n {"prom',
        "not JSON: Unterminated string starting at line 2 column 3",
    ),
    "two.json": (
        json.dumps({"train": ROWS, "test": ROWS}),
        "its object has several lists of records: train, test (write a file of each)",
    ),
    "empty.csv": ("", "it has no header (the first row must name the columns)"),
    "twice.csv": (
        "prompt,chosen,chosen\na,b,c\n",
        "its header has the name chosen twice (the first row must name the columns)",
    ),
    "texts.csv": (
        f"Why?,{LONG}\n",
        "it has no header: column 2 begins with a text (the first row must name the columns)",
    ),
    "turns.tsv": (
        '"Why\nso?"\tSo.\n',
        "it has no header: column 1 begins with a text (the first row must name the columns)",
    ),
    "latin1.csv": (b"Gr\xf6\xdfe,b\n", "its header is not UTF-8 (convert the file to UTF-8)"),
    "open.csv": (
        'prompt,chosen\na,b\nc,"d\ne,f\n',
        "the row at line 3 has a quote that is not closed, or one inside a cell that is not "
        'doubled (write "" for it)',
    ),
    "single.csv": (
        'prompt,chosen\na,"b" c\n',
        "the row at line 2 has a quote that is not closed, or one inside a cell that is not "
        'doubled (write "" for it)',
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read(name):
    content, fault = UNREADABLE[name]
    put({name: content})
    assert refusal(name) == f"{name} train: cannot be read: {fault}"


def test_damaged_columnar_files():
    """In pyarrow's words, so only the place is ours."""
    for name in ("a.parquet", "a.arrow", "b.feather"):
        put({name: b"ARROW1 and nothing more"})
        assert refusal(name).startswith(f"{name} train: cannot be read: ")


ENDED = "Compressed file ended before the end-of-stream marker was reached"


@pytest.mark.parametrize(
    ("suffix", "reason", "least"),
    [
        (".gz", ENDED, 2000),
        (".xz", ENDED, 2000),
        (".zst", "Truncated compressed stream", 2000),
        (".bz2", ENDED, 0),  # a block of bz2 is larger than the file
    ],
)
def test_compressed_text_that_ends_early(suffix, reason, least):
    """The records before the end are counted, but for those of the reader's last block."""
    numbers = random.Random(0)
    lines = [b'{"prompt": "%064x"}\n' % numbers.getrandbits(256) for _ in range(5000)]
    whole = COMPRESS[suffix](b"".join(lines))
    put({f"a.jsonl{suffix}": whole[: len(whole) // 2]})
    found = refusal(f"a.jsonl{suffix}")
    count = int(found.partition(", after ")[2].partition(" ")[0])
    assert found == (
        f"a.jsonl{suffix} train: cannot be read: its compressed data ends early or is damaged, "
        f"after {count} records: {reason} (copy it again)"
    )
    assert least <= count < 2600


SPLIT_FOLDERS = {
    "split names": ["train.jsonl", "test.jsonl", "other.jsonl"],
    "parts": ["train-0.jsonl", "train-1.jsonl", "my_eval.jsonl", "dev.jsonl"],
    "no names": ["b.jsonl", "a.jsonl", "sub/c.jsonl"],
    "folders": ["train/a.jsonl", "train/sub/b.jsonl", "test_2/a.jsonl", "train.jsonl"],
    "shards": [
        *("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"),
        *("data/test_prefs-00000-of-00001-abc.jsonl", "train.jsonl"),
    ],
    "both": ["train_test.jsonl", "testing 1.jsonl"],
    "no words": ["trainer.jsonl", "contest.jsonl", "train2.jsonl"],
    "hidden": ["a.jsonl", ".b.jsonl", ".git/c.jsonl", "__old__/d.jsonl", "config.json"],
    "compressed": ["train.jsonl.gz", "validation.jsonl.gz"],
}


@pytest.mark.parametrize("case", SPLIT_FOLDERS)
def test_splits_of_a_folder_are_those_of_datasets(case, folder):
    for name in SPLIT_FOLDERS[case]:
        line = json.dumps({"prompt": name}) + "\n"
        put({f"set/{name}": COMPRESS[".gz"](line.encode()) if name.endswith(".gz") else line})
    base = str(folder / "set")
    found = DataFilesDict.from_patterns(get_data_patterns(base), base, [".jsonl", ".gz"])
    theirs = {str(split): files for split, files in found.items()}
    assert theirs
    for split, files in theirs.items():
        names = sorted({os.path.relpath(file, base) for file in files})
        assert [record["prompt"] for record in read("./set", split)] == names
    for split in {"train", "validation", "test"} - set(theirs):
        assert refusal("./set", split) == (
            f"./set {split}: cannot be read: no such split, only {', '.join(sorted(theirs))} "
            "(train_split and test_split take another, or null for none)"
        )


@pytest.mark.parametrize("held_out", ["Test.jsonl", "sub/VALID-2.jsonl", "My Eval/a.jsonl"])
def test_held_out_files_that_datasets_takes_for_train(held_out):
    put({f"set/{name}": "1\n" for name in ("Train.jsonl", held_out)})
    assert str(next(iter(get_data_patterns("set")))) == "train"
    for split in ("train", "test"):
        assert refusal("./set", split) == (
            f"./set {split}: cannot be read: {held_out} would be train, as names of splits are "
            "read in lower case only (rename it, or name the files by a glob)"
        )
    assert read("set/Train.jsonl") == [1]


README = """---
configs:
- config_name: helpful
  data_files:
  - split: train
    path: helpful/*.jsonl
  - split: test
    path: [held/a.jsonl, held/b.jsonl]
- config_name: harmless
  data_dir: harmless
---
"""


def test_subsets_of_a_folder():
    """As the header of its README.md lists them."""
    names = ("helpful/2.jsonl", "helpful/1.jsonl", "held/a.jsonl", "held/b.jsonl", "held/c.jsonl")
    put({f"set/{name}": f'"{name}"' for name in (*names, "harmless/x.jsonl")})
    put({"set/README.md": README})
    assert read("set/", subset="helpful") == ["helpful/1.jsonl", "helpful/2.jsonl"]
    assert read("set/", "test", subset="helpful") == ["held/a.jsonl", "held/b.jsonl"]
    assert read("set/", subset="harmless") == ["harmless/x.jsonl"]
    assert refusal("set/") == (
        "set/ train: cannot be read: no subset is set: its README.md lists helpful, harmless "
        "(set subset)"
    )
    put({"set/README.md": "no header"})
    assert refusal("set/", subset="helpful") == (
        "set/ train: cannot be read: no subset helpful: its README.md lists none (set subset)"
    )


def test_a_folder_of_several_kinds():
    put({"set/a.csv": TABLE, "set/a.jsonl": LINES, "set/notes.txt": "x", "set/README.md": "x"})
    assert refusal("./set") == (
        "./set train: cannot be read: holds files of several kinds, .csv, .jsonl (name one kind by "
        "a glob)"
    )
    assert read("set/*.csv") == ROWS


def test_globs():
    """Sorted by name, at any depth, and told apart in places."""
    put({"d/b.jsonl": LINES, "d/a.jsonl": "1\n\n2\n", "d/sub/c.jsonl": "3", "d/x[1].jsonl": "4"})
    assert placed("d/[ab].jsonl")[:3] == [
        ("record 1 (d/a.jsonl line 1)", 1),
        ("record 2 (d/a.jsonl line 3)", 2),
        ("record 3 (d/b.jsonl line 1)", ROWS[0]),
    ]
    assert read("d/**/*.jsonl") == [1, 2, *ROWS, 3, 4]
    assert read("d/x[1].jsonl") == [4]
    assert placed("d/?.jsonl", "test", test_path="d/su*/*") == [("record 1", 3)]
    for path in ("d/[ab].jsonl", "d/**/*.jsonl", "d/x[1].jsonl"):
        assert list(SourceConfig(path=path, test_path=path).problems()) == []
    put({"d/b.jsonl": "[\n"})
    assert refusal("d/*.jsonl") == (
        "d/*.jsonl train: cannot be read: d/b.jsonl: it is one JSON list and not JSON lines (name "
        "it .json)"
    )


def test_places_in_files_without_lines():
    for name in "ab":
        COLUMNAR["a.parquet"](pyarrow.Table.from_pylist([{"x": 1}, {"x": 2}]), f"{name}.parquet")
    assert [place for place, _ in placed("*.parquet")] == [
        *("record 1 (a.parquet record 1)", "record 2 (a.parquet record 2)"),
        *("record 3 (b.parquet record 1)", "record 4 (b.parquet record 2)"),
    ]
    assert [place for place, _ in placed("a.parquet")] == ["record 1", "record 2"]


FILE = "a .jsonl, .json, .csv, .tsv, .parquet or .arrow file"


def test_settings_answer_what_a_path_shows():
    put({"d/a.csv": TABLE, "d/a.jsonl": LINES, "d/notes.txt": "x", "e/a.csv": TABLE})
    for path, problem in {
        "d/*.json": "no file matches, got d/*.json",
        "d/*": f"matches d/notes.txt, which is not {FILE} (narrow the pattern)",
        "d/a.*": "holds files of several kinds, .csv, .jsonl (name one kind by a glob)",
        "train.csv": "no such file or folder, got train.csv",
        "train.csv.zst": "no such file or folder, got train.csv.zst",
        "~/none/*.csv": "no file matches, got ~/none/*.csv",
        "hf://datasets/user/name": (
            "must be hf://datasets/USER/NAME/FILE, got hf://datasets/user/name (a whole data set "
            "goes by its hub id, USER/NAME)"
        ),
        "hf://user/name/a.csv": (
            "must be hf://datasets/USER/NAME/FILE, got hf://user/name/a.csv (a whole data set goes "
            "by its hub id, USER/NAME)"
        ),
        "hf://datasets/user/name/a.xlsx": f"must be {FILE}, got hf://datasets/user/name/a.xlsx",
        "hf://datasets/user/name@v1/a.csv": None,
        "hf://datasets/user/name/data": None,
        "user/name": None,
        "e": None,
    }.items():
        expected = [] if problem is None else [f"path: {problem}"]
        assert list(SourceConfig(path=path).problems()) == expected
        # Only a path of files is one of held-out records.
        if problem and not path.startswith("hf:"):
            held_out = SourceConfig(path="e/a.csv", test_path=path)
            assert list(held_out.problems()) == [f"test_path: {problem}"]


def test_settings_tell_what_is_there():
    put({"p[1]/a.jsonl": LINES})
    (problem,) = SourceConfig(path="p[1]/*.jsonl").problems()
    assert problem == (
        "path: no file matches, got p[1]/*.jsonl (write [[] for the [ of the folder p[1])"
    )
    assert read("p[[]1]/*.jsonl") == ROWS
    os.mkfifo("a.jsonl")
    for path in ("a.jsonl", "/dev/null"):
        assert list(SourceConfig(path=path).problems()) == [
            f"path: must be a file or a folder, got {path}, a pipe or a device "
            "(write a file from it)"
        ]


def test_on_the_command_line():
    put({"d/a.csv": TABLE, "d/b.csv": TABLE})
    run = compose_run(["data=jsonl", "data.sources=[{path: d/*.csv, test_path: 'd/[b].csv'}]"])
    assert (run.data.sources[0].path, run.data.sources[0].test_path) == ("d/*.csv", "d/[b].csv")
    with pytest.raises(ConfigError) as caught:
        compose_run(["data=jsonl", "data.sources=[{path: none.csv}]"])
    assert caught.value.problems == ["data.sources[0].path: no such file or folder, got none.csv"]


def test_settings_need_no_library_of_tables():
    put({"d/a.csv.gz": COMPRESS[".gz"](TABLE.encode())})
    code = (
        "import sys\n"
        "from simpo.config.data import SourceConfig\n"
        "print(list(SourceConfig(path='d/*.csv.gz', test_path='d/a.csv.gz').problems()))\n"
        "print({'pandas', 'pyarrow', 'datasets', 'torch'} & set(sys.modules))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\nset()\n"


@pytest.fixture
def calls(monkeypatch):
    """The libraries may ask the hub; every try to reach another machine fails and is listed."""
    made = []

    def refuse(*args, **kwargs):
        made.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    hub.go_offline_if_unreachable.cache_clear()
    yield made
    hub.go_offline_if_unreachable.cache_clear()


def test_a_local_path_never_goes_to_the_network(calls):
    put(TEXTS | {"set/train.csv": TABLE, "owner/name/a.jsonl": LINES, "plain": "x"})
    put({"far/README.md": README.replace("helpful/*.jsonl", "https://example.org/a.jsonl")})
    put({"far/held/a.jsonl": LINES})
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    for path in (*TEXTS, "set", "owner/name", "saved", "*a.jsonl", "owner/**/*.jsonl"):
        assert list(SourceConfig(path=path).problems()) == []
        assert read(path) == ROWS
    # What is not there, and past the settings' check.
    for path in ("train.csv", "a/train.csv.gz", "x.xlsx", "./none", "a/b/c", "d/*.csv", "~/none"):
        assert list(SourceConfig(path=path).problems()) != []
        assert refusal(path) == f"{path} train: cannot be read: no such file"
    refusal("plain")
    assert read("far", "test", subset="helpful") == ROWS
    assert refusal("far", subset="helpful") == "far train: cannot be read: no such file"
    assert calls == []
    absent = (
        f"it is not in the cache, and {constants.ENDPOINT} does not answer or HF_HUB_OFFLINE is "
        "set (check the network, or name a local folder)"
    )
    for path in ("owner/other", "hf://datasets/owner/name/a.jsonl"):
        assert refusal(path) == f"{path} train: cannot be read: {absent}"
    assert calls


@given(st.text(max_size=12), st.sampled_from(["", *TEXTS, "*.csv", ".xlsx", ".jsonl.gz"]))
def test_only_names_of_the_hub_are_hub_ids(name, end):
    """Whatever has a file's suffix, wildcards, two slashes or a file of that name is none."""
    path = name + end
    if is_hub_id(path):
        assert not kind(path) and not os.path.exists(path)
        assert not set("*?[") & set(path) and path.count("/") < 2 and "://" not in path


COMMIT = "0123456789" * 4


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A hub on this machine with one data set, user/name."""
    files = {
        "data/a.jsonl": LINES.encode(),
        "data/sub/b.jsonl": b'"b"\n',
        "data/c.csv.gz": COMPRESS[".gz"](TABLE.encode()),
        "other.parquet": b"",
    }

    siblings = [{"rfilename": name} for name in files]
    listing = {"id": "user/name", "sha": COMMIT, "siblings": siblings}
    tree = [
        {"type": "file", "path": name, "size": len(content), "oid": str(number)}
        for number, (name, content) in enumerate(files.items())
    ]

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            content = json.dumps(listing).encode()
            if "/tree/" in self.path:
                content = json.dumps(tree).encode()
            elif "/resolve/" in self.path:
                content = files[self.path.partition(f"/resolve/{COMMIT}/")[2]]
            self.send_response(200)
            self.send_header("ETag", f'"{abs(hash(content))}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                asked.append(self.path)
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    asked: list[str] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.go_offline_if_unreachable.cache_clear()
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield asked
        server.shutdown()
    hub.go_offline_if_unreachable.cache_clear()


def test_several_files_of_the_hub_with_one_listing(served):
    folder = hub.download("user/name", None, "data/a.jsonl", "data/sub")
    assert (folder / "data/a.jsonl").is_file() and (folder / "data/sub/b.jsonl").is_file()
    assert sum("/revision/" in path for path in served) == 1
    with pytest.raises(ValueError, match=r"^the data set has no none\.csv "):
        hub.download("user/name", None, "data/a.jsonl", "none.csv")


def test_files_of_the_hub(served, monkeypatch):
    """Fetched one by one, read as local ones, and read again without a network."""
    root = "hf://datasets/user/name"
    assert read(f"{root}/data/**/a.jsonl") == ROWS
    assert read(f"{root}/data/a.jsonl") == ROWS
    assert not any("sub/b" in path for path in served)
    assert placed(f"{root}@v1/data/**/*.jsonl")[2:] == [
        ("record 3 (data/a.jsonl line 3)", ROWS[2]),
        ("record 4 (data/sub/b.jsonl line 1)", "b"),
    ]
    assert read(f"{root}/data/c.csv.gz", "test", test_path=f"{root}/data/c.csv.gz") == ROWS
    assert read(f"{root}/data/sub", test_split=None) == ["b"]
    assert any("/revision/v1" in path for path in served)
    assert refusal(f"{root}/none.csv") == (
        f"{root}/none.csv train: cannot be read: the data set has no none.csv (look at "
        f"{constants.ENDPOINT}/datasets/user/name/tree/main)"
    )
    served.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read(f"{root}/data/a.jsonl") == ROWS
    for path in (f"{root}/other.parquet", f"{root}/none.csv"):
        assert refusal(path) == (
            f"{path} train: cannot be read: it is not in the cache, and {constants.ENDPOINT} does "
            "not answer or HF_HUB_OFFLINE is set (check the network, or name a local folder)"
        )
    assert served == []
