"""What compares the models of rounds, and that all of them are compared with the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from simpo.config.check import run_yaml
from simpo.config.choices import Dtype, Mode
from simpo.config.compose import compose_run
from simpo.config.composer import CONF, Composer
from simpo.config.errors import ConfigError
from simpo.config.schema import RunConfig
from simpo.judging.answers import before_training, contestant
from simpo.judging.judge import open_benchmark
from simpo.launch.commands.rounds import _defaults
from simpo.launch.rounds.driver import _watch
from simpo.launch.rounds.phases import Phase, settings_of
from simpo.launch.rounds.preflight import _monitor_problems
from simpo.loop.publish import export_dtype
from simpo.run.pruning import Pruner, Pruning
from simpo.run.rounds import Kind, as_begun, run_folder

DEFAULTS = ["rounds.number=3", "monitor.metric=reply_reward", "monitor.mode=max"]


def composed(*words: str) -> RunConfig:
    return compose_run(["rounds.number=3", "monitor.metric=reply_reward", *words])


def test_more_reward_is_better_whatever_the_loss_is_compared_by() -> None:
    """Of loss=sft's own metric less is better."""
    assert compose_run(["loss=sft"]).monitor.mode is Mode.min
    with pytest.raises(ConfigError) as told:
        composed("loss=sft")
    assert str(told.value) == (
        "monitor.mode: more reply_reward is better, got min (monitor.mode=max)"
    )
    assert _defaults(["loss=sft"], CONF) == DEFAULTS
    run = compose_run([*DEFAULTS, "loss=sft"])
    assert run.monitor.mode is Mode.max
    # Within a round there is no reward, and without a rejected reply no accuracy.
    own = settings_of(run, Path("/rounds"), Phase(1, Kind.train)).monitor
    assert (own.metric, own.mode) == ("loss", Mode.min)
    own = settings_of(composed(), Path("/rounds"), Phase(1, Kind.train)).monitor
    assert (own.metric, own.mode) == ("rewards/accuracies", Mode.max)


def test_settings_of_files_of_the_users_stay(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    mine = tmp_path / "experiments/mine.yaml"
    mine.write_text(
        "defaults:\n  - override /loss: sft\n\nrounds:\n  number: 5\nmonitor:\n  metric: win_rate\n"
    )
    composer = Composer(str(tmp_path))
    assert _defaults(["experiments=mine"], composer) == []
    assert _defaults(["experiments=mine", "rounds.number=2"], composer) == []
    mine.write_text("defaults:\n  - override /loss: sft\n")
    assert _defaults(["experiments=mine"], composer) == DEFAULTS
    mine.write_text("hydra:\n  sweeper:\n    params:\n      rounds.number: 1,2\n")
    assert _defaults(["experiments=mine"], composer) == DEFAULTS[1:]
    assert _defaults(["rounds.number=1,2", "loss.beta=1,2"], composer) == DEFAULTS[1:]
    assert _defaults(["no such word"], composer) == DEFAULTS


def test_no_rounds_are_no_rounds() -> None:
    with pytest.raises(ConfigError) as told:
        _defaults(["rounds.number=0"], CONF)
    assert str(told.value) == "rounds.number: must be 1 or more, got 0 (simpo train trains without)"


@pytest.mark.parametrize(
    ("metric", "fault"),
    [
        ("reply_rewards", " (did you mean reply_reward?)"),
        ("win_rate", None),
        ("rewards/accuracies", ""),
        ("on_policy/loss", ""),
        ("reply_kl", ""),
    ],
)
def test_a_metric_that_no_round_has_is_told_first(metric: str, fault: str | None) -> None:
    run = composed(f"monitor.metric={metric}", "benchmark=pairs")
    assert _monitor_problems(run) == (
        [f"monitor.metric: no such held-out metric, got {metric}{fault}"] if fault else []
    )


def test_a_pass_rate_needs_to_know_what_passes() -> None:
    with pytest.raises(ConfigError) as told:
        composed("monitor.metric=reply_pass_rate", "on_policy.reward=own:function")
    assert str(told.value) == (
        "monitor.metric: reply_pass_rate needs the score from which a reply passes "
        "(on_policy.pass_reward)"
    )
    composed("monitor.metric=reply_pass_rate", "on_policy.reward=rules")


@pytest.fixture
def second_round(tiny_folder: Path, tmp_path: Path) -> tuple[RunConfig, RunConfig]:
    """Settings of rounds of prompts alone, and of the run of their second round, on the disk."""
    rule = {"name": "bullets", "count": 2}
    for name in ("a", "b"):
        lines = (json.dumps({"prompt": f"{name} {i}", "rule": rule}) + "\n" for i in range(4))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    root = tmp_path / "root"
    run = replace(
        composed(
            f"model.path={tiny_folder}",
            "model.lora.rank=0",
            "data=jsonl",
            f"data.sources=[{{path: {tmp_path}/a.jsonl, test_path: {tmp_path}/b.jsonl}}]",
            "benchmark=pairs",
            "benchmark.baseline=base",
            "on_policy.reward=rules",
            f"cache_dir={tmp_path}/cache",
        ),
        run_dir=str(root),
    )
    own = settings_of(run, root, Phase(2, Kind.train))
    for settings in (run, own):
        folder = Path(settings.run_dir or "")
        (folder / "model").mkdir(parents=True)
        (folder / "model/config.json").touch()
        (folder / "run.yaml").write_text(run_yaml(settings))
    return run, own


def test_models_of_all_rounds_are_judged_on_the_same(
    second_round: tuple[RunConfig, RunConfig],
) -> None:
    """On the prompts that are held out of the rounds, against the first model."""
    run, own = second_round
    assert own.run_dir and run.run_dir and own.model.path != run.model.path
    asked = contestant(run, own.run_dir)
    assert asked.run is not None
    judged = replace(own, data=asked.run.data, loss=asked.run.loss)
    questions = [question.prompt[0]["content"] for question in open_benchmark(judged).questions]
    assert questions == ["b 0", "b 1", "b 2", "b 3"]
    assert before_training(asked).saved.model.path == run.model.path
    assert str(asked.folder).startswith(own.run_dir)


def test_a_run_as_its_rounds_began(second_round: tuple[RunConfig, RunConfig]) -> None:
    run, own = second_round
    assert as_begun(own) == replace(run, run_dir=own.run_dir)
    assert as_begun(run) == run
    copied = replace(own, run_dir=str(run_folder(Path("/elsewhere"), 2)))
    assert as_begun(copied) == copied


def test_the_last_model_is_saved_as_the_first_was(
    second_round: tuple[RunConfig, RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the round before is in float32, whatever the first one is in."""
    run, own = second_round
    asked: list[str] = []
    monkeypatch.setattr("simpo.loop.publish.files_dtype", lambda source, _: asked.append(source))
    export_dtype(replace(own, export=replace(own.export, dtype=Dtype.auto)))
    assert asked == [run.model.path]


def test_a_collapse_over_rounds_is_told_by_round(capsys: pytest.CaptureFixture[str]) -> None:
    found = {n: {"eval": {"reply_repetition": v}} for n, v in enumerate((0.04, 0.03, 0.28))}
    (told,) = _watch(composed(), found)
    assert told == (
        "round 2: the share of repeated 4-grams in replies rose from 0.04 to 0.28, by more than "
        "watch.repetition_rise=0.15; last good round 1 (read rounds/3/replies; lower "
        "train.learning_rate, raise loss.beta or add loss.sft_weight)"
    )
    assert capsys.readouterr().out == f"watch  {told}\n"


def test_rounds_are_not_pruned() -> None:
    run = composed("train.eval_every=1")
    assert [*Pruning(Pruner.median, 2, 0).problems(run)] == [
        "hydra.sweeper.pruner: rounds are not pruned (hydra.sweeper.pruner=none; "
        "rounds.patience ends them)"
    ]
