"""A collapse is reported once, with numbers worked out by hand, and the same after a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import simpo.loop.step
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, RunError
from simpo.config.schema import WatchConfig
from simpo.data.demo.records import demo_records
from simpo.loop.train import train
from simpo.loop.watch import CollapseWatch
from simpo.run.files import read_results
from tests.support.whole_runs import metrics_of, run_command

REMEDY = "lower train.learning_rate, raise loss.beta or add loss.sft_weight"


def told(config: WatchConfig, lines: list[dict[str, float]]) -> list[str]:
    watch = CollapseWatch(config)
    return [finding.text for line in lines for finding in watch.read(line)]


def series(key: str, values: list[float], first_step: int = 1) -> list[dict[str, float]]:
    return [{"step": step, key: value} for step, value in enumerate(values, first_step)]


def test_chosen_falls_in_training() -> None:
    """Pairs of two: starts at -1.0; -1.2 is within half a nat, -1.7 is not, -2.1 is beyond one.

    The window that was last in order holds steps 2 and 3, whose older one was computed after one
    update.
    """
    lines = series("train/logps/chosen", [-0.8, -1.2, -1.2, -2.2, -2.0, -9.0, -9.0])
    watch = CollapseWatch(WatchConfig(window=2))
    found = [finding for line in lines for finding in watch.read(line)]
    assert [(f.step, f.good_step) for f in found] == [(5, 1)]
    assert found == watch.findings
    assert found[0].text == (
        "step 5: the log-prob of a chosen token fell from -1.00 to -2.10, by more than "
        f"watch.chosen_drop=1.0; last good step 1 ({REMEDY})"
    )


def test_chosen_falls_on_held_out_pairs() -> None:
    lines = [{"step": s, "eval/logps/chosen": v} for s, v in ((0, -0.9), (12, -1.4), (24, -1.91))]
    assert told(WatchConfig(), lines) == [
        "step 24: the log-prob of a held-out chosen token fell from -0.90 to -1.91, by more than "
        f"watch.chosen_drop=1.0; last good step 12 ({REMEDY})"
    ]


def test_replies_loop() -> None:
    lines = [
        {"step": s, "eval/reply_repetition": v} for s, v in ((0, 0.04), (12, 0.03), (24, 0.28))
    ]
    assert told(WatchConfig(), lines) == [
        "step 24: the share of repeated 4-grams in replies rose from 0.04 to 0.28, by more than "
        "watch.repetition_rise=0.15; last good step 12 "
        f"(read samples/step-000024.json; {REMEDY})"
    ]


def test_gradients_explode() -> None:
    """One spike of 30 among norms of 2 leaves a mean of 9, a lasting one does not."""
    spike, lasting = [2.0] * 4 + [30.0] + [2.0] * 3, [2.0] * 5 + [20.0] + [30.0] * 3
    config = WatchConfig(window=4)
    assert told(config, series("train/grad_norm", spike)) == []
    assert told(config, series("train/grad_norm", lasting)) == [
        "step 8: the gradient's norm rose from 2.0 to 20.5, to more than "
        "watch.grad_norm_ratio=10.0 times; last good step 2 "
        "(lower train.learning_rate or raise train.warmup_ratio)"
    ]
    assert told(config, series("train/grad_norm", [0.0] * 4 + [5.0] * 8)) == []


def test_what_is_no_collapse() -> None:
    """At a limit is not beyond it; better than the start is well; a limit of 0 watches nothing."""
    edge = {"step": 9, "eval/logps/chosen": -2.0, "eval/reply_repetition": 0.25}
    start = {"step": 0, "eval/logps/chosen": -1.0, "eval/reply_repetition": 0.0}
    better = {"step": 4, "eval/logps/chosen": -0.1, "eval/reply_repetition": 0.0}
    config = WatchConfig(repetition_rise=0.25)
    assert told(config, [start, better, edge]) == []
    worse = {"step": 12, "eval/logps/chosen": -2.1, "eval/reply_repetition": 0.26}
    assert len(told(config, [start, better, edge, worse])) == 2
    assert told(WatchConfig(chosen_drop=0, repetition_rise=0), [start, worse]) == []


def test_a_value_that_is_no_number_is_told() -> None:
    lines = [{"step": s, "eval/logps/chosen": v} for s, v in ((0, -0.9), (12, float("nan")))]
    assert "fell from -0.90 to nan" in told(WatchConfig(), lines)[0]


VALUES = st.floats(-20, 20) | st.just(float("nan"))
LINES = st.lists(
    st.dictionaries(
        st.sampled_from(
            ["train/logps/chosen", "train/grad_norm", "eval/logps/chosen", "eval/reply_repetition"]
        ),
        VALUES,
    ),
    max_size=30,
)


@given(LINES, st.integers(0, 30), st.integers(1, 4))
def test_restarted_from_logged_lines(values: list[dict[str, float]], cut: int, window: int) -> None:
    """Interrupted anywhere, a watch that reads what was written goes on like an undisturbed one."""
    lines = [{"step": step, **line} for step, line in enumerate(values, 1)]
    config = WatchConfig(window=window)
    whole = CollapseWatch(config)
    after = [whole.read(line) for line in lines][cut:]
    restarted = CollapseWatch(config)
    for line in lines[:cut]:
        restarted.read(json.loads(json.dumps(line)))
    assert [restarted.read(line) for line in lines[cut:]] == after
    assert restarted.findings == whole.findings
    # Once for each signal, however long it lasts.
    kinds = [finding.text.partition(" from ")[0].partition(": ")[2] for finding in whole.findings]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("watch.chosen_drop=-1", "watch.chosen_drop: must be 0 (off) or more, got -1.0"),
        ("watch.repetition_rise=-1", "watch.repetition_rise: must be 0 (off) or more, got -1.0"),
        (
            "watch.grad_norm_ratio=0.5",
            "watch.grad_norm_ratio: must be 0 (off) or above 1, got 0.5",
        ),
        ("watch.window=0", "watch.window: must be 1 or more, got 0"),
        ("watch.action=pause", "watch.action: must be one of warn, stop, got pause"),
    ],
)
def test_bad_settings(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run([override])
    assert str(caught.value) == message


# The second update destroys the tiny model: step 3 sees what it left.
ABSURD = ["train.learning_rate=1", "train.checkpoint_every=1", "watch.window=1"]


@pytest.mark.matrix
def test_stop_ends_the_run_and_names_the_last_good_checkpoint(
    tiny_run: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    overrides = [*tiny_run, *ABSURD, "watch.action=stop", f"run_dir={folder}"]
    told = run_command("simpo.train", *overrides)
    assert told.returncode == 1
    (line,) = [x for x in told.stderr.splitlines() if x.startswith("watch")]
    assert line.startswith("watch  step 3: the log-prob of a chosen token fell from -6.")
    assert line.endswith(
        f"last good step 1 ({REMEDY}); last good checkpoint: {folder}/checkpoints/step-000001"
    )
    assert told.stderr.splitlines()[-1] == line, "no traceback"
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002"]
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 2)
    assert line in status["error"]


def test_warn_goes_on(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train(compose_run([*tiny_run, *ABSURD, f"run_dir={folder}"]))
    output = capsys.readouterr().out
    findings = json.loads((folder / "results.json").read_text())["findings"]
    assert len(findings) == 4
    assert all(
        output.count(f"watch  {finding}; last good checkpoint: ") == 1 for finding in findings
    )
    assert "watch  4 signs of a collapse, see results.json" in output
    card = (folder / "model/README.md").read_text()
    assert all(f"Sign of collapse: {finding}." in card for finding in findings)


def test_a_continued_run_tells_only_what_is_new(
    tiny_run: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted after step 3 has been told; the results are those of an undisturbed run."""
    folders = tmp_path / "whole", tmp_path / "continued"
    whole, continued = (
        compose_run([*tiny_run, *ABSURD, "watch.grad_norm_ratio=20", f"run_dir={folder}"])
        for folder in folders
    )
    train(whole)
    every = json.loads((folders[0] / "results.json").read_text())["findings"]

    real, steps = simpo.loop.step.update, []

    def interrupted(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise RunError("interrupted")
        return real(*args)

    monkeypatch.setattr(simpo.loop.step, "update", interrupted)
    with pytest.raises(RunError, match="interrupted"):
        train(continued)
    monkeypatch.setattr(simpo.loop.step, "update", real)
    capsys.readouterr()
    train(continued)
    output = capsys.readouterr().out
    assert json.loads((folders[1] / "results.json").read_text())["findings"] == every
    assert ["step 3" in x for x in every] == [f"watch  {x}" not in output for x in every]
    assert {x.partition(":")[0] for x in every} == {"step 3", "step 4"}


@pytest.mark.matrix
def test_the_demo_is_in_order(smollm2: Path, tmp_path: Path) -> None:
    """The main job, replies included, with half of its pairs in a step, which is noisier, and with
    one in eight of its held-out pairs.
    """
    for split, every in (("train", 1), ("test", 8)):
        records = demo_records(compose_run([]).data.seed, split)[::every]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    sources = f"data.sources=[{{path: {tmp_path}/train.jsonl, test_path: {tmp_path}/test.jsonl}}]"
    fewer = ["train.pairs_per_step=2", "sample.num_prompts=4"]
    train(compose_run([sources, *fewer, f"run_dir={tmp_path / 'run'}"]))
    assert read_results(tmp_path / "run")["findings"] == []
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines if "eval/reply_repetition" in line] == [0, 36]


@pytest.mark.matrix
def test_the_demo_collapses_at_1e3_on_the_preference_alone(smollm2: Path, tmp_path: Path) -> None:
    """Stopped by the log-prob of the chosen replies in less than half of the 36 steps.

    (With its NLL term, which `data=demo` adds, the demo bears 1e-3.)
    """
    overrides = ["train.learning_rate=1e-3", "loss.sft_weight=0"]
    overrides += ["data.sources=[{path: builtin:demo, test_split: null}]"]
    overrides += ["train.pairs_per_step=2"]
    with pytest.raises(RunError, match=r"step 1\d: the log-prob of a chosen token fell from -0"):
        train(compose_run([*overrides, "watch.action=stop", f"run_dir={tmp_path}"]))
