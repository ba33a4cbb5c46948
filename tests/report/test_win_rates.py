"""What judges found, in the report: tables, paired differences, and beside published results."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from simpo.config.errors import ConfigError, DamagedError
from simpo.report.compare import Comparison, compare
from simpo.report.page import render
from simpo.report.text import ROWS_SHOWN, damaged_lines, text
from simpo.run.judged import Figure, read_judged
from simpo.run.runs import find_runs, read_runs
from tests.support.browser import Tab
from tests.support.made_runs import judge, make

WIDTHS = "[innerWidth, document.documentElement.scrollWidth]"


def won(number: int, of: int = 200) -> list[float]:
    return [1.0] * number + [0.0] * (of - number)


def judged_runs(folder: Path, numbers: dict[str, int], **more: Any) -> Comparison:
    """Runs that won that many of 200 questions, each those of a worse run too."""
    for name, number in numbers.items():
        judge(make(folder / name, steps=4), won(number), **more)
    return compare([folder])


def test_a_table_and_paired_differences(tmp_path: Path) -> None:
    """100 won questions against 98 is chance; against 60 it is not."""
    report = judged_runs(tmp_path, {"a": 60, "b": 100, "c": 98}, notes=["LC is approximate."])
    (rates,) = report.judged
    assert (list(rates.judged), rates.groups) == ([1, 2, 0], [[1, 2, 0]])
    near, far = rates.behind[2], rates.behind[0]
    assert (near.mean, far.mean) == pytest.approx((1, 20))
    # 40 of 200 questions that one alone won.
    error = 100 * math.sqrt(0.2 * 0.8 / 200)
    assert (far.low, far.high) == pytest.approx((20 - 1.96 * error, 20 + 1.96 * error), abs=0.6)
    assert far.p < 1e-9 and near.p == pytest.approx(math.erfc(math.sqrt(0.02 / 0.0198)), abs=0.01)
    lines = text(report).splitlines()
    begin = lines.index(
        "alpaca_eval_2, 200 questions, against gpt4_1106_preview, judged by gpt-4-1106-preview"
    )
    head, _, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in lines[begin + 1 :][:5])
    assert head == [
        *("run", "LC win rate", "win rate", "behind the best", "win rate, official interval"),
        *("position bias", "agreement", "malformed", "model's chars", "baseline's chars"),
    ]
    same = ["12%", "95%", "3 of 420", "1825", "2049"]
    assert rows == [
        ["b", "53.0 (50.0 to 56.0)", "50.0 (47.0 to 53.0)", "best", "49.0 to 51.0", *same],
        ["c", "52.0 (49.0 to 55.0)", "49.0 (46.0 to 52.0)", rows[1][3], "48.0 to 50.0", *same],
        ["a", "33.0 (30.0 to 36.0)", "30.0 (27.0 to 33.0)", rows[2][3], "29.0 to 31.0", *same],
    ]
    assert rows[2][3] == f"20.0 ({far.low:.1f} to {far.high:.1f}), p {far.p:.2g}"
    assert lines[begin + 6 :] == [
        "percent, a win rate of 50 is as good as the baseline; (low to high): 95 % interval, by "
        "resampling questions; official: as the benchmark's own script computes it",
        "behind the best: mean difference on the same questions, as judged (no control of length); "
        "p after Holm",
        "LC is approximate.",
    ]
    narrow = text(report, 80).splitlines()
    begin = narrow.index(lines[begin])
    assert [len(line) <= 80 for line in narrow[begin + 1 :][:5]] == [True] * 5
    assert narrow[begin + 6].startswith("too wide for this terminal: behind the best, win rate, of")


def test_a_terminal_shows_few_notes(tmp_path: Path) -> None:
    for number in range(ROWS_SHOWN + 5):
        folder = make(tmp_path / f"{number:02}", steps=4, pairs=4, prompts=1)
        judge(folder, won(9), notes=[f"note {number}"])
    report = compare([tmp_path])
    lines = text(report, 200).splitlines()
    # Two are about intervals.
    assert lines[-2:] == ["37: note 37", "7 more notes are in the page"]
    assert text(report).splitlines()[-1] == "44: note 44"


def test_columns_for_programs(tmp_path: Path) -> None:
    make(tmp_path / "z", steps=4)
    report = judged_runs(tmp_path, {"a": 60, "b": 100})
    a, b, z = report.lines()
    assert a.keys() == b.keys() == z.keys()
    name = "alpaca_eval_2"
    assert (a[f"{name}/lc_win_rate"], a[f"{name}/win_rate low"]) == (33.0, 27.0)
    assert (b[f"{name}/win_rate official high"], b[f"{name}/judge"]) == (51.0, "gpt-4-1106-preview")
    assert (a[f"{name}/behind best"], b[f"{name}/behind best"]) == (pytest.approx(20), None)
    assert (a[f"{name}/mean_chars model"], a[f"{name}/first_share"]) == (1825.0, 0.56)
    assert {value for key, value in z.items() if key.startswith(name)} == {None}


def test_other_questions_judges_and_baselines(tmp_path: Path) -> None:
    """Pairs of runs share half of their questions; those of another judge are in a group apart."""
    for name, number in (("a", 60), ("b", 100)):
        folder = make(tmp_path / name, steps=4)
        questions = {str(i + 100 * (name == "b")): x for i, x in enumerate(won(number))}
        judge(folder, won(number), by_question=questions, notes=[f"of {name}"])
    for name, number in (("c", 150), ("d", 140)):
        judge(make(tmp_path / name, steps=4), won(number), judge="my-reward")
    judge(make(tmp_path / "e", steps=4), won(10), baseline="base", by_question={"0": 1.0})
    report = compare([tmp_path])
    (rates,) = report.judged
    assert [[report.names[i] for i in group] for group in rates.groups] == [
        ["c", "d"],
        ["b", "a"],
        ["e"],
    ]
    # The questions 100 to 199: b won them all, a none.
    assert {report.names[i]: one.mean for i, one in rates.behind.items()} == {"d": 5.0, "a": 100.0}
    # One comparison in each group, so Holm changes nothing.
    assert rates.behind[3].p == pytest.approx(
        math.erfc(5 / (100 * math.sqrt(0.05 * 0.95 / 200)) / math.sqrt(2)), rel=0.5
    )
    lines = rates.table(report.names)
    assert [(line["judge"], line["baseline"], line["behind the best"][:3]) for line in lines] == [
        ("my-reward", "gpt4_1106_preview", "bes"),
        ("my-reward", "gpt4_1106_preview", "5.0"),
        ("gpt-4-1106-preview", "gpt4_1106_preview", "bes"),
        ("gpt-4-1106-preview", "gpt4_1106_preview", "100"),
        ("gpt-4-1106-preview", "base", ""),
    ]
    assert rates.caption() == "alpaca_eval_2, 200 questions"
    assert rates.notes(report.names)[2:] == [
        "runs with another judge or baseline are not compared with each other: my-reward against "
        "gpt4_1106_preview; gpt-4-1106-preview against gpt4_1106_preview; gpt-4-1106-preview "
        "against base",
        "b: of b",
        "a: of a",
    ]


def test_points_and_what_is_not_known(tmp_path: Path) -> None:
    """MT-Bench: points of each question from 1 to 10, no baseline, nothing asked twice."""
    for name, points in (("a", [8.0, 4.0]), ("b", [9.0, 7.0])):
        judge(
            make(tmp_path / name, steps=4),
            points,
            "mt_bench",
            kind="mt_bench",
            baseline="",
            figures={"score": Figure(sum(points) / 2)},
            **dict.fromkeys(("position_bias", "first_share", "agreement")),
            mean_chars={"model": 10.0},
        )
    report = compare([tmp_path])
    (rates,) = report.judged
    assert rates.behind[0].mean == 2.0
    assert rates.table(report.names)[0] == {
        "run": "b",
        "score": "8.00",
        "behind the best": "best",
        "malformed": "3 of 24",
        "model's chars": "10",
    }
    assert rates.caption() == "mt_bench, 2 questions, judged by gpt-4-1106-preview"


def test_the_best_run_by_a_figure(tmp_path: Path) -> None:
    report = judged_runs(tmp_path, {"a": 60, "b": 100, "c": 98})
    by_figure = compare([tmp_path], "alpaca_eval_2/win_rate")
    assert by_figure.best == 1 and report.best == 0, "all have the same accuracy"
    assert "| run | " in text(by_figure) and "50.0000" in text(by_figure).splitlines()[2]
    with pytest.raises(ConfigError) as error:
        compare([tmp_path], "alpaca_eval_2/wins")
    assert "alpaca_eval_2/lc_win_rate, alpaca_eval_2/win_rate" in str(error.value)
    monitored = make(
        tmp_path / "new" / "d", steps=4, overrides=("monitor.metric=alpaca_eval_2/win_rate",)
    )
    judge(monitored, won(20))
    (run,), _ = read_runs([monitored])
    assert run.monitored == 10.0


def test_beside_published_results(tmp_path: Path) -> None:
    """What the user wrote counts; what was compared with another baseline does not."""
    mine = make(tmp_path / "mine", steps=4, overrides=("experiments=paper/llama3_instruct",))
    judge(mine, won(80), judge="my judge")
    judge(mine, won(60), "arena_hard_v0.1", baseline="base", judge="nobody")
    told = text(compare([mine]))
    assert (
        "| mine      | sigmoid | 43.0 (40.0 to 46.0) | 40.0 (37.0 to 43.0) |            |\n" in told
    )
    note = "of the runs, with 95 % intervals: judged by {}; published: judged by gpt-4-1106-preview"
    assert told.splitlines()[-1] == note.format("my judge")
    (mine / "benchmarks.json").write_text(
        '{"alpaca_eval_2_lc": 50, "alpaca_eval_2_wr": 51, "arena_hard_wr": 52}'
    )
    told = text(compare([mine]))
    assert "| mine      | sigmoid | 50.0            | 51.0         | 52.0       |\n" in told
    assert "published: judged by" not in told


def test_arena_hard_beside_published_results(tmp_path: Path) -> None:
    """Its main figure is `score`."""
    mine = make(tmp_path / "mine", steps=4, overrides=("experiments=paper/llama3_instruct",))
    figures = {"score": Figure(33.1, 30.0, 36.0), "style_win_rate": Figure(20.0, 17.0, 23.0)}
    judge(mine, won(66), "arena_hard_v0.1", baseline="gpt-4-0314", figures=figures)
    assert "33.1 (30.0 to 36.0)" in text(compare([mine]))


@pytest.mark.parametrize(
    "change",
    [
        {"figures": {"win_rate": {"value": "50"}}},
        {"figures": {"win_rate": {"value": 50, "low": "x"}}},
        {"figures": {"win_rate": 50}},
        {"figures": []},
        {"by_question": {"1": None}},
        {"by_question": [1, 2]},
        {"questions": 1.5},
        {"agreement": "high"},
        {"examples": [{"question": "q"}]},
        {"examples": ["q"]},
        {"notes": [1]},
        {"mean_chars": {"model": "1"}},
        {"judge": None},
        {"notes": "text"},
        {"examples": {}},
        {"examples": [{"preference": 1, "question": "q", "model": None, "baseline": ""}]},
        {"by_question": {"1": 10**400}},
        {"figures": {"win_rate": {"value": 10**400}}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_damaged(change: dict[str, Any], tmp_path: Path) -> None:
    folder = make(tmp_path / "a", steps=4)
    judge(folder, won(10))
    file = folder / "benchmarks" / "alpaca_eval_2" / "judged.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DamagedError):
        read_judged(folder)
    make(tmp_path / "b", steps=4)
    report = compare([tmp_path])
    assert report.names == ["b"]
    assert damaged_lines(report) == [
        f"a: {file}: holds no judgement (remove it: simpo judge writes it anew)"
    ]


@pytest.mark.parametrize(
    "change", [{"more": 1}, {"figures": {"win_rate": {"value": 50, "more": 1}}}]
)
def test_of_a_newer_version(change: dict[str, Any], tmp_path: Path) -> None:
    """The message does not tell to remove what the newer version can read."""
    folder = make(tmp_path / "a", steps=4)
    judge(folder, won(10))
    file = folder / "benchmarks" / "alpaca_eval_2" / "judged.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert damaged_lines(compare([tmp_path])) == [
        f"a: {file}: has an unknown key, more (if a newer simpo wrote it, use that one; else judge "
        "again)"
    ]
    file.unlink()
    settings = folder / "run.yaml"
    settings.write_text(settings.read_text().replace("\ntrain:\n", "\ntrain:\n  novel: 3\n"))
    assert damaged_lines(compare([tmp_path])) == [
        f"a: {settings}: Key 'novel' not in 'TrainConfig' (restore it; if a newer simpo wrote it, "
        "use that one)"
    ]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", steps=4)
    written = judge(folder, won(10))
    assert read_judged(folder) == {"alpaca_eval_2": written}
    known: Any = {}
    (before,), _ = read_runs([folder], known)
    assert read_runs([folder], known)[0][0] is before
    judge(folder, won(10), "arena_hard_v0.1")
    (after,), _ = read_runs([folder], known)
    assert list(after.judged) == ["alpaca_eval_2", "arena_hard_v0.1"]
    make(folder / "benchmarks" / "alpaca_eval_2" / "not_a_run_of_mine", steps=4)
    assert find_runs([tmp_path]) == [folder]


@pytest.mark.process
def test_the_page(tmp_path: Path) -> None:
    """Narrow and dark: no part is wider than the window; texts of the data are text."""
    report = judged_runs(tmp_path / "runs", {"a": 60, "b": 100, "<i>c": 98}, notes=["<b>note"])
    page = tmp_path / "report.html"
    page.write_text(render(report), encoding="utf-8")
    details = re.findall(r'<details id="benchmark-[^"]*"( open)?>', page.read_text())
    assert details == [""] * 3
    with Tab(page.as_uri(), width=390, dark=True) as tab:
        tab.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert tab.run(WIDTHS) == [390, 390]
        section = "document.getElementById('benchmark-alpaca_eval_2')"
        cells = f"[...{section}.querySelectorAll('tbody tr')].map(row => row.cells[0].innerText)"
        assert tab.run(cells)[:3] == ["b", "<i>c", "a"]
        assert tab.run(f"[...{section}.querySelectorAll('b')].map(b => b.innerText)") == [
            *("won", "lost") * 3
        ]
        assert tab.run("document.querySelectorAll('main script:not([type]), main i').length") == 0
        assert tab.run("document.title") == "simpo: <i>c, a, b"
        assert tab.console == []
