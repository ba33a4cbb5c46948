"""Reports of hand-made runs, in which every number of the tables and figures is known."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from simpo.config.check import run_yaml
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError
from simpo.launch.commands.report import main
from simpo.loss.simpo import SigmoidConfig
from simpo.report.compare import Comparison, averages, compare
from simpo.report.curves import panels
from simpo.report.figures import held_out, sweep_map
from simpo.report.page import render
from simpo.report.serve import Source
from simpo.report.text import averages_text, damaged_lines, shorten, text
from simpo.run.runs import State, note_job, read_progress
from simpo.run.tables import metric_labels
from tests.support.browser import look_at
from tests.support.made_runs import make
from tests.support.whole_runs import run_command

GRID = [(beta, ratio) for beta in (2.0, 10.0) for ratio in (0.3, 0.5)]


def accuracy_of(beta: float, ratio: float) -> float:
    return round(0.5 + beta / 100 + ratio / 10, 4)


def make_run(folder: Path, overrides: list[str], **more: Any) -> Path:
    """A run's folder as the training leaves it: two steps, and evaluations around them."""
    run = compose_run(overrides)
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(run_yaml(run))
    assert isinstance(run.loss, SigmoidConfig)
    accuracy = accuracy_of(run.loss.beta, run.loss.gamma_beta_ratio)
    held_out = {0: 0.5, 2: accuracy}
    lines = [{"step": 0, "eval/rewards/accuracies": 0.5, "eval/loss": 1.0}]
    for step in (1, 2):
        lines.append({"step": step, "train/loss": 1.0 - step / 10, "train/rewards/accuracies": 0.5})
    lines.append({"step": 2, "eval/rewards/accuracies": accuracy, "eval/loss": 0.7})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = {"state": "finished", "step": 2, "total_steps": 2, "error": ""} | more
    (folder / "status.json").write_text(json.dumps(status))
    if status["state"] == "finished":
        after = {"rewards/accuracies": accuracy, "loss": 0.7}
        results = {"eval_before": {}, "eval_after": after, "train": {"model_step": 2}}
        (folder / "results.json").write_text(json.dumps(results))
    for step in held_out:
        for name in ("held_out", "samples"):
            (folder / name).mkdir(exist_ok=True)
        rows = [f"p{i},{i / 10 + step},{20 + i},{30 + i}" for i in range(8)]
        header = "pair,rewards/margins,chosen_tokens,rejected_tokens"
        table = "\n".join([header, *rows]) + "\n"
        (folder / "held_out" / f"step-{step:06d}.csv").write_text(table)
        reply = {"prompt": "Say <b>hi</b>", "reply": f"hi {step}", "tokens": 3, "obeys": step > 0}
        (folder / "samples" / f"step-{step:06d}.json").write_text(json.dumps([reply]))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for beta, ratio in GRID:
        overrides = [f"loss.beta={beta}", f"loss.gamma_beta_ratio={ratio}"]
        make_run(tmp_path / "sweep" / f"loss.beta={beta:g},ratio={ratio}", overrides)
    return tmp_path / "sweep"


def cli(*arguments: str, code: int = 0) -> str:
    told = run_command("simpo.report", *arguments)
    assert told.returncode == code, told.stderr
    return told.stdout if code == 0 else told.stderr


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([\w-]+)"', page)


def best_of(comparison: Comparison) -> str:
    assert comparison.best is not None
    return comparison.names[comparison.best]


def test_the_best_member_and_what_differs(sweep: Path) -> None:
    comparison = compare([sweep])
    assert comparison.differing == {
        "loss.beta": [10.0, 10.0, 2.0, 2.0],
        "loss.gamma_beta_ratio": [0.3, 0.5, 0.3, 0.5],
    }
    assert best_of(comparison) == "loss.beta=10,ratio=0.5"
    lines = text(comparison).splitlines()
    (best,) = [line for line in lines if "| best |" in line]
    assert "loss.beta=10,ratio=0.5" in best and "finished, step 2 of 2" in best
    assert "| 0.6500 " in best and "| 0.7000 " in best


def test_runs_stored_with_the_old_name_of_monitor(sweep: Path) -> None:
    low = make_run(sweep / "low", ["loss.beta=1", "monitor.metric=loss", "monitor.mode=min"])
    new = compare([low]), compare([sweep])
    for file in sweep.glob("*/run.yaml"):
        text = file.read_text()
        assert "\nmonitor:\n" in text
        file.write_text(text.replace("\nmonitor:\n", "\nobjective:\n"))
    assert (compare([low]), compare([sweep])) == new
    assert (new[0].metric, new[0].mode.value) == ("loss", "min")


def test_tables_for_programs(sweep: Path) -> None:
    expected = {(b, r): accuracy_of(b, r) for b, r in GRID}
    for rows in (
        json.loads(cli(str(sweep), "format=json")),
        list(csv.DictReader(io.StringIO(cli(str(sweep), "format=csv")))),
    ):
        read = {
            (float(row["loss.beta"]), float(row["loss.gamma_beta_ratio"])): float(
                row["rewards/accuracies"]
            )
            for row in rows
        }
        assert read == expected
    assert not (sweep / "report.html").exists()


def test_a_diverged_run_gives_valid_json(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ["loss.beta=2"])
    for file in (folder / "results.json", folder / "metrics.jsonl"):
        file.write_text(file.read_text().replace('loss": 0.7', 'loss": NaN'))
    told = cli(str(folder), "format=json")
    (row,) = json.loads(told, parse_constant=lambda name: pytest.fail(name))
    assert row["loss"] is None


def test_a_run_on_single_replies(tmp_path: Path) -> None:
    """Held-out pairs that lack a response have no margin and one length, and damage nothing."""
    folder = make_run(tmp_path / "run", ["loss.beta=2"])
    for file in (folder / "held_out").iterdir():
        header, first, second, *rest = file.read_text().splitlines()
        assert first.endswith(",20,30") and second.endswith(",21,31")
        file.write_text("\n".join([header, "p0,,20,", "p1,,,31", *rest]) + "\n")
    assert "damaged" not in cli(str(folder), "html=none")
    comparison = compare([folder])
    assert not comparison.damaged
    _, after = comparison.runs[0].scores
    assert list(map(str, after["chosen_tokens"][:2])) == ["20.0", "nan"]
    drawn = held_out(comparison, [0])
    assert drawn is not None
    margins, lengths = drawn["views"]["run"]
    assert [sum(trace["y"]) for trace in margins["data"]] == [6, 6]
    assert [sum(trace["y"]) for trace in lengths["data"][:2]] == [7, 7]


def test_a_run_on_single_replies_shows_the_rewards_of_both_labels(tmp_path: Path) -> None:
    """It has neither accuracy nor margin; a run on pairs shows those two instead."""
    rewards = {"rewards/chosen": 0.25, "rewards/rejected": -0.5}
    for seed in (1, 2):
        overrides = ("loss=kto", "monitor.metric=loss", "monitor.mode=min")
        folder = make(tmp_path / f"kto/{seed}", seed=seed, held_out=False, overrides=overrides)
        lines = [{"step": step, "eval/loss": 0.5, "train/rewards/chosen": 0.125} for step in (0, 2)]
        lines[1] |= {f"eval/{key}": value for key, value in rewards.items()}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        results = {"eval_before": {}, "eval_after": {"loss": 0.5, **rewards}}
        (folder / "results.json").write_text(json.dumps(results | {"train": {"model_step": 2}}))
    report = compare([tmp_path / "kto"])
    assert list(report.columns().values()) == [
        "loss",
        "reward of desirable",
        "reward of undesirable",
    ]
    assert "| 0.5000 | 0.2500              | -0.5000               |" in text(report)
    assert "| loss   | reward of desirable | reward of undesirable |" in averages_text(
        report, "train.seed"
    )
    chosen, rejected = panels(report)[1:]
    assert chosen["title"] == "reward of chosen responses"
    assert [line[1:] for line in chosen["lines"]][:2] == [
        ["train", (0, 2), [0.125, 0.125]],
        ["eval", (2,), [0.25]],
    ]
    assert rejected["title"] == "reward of rejected responses"
    paired = {**rewards, "loss": 0.5, "rewards/accuracies": 1.0, "rewards/margins": 0.75}
    assert list(metric_labels(paired)) == ["loss", "rewards/accuracies", "rewards/margins"]


def test_another_metric(sweep: Path) -> None:
    """The lowest loss is the best one."""
    folder = make_run(sweep / "low", ["loss.beta=3"])
    results = {"eval_before": {}, "eval_after": {"loss": 0.1}, "train": {"model_step": 2}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text('{"step": 2, "eval/loss": 0.1}\n')
    assert best_of(compare([sweep], "loss")) == "low"
    with pytest.raises(ConfigError) as error:
        compare([sweep], "lost")
    assert str(error.value) == (
        "metric: no such held-out metric, got lost (loss, rewards/accuracies)"
    )


def test_nothing_to_report(tmp_path: Path) -> None:
    assert cli(str(tmp_path), code=2) == f"DIR: no run in {tmp_path} (no run.yaml below)\n"
    (tmp_path / "file").touch()
    assert (
        cli(f"{tmp_path}/file", code=2) == f"DIR: must be a folder, got the file {tmp_path}/file\n"
    )
    assert cli(f"{tmp_path}/x", "format=xml", code=2) == (
        f"DIR: no such folder, got {tmp_path}/x\nformat: must be one of text, csv, json, got xml\n"
    )
    assert (
        cli("formt=json", code=2)
        == "formt: no such key (report has format, metric, html, over, port)\n"
    )


def test_a_run_without_settings(tmp_path: Path) -> None:
    (make(tmp_path / "a", steps=4) / "run.yaml").unlink()
    make(tmp_path / "b", steps=4)
    assert damaged_lines(compare([tmp_path])) == [
        f"a: {tmp_path}/a/run.yaml: No such file or directory (restore it, or remove it: the run's "
        "own command writes it anew)"
    ]


def test_states_without_slurm(tmp_path: Path) -> None:
    """What the folder and the processes of this machine tell."""
    folders = [
        make_run(tmp_path / "finished", []),
        make_run(tmp_path / "failed", [], state="failed", error="RunError: step 2: bad\n"),
        make_run(tmp_path / "stopped", [], state="stopped", step=1, error="Stopped: SIGTERM"),
        make_run(tmp_path / "killed", [], state="running", step=1),
        make_run(tmp_path / "alive", [], state="running", step=1),
        make_run(tmp_path / "refused", []),
        make_run(tmp_path / "pending", []),
        make_run(tmp_path / "forgotten", []),
        make_run(tmp_path / "begun", []),
    ]
    refused, pending, forgotten, begun = folders[5:]
    note_job(forgotten, forgotten / "log.txt", id="1_1")
    (begun / "lock").touch()  # by a process that is no more
    for folder in (refused, pending, forgotten, begun):
        for name in ("status.json", "results.json", "metrics.jsonl"):
            (folder / name).unlink()
    (refused / "log.txt").write_text(
        "data.sources: must list one\nsrun: error: 2\ntrain 16/36, loss 0.961, 0:31 left\n"
        "reference log-probs of pairs 3/16, 0:02 left\nreplies (vllm) 64/64\n"
    )
    note_job(refused, refused / "log.txt", pid=2**22 + 1)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)", str(folders[4])]
    process = subprocess.Popen(sleep)
    note_job(folders[4], folders[4] / "log.txt", pid=process.pid)
    # A dead process whose number another has by now.
    note_job(folders[3], folders[3] / "log.txt", pid=process.pid)
    try:
        progress = read_progress(folders)
    finally:
        process.kill()
        process.wait()
    assert [(p.state, p.note) for p in progress] == [
        (State.finished, ""),
        (State.failed, "RunError: step 2: bad"),
        (State.stopped, "Stopped: SIGTERM"),
        (State.killed, ""),
        (State.running, ""),
        (State.killed, "data.sources: must list one"),
        (State.pending, ""),
        (State.killed, "Slurm knows no job 1_1, or does not answer"),
        (State.killed, "it ended before its first step"),
    ]
    # Steps of metrics.jsonl count, which is written more often.
    assert progress[3].text() == "killed, step 2 of 2"


@pytest.mark.matrix
def test_every_figure_is_drawn(sweep: Path) -> None:
    """In a browser without a network: all figures, at each choice of their menus."""
    make_run(sweep / "under way", ["loss.beta=3"], state="running")
    assert "report.html" not in cli(str(sweep))
    seen = look_at(sweep / "report.html")
    assert seen.console == []
    curves, heat, histograms = seen.figures
    assert curves["titles"][:2] == ["loss", "accuracy"]
    # Two panels, train and held out, five runs.
    assert curves["states"] == [20]
    assert heat["states"] == [1, 1]
    assert heat["menu"] == ["rewards/accuracies", "loss"]
    assert (heat["x"], heat["y"]) == (["2", "3", "10"], ["0.3", "0.5"])
    assert heat["z"] == [
        [accuracy_of(2, 0.3), None, accuracy_of(10, 0.3)],
        [accuracy_of(2, 0.5), accuracy_of(3, 0.5), accuracy_of(10, 0.5)],
    ]
    assert histograms["menu"][0] == "loss.beta=10,ratio=0.5"
    assert histograms["states"] == [6] * 5
    assert all(figure["drawn"] for figure in seen.figures)
    assert "Say &lt;b&gt;hi&lt;/b&gt;" in seen.html


def test_one_run_and_one_swept_setting(tmp_path: Path) -> None:
    single = make_run(tmp_path / "one", [])
    page = render(compare([single]))
    assert sections(page) == ["top", "runs", "curves", "held-out", "replies"]
    formula = compare([single]).runs[0].config.loss.formula()
    assert f"<dt>loss</dt><dd>{formula}</dd>" in page and "log sigmoid(" in formula
    assert "<td><code>train.learning_rate</code></td><td>0.0003</td>" in page
    make_run(tmp_path / "two", ["loss.beta=5"])
    page = render(compare([tmp_path]))
    assert sections(page) == ["top", "runs", "curves", "sweep", "held-out", "replies"]
    assert "<dt>loss</dt>" not in page and "<dt>seed</dt><dd>42</dd>" in page
    assert "<code>loss.beta</code>" not in page
    # Offline: the page names nothing to fetch (the library holds a few addresses as text).
    own = page.replace(get_plotlyjs(), "")
    assert re.findall(r"(?:src|href)=.(?!data:)\w+", own) == []


def test_published_results_beside_a_reproduction(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine", ["experiments=paper/llama3_instruct"])
    other = make_run(tmp_path / "other", [])
    assert "published" not in cli(str(other), "html=none")
    scores = {"alpaca_eval_2_lc": 43.9, "arena_hard_wr": 33}
    (folder / "benchmarks.json").write_text(json.dumps(scores))
    told = cli(str(folder))
    assert "published results of llama3_instruct, in percent\n" in told
    assert "| published | sigmoid | 44.7            | 40.5         | 33.8       |\n" in told
    assert "| mine      | sigmoid | 43.9            |              | 33.0       |\n" in told
    seen = look_at(folder / "report.html")
    assert seen.console == []
    assert "<td>mine</td><td>sigmoid</td><td>43.9</td><td></td><td>33.0</td>" in seen.html
    assert "wandb.ai/yumeng0818/simpo/runs/zoesxyuj" in seen.html
    (folder / "benchmarks.json").write_text('{"alpaca": 1}')
    assert cli(str(folder), "html=none").splitlines()[-1] == (
        f"mine: {folder}/benchmarks.json: must hold numbers of alpaca_eval_2_lc, "
        "alpaca_eval_2_wr, arena_hard_wr, got {'alpaca': 1} (mend it)"
    )


def test_runs_averaged_over_a_setting(tmp_path: Path) -> None:
    """Accuracies of 0.55 and 0.57 at beta 2, of 0.63 at beta 10, whose other run has not ended."""
    for beta, ratio in GRID:
        state = "running" if (beta, ratio) == (10.0, 0.5) else "finished"
        words = [f"loss.beta={beta}", f"loss.gamma_beta_ratio={ratio}"]
        make_run(tmp_path / "all" / ",".join(words), words, state=state)
    folder, over = str(tmp_path / "all"), "over=loss.gamma_beta_ratio"
    told = cli(folder, over, "html=none").splitlines()
    header = [word.strip() for word in told[0].split("|")[1:-1]]
    assert header == ["runs", "number", "accuracy", "loss"]
    assert "| loss.beta=10.0 | 1      | 0.6300          |" in told[2]
    # 12.706 * 0.01: Student's t of two runs.
    assert "| loss.beta=2.0  | 2      | 0.5600 ± 0.1271 |" in told[3]
    rows = json.loads(cli(folder, over, "format=json"))
    assert rows[1]["rewards/accuracies"] == pytest.approx(0.56)
    assert (rows[1]["runs"], rows[1]["number"]) == ("loss.beta=2.0", 2)
    assert (rows[1]["loss min"], rows[1]["loss max"]) == (0.7, 0.7)
    assert cli(folder, "over=train.sed", code=2) == (
        "over: the runs do not differ in train.sed (loss.beta, loss.gamma_beta_ratio)\n"
    )


def test_pruned_runs_count_for_nothing(tmp_path: Path) -> None:
    """Even if one was ahead when it ended: neither for the best, nor in means or the map."""
    for seed in (1, 2, 3):
        words = [f"train.seed={seed}", f"loss.beta={20 if seed == 3 else 2}"]
        state = {"state": "pruned", "total_steps": 9, "error": "Pruned: hopeless"}
        make_run(tmp_path / f"seed={seed}", words, **(state if seed == 3 else {}))
    report = compare([tmp_path])
    low, high = accuracy_of(2, 0.5), accuracy_of(20, 0.5)
    assert [report.monitored(index) for index in range(3)] == [low, low, high]
    assert report.best == 0
    note = "1 run was pruned and counts neither for the best nor in means"
    told = text(report).splitlines()
    assert "pruned, step 2 of 9" in told[2]  # the table is by value alone
    assert note in told and "seed=3: Pruned: hopeless" in told
    assert [(line["number"], line["loss"]) for line in averages(report, "train.seed")] == [(2, 0.7)]
    assert averages_text(report, "train.seed").splitlines()[-1] == note
    figure = sweep_map(report)
    assert figure is not None
    (panel,) = figure["views"]["rewards/accuracies"]
    assert panel["data"][0]["y"] == [low, None]


def test_averages_fit_a_terminal(tmp_path: Path) -> None:
    for seed in (1, 2):
        for beta in (2.0, 5.0):
            make(tmp_path / f"beta={beta},seed={seed}", beta=beta, seed=seed, steps=4)
    report = compare([tmp_path])
    whole, *_ = averages_text(report, "train.seed").splitlines()
    labels = [label.strip() for label in whole.split("|")[1:-1]]
    assert labels[:4] == ["runs", "number", "accuracy", "loss"] and len(labels) > 4
    for width, columns in ((80, 5), (100, 6)):
        lines = averages_text(report, "train.seed", width).splitlines()
        head, rule, *rows = lines[:4]
        assert [label.strip() for label in head.split("|")[1:-1]] == labels[:columns]
        assert {len(line) for line in (head, rule, *rows)} == {len(head)}
        assert len(head) <= width
        assert lines[4] == f"too wide for this terminal: {', '.join(labels[columns:])}"


def test_the_table_fits_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns and long names: the best first, metrics before the state, the rest in words."""
    monkeypatch.setattr("simpo.report.text.ROWS_SHOWN", 10)
    long = "very_long_name_of_a_sweep_with_many_settings_and_their_values"
    for number in range(15):
        state = {3: "failed", 4: "running"}.get(number, "finished")
        make(tmp_path / f"{long},beta={number}", beta=number + 1.0, state=state, steps=4)
    report = compare([tmp_path])
    lines = text(report, 80).splitlines()
    assert max(map(len, lines[:12])) <= 80
    head = "| run |      | accuracy | loss   | margin | rule pass rate | state    |"
    assert lines[0] == head
    best = r"\| 14  \| best \| 0\.\d{4}   \| .* \| finished \|"
    assert re.fullmatch(best, lines[2])
    accuracies = [float(line.split("|")[3]) for line in lines[2:12]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert lines[12:16] == [
        f"the runs' names begin with {long},",
        "a run's name here is its beta",
        "5 more runs are in the page, and with format=csv",
        "too wide for this terminal: repetition in replies",
    ]
    few = text(compare([tmp_path / f"{long},beta={number}" for number in (3, 5)]), 60).splitlines()
    assert [line.split("|")[1].strip() for line in few[2:4]] == ["5", "3"]
    assert not any("more runs" in line for line in few)
    make(tmp_path / "another_name_that_is_longer_than_the_terminal_is_wide_and_no_setting", beta=60)
    (_, _, top, *_) = text(compare([tmp_path]), 80).splitlines()
    assert top.split("|")[1] == " another_name_...nd_no_setting " and len(top) <= 80
    whole = text(report).splitlines()
    assert len([line for line in whole if line.startswith("| beta=")]) == 15
    assert "| finished, step 4 of 4 |" in whole[2]
    assert [line["run"] for line in report.lines()] == report.names


def test_long_names_are_shortened_in_their_middle() -> None:
    assert shorten("loss.beta=2,train.seed=42", 15) == "loss.b...eed=42"
    assert shorten("loss.beta=2", 11) == "loss.beta=2"


def test_links_to_nothing(tmp_path: Path) -> None:
    """They are not taken for files that are not there."""
    status, judged = (
        make(tmp_path / name, steps=4) / file
        for name, file in (("a", "status.json"), ("b", "benchmarks/ifbench/judged.json"))
    )
    status.unlink()
    judged.parent.mkdir(parents=True)
    for link in (status, judged):
        link.symlink_to(link.name)
    assert damaged_lines(compare([tmp_path])) == [
        f"a: {status}: is a link to nothing (remove it: the run's own command writes it anew)",
        f"b: {judged}: is a link to nothing (remove it: simpo judge writes it anew)",
    ]


@contextmanager
def without_rights() -> Iterator[Path]:
    """A folder in which, also for root, the rights of files count."""
    is_root = os.geteuid() == 0
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        if is_root:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "/jobs.jsonl: cannot be read: Permission denied"),
        ("run.yaml", "/run.yaml: Permission denied"),
        ("status.json", "/status.json: cannot be read: Permission denied"),
        ("benchmarks", "/benchmarks: Permission denied"),
        ("held_out", "/held_out/step-000000.csv: cannot be read: Permission denied"),
    ],
)
def test_what_this_user_may_not_read(name: str, fault: str) -> None:
    """A run that cannot be read has a line, and the others are compared."""
    with without_rights() as folder:
        make(folder / "a", steps=4)
        run = make(folder / "b", steps=4)
        (run / "benchmarks").mkdir()
        closed = run / name
        rights = closed.stat().st_mode
        closed.chmod(0)
        report = compare([folder])
        closed.chmod(rights)
    assert report.names == ["a"]
    assert damaged_lines(report) == [f"b: {run}{fault} (let this user read it)"]


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of a folder's name that are no text, a |, and a new line."""
    make(tmp_path / "a|b\nc\udcff", steps=4)
    make(tmp_path / "d", seed=1, steps=4)
    assert "| a\\|b c\udcff | " in text(compare([tmp_path]))
    page = tmp_path / "page.html"
    main([str(tmp_path), "format=json", f"html={page}"])
    assert json.loads(capsys.readouterr().out)[0]["run"] == "a|b\nc\udcff"
    assert "c\\udcff" in page.read_text()
    assert Source([tmp_path]).look().version


def test_no_name_of_a_page(tmp_path: Path) -> None:
    make(tmp_path / "a", steps=4)
    with pytest.raises(ConfigError) as caught:
        main([str(tmp_path), "html="])
    assert str(caught.value) == "html: must not be empty (none writes no page)"
