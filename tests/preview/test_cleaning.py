"""The preview counts what each check finds, also where it is off, and says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpo.config.data import DataConfig, SourceConfig
from simpo.config.filters import FilterConfig
from simpo.data.mixture import Mixture, load_mixture
from simpo.previewing import cleaning
from simpo.previewing.cleaning import Cleaning
from tests.support.browser import look_at

ROWS: list[dict[str, Any]] = [
    {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    {"prompt": "Held?", "chosen": "<b>&", "rejected": "No."},
    {"prompt": "How?", "chosen": "So.", "rejected": "No! " * 600},
    {"prompt": "How?", "chosen": "", "rejected": "No."},
    {"prompt": "Same?", "chosen": "So.", "rejected": "So."},
]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    held = [{"prompt": "Held?", "chosen": "So.", "rejected": "Not so, not at all, never."}]
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return DataConfig(
        name="x",
        sources=[SourceConfig(path="train.jsonl", test_path="test.jsonl")],
        on_bad_record="drop",  # type: ignore[arg-type]
        filter=FilterConfig(exact_duplicates=True, max_length_ratio=100.0),
    )


@pytest.fixture
def mixture(config: DataConfig) -> Mixture:
    return load_mixture(config)


def test_the_table(config: DataConfig, mixture: Mixture) -> None:
    """The run's own setting counts where there is one; pairs that the run leaves out count too."""
    assert len(mixture.train) == 2
    lines = cleaning.text(Cleaning.of(config, mixture))
    assert lines == [
        "| check                              | in this run | pairs | share | held out |",
        "|------------------------------------|-------------|-------|-------|----------|",
        "| data.drop_overlap=true             | off         | 1     | 25.0% | -        |",
        "| data.filter.benchmarks=[FILE]      | off         | -     | -     | -        |",
        "| data.filter.max_length_ratio=100.0 | on          | 1     | 25.0% | 0        |",
        "| data.filter.min_score_margin=0.01  | off         | -     | -     | -        |",
        "| data.filter.cut_off=true           | off         | 0     | 0.0%  | 0        |",
        "| data.filter.language=true          | off         | 0     | 0.0%  | 0        |",
        "| data.filter.exact_duplicates=true  | on          | 1     | 25.0% | 0        |",
        "| data.filter.near_duplicates=0.8    | off         | 1     | 25.0% | 0        |",
        "       3 of 4 train pairs are found by a check",
        "       train.jsonl train record 3: the prompt of test.jsonl test record 1",
        "       data.filter.benchmarks=[FILE]: no file is named",
        "       train.jsonl train record 4: rejected is 800.0 times as long as chosen: 2,400 "
        "and 3 characters",
        "       data.filter.min_score_margin=0.01: no pair has scores",
        "       train.jsonl train record 2: the same as train.jsonl train record 1",
        "       train.jsonl train record 2: Jaccard index 1.000 with train.jsonl train record 1",
    ]


def test_held_out_pairs_are_counted(config: DataConfig, mixture: Mixture) -> None:
    config.filter.max_length_ratio = 5
    (ratio,) = (f for f in Cleaning.of(config, mixture).findings if "length_ratio=5" in f.setting)
    assert (ratio.pairs, ratio.held_out) == (1, 1)
    assert len(load_mixture(config).test) == 1


def test_the_page_in_a_browser(config: DataConfig, mixture: Mixture, tmp_path: Path) -> None:
    found = Cleaning.of(config, mixture)
    file = tmp_path / "cleaning.html"
    file.write_text(cleaning.page(found), encoding="utf-8")
    seen = look_at(file)
    assert seen.console == []
    for text in (
        "<code>data.filter.max_length_ratio=100.0</code>",
        "Leaves out pairs with one reply more than so many times as long as another",
        "<td>chosen: the response is empty</td>",
        "<li>train.jsonl train record 6: ",
        "... and 400 more characters",
        "the prompt of test.jsonl test record 1",
        "<dd>&lt;b&gt;&amp;</dd>",
    ):
        assert text in seen.html
    assert cleaning.page(Cleaning.of(config, load_mixture(config))) == cleaning.page(found)


def test_at_most_ten_examples(config: DataConfig) -> None:
    Path("train.jsonl").write_text(f"{json.dumps(ROWS[0])}\n" * 30)
    found = Cleaning.of(config, load_mixture(config))
    (same,) = (f for f in found.findings if "exact" in f.setting)
    assert (same.pairs, len(same.examples)) == (29, 10)
    assert "29.\nThe first 10:" in cleaning.page(found)
