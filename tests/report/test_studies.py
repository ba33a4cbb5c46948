"""Statistics of studies: by hand, from printed tables, and how often they hold in simulations."""

from __future__ import annotations

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
from tests.support.made_runs import study

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
    assert by_t([1.0, 1.0 + 1e-11]).p < 1e-9
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


def test_differences_that_are_equal_but_for_rounding() -> None:
    """0.02 three times, of runs that were right on 82 and 80, 81 and 79, 50 and 48 of 100."""
    nearly = [0.82 - 0.80, 0.81 - 0.79, 0.50 - 0.48]
    assert len(set(nearly)) > 1
    for found in (by_t(nearly), *by_bootstrap([nearly])):
        assert found.mean == pytest.approx(0.02)
        assert (found.low, found.high, found.p) == (None, None, 0.25)
    assert half_width([0.1 + 0.2, 0.3]) is None


def test_numbers_that_are_none() -> None:
    assert half_width([math.nan, 0.5]) is None and half_width([0.5, math.inf]) is None
    assert seeds_needed([0.01, -0.01]) == math.inf
    assert seeds_needed([1e-200, 2.0, -2.0]) == math.inf


@pytest.mark.parametrize("number", [2, 3, 5, 200])
def test_students_t_of_scipy(number: int) -> None:
    special = pytest.importorskip("scipy.special")
    values = np.random.default_rng(number).normal(0.3, 1, number)
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(number)
    found, half = by_t(values.tolist()), error * special.stdtrit(number - 1, 0.975)
    p = 2 * special.stdtr(number - 1, -abs(mean) / error)
    assert found.p == pytest.approx(p, rel=1e-4)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=1e-4)
    assert half_width(values.tolist()) == pytest.approx(half, rel=1e-4)


@pytest.mark.parametrize("number", [8, 50])
def test_a_bootstrap_that_draws_pairs_one_by_one(number: int) -> None:
    """Over 20 runs, since a bound of 2,000 draws is off by 0.06 standard errors by chance."""
    draw = np.random.default_rng(number)
    values = draw.normal(0.3, 1, (20, number))
    means = values[:, draw.integers(0, number, (10_000, number))].mean(axis=2)
    errors = means.std(axis=1)
    found = by_bootstrap(values.tolist())
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert fmean(([one.low for one in found] - low) / errors) == pytest.approx(0, abs=0.06)
    assert fmean(([one.high for one in found] - high) / errors) == pytest.approx(0, abs=0.06)
    for one, mean, error in zip(found, values.mean(axis=1), errors, strict=True):
        p = math.erfc(abs(mean) / error / math.sqrt(2))
        assert one.p == pytest.approx(max(p, 2.0 ** (1 - number)), abs=0.05)


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


def test_holm_by_its_definition() -> None:
    """An adjusted p-value is the least level at which stepping down rejects; with ties too."""
    for p in (
        [0.02, 0.02, 0.02],
        [0.01, 0.04, 0.01, 0.04, 1.0],
        [0.9, 0.9],
        [0.0, 0.0, 0.3],
        [0.2],
    ):
        found = [one.p for one in holm([Difference(1, 0, 2, value) for value in p])]
        for level in np.linspace(0.0025, 0.9975, 200):
            rejected: list[int] = []
            for index in sorted(range(len(p)), key=lambda i: p[i]):
                if p[index] > level / (len(p) - len(rejected)):
                    break
                rejected.append(index)
            assert {i for i, value in enumerate(found) if value <= level} == set(rejected)
        assert all(found[i] == found[p.index(value)] for i, value in enumerate(p))


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
