"""Figures of others in model folders, as the hub's own writer puts them there, in the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from simpo.report.compare import compare
from simpo.report.hub_results import CAPTION, others_figures
from simpo.report.page import content
from simpo.report.text import text
from tests.support.made_runs import judge, make

GPQA = EvalResultEntry("Idavidrein/gpqa", "gpqa_diamond", 20.9, date="2025-01-15")
HLE = EvalResultEntry(
    *("cais/hle", "default", 4.5),
    source_url="https://example.org/hle",
    source_name="CAIS HLE",
    notes="no-tools",
)
GPQA_CELLS = {"data set": "Idavidrein/gpqa", "figure": "gpqa_diamond", "value": "20.9"}


def write(model: Path, name: str, *entries: EvalResultEntry, more: str = "") -> Path:
    file = model / ".eval_results" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(list(entries))) + more)
    return file


def test_of_a_run_its_base_and_a_model_named_beside_it(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    write(base, "gpqa.yaml", GPQA)
    write(base, "hle.yaml", HLE)
    runs = [
        make(tmp_path / "runs" / name, steps=4, overrides=(f"model.path={base}",)) for name in "ab"
    ]
    write(other, "all.yaml", GPQA, HLE)
    write(runs[0] / "model", "hle.yaml", HLE)
    empty = {"date": "", "source": "", "notes": ""}
    gpqa = GPQA_CELLS | empty | {"date": "2025-01-15"}
    hle = {
        **{"data set": "cais/hle", "figure": "default", "value": "4.5", "date": ""},
        **{"source": "CAIS HLE, https://example.org/hle", "notes": "no-tools"},
    }
    report = compare([tmp_path / "runs", other])
    assert others_figures(report) == (
        [
            {"model": "a", **hle},
            *({"model": str(other), **cells} for cells in (gpqa, hle)),
            *({"model": str(base), **cells} for cells in (gpqa, hle)),
        ],
        [],
    )
    told = text(report).splitlines()
    at = told.index(CAPTION)
    head = "| model | data set | figure | value | date | source | notes |"
    assert " ".join(told[at + 1].split()) == head
    assert f"<h2>F{CAPTION[1:]}</h2>" in content(report)
    assert "<td>CAIS HLE, https://example.org/hle</td>" in content(report)


def test_nothing_of_nothing(tmp_path: Path) -> None:
    report = compare([make(tmp_path / "run", steps=4)])
    assert others_figures(report) == ([], [])
    assert CAPTION not in text(report) and CAPTION[1:] not in content(report)


def test_what_simpo_judged_itself_is_not_shown_twice(tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=4)
    write(run / "model", "ifbench.yaml", GPQA)
    assert others_figures(compare([run]))[0] == [
        {"model": "run", **GPQA_CELLS, "date": "2025-01-15"}
    ]
    judge(run, [1.0], "ifbench")
    assert others_figures(compare([run])) == ([], [])


def test_unknown_keys_and_dates_that_yaml_reads(tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=4)
    more = (
        "- {dataset: {id: a/b, task_id: t, split: x}, value: 7, date: 2025-01-15, colour: red}\n"
        "- {dataset: {id: a/b, task_id: t}, value: 'A | B\x1b[2J', error: none}\n"
    )
    file = write(run / "model", "x.yaml", more=more)
    file.write_text("\ufeff" + more.replace("\x1b", "\\e").replace("'", '"'))
    assert others_figures(compare([run])) == (
        [
            {"model": "run", "data set": "a/b", "figure": "t", "value": "7", "date": "2025-01-15"},
            {"model": "run", "data set": "a/b", "figure": "t", "value": "A B [2J", "date": ""},
        ],
        [],
    )


ENTRY = (
    "entry {}: needs dataset with id and task_id, a value, and if it has a source, its url "
    "(mend or remove it)"
)


@pytest.mark.parametrize(
    ("damaged", "told"),
    [
        (b"", ["must be a list of results (mend or remove it)"]),
        (b"a: 1", ["must be a list of results (mend or remove it)"]),
        (b"[", ["is not YAML (mend or remove it)"]),
        (b"[" * 3000, ["is not YAML (mend or remove it)"]),
        (b"- 2025-13-45", ["is not YAML (mend or remove it)"]),
        (b"\xff", ["cannot be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid "
                   "start byte"]),
        (b"- 1\n- {dataset: {id: a/b, task_id: t}}", [ENTRY.format(1), ENTRY.format(2)]),
        (b"- {dataset: a, value: 1}", [ENTRY.format(1)]),
        (b"- {dataset: {id: [a], task_id: t}, value: 1}", [ENTRY.format(1)]),
        (b"- {dataset: {id: a, task_id: t}, value: {a: 1}}", [ENTRY.format(1)]),
        (b"- {dataset: {id: a, task_id: t}, value: 1, source: me}", [ENTRY.format(1)]),
        (b"- {dataset: {id: a, task_id: t}, value: 1, source: {name: me}}", [ENTRY.format(1)]),
        (b"- {dataset: {id: a, task_id: t}, value: 0x1" + b"0" * 9000 + b"}", [ENTRY.format(1)]),
    ],
)  # fmt: skip
def test_damaged_files_are_told_and_others_shown(
    damaged: bytes, told: list[str], tmp_path: Path
) -> None:
    run = make(tmp_path / "run", steps=4)
    write(run / "model", "whole.yaml", GPQA)
    file = run / "model" / ".eval_results" / "damaged.yaml"
    file.write_bytes(damaged)
    report = compare([run])
    lines = [f"{file}: {fault}" for fault in told]
    assert others_figures(report) == (
        [{"model": "run", **GPQA_CELLS, "date": "2025-01-15"}],
        lines,
    )
    assert text(report).splitlines()[-len(lines) :] == lines
