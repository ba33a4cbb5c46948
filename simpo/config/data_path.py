"""Tells from a data path what it names: files, a folder, or a data set of the hub.

Only the path and the folders on this machine are looked at; nothing is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path

from simpo.config.paths import looks_local

TEXT = (".jsonl", ".ndjson", ".jsonlines", ".json", ".csv", ".tsv")
COLUMNAR = (".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes that may follow one of TEXT."""
UNREADABLE = (
    *(".txt", ".md", ".html", ".xml", ".yaml", ".yml", ".zip", ".tar", ".tgz", ".7z", ".orc"),
    *(".xls", ".xlsx", ".pkl", ".pickle", ".pt", ".npy", ".npz", ".h5", ".hdf5", ".db", ".sqlite"),
)
"""Suffixes of files that cannot be read; a path with one is never taken for a hub id."""
FILE = "a .jsonl, .json, .csv, .tsv, .parquet or .arrow file"
HUB_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.*[^/])/?")
"""Address of a file, glob or folder in a data set of the hub: its id, revision and path."""


def kind(path: str) -> str:
    """The suffixes that say how a file is read, such as .csv or .jsonl.gz; empty for any other."""
    before, last = ["", "", *(suffix.lower() for suffix in Path(path).suffixes)][-2:]
    if last in COMPRESSED and before in TEXT:
        return before + last
    return last if last in TEXT + COLUMNAR else ""


def is_glob(path: str) -> bool:
    """Whether a path has wildcards; a file or folder of that very name is none."""
    return has_magic(path) and not os.path.exists(os.path.expanduser(path))


def names_files(path: str) -> bool:
    """Whether a path names files that make up one split, here or on the hub."""
    return bool(kind(path)) or is_glob(path)


def is_hub_id(path: str) -> bool:
    """Whether a path is not here and may be a data set of the hub; no other is sent there."""
    return not (
        "://" in path
        or names_files(path)
        or Path(path).suffix.lower() in COMPRESSED + UNREADABLE
        or looks_local(path)
        or os.path.exists(path)
    )


def matched(pattern: str) -> list[str]:
    """The files that a glob matches, sorted; `**` is any number of folders."""
    found = sorted(glob(os.path.expanduser(pattern), recursive=True))
    return [path for path in found if os.path.isfile(path)]


def path_problems(path: str) -> Iterator[str]:
    """What is wrong with the path of a source, as far as it can be seen without reading."""
    # os.path.exists is False for a name that no file can have, where Path.exists raises.
    expanded = os.path.expanduser(path)
    if path.startswith("builtin:"):
        if path != "builtin:demo":
            yield f"the only built-in data set is builtin:demo, got {path}"
    elif path.startswith("hf://"):
        yield from _problems_on_hub(path)
    elif "://" in path:
        yield f"must be a hub id or a local file or folder, got {path} (download it)"
    elif is_glob(path):
        files = matched(path)
        hint = _literal_hint(path)
        yield from kind_problems(files) if files else [f"no file matches, got {path}{hint}"]
    elif not os.path.exists(expanded):
        if not is_hub_id(path):
            yield f"no such file or folder, got {path}"
    elif not os.path.isfile(expanded) and not os.path.isdir(expanded):
        yield f"must be a file or a folder, got {path}, a pipe or a device (write a file from it)"
    elif kind(path) and not os.path.isfile(expanded):
        yield f"must be a file, got the folder {path} (rename the folder)"
    elif not kind(path) and not os.path.isdir(expanded):
        yield f"must be {FILE}, a folder or a hub id, got the file {path} (convert or rename it)"


def _literal_hint(pattern: str) -> str:
    """What to write where a folder has `[` in its name, which is a wildcard beside others."""
    for folder in Path(os.path.expanduser(pattern)).parents:
        if "[" in folder.name and folder.is_dir():
            return f" (write [[] for the [ of the folder {folder.name})"
    return ""


def kind_problems(files: list[str]) -> Iterator[str]:
    """What is wrong with the kinds of the files of one split."""
    other = [file for file in files if not kind(file)]
    if other:
        yield f"matches {other[0]}, which is not {FILE} (narrow the pattern)"
    elif len(kinds := sorted({kind(file) for file in files})) > 1:
        yield f"holds files of several kinds, {', '.join(kinds)} (name one kind by a glob)"


def _problems_on_hub(path: str) -> Iterator[str]:
    if not (address := HUB_FILE.fullmatch(path)):
        yield (
            f"must be hf://datasets/USER/NAME/FILE, got {path} "
            "(a whole data set goes by its hub id, USER/NAME)"
        )
    elif not names_files(path) and Path(address[3]).suffix.lower() in COMPRESSED + UNREADABLE:
        yield f"must be {FILE}, got {path}"
