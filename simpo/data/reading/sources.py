"""Finds the files of one split of a source, or its data set, and yields the raw records.

A local path is never sent to the hub. Folders are divided into splits as `datasets` does it, by the
names of their files, but `simpo.data.reading.readers` reads the files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from simpo.config import data_path
from simpo.config.data import SourceConfig
from simpo.config.errors import DataError
from simpo.data import hub
from simpo.data.demo.records import demo_records
from simpo.data.reading.readers import read_file
from simpo.run.progress import on_terminal

SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
"""Words in the name of a file or folder that put it into a split, as `datasets` reads them."""
METADATA_FILES = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def origin(source: SourceConfig, held_out: bool) -> str:
    """Path or hub id of a split, as written in the settings."""
    return source.test_path if held_out and source.test_path else source.path


def raw_records(
    source: SourceConfig, split: str, held_out: bool, seed: int
) -> Iterator[tuple[str, Any]]:
    """Yield the records of a split, each with its place: `record 3`, and where that is not the
    third line of a single file, the file and line too: `record 3 (data/b.jsonl line 1)`.

    A record that cannot be parsed is a `RecordFault`.

    Raises:
        DataError: the source cannot be read, or changed while it was read.
    """
    path = origin(source, held_out)
    # Libraries raise errors of many types, with messages of many lines.
    try:
        for number, (where, record) in enumerate(_records(source, path, split, seed), start=1):
            shown = f" ({where})" if where and where != f"line {number}" else ""
            yield f"record {number}{shown}", record
    except Exception as error:
        # The reason of "An error occurred while generating the dataset" is in its cause.
        address = data_path.HUB_FILE.fullmatch(path)
        name = address[1] if address else path
        fault = hub.reason(error.__cause__ or error, f"datasets/{name}")
        raise DataError(f"{path} {split}: cannot be read: {fault}") from error


def files_of_split(source: SourceConfig, split: str, held_out: bool) -> list[Path] | None:
    """The files that decide the records of a split; None if there are none that tell.

    Those of a hub dataset are in the cache of `datasets`, in a folder of its revision, which the
    hub is asked for.

    Raises:
        Exception: of many types, if the source cannot be read.
    """
    path = origin(source, held_out)
    folder = Path(os.path.expanduser(path))
    if path == "builtin:demo":
        return []
    if data_path.is_hub_id(path):
        cached = _hub_dataset(source, split).cache_files
        return [Path(file["filename"]) for file in cached] or None
    if _is_saved(folder):
        return sorted(file for file in folder.rglob("*") if file.is_file())
    return list(_files(source, path, split).values())


def _records(source: SourceConfig, path: str, split: str, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield where a record lies, if that says more than its number, and the record."""
    folder = Path(os.path.expanduser(path))
    if path == "builtin:demo":
        yield from (("", record) for record in demo_records(seed, split))
    elif data_path.is_hub_id(path):
        yield from (("", record) for record in _hub_dataset(source, split))
    elif _is_saved(folder):
        yield from (("", record) for record in _saved(folder, source, split))
    else:
        yield from _read(_files(source, path, split))


def _read(files: Mapping[str, Path]) -> Iterator[tuple[str, Any]]:
    """Yield the records of named files; the names are shown if there are several."""
    for name, file in files.items():
        try:
            for index, (line, record) in enumerate(read_file(file), start=1):
                where = f"line {line}" if line else ""
                if len(files) > 1:
                    where = f"{name} {where or f'record {index}'}"
                yield where, record
        except Exception as error:
            if len(files) == 1:
                raise
            raise ValueError(f"{name}: {hub.reason(error, name)}") from None


def _files(source: SourceConfig, path: str, split: str) -> dict[str, Path]:
    """The files of a split by the names that messages show, in the order in which they are read."""
    root, local = None, os.path.expanduser(path)
    if address := data_path.HUB_FILE.fullmatch(path):
        repo, revision, local = address.groups()
        root = hub.download(repo, unquote(revision) if revision else source.revision, local)
        local = str(root / local)
    if os.path.isdir(local):
        root = Path(local)
        paths = [str(root / name) for name in _files_of_folder(root, source.subset, split)]
    else:
        paths = data_path.matched(local) if data_path.is_glob(local) else [local]
    if not paths or not os.path.exists(paths[0]):
        raise ValueError("no such file")
    if fault := next(data_path.kind_problems(paths), None):
        raise ValueError(fault)
    return {os.path.relpath(file, root) if root else file: Path(file) for file in paths}


def _files_of_folder(folder: Path, subset: str | None, split: str) -> list[str]:
    """The names of the files of one split, sorted, relative to their folder."""
    relative = (PurePosixPath(file.relative_to(folder).as_posix()) for file in folder.rglob("*"))
    names = sorted(
        str(name)
        for name in relative
        if data_path.kind(name.name)
        and name.name not in METADATA_FILES
        and not any(part.startswith((".", "__")) for part in name.parts)
        and (folder / name).is_file()
    )
    if not names:
        raise ValueError(f"the folder has no {data_path.FILE[2:]}")
    return _of(_listed_splits(folder, names, subset) or _splits(names), split)


def _of(splits: Mapping[Any, Any], split: str) -> Any:
    if split not in splits:
        raise ValueError(
            f"no such split, only {', '.join(sorted(splits))} "
            "(train_split and test_split take another, or null for none)"
        )
    return splits[split]


def _splits(names: list[str]) -> dict[str, list[str]]:
    """The splits that names show: data/SPLIT-00000-of-00001, else a word in the names of folders,
    else a word in the names of files; else all files are the train split."""
    sharded: dict[str, list[str]] = {}
    for name in names:
        if found := re.fullmatch(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*", name):
            sharded.setdefault(found[1], []).append(name)
    if sharded:
        return sharded
    for parts in (lambda name: name.parts[:-1], lambda name: name.parts[-1:]):
        splits = {}
        for split, words in SPLIT_WORDS.items():
            word = _word(words)
            found_names = [n for n in names if any(map(word.search, parts(PurePosixPath(n))))]
            if found_names:
                splits[split] = found_names
        if splits:
            return splits
    # As `datasets` does it, but it would train on them without a word.
    held_out = _word(f"{SPLIT_WORDS['validation']}|{SPLIT_WORDS['test']}", re.IGNORECASE)
    for name in names:
        if any(map(held_out.search, PurePosixPath(name).parts)):
            raise ValueError(
                f"{name} would be train, as names of splits are read in lower case only "
                "(rename it, or name the files by a glob)"
            )
    return {"train": names}


def _word(words: str, flags: int = 0) -> re.Pattern[str]:
    return re.compile(rf"(?:^|[-._ 0-9])(?:{words})(?:$|[-._ 0-9])", flags)


def _listed_splits(folder: Path, names: list[str], subset: str | None) -> dict[str, list[str]]:
    """The splits of a subset that the header of README.md lists, as in data sets of the hub."""
    readme = folder / "README.md"
    if not subset and not readme.is_file():
        return {}
    from huggingface_hub import metadata_load

    header = (metadata_load(readme) if readme.is_file() else None) or {}
    if not subset and "configs" not in header:
        return {}
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs

    subsets = MetadataConfigs.from_dataset_card_data(header)
    only = next(iter(subsets)) if len(subsets) == 1 else None
    chosen = subset or subsets.get_default_config_name() or only
    if chosen not in subsets:
        listed = f"lists {', '.join(subsets)}" if subsets else "lists none"
        raise ValueError(f"no subset {subset or 'is set'}: its README.md {listed} (set subset)")
    inside = folder / (subsets[chosen].get("data_dir") or "")
    if not (patterns := subsets[chosen].get("data_files")):
        return _splits([name for name in names if (folder / name).is_relative_to(inside)])
    return {
        split: sorted(
            {
                os.path.relpath(inside / file, folder)
                for pattern in wanted
                for file in glob(pattern, root_dir=inside, recursive=True)
            }
            & set(names)
        )
        for split, wanted in sanitize_patterns(patterns).items()
    }


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def _saved(folder: Path, source: SourceConfig, split: str) -> Any:
    """A split of a data set that `save_to_disk` wrote."""
    from datasets import DatasetDict, disable_progress_bars, load_from_disk

    disable_progress_bars()
    saved = load_from_disk(str(folder))
    # A saved data set without named splits is one split, like a file.
    only = source.train_split or source.test_split
    return _of(saved if isinstance(saved, DatasetDict) else {only: saved}, split)


def _hub_dataset(source: SourceConfig, split: str) -> Any:
    # Imported here because it takes a second, mostly for pandas and pyarrow.
    import datasets
    from huggingface_hub import constants

    if not on_terminal():
        datasets.disable_progress_bars()
    hub.go_offline_if_unreachable()
    datasets.config.HF_HUB_OFFLINE |= constants.HF_HUB_OFFLINE
    return datasets.load_dataset(source.path, source.subset, split=split, revision=source.revision)
