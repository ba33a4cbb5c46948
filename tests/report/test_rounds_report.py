"""Runs with rounds in a report, from files written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from simpo.config.check import run_yaml
from simpo.config.compose import compose_run
from simpo.launch.commands.report import main
from simpo.report.compare import compare
from simpo.report.page import content
from simpo.report.rounds import COLUMNS, MEANINGS, by_round
from simpo.report.text import text
from simpo.run.runs import find_runs, read_progress
from tests.support.made_runs import make

REWARDS = (0.25, 0.5, 0.375)


def make_rounds(folder: Path, rewards: tuple[float, ...] = REWARDS, kept: int | None = 1) -> Path:
    """A run of two rounds; `kept` is the round whose model was kept, None while it runs."""
    folder.mkdir(parents=True)
    words = ["rounds.number=2", "monitor.metric=reply_reward", "on_policy.reward=rules"]
    (folder / "run.yaml").write_text(run_yaml(compose_run(words)))
    found = {
        number: {"reply_reward": reward, "reply_win_rate": 0.5 + number / 8, "reply_tokens": 40.25}
        for number, reward in enumerate(rewards)
    }
    lines = [
        {"step": number, **{f"eval/{key}": value for key, value in metrics.items()}}
        for number, metrics in found.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = "running" if kept is None else "finished"
    status = {"state": state, "step": len(rewards) - 1, "total_steps": 2, "error": ""}
    (folder / "status.json").write_text(json.dumps(status))
    seconds = {"generate": 90.0, "generate-2": 96.0, "annotate": 6.0, "train": 30.0}
    for number in range(1, len(rewards) + 1):
        one = folder / "rounds" / str(number)
        one.mkdir(parents=True)
        for kind, took in seconds.items():
            if number < len(rewards) or kind != "train":
                (one / f"{kind}.json").write_text(json.dumps({"seconds": took * number}))
    if kept is not None:
        results = {
            "eval_before": found[0],
            "eval_after": found[kept],
            "findings": [],
            "train": {"steps": 2, "model_step": kept, "this_process_s": 1.0},
        }
        (folder / "results.json").write_text(json.dumps(results))
        make(folder / "rounds/1/run")
    return folder


def test_a_run_by_round(tmp_path: Path) -> None:
    """Of parts at the same time the longest counts: 96 s of the first round are 1.6 minutes."""
    root = make_rounds(tmp_path / "run")
    (root / "rounds/ended.txt").write_text("rounds.patience=1 rounds without a better one\n")
    shown = text(compare([root])).splitlines()
    begin = shown.index("run by round")
    assert shown[begin + 1 : begin + 9] == [
        "| round |      | reward | beats the first | tokens | generate, min | annotate, min "
        "| train, min |",
        "|-------|------|--------|-----------------|--------|---------------|---------------"
        "|------------|",
        "| 0     |      | 0.250  | 0.500           | 40.2   |               |               "
        "|            |",
        "| 1     | kept | 0.500  | 0.625           | 40.2   | 1.6           | 0.1           "
        "| 0.5        |",
        "| 2     |      | 0.375  | 0.750           | 40.2   | 3.2           | 0.2           "
        "| 1.0        |",
        "5.1 minutes for the replies after round 2, by which it is measured",
        "ended after round 2: rounds.patience=1 rounds without a better one",
        MEANINGS,
    ]
    assert read_progress([root])[0].text() == "finished, round 2 of 2"
    page = content(compare([root]))
    assert (
        'id="rounds-0"' in page
        and "<td>1.6</td>" in page
        and "Of replies to held-out prompts." in page
    )


@pytest.mark.parametrize(
    ("benchmark", "shown"),
    [
        ("pairs", {"judged win rate": "0.523", "judged score": "0.074"}),
        ("mt_bench", {"judged win rate": "52.3", "judged score": "7.4"}),
    ],
)
def test_judged_figures_are_shares_like_the_other_columns(
    benchmark: str, shown: dict[str, str], tmp_path: Path
) -> None:
    """metrics.jsonl has them in percent, or in points from 1 to 10."""
    root = make_rounds(tmp_path / "run", kept=None)
    settings = (root / "run.yaml").read_text()
    kind = re.sub(r"(\nbenchmark:\n.*?\n  kind: )none", rf"\g<1>{benchmark}", settings, flags=re.S)
    (root / "run.yaml").write_text(kind)
    figures = {"eval/reply_pass_rate": 0.5, "eval/win_rate": 52.34, "eval/score": 7.38}
    (root / "metrics.jsonl").write_text(json.dumps({"step": 0, **figures}) + "\n")
    ((line,), *_) = (one.table for one in by_round(compare([root])))
    assert {key: value for key, value in line.items() if key in shown} == shown
    assert line["pass rate"] == "0.500"


def test_minutes_for_replies_while_the_next_round_goes_on(tmp_path: Path) -> None:
    """96 s and 6 s are for the replies; the check before them and the training after are not."""
    root = make_rounds(tmp_path / "run", REWARDS[:1], kept=None)
    for kind in ("check", "train"):
        (root / "rounds/1" / f"{kind}.json").write_text(json.dumps({"seconds": 600.0}))
    (told,) = by_round(compare([root]))
    assert told.notes == ["1.7 minutes for the replies after round 0, by which it is measured"]


def test_of_many_runs_a_terminal_tells_the_best_by_round(tmp_path: Path) -> None:
    for number in range(6):
        make_rounds(tmp_path / f"sweep/run{number}", (0.25, 0.5 + number / 100, 0.375))
    report = compare([tmp_path / "sweep"])

    def told(width: int | None) -> list[str]:
        lines = text(report, width).splitlines()
        return [line for line in lines if "by round" in line or "more runs" in line]

    every = [f"run{number} by round" for number in (5, 4, 3, 2, 1, 0)]
    assert told(100) == [*every[:4], "2 more runs have rounds: format=json tells them"]
    assert told(None) == every


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (80, "round,,reward,pass rate,beats the first,tokens,KL"),
        (100, "round,,reward,pass rate,beats the first,tokens,KL,no pair,generate, min"),
        (
            140,
            "round,,reward,spread,pass rate,beats the first,beats the last,tokens,KL,no pair,"
            "generate, min,train, min",
        ),
    ],
)
def test_what_a_narrow_terminal_shows(width: int, shown: str, tmp_path: Path) -> None:
    """How good the model is, how long its replies are and how far it is from the first stay."""
    root = make_rounds(tmp_path / "run", kept=None)
    metrics = dict.fromkeys((key for key, _ in COLUMNS if key.startswith("reply_")), 0.5)
    lines = [
        {"step": number, **{f"eval/{key}": value for key, value in metrics.items()}}
        for number in range(3)
    ]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = text(compare([root]), width).splitlines()
    table = told[(begin := told.index("run by round")) + 1 : begin + 6]
    assert max(map(len, table)) <= width
    cells = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert cells == re.split(",(?! )", shown)
    hidden = [key for key in by_round(compare([root]))[0].table[0] if key not in cells]
    assert told[begin + 6] == f"too wide for this terminal: {', '.join(hidden)}"


def test_a_run_stands_for_its_rounds(tmp_path: Path) -> None:
    root = make_rounds(tmp_path / "run")
    assert find_runs([tmp_path]) == [root]
    assert find_runs([root / "rounds"]) == [root / "rounds/1/run"]
    # Whose runs are called rounds are not left out.
    other = make(tmp_path / "rounds" / "a")
    assert find_runs([tmp_path]) == [other, root]


def test_several_runs_and_one_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_rounds(tmp_path / "sweep/good", (0.25, 0.75, 0.5))
    make_rounds(tmp_path / "sweep/now", (0.25, 0.3), kept=None)
    report = compare([tmp_path / "sweep"])
    assert [one.name for one in by_round(report)] == ["good", "now"]
    assert [line["round"] for line in by_round(report)[1].table] == ["0", "1"]
    assert report.metric == "reply_reward" and report.names[report.order[0]] == "good"
    assert text(report).count(MEANINGS) == 1
    main([str(tmp_path / "sweep"), "format=json"])
    good, _ = json.loads(capsys.readouterr().out)
    assert [line["reply_reward"] for line in good["rounds"]] == [0.25, 0.75, 0.5]
    assert [line["round"] for line in good["rounds"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("1/train.json", "{", "is not JSON"),
        ("1/train.json", '{"seconds": "x"}', "has no number of seconds"),
        ("ended.txt", b"\xff", "is not UTF-8 at byte 1"),
    ],
)
def test_damaged_files(name: str, content: str | bytes, fault: str, tmp_path: Path) -> None:
    root = make_rounds(tmp_path / "run")
    file = root / "rounds" / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (told,) = by_round(compare([root]))
    assert told.notes[-1] == (f"{file}: {fault} (restore it, or start anew with run_dir=NEW)")
