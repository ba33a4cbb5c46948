"""Settings of a run's data: the sources, and how a pair becomes tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from omegaconf import MISSING

from simpo.config.choices import Compat, OnBadRecord, PairChoice, PromptTruncation, Reasoning
from simpo.config.data_path import FILE, names_files, path_problems
from simpo.config.errors import did_you_mean
from simpo.config.filters import FilterConfig
from simpo.config.own_code import is_function
from simpo.config.ranges import at_least

MAX_WEIGHT = 1000
NO_NAMES = ("mean", "rewards", "logps")
"""First parts of keys of held-out metrics, so no names of sets."""
FORMATS = (
    *("openai", "sharegpt", "hh_rlhf", "ultrafeedback", "dialogues", "pair", "alpaca", "orca"),
    *("comparison", "replies", "messages", "prompt", "kto"),
)
"""Names of the shapes of record in `simpo.data.reading.shapes`."""


@dataclass(kw_only=True)
class SourceConfig:
    """One data set of the mixture."""

    path: str = MISSING
    """Hub id, local folder, file (JSON lines, JSON, CSV, TSV, parquet or Arrow), glob of files,
    `hf://datasets/USER/NAME/FILE`, or `builtin:demo`."""
    subset: str | None = None
    """Configuration name of a hub data set, or of a folder whose README.md lists several."""
    revision: str | None = None
    """Branch, tag or commit of a data set of the hub."""
    train_split: str | None = "train"
    """Split to train on; null: none. For a file, the file itself is the split."""
    test_split: str | None = "test"
    """Held-out split, always used whole; null: none."""
    test_path: str | None = None
    """A second file, or glob, that holds the held-out records of a source of files."""
    format: str | None = None
    """Shape of the records (docs/data.md), or `module:function`, your function that converts them
    (docs/extending.md); null: the first shape that fits."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns under our names, as `{theirs: ours}`; `{input.text: prompt}` reaches into objects."""
    pairs: PairChoice = PairChoice.best_worst
    """Pairs of a prompt with scored replies: the best with the worst or a random one, or all. A
    loss that compares all replies (loss.compare) takes the whole record."""
    min_margin: float = 0.0
    """Replies whose scores differ by less make no pair; nor do those of equal scores. Of a whole
    record, the best and the worst reply."""
    weight: float = 1.0
    """Share of the train split taken: 0.5 takes half, 2.5 takes all twice and half once more; at
    most 1000."""
    num_pairs: int | None = None
    """Number of train records taken, instead of weight."""
    held_out_name: str | None = None
    """Name of its held-out set in metrics (`eval/<name>/loss`), which are logged for each set if
    there are several; null: the last part of the path."""

    def is_file(self) -> bool:
        """Whether the path names files that are one split; held-out records come by `test_path`."""
        return names_files(self.path)

    def has_held_out(self) -> bool:
        """Whether it names held-out records."""
        return self.test_split is not None and (not self.is_file() or self.test_path is not None)

    def problems(self) -> Iterator[str]:
        if not self.path:
            yield "path: must not be empty"
        if not 0 < self.weight <= MAX_WEIGHT:
            yield f"weight: must be above 0 and at most {MAX_WEIGHT}, got {self.weight}"
        if self.num_pairs is not None and self.weight != 1.0:
            both = f"{self.num_pairs} and {self.weight}"
            yield f"num_pairs: cannot go with weight, got {both} (keep one)"
        if self.num_pairs is not None and self.num_pairs < 1:
            yield f"num_pairs: must be 1 or more, got {self.num_pairs}"
        if self.held_out_name in NO_NAMES:
            yield f"held_out_name: is a part of names of metrics, got {self.held_out_name}"
        elif self.held_out_name and not re.fullmatch(r"[\w-]+", self.held_out_name):
            yield f"held_out_name: must be letters, digits, _ and -, got {self.held_out_name}"
        if self.train_split is None and self.test_split is None:
            yield "train_split: null like test_split, so the source gives nothing (set one)"
        yield from self._problems_of_shape()
        yield from (f"path: {problem}" for problem in path_problems(self.path) if self.path)
        yield from self._problems_of_test_path()

    def _problems_of_shape(self) -> Iterator[str]:
        name = self.format
        if name is not None and name not in FORMATS and not is_function(name):
            hint = did_you_mean(name, FORMATS, f"shapes: {', '.join(FORMATS)}")
            yield f"format: must be a shape or module:function, got {name or repr(name)} ({hint})"
        columns = ", ".join(f"{theirs}: {ours}" for theirs, ours in self.columns.items())
        if not all(isinstance(ours, str) for ours in self.columns.values()):
            yield f"columns: must be of the form {{name: value, ...}}, got {{{columns}}}"
            return
        for ours, times in Counter(self.columns.values()).items():
            if times > 1:
                yield f"columns: {times} are to be {ours}, got {{{columns}}} (keep one)"
        yield from at_least(self, 0, "min_margin")

    def _problems_of_test_path(self) -> Iterator[str]:
        if self.test_path is None:
            return
        if not self.is_file():
            yield f"test_path: only where path is {FILE} (else use test_split)"
        elif not names_files(self.test_path):
            yield f"test_path: must be {FILE}, got {self.test_path}"
        else:
            yield from (f"test_path: {problem}" for problem in path_problems(self.test_path))


@dataclass(kw_only=True)
class DataConfig:
    """The mixture of preference pairs and how a pair becomes tokens."""

    name: str = MISSING
    """Short name, used in the run's folder and tables."""
    sources: list[SourceConfig] = field(default_factory=list)
    """The data sets mixed."""
    seed: int = 42
    """Seed that decides which records are taken, and their order."""
    max_length_tokens: int = 2048
    """Longest prompt + response; longer ones are cut."""
    max_prompt_tokens: int = 1800
    """A prompt longer than this is cut if a response would not fit otherwise."""
    prompt_truncation: PromptTruncation = PromptTruncation.keep_end
    """Which end of a cut prompt is kept (a BOS token always is)."""
    compat: Compat = Compat.none
    """paper: the token ids of the original SimPO trainer, with its header tokens and joint cut."""
    reasoning: Reasoning = Reasoning.score
    """What happens to the reasoning of replies. score: it is scored like the rest. keep: it stays
    before the answer but is not scored. drop: it is removed from all turns."""
    on_bad_record: OnBadRecord = OnBadRecord.stop
    """stop: the first bad record ends the run. drop: leave bad ones out and count them by fault."""
    drop_overlap: bool = False
    """Leave out train records whose prompt is also held out; the overlap is counted either way."""
    filter: FilterConfig = field(default_factory=FilterConfig)

    def held_out_names(self) -> list[str]:
        """The name of each source's held-out set, with a number behind one that would come twice.

        Sources that are given the same name have one set in common.
        """
        given = [source.held_out_name for source in self.sources]
        names: list[str] = []
        for source in self.sources:
            last = Path(source.test_path or source.path).name.split(".")[0]
            own = re.sub(r"[^\w-]+", "-", last).strip("-") or "test"
            others = (f"{own}-{number}" for number in count(2))
            taken = {*NO_NAMES, *names, *given}
            unused = next(name for name in chain([own], others) if name not in taken)
            names.append(source.held_out_name or unused)
        return names

    def problems(self) -> Iterator[str]:
        if not self.sources:
            yield "sources: must list at least one source (such as [{path: train.jsonl}])"
        elif all(source.train_split is None for source in self.sources):
            yield "sources: no source has a train_split"
        yield from at_least(self, 0, "seed")
        yield from at_least(self, 2, "max_length_tokens")
        if not 1 <= self.max_prompt_tokens < self.max_length_tokens:
            yield (
                f"max_prompt_tokens: must be from 1 to below max_length_tokens "
                f"({self.max_length_tokens}), got {self.max_prompt_tokens}"
            )
        if self.reasoning is Reasoning.keep and self.compat is Compat.paper:
            yield "reasoning: with compat=paper all of a response is scored, got keep (set drop)"
