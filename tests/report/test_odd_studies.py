"""Studies with runs that tie, lack, diverge, fail or are alone in their group."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from simpo.launch.commands.report import main
from simpo.launch.sweep import _print_end
from simpo.report.compare import averages, compare
from simpo.report.figures import sweep_map
from simpo.report.findings import between_groups, findings
from simpo.report.page import content
from simpo.report.text import averages_text, text
from tests.support.made_runs import judge, make, study

SEED = "train.seed=0"


def rewrite(path: Path, **changed: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def diverge(run: Path) -> None:
    """NaN of each pair, as of a run whose weights are not finite."""
    table = run / "held_out" / "step-000040.csv"
    table.write_text(re.sub(r",[\d.]+", ",nan", table.read_text()))
    for name in ("metrics.jsonl", "results.json"):
        numbers = re.sub(r'(rewards/accuracies": )[\d.]+', r"\1NaN", (run / name).read_text())
        (run / name).write_text(numbers)


def end(run: Path, state: str) -> None:
    rewrite(run / "status.json", state=state)
    (run / "results.json").unlink()


def test_means_of_runs_of_which_none_has_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 2):
        make(tmp_path / f"run{seed}", seed=seed, state="stopped")
    note = "2 runs have not finished and count in no mean (2 stopped)\n"
    assert averages_text(compare([tmp_path]), "train.seed", 80) == f"(none)\n{note}"
    main([str(tmp_path), "over=train.seed", "format=json"])
    assert json.loads(capsys.readouterr().out) == []


def test_json_of_a_study_with_a_damaged_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (make(tmp_path / "a") / "status.json").write_text("{")
    make(tmp_path / "b", seed=2)
    main([str(tmp_path), "format=json"])
    told = json.loads(capsys.readouterr().out)
    assert [(line["run"], line["state"]) for line in told] == [("b", "finished"), ("a", "damaged")]
    assert told[1]["note"].endswith(
        "status.json: is not JSON (remove it: the run's own command writes it anew)"
    )
    assert told[1].keys() == told[0].keys()


def test_runs_that_tie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path, {"1": [100], "2": [160], "10": [160]})
    report = compare([tmp_path])
    ten, two = f"loss.beta=10,{SEED}", f"loss.beta=2,{SEED}"
    lines = text(report).splitlines()
    assert [line.split("|")[1:3] for line in lines[2:5]] == [
        [f" {ten} ", " tied for best "],
        [f" {two}  ", " tied for best "],
        [f" loss.beta=1,{SEED}  ", "               "],
    ]
    assert [line["best"] for line in report.lines()] == [False, True, True]
    assert [line["behind best"] for line in report.lines()] == [pytest.approx(0.3), None, 0.0]
    _print_end(tmp_path, with_best=True)
    told = f"best   {ten}; {two} (tied for best): rewards/accuracies 0.8000\n"
    assert capsys.readouterr().out.startswith(told)
    page = re.sub("<wbr>", "", content(report))
    assert f"Best: <b>{ten}; {two} (tied for best)</b>." in page
    assert page.count('<b class="tag">tied for best</b>') == 2
    assert page.count('<tr class="best">') == 2


def test_many_runs_that_tie(tmp_path: Path) -> None:
    study(tmp_path, {str(beta): [160] for beta in range(1, 9)})
    names = "; ".join(f"loss.beta={beta},{SEED}" for beta in range(1, 6))
    report = compare([tmp_path])
    assert report.best_in_words() == f"{names} and 3 more (tied for best)"


def test_two_hundred_runs(tmp_path: Path) -> None:
    """Equally good but for chance: Holm calls none worse; and one that is."""
    study(tmp_path, {str(beta): [160 - beta % 3] for beta in range(1, 200)} | {"200": [60]})
    first, *_ = findings(compare([tmp_path]))
    assert first.startswith("198 of 199 others are not worse than the best by more than chance (")
    assert first.endswith(" and 193 more")


def test_a_diverged_run_leaves_the_others_compared(tmp_path: Path) -> None:
    study(tmp_path, {"1": [100], "2": [158], "10": [160]})
    diverge(tmp_path / f"loss.beta=2,{SEED}")
    report = compare([tmp_path])
    how = "accuracy on the same 200 held-out pairs, bootstrap, p < 0.05 after Holm"
    assert findings(report) == [
        f"the best is better than each other finished run by more than chance ({how})"
    ]
    assert [report.names[index] for index in report.behind_best] == [f"loss.beta=1,{SEED}"]
    assert [line["best"] for line in report.lines()] == [False, True, False]


def test_runs_that_cannot_be_compared_are_told(tmp_path: Path) -> None:
    """Others are worse than the best only as far as they were compared."""
    study(tmp_path, {"1": [100], "2": [158], "5": [159], "10": [160]})
    other, short = (tmp_path / f"loss.beta={beta},{SEED}" for beta in (2, 5))
    (other / "data.json").write_text('{"test_fingerprint": "x"}')
    table = short / "held_out" / "step-000040.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    first, second, *_ = findings(compare([tmp_path]))
    assert first.startswith("the best is better than each run that was compared by more than ")
    assert second == (
        "2 finished runs were not compared: of other held-out pairs, or without numbers of each"
    )


def test_averages_without_a_number(tmp_path: Path) -> None:
    """A mean with a diverged run is none; failed and running ones are told; no traceback."""
    study(tmp_path, {"2": [120, 124, 124, 130, 120], "10": [160, 164, 162]})
    diverge(tmp_path / f"loss.beta=2,{SEED}")
    for seed, state in ((3, "failed"), (4, "running"), (1, "failed")):
        end(tmp_path / f"loss.beta=2,train.seed={seed}", state)
    report = compare([tmp_path])
    ten, two = averages(report, "train.seed")
    key = "rewards/accuracies"
    assert (ten["number"], two["number"]) == (3, 2)
    assert math.isnan(two[key]) and two[f"{key} +-"] is None
    lines = averages_text(report, "train.seed").splitlines()
    assert re.search(r"\| loss.beta=2 +\| 2 +\| nan  ", lines[3])
    assert lines[-2:] == [
        "not compared with loss.beta=10, the best in accuracy, for want of two values of "
        "train.seed that both have: loss.beta=2",
        "3 runs have not finished and count in no mean (2 failed, 1 killed)",
    ]


def test_the_best_group_has_one_seed(tmp_path: Path) -> None:
    """Lucky, and compared with none; the report says so."""
    study(tmp_path, {"2": [150, 151, 152, 153, 154], "5": [149], "10": [170]})
    report = compare([tmp_path])
    assert between_groups(report, "train.seed") == [
        "not compared with loss.beta=10, the best in accuracy, for want of two values of "
        "train.seed that both have: loss.beta=2; loss.beta=5"
    ]


def test_groups_without_a_difference_in_their_mean(tmp_path: Path) -> None:
    study(tmp_path, {"2": [150, 152], "10": [152, 150]})
    assert between_groups(compare([tmp_path]), "train.seed") == [
        "loss.beta=2 is behind loss.beta=10 in accuracy by 0.0000 ± 0.1271 (2 values of "
        "train.seed, p 1 after Holm): no difference"
    ]


def test_equal_differences_of_seeds(tmp_path: Path) -> None:
    """0.02 with each seed: two equal signs of four, though the numbers differ by a rounding."""
    study(tmp_path, {"2": [160, 158], "10": [164, 162]})
    assert between_groups(compare([tmp_path]), "train.seed") == [
        "loss.beta=2 is behind loss.beta=10 in accuracy by 0.0200 (2 values of train.seed, p 0.5 "
        "after Holm)"
    ]


def test_repeats_of_a_seed_are_one_value(tmp_path: Path) -> None:
    """The same run twice tells nothing about other seeds: 12.706 * 0.01 of two, not of three."""
    study(tmp_path, {"2": [160, 164]})
    study(tmp_path / "again", {"2": [160]})
    (line,) = averages(compare([tmp_path]), "train.seed")
    assert line["number"] == 2
    assert line["rewards/accuracies"] == pytest.approx(0.81)
    assert line["rewards/accuracies +-"] == pytest.approx(12.706 * 0.01, rel=1e-3)


def test_names_of_groups(tmp_path: Path) -> None:
    """By what their runs' names have in common, wherever the setting stands; else by settings."""
    study(tmp_path / "one", {"2": [150, 151]})
    (only,) = averages(compare([tmp_path / "one"]), "train.seed")
    assert only["runs"] == "loss.beta=2"
    for seed in (1, 2):
        make(tmp_path / "seeds" / f"train.seed={seed}", seed=seed, steps=4)
        make(tmp_path / "first" / f"train.seed={seed},z=1", seed=seed, steps=4)
        for beta in (2.0, 10.0):
            make(tmp_path / "dated" / f"2026-{seed}-{beta}", beta=beta, seed=seed, steps=4)
    for folder, names in (
        ("seeds", ["all"]),
        ("first", ["z=1"]),
        ("dated", ["loss.beta=10.0", "loss.beta=2.0"]),
    ):
        found = averages(compare([tmp_path / folder]), "train.seed")
        assert [line["runs"] for line in found] == names


def test_the_map_averages_no_run_that_goes_on(tmp_path: Path) -> None:
    """Where another has finished; else it shows what there is."""
    study(tmp_path, {"2": [120, 40], "5": [50], "10": [160, 164]})
    for name in (f"loss.beta=5,{SEED}", "loss.beta=2,train.seed=1"):
        end(tmp_path / name, "failed")
    figure = sweep_map(compare([tmp_path]))
    assert figure is not None
    (panel,) = figure["views"]["rewards/accuracies"]
    assert panel["data"][0]["y"] == pytest.approx([0.6, 0.25, 0.81])


def test_judged_runs_that_tie(tmp_path: Path) -> None:
    """And intervals are explained where there are some."""
    for name, won in (("a", 10), ("b", 10), ("c", 5)):
        figures = {"win_rate": {"value": 10.0 * won}}
        judge(make(tmp_path / name, steps=4), [1.0] * won + [0.0] * (10 - won))
        path = tmp_path / name / "benchmarks" / "alpaca_eval_2" / "judged.json"
        rewrite(path, figures=figures)
    (rates,) = compare([tmp_path]).judged
    places = [line["behind the best"] for line in rates.table(["a", "b", "c"])]
    assert places[:2] == ["tied for best", "tied for best, 0.0, p 1"]
    assert re.fullmatch(r"50.0 \(\d+.0 to \d+.0\), p [\d.]+", places[2])
    assert rates.notes(["a", "b", "c"])[0] == (
        "percent, a win rate of 50 is as good as the baseline; (low to high): 95 % interval, by "
        "resampling questions"
    )
    (same,) = compare([tmp_path / "a", tmp_path / "b"]).judged
    assert not [note for note in same.notes(["a", "b"]) if "interval" in note]
