"""Several held-out sets: each has metrics of its own, beside those of all pairs and their mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpo.config.compose import compose_run
from simpo.config.data import DataConfig, SourceConfig
from simpo.config.errors import ConfigError
from simpo.config.schema import MonitorConfig
from simpo.loop.train import train
from simpo.run.best import mode_of
from simpo.run.tables import result_lines
from tests.support.whole_runs import metrics_of


def first_evaluation(words: list[str], folder: Path) -> dict[str, float]:
    one_step = ["train.max_steps=1", "train.warmup_ratio=0", "train.eval_every=0"]
    run = compose_run([*words, *one_step, f"run_dir={folder}"])
    train(run)
    return {k: v for k, v in metrics_of(folder)[0].items() if k.startswith("eval/")}


def test_each_set_is_as_alone(tiny_run: list[str], tmp_path: Path) -> None:
    """A set's metrics are those of a run that holds out that set alone."""
    lines = (tmp_path / "test.jsonl").read_text().splitlines()
    (tmp_path / "easy.jsonl").write_text("\n".join(lines[:5]))
    (tmp_path / "hard.jsonl").write_text("\n".join(lines[5:]))
    train_file = f"path: {tmp_path}/train.jsonl"
    easy, hard = (f"test_path: {tmp_path}/{name}.jsonl" for name in ("easy", "hard"))
    words = [word for word in tiny_run if not word.startswith("data.sources")]

    def evaluation(name: str, *sources: str) -> dict[str, float]:
        own = [*words, "sample.num_prompts=0", f"data.sources=[{', '.join(sources)}]"]
        return first_evaluation(own, tmp_path / name)

    both = evaluation(
        "both", f"{{{train_file}, {easy}}}", f"{{{train_file}, {hard}, held_out_name: on_birds}}"
    )
    alone = {
        "easy": evaluation("one", f"{{{train_file}, {easy}}}"),
        "on_birds": evaluation("two", f"{{{train_file}, {hard}}}"),
    }
    keys = [key.removeprefix("eval/") for key in alone["easy"]]
    assert {"loss", "rewards/accuracies"} <= set(keys)
    assert len(both) == 4 * len(keys)
    for key in keys:
        one, two = (alone[name][f"eval/{key}"] for name in alone)
        assert both[f"eval/easy/{key}"] == pytest.approx(one, rel=1e-5)
        assert both[f"eval/on_birds/{key}"] == pytest.approx(two, rel=1e-5)
        assert both[f"eval/mean/{key}"] == pytest.approx((one + two) / 2, rel=1e-5)
        if key != "loss":  # with an SFT term the loss is no mean over pairs
            assert both[f"eval/{key}"] == pytest.approx((5 * one + 11 * two) / 16, rel=1e-5)
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    shown = [line["held out"] for line in result_lines({}, results["eval_after"])]
    assert shown[-3:] == ["accuracy, easy", "accuracy, on_birds", "accuracy, mean"]


@pytest.mark.parametrize("loss", ["sigmoid", "sft"])
def test_what_an_evaluation_measures_is_known_before_it(
    loss: str, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[str] = []
    monkeypatch.setattr(
        "simpo.loop.setup.check_monitor", lambda monitor, names: known.extend(names)
    )
    sources = [
        f"{{path: {tmp_path}/{name}.jsonl, test_path: {tmp_path}/test.jsonl}}" for name in "ab"
    ]
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    words = [*tiny_run, f"loss={loss}", "sample.num_prompts=2", "sample.max_new_tokens=2"]
    words += ["train.keep_best=true", f"data.sources=[{', '.join(sources)}]"]
    run = compose_run(
        [*words, "train.max_steps=1", "train.warmup_ratio=0", f"run_dir={tmp_path}/run"]
    )
    train(run)
    assert known == [key[5:] for key in metrics_of(tmp_path / "run")[0] if key[:5] == "eval/"]
    assert {"loss", "mean/loss", "reply_tokens", "rule_pass_rate"} <= {*known}


def test_names_of_sets() -> None:
    sources = [
        SourceConfig(path="me/helpful.v2"),
        SourceConfig(path="a.jsonl", test_path="x/test.jsonl.gz"),
        SourceConfig(path="b.jsonl", test_path="y/test.jsonl"),
        SourceConfig(path="c.jsonl", test_path="z/mean.jsonl"),
        SourceConfig(path="d.jsonl", held_out_name="common"),
        SourceConfig(path="e.jsonl", held_out_name="common"),
        SourceConfig(path="f.jsonl", test_path="common.jsonl"),
        SourceConfig(path="g.jsonl", held_out_name="late"),
    ]
    sources.insert(0, SourceConfig(path="late.jsonl"))
    names = ["late-2", "helpful", "test", "test-2", "mean-2", *["common"] * 2, "common-2", "late"]
    assert DataConfig(name="x", sources=sources).held_out_names() == names


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a/b", "must be letters, digits, _ and -, got a/b"),
        ("rewards", "is a part of names of metrics, got rewards"),
    ],
)
def test_names_that_cannot_be(name: str, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run(
            ["data=jsonl", f"data.sources=[{{path: 'builtin:demo', held_out_name: '{name}'}}]"]
        )
    assert str(caught.value) == f"data.sources[0].held_out_name: {fault}"


def test_less_is_better_in_a_set_too() -> None:
    monitor = MonitorConfig()
    assert mode_of("easy/loss", monitor).value == "min"
    assert mode_of("easy/rewards/margins", monitor).value == "max"
    assert mode_of("easy/rewards/chosen", monitor).value == "max"
    assert mode_of("easy/rewards/rejected", monitor).value == "min"
