"""Statistics of studies: by hand, from printed tables, and how often they hold in simulations."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from simpo.report.compare import compare
from simpo.report.findings import between_groups, findings
from simpo.report.studies import (
    Difference,
    by_bootstrap,
    by_t,
    half_width,
    holm,
    seeds_needed,
    shares,
)
from simpo.report.text import averages_text
from tests.support.made_runs import make

STUDIES = 1000
HOLDS = pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("number", "quantile"), [(2, 12.706), (3, 4.303), (11, 2.228), (31, 2.042)]
)
def test_students_t(number: int, quantile: float) -> None:
    """The 97.5 % quantiles of printed tables, for one degree of freedom less than values."""
    values = [float(i) for i in range(number)]
    error = np.std(values, ddof=1) / math.sqrt(number)
    found = half_width(values)
    assert found == pytest.approx(quantile * error, rel=3e-4)
    shifted = by_t([value - fmean(values) + quantile * error for value in values])
    assert shifted.p == pytest.approx(0.05, rel=2e-3)
    assert shifted.low == pytest.approx(0, abs=2e-3 * error)


def test_extremes() -> None:
    assert by_t([1.0, 1.0 + 1e-15]).p < 1e-9
    assert seeds_needed([1e-9, -1e-9 + 1e-15]) > 10**9


def test_without_spread_or_with_one_value() -> None:
    assert half_width([0.7]) is None
    assert half_width([0.7, 0.7]) is None
    assert by_t([0.0, 0.0]) == Difference(0.0, None, None, 1.0)
    assert by_t([0.5, 0.5, 0.5]) == Difference(0.5, None, None, 0.25)  # of 8 equal signs, 2
    same, worse = by_bootstrap([[0.0] * 5, [1.0] * 5])
    assert (same, worse) == (Difference(0, None, None, 1), Difference(1, None, None, 1 / 16))
    (few,) = by_bootstrap([[0.9, 1.0]])
    assert (few.low, few.high, few.p) == (0.9, 1.0, 0.5)


def test_intervals_over_three_seeds_hold() -> None:
    draws = np.random.default_rng(1).normal(0.8, 0.03, (STUDIES, 3))
    held = [abs(fmean(seeds) - 0.8) <= (half_width(list(seeds)) or 0) for seeds in draws]
    assert fmean(held) == HOLDS


def test_intervals_over_pairs_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs are right on 80 % and on 70 % of all pairs, often on the same ones."""
    monkeypatch.setattr("simpo.report.studies.RESAMPLES", 500)
    draw = np.random.default_rng(2)
    held = []
    for _ in range(STUDIES):
        hard = draw.random(150)
        best, other = (hard + draw.normal(0, 0.2, 150) < limit for limit in (0.8, 0.7))
        (found,) = by_bootstrap([(best.astype(float) - other).tolist()])
        held.append((found.low, found.high))
    hard = draw.random(2_000_000)
    best, other = (hard + draw.normal(0, 0.2, len(hard)) < limit for limit in (0.8, 0.7))
    truth = fmean((best.mean(), -other.mean())) * 2
    assert fmean(low <= truth <= high for low, high in held) == HOLDS


def test_a_sweep_of_equals_shows_no_difference() -> None:
    """Of 100 sweeps of 20 runs that are equally good at most 5 show a clear difference, and not
    most, as they would if each run were compared by itself."""
    draw = np.random.default_rng(3)
    alarms, alone = [], []
    for _ in range(100):
        runs = draw.random((120, 1)) + draw.normal(0, 0.3, (120, 21)) < 0.7
        found = by_bootstrap((runs[:, :1].astype(float) - runs[:, 1:]).T.tolist())
        alone.append(any(one.clear for one in found))
        alarms.append(any(one.clear for one in holm(found)))
    assert sum(alarms) <= 9 and sum(alone) >= 30


def test_holm_by_hand() -> None:
    """Of three the least counts three times, the next twice, and none less than one before."""
    found = holm([Difference(1, 0, 2, p) for p in (0.04, 0.01, 0.03)])
    assert [one.p for one in found] == pytest.approx([0.06, 0.03, 0.06])
    assert [one.clear for one in found] == [False, True, False]


def test_seeds_by_hand() -> None:
    """For a mean as large as the deviation (2.262 + 0.842) squared is 9.6, with t of 9 degrees; for
    a tenth of it (1.963 + 0.842) squared is 7.866."""
    unit = [1 - math.sqrt(0.5), 1 + math.sqrt(0.5)]
    assert seeds_needed(unit) == 10
    assert seeds_needed([value - 0.9 for value in unit]) == 787


def test_that_many_seeds_show_it() -> None:
    """In four of five studies; half as many seeds do so much less often."""
    draw = np.random.default_rng(4)
    shown = {
        n: fmean(by_t(draw.normal(1, 1, n).tolist()).clear for _ in range(STUDIES)) for n in (5, 10)
    }
    assert shown[10] == pytest.approx(0.8, abs=0.04) and shown[5] < 0.5


def test_shares_by_hand() -> None:
    """In a grid of two by two one setting adds 2, the other 1: variances as 4 to 1."""
    settings: dict[str, list[object]] = {
        "loss.beta": [1, 1, 2, 2],
        "ratio": [0.3, 0.5, 0.3, 0.5],
        "name": list("abcd"),
    }
    assert shares(settings, [0, 1, 2, 3]) == pytest.approx({"loss.beta": 0.8, "ratio": 0.2})
    assert shares(settings, [1, 1, 1, 1]) == {}


def study(folder: Path, right: dict[str, list[int]]) -> None:
    """Finished runs, each right on that many of 200 held-out pairs with each of its seeds."""
    for name, numbers in right.items():
        for seed, number in enumerate(numbers):
            run = make(folder / f"loss.beta={name},train.seed={seed}", float(name), seed=seed)
            order = np.random.default_rng(seed).permutation(200)
            file = run / "held_out" / "step-000040.csv"
            lines = [("pair", "rewards/accuracies")]
            lines += [(f"p{pair}", str(float(order[pair] < number))) for pair in range(200)]
            with file.open("w") as table:
                csv.writer(table).writerows(lines)
            (run / "data.json").write_text('{"test_fingerprint": "pairs"}')
            metrics = (run / "metrics.jsonl").read_text()
            accuracy = number / 200
            *others, last = metrics.splitlines()
            changed = json.loads(last) | {"eval/rewards/accuracies": accuracy}
            (run / "metrics.jsonl").write_text("\n".join([*others, json.dumps(changed), ""]))
            results = json.loads((run / "results.json").read_text())
            results["eval_after"]["rewards/accuracies"] = accuracy
            (run / "results.json").write_text(json.dumps(results))


def test_runs_as_good_as_the_best(tmp_path: Path) -> None:
    """160 pairs against 158 is chance; against 100 it is not."""
    study(tmp_path, {"1": [100], "2": [158], "10": [160]})
    report = compare([tmp_path])
    best, *others = report.order
    assert best == report.best
    near, far = (report.behind_best[index] for index in others)
    assert (near.mean, far.mean) == pytest.approx((0.01, 0.3))
    # The pairs that only one of two got right: 2 of 200, and 60.
    error = math.sqrt(0.3 * 0.7 / 200)
    assert (far.low, far.high) == pytest.approx((0.3 - 1.96 * error, 0.3 + 1.96 * error), abs=0.01)
    assert far.clear and not near.clear
    assert findings(report) == [
        "1 of 2 others are not worse than the best by more than chance (accuracy on the same 200 "
        "held-out pairs, bootstrap, p < 0.05 after Holm): loss.beta=2,train.seed=0",
    ]
    line = report.lines()[others[1]]
    assert line["behind best"] == pytest.approx(0.3) and line["behind best p"] < 1e-9
    assert report.lines()[best]["behind best"] is None


def test_other_held_out_pairs_are_not_compared(tmp_path: Path) -> None:
    study(tmp_path, {"2": [158], "10": [160]})
    (tmp_path / "loss.beta=2,train.seed=0" / "data.json").write_text('{"test_fingerprint": "x"}')
    report = compare([tmp_path])
    assert report.behind_best == {} and findings(report) == []
    assert "behind best" not in report.lines()[0]


def test_groups_over_seeds(tmp_path: Path) -> None:
    """Accuracies 0.80, 0.82, 0.81 at beta 10; 0.2, 0.2, 0.19 less at 2; at 5 now more, now less."""
    study(tmp_path, {"2": [120, 124, 124], "5": [164, 158, 161], "10": [160, 164, 162]})
    report = compare([tmp_path])
    behind = "is behind loss.beta=10 in accuracy by"
    # 198: differences 0.005 of deviation 0.025, (1.972 + 0.842) squared times 25.
    assert between_groups(report, "train.seed") == [
        f"loss.beta=2 {behind} 0.1967 ± 0.0143 (3 values of train.seed, p 0.00057 after Holm)",
        f"loss.beta=5 {behind} 0.0050 ± 0.0621 (3 values of train.seed, p 0.76 after Holm): not "
        "clear, a difference of this size needs about 198 values",
    ]
    told = averages_text(report, "train.seed")
    # 4.303 * 0.01 / sqrt(3)
    assert re.search(r"loss.beta=10 +\| 3 +\| 0.8100 ± 0.0248", told)
    assert "±: interval of the mean over train.seed at 95 %, by Student's t\n" in told


def test_the_settings_that_matter(tmp_path: Path) -> None:
    study(tmp_path, {"2": [100, 110], "10": [150, 160]})
    assert findings(compare([tmp_path]))[-1] == (
        "share of each setting in the variance of accuracy between runs: loss.beta 96%, "
        "train.seed 4%"
    )
