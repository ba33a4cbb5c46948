"""The page of a report in a browser: narrow and wide, light and dark, of one run and of many."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from simpo.report import page
from simpo.report.compare import Comparison, compare, comparison
from simpo.report.curves import MOST_POINTS, thinned
from simpo.report.page import COLORS, DETAILED, MOST_RUNS, breakable, render
from simpo.run.runs import read_runs
from tests.support.browser import LOOK, Tab
from tests.support.made_runs import make, make_sweep

WIDTHS = "[innerWidth, document.documentElement.scrollWidth]"
NAMES = "[...document.querySelectorAll('#runs tbody .name')].map(cell => cell.dataset.sort)"
COLUMN = "[...document.querySelectorAll('#runs tbody tr')].map(row => row.cells[{}].dataset.sort)"
SORTED = (
    "[...document.querySelectorAll('#runs th[aria-sort]')]"
    ".map(head => [head.textContent, head.getAttribute('aria-sort')])"
)


def many(folder: Path, number: int, steps: int = 900) -> Comparison:
    """A sweep over beta, read once and multiplied, since reading hundreds of runs takes long."""
    (run,), _ = read_runs([make(folder / "run", steps=steps, prompts=16)])
    runs = []
    for index in range(number):
        accuracy = round(0.5 + index / 1000, 4)
        results = run.results | {"eval_after": run.metrics | {"rewards/accuracies": accuracy}}
        loss = replace(run.config.loss, beta=1.0 + index)  # type: ignore[call-arg]
        config = replace(run.config, loss=loss)
        name = folder / f"loss.beta={index:03d},a.long.name.of.a.setting=and_its_long_value"
        runs.append(replace(run, folder=name, config=config, results=results))
    return comparison(runs, [])


@pytest.fixture(scope="module")
def thirty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page of 30 runs, some of which did not succeed."""
    folder = make_sweep(tmp_path_factory.mktemp("runs"), 29)
    make(folder / "smollm2-demo-simpo" / "untested", held_out=False)
    page = folder / "report.html"
    page.write_text(render(compare([folder])), encoding="utf-8")
    yield page.as_uri()


@pytest.mark.process
def test_on_a_phone_in_the_dark(thirty: str) -> None:
    with Tab(thirty, width=390, dark=True) as tab:
        assert tab.run(WIDTHS) == [390, 390]
        assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
        for word in (".xtick text", ".ytitle", ".legendtext"):
            color = f"getComputedStyle(document.querySelector('.plot {word}')).fill"
            assert tab.run(color) == "rgb(227, 231, 236)", word
        places = "[...document.querySelectorAll('.plot')].map(p => p.getBoundingClientRect().left)"
        assert len(set(tab.run(places))) == 1, "figures are in one column"
        shown = "[...document.querySelectorAll('#replies td')].map(c => c.getBoundingClientRect()"
        assert len(set(tab.run(f"{shown}.left)"))) == 1, "replies are below each other"
        # What the data holds is text, not part of the page.
        assert tab.run("document.title") == "simpo: 30 runs"
        assert tab.run("document.querySelectorAll('main img').length") == 0
        assert tab.console == []


@pytest.mark.process
def test_sorting_and_choosing(thirty: str) -> None:
    with Tab(thirty, width=1280) as tab:
        assert tab.run(SORTED) == [["accuracy", "descending"]]
        *accuracy, nothing = tab.run(COLUMN.format(2))
        assert len(accuracy) == 29 and nothing == ""
        assert accuracy == sorted(accuracy, key=float, reverse=True)
        tab.run("document.getElementById('by-loss').click()")
        assert tab.run(SORTED) == [["loss", "descending"]]
        tab.run("document.getElementById('by-loss').click()")
        *losses, nothing = tab.run(COLUMN.format(3))
        assert losses == sorted(losses, key=float) and nothing == "", "no value is last, either way"
        tab.run("document.getElementById('by-run').focus()")
        tab.press("Enter")
        assert tab.run(SORTED) == [["run", "ascending"]]
        assert tab.run(NAMES)[:2] == [
            f"loss.beta=1,loss.gamma_beta_ratio=0.3,train.seed={seed}" for seed in (1, 42)
        ]
        legend = "document.querySelectorAll('.legend li').length"
        traces = "document.querySelector('#curves .plot')._fullData.map(t => t.line.color)"
        assert tab.run(legend) == DETAILED
        assert set(tab.run(traces)[1:]) == set(COLORS)
        tab.run("document.querySelector('#runs .pick input:not(:checked)').click()")
        tab.run("document.querySelectorAll('#runs .pick input:checked').forEach(b => b.click())")
        assert tab.run(legend) == 0
        assert len(tab.run(traces)) == 1, "all runs are faint"
        assert tab.console == []


@pytest.mark.matrix
def test_three_hundred_runs(tmp_path: Path) -> None:
    report = many(tmp_path, 300)
    page = tmp_path / "report.html"
    page.write_text(render(report), encoding="utf-8")
    assert page.stat().st_size - len(get_plotlyjs().encode()) < 3e6
    for width in (390, 1280):
        with Tab(page.as_uri(), width=width) as tab:
            assert tab.run(WIDTHS) == [width, width]
            assert tab.run("document.querySelectorAll('#runs tbody tr').length") == 300
            assert tab.run(NAMES)[0].startswith("loss.beta=299,")
            points = "document.querySelector('#curves .plot')._fullData[0].x.length"
            assert 300 * 40 < tab.run(points) < 300 * MOST_POINTS
            assert tab.console == []


@pytest.mark.matrix
def test_a_page_of_more_runs_than_it_shows(tmp_path: Path) -> None:
    """It opens, and is no larger than that of a thousand runs."""
    file = tmp_path / "report.html"
    file.write_text(render(many(tmp_path, MOST_RUNS + 200)), encoding="utf-8")
    assert file.stat().st_size < 10e6
    with Tab(file.as_uri(), width=1280) as tab:
        assert tab.run("document.title") == "simpo: 1200 runs"
        assert tab.run("document.querySelectorAll('#runs tbody tr').length") == MOST_RUNS
        assert tab.run(NAMES)[0].startswith("loss.beta=1199,")
        assert all(figure["drawn"] for figure in tab.run(LOOK))
        assert tab.console == []


def test_the_best_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_RUNS", 5)
    report = many(tmp_path, 12, steps=4)
    html = page.content(report)
    names = re.findall(r'class="name" data-sort="loss.beta=(\d+)', html)
    assert names == ["011", "010", "009", "008", "007"]
    assert "The best 5; 7 more are in <code>format=csv</code>." in html
    assert "<h1>12 runs</h1>" in html and ">12 finished</span>" in html
    found = re.search(r'id="curves".*?<script type="application/json">(.*?)</script>', html, re.S)
    assert found is not None
    curves = json.loads(found[1])
    assert [name[10:13] for name in curves["names"]] == names
    assert {index for panel in curves["panels"] for index, *_ in panel["lines"]} == set(range(5))
    kept = report.of_best(5)
    assert (kept.best, report.best) == (0, 11)
    assert kept.differing == {"loss.beta": [12.0, 11.0, 10.0, 9.0, 8.0]}
    assert "more are in" not in page.content(kept)


KINDS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "sft": ([{"sft": True}, {"sft": True, "seed": 1}], ["curves", "held-out"]),
    "nothing held out": ([{"held_out": False}], ["curves"]),
    "not begun": ([{"state": "running", "steps": 1, "held_out": False}], []),
    "several sets": ([{"sets": ("alpaca", "<i>chat</i>", "mean")}], ["curves", "held-out"]),
    "seeds": (
        [{"beta": beta, "seed": seed} for beta in (2, 3) for seed in (1, 2)],
        ["curves", "sweep", "held-out"],
    ),
    "intervals": (
        [{"beta": 2 + i * i % 7 + i / 10, "ratio": 0.3 + i / 99} for i in range(8)],
        ["curves", "sweep", "held-out"],
    ),
}


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run(kind: str, tmp_path: Path) -> None:
    runs, expected = KINDS[kind]
    for index, settings in enumerate(runs):
        make(tmp_path / f"<b>{index}</b>", **settings)
    page = tmp_path / "report.html"
    page.write_text(render(compare([tmp_path])), encoding="utf-8")
    with Tab(page.as_uri(), width=390, dark=True) as tab:
        shown = "[...document.querySelectorAll('section:has(.panels)')].map(s => s.id)"
        assert tab.run(shown) == expected
        assert all(figure["drawn"] for figure in tab.run(LOOK))
        assert tab.run(WIDTHS) == [390, 390]
        assert tab.run("document.querySelectorAll('main #runs b:not(.tag), main i').length") == 0
        assert tab.console == []


def test_the_best_come_first_and_shared_parts_of_names_once(tmp_path: Path) -> None:
    for beta, ratio in ((2, 0.3), (9, 0.5), (5, 0.3)):
        make(tmp_path / "all" / "sweep-1" / f"beta={beta},ratio={ratio}", beta=beta, ratio=ratio)
    make(tmp_path / "all" / "sweep-1" / "beta=2,none", held_out=False)
    report = compare([tmp_path / "all"])
    assert report.prefix == ""
    assert [report.names[index] for index in report.order] == [
        *("beta=9,ratio=0.5", "beta=5,ratio=0.3", "beta=2,ratio=0.3", "beta=2,none")
    ]
    make(tmp_path / "all" / "sweep-10")
    assert compare([tmp_path / "all"]).prefix == ""
    two = compare(
        [tmp_path / "all" / "sweep-1" / f"beta=2,{name}" for name in ("ratio=0.3", "none")]
    )
    assert (two.names, two.prefix) == (["beta=2,ratio=0.3", "beta=2,none"], "beta=2,")


def test_names_in_menus_are_whole(tmp_path: Path) -> None:
    """Without a value of its own, a browser takes the text, and joins its blanks."""
    for name in ("a  b", "<i>"):
        make(tmp_path / name, steps=4)
    page = render(compare([tmp_path]))
    assert '<option value="&lt;i&gt;">&lt;i&gt;</option><option value="a  b">a  b</option>' in page


def test_long_curves_are_thinned_and_keep_their_spikes() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[777], points[9000] = (777.0, 50.0), (9000.0, -3.0)
    kept = thinned(points, 300)
    assert 100 < len(kept) <= 300
    assert {points[0], points[777], points[9000], points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:300], 300) == points[:300]


def test_names_break_between_their_parts_alone() -> None:
    assert breakable("loss.beta=0.3,<b>") == "loss.<wbr>beta=<wbr>0.3,<wbr>&lt;b&gt;"
    assert breakable(0.1 + 0.2) == "0.3"


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colors_are_seen_on_light_and_dark_pages() -> None:
    """A contrast of 3 is what WCAG 2 asks of graphics, 4.5 what it asks of text."""
    style = (Path(render.__code__.co_filename).parent / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media", 2)[:2]
    )

    def contrast(one: str, two: str) -> float:
        low, high = sorted(map(luminance, (one, two)))
        return (high + 0.05) / (low + 0.05)

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for colors in (light, dark):
        assert all(contrast(color, colors["page"]) >= 3 for color in COLORS)
        for text in ("text", "soft", "good", "bad"):
            assert contrast(colors[text], colors["page"]) >= 4.5, text
        for back in ("gray", "green", "blue", "red", "amber", "best", "head"):
            assert contrast(colors["text"], colors[back]) >= 4.5, back
