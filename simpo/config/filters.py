"""Settings of the checks that leave out train pairs (docs/cleaning.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from simpo.config.data_path import FILE, kind
from simpo.config.ranges import at_least

BENCHMARK_FILE = FILE.replace("a ", "a .txt, ", 1)
LOWEST_JACCARD = 0.5


@dataclass(kw_only=True)
class FilterConfig:
    """Which train pairs are left out. Nothing is left out by default; held-out pairs never are.
    `simpo preview` counts what each check would leave out."""

    benchmarks: list[str] = field(default_factory=list)
    """Files (.txt, or of any kind that a source may be) and folders of benchmark prompts: leave out
    pairs whose prompt has 13 words in a row of one, or is a shorter one."""
    max_length_ratio: float | None = None
    """Leave out pairs with one reply more than this many times as long as another, in
    characters; null: off."""
    min_score_margin: float | None = None
    """Leave out pairs whose chosen reply scores less than this above the rejected one; pairs
    without scores stay; null: off."""
    cut_off: bool = False
    """Leave out pairs with a reply that ends in the middle of a sentence or of a code block."""
    language: bool = False
    """Leave out pairs with a reply in another language than the prompt, translations included."""
    exact_duplicates: bool = False
    """Leave out pairs with the prompt and replies of an earlier one."""
    near_duplicates: float | None = None
    """Leave out pairs whose word 3-grams have at least this Jaccard index, 0.5 to 1, with those of
    an earlier pair that stays; null: off."""

    def problems(self) -> Iterator[str]:
        yield from at_least(self, 1, "max_length_ratio")
        if self.near_duplicates is not None and not LOWEST_JACCARD <= self.near_duplicates <= 1:
            yield (
                f"near_duplicates: must be from {LOWEST_JACCARD} to 1, or null, "
                f"got {self.near_duplicates}"
            )
        for index, path in enumerate(self.benchmarks):
            place = os.path.expanduser(path)
            if not os.path.exists(place):
                yield f"benchmarks[{index}]: no such file or folder, got {path or repr(path)}"
            elif os.path.isfile(place) and not holds_prompts(path):
                yield (
                    f"benchmarks[{index}]: must be {BENCHMARK_FILE}, or a folder of them, "
                    f"got {path} (convert it)"
                )


def holds_prompts(path: str) -> bool:
    """Whether a file can be read as benchmark prompts."""
    return bool(kind(path)) or Path(path).suffix.lower() == ".txt"
