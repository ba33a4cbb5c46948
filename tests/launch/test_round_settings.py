"""What each phase of rounds is to do, and when rounds end: settings and planted figures alone."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from simpo.config.check import check_run, run_yaml
from simpo.config.choices import Dtype
from simpo.config.compose import compose_run, run_of_words
from simpo.config.errors import ConfigError, RunError
from simpo.config.schema import RunConfig
from simpo.launch.rounds import driver
from simpo.launch.rounds.by_hand import commands_of
from simpo.launch.rounds.phases import Phase, phases, settings_of
from simpo.launch.rounds.record import (
    done_file,
    exceeded,
    kept_round,
    measured,
    next_phases,
    nothing_to_learn,
    reason_to_end,
    rounds_table,
)
from simpo.run.rounds import Kind, run_folder

ROOT = Path("/rounds")


def composed(*words: str) -> RunConfig:
    """Three rounds of the demo, whose model is trained with LoRA."""
    return compose_run(["rounds.number=3", "monitor.metric=reply_reward", *words])


def settings(run: RunConfig, number: int, kind: Kind, part: int = 1, best: int = 0) -> RunConfig:
    return settings_of(run, ROOT, Phase(number, kind, part), best)


def test_the_order_of_phases() -> None:
    run = composed("rounds.number=1", "rounds.generate_jobs=2")
    assert [phase.text() for phase in phases(run)] == [
        "round 1, check",
        "round 1, generate",
        "round 1, generate, part 2",
        "round 1, annotate",
        "round 1, train",
        "round 2, generate",
        "round 2, generate, part 2",
        "round 2, annotate",
    ]


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    run = composed("rounds.generate_jobs=2")
    assert next_phases(run, tmp_path) == [Phase(1, Kind.check)]
    for phase in (Phase(1, Kind.check), Phase(1, Kind.generate, 2)):
        done_file(tmp_path, phase).parent.mkdir(parents=True, exist_ok=True)
        done_file(tmp_path, phase).write_text("{}")
    assert next_phases(run, tmp_path) == [Phase(1, Kind.generate, 1)]
    for phase in phases(run):
        if phase.round <= 2 and (phase.round, phase.kind) != (2, Kind.train):
            done_file(tmp_path, phase).parent.mkdir(parents=True, exist_ok=True)
            done_file(tmp_path, phase).write_text("{}")
    # More processes do not do again what others have done.
    for number in (2, 3):
        run = composed(f"rounds.generate_jobs={number}")
        assert next_phases(run, tmp_path) == [Phase(2, Kind.train)]
    (tmp_path / "rounds/ended.txt").write_text("enough\n")
    assert next_phases(run, tmp_path) == []


def test_prompts_of_each_round() -> None:
    run = composed("on_policy.seeds=[1,2]", "rounds.generate_jobs=2", "rounds.choice=all")
    dealt = [settings(run, number, Kind.generate, 2).on_policy for number in (1, 2, 3, 4)]
    assert [(one.slice, one.slices, one.held_out_only) for one in dealt] == [
        (1, 3, False),
        (2, 3, False),
        (3, 3, False),
        (1, 1, True),
    ]
    assert {(one.part, one.parts, one.choice.value) for one in dealt} == {(2, 2, "all")}
    assert dealt[1].folder == "/rounds/rounds/2/replies"
    every = composed("rounds.prompts=all", "on_policy.choice=margin")
    own = settings(every, 2, Kind.annotate).on_policy
    assert (own.slice, own.slices, own.choice.value) == (1, 1, "margin")


def test_replies_come_from_the_newest_model_and_training_starts_where_it_is_told() -> None:
    for start, adapter in (("last", 2), ("first", None), ("best", 1)):
        run = composed(f"rounds.start={start}")
        replies = settings(run, 3, Kind.generate, best=1).model.lora
        assert (replies.adapter, replies.rank) == (f"{run_folder(ROOT, 2)}/model", 0)
        trained = settings(run, 3, Kind.train, best=1).model.lora
        if adapter is None:
            assert trained == run.model.lora and trained.rank == 16
        else:
            assert (trained.adapter, trained.rank) == (f"{run_folder(ROOT, adapter)}/model", 0)


def test_what_a_judge_needs_stays(tmp_path: Path) -> None:
    """Its prompts lie where the benchmark's files lie, and monitor.metric may be its figure."""
    run = composed("benchmark=pairs", "judge.reward=rules", "monitor.metric=win_rate")
    (tmp_path / "rounds/1/replies").mkdir(parents=True)
    (tmp_path / "rounds/1/replies/train.jsonl").touch()
    for kind in (Kind.generate, Kind.annotate, Kind.train):
        own = settings_of(run, tmp_path, Phase(1, kind))
        assert own.benchmark == run.benchmark and own.monitor.metric == "win_rate"
        check_run(own)


def test_whole_models_are_handed_on_in_fp32(tmp_path: Path) -> None:
    run = composed("model.lora.rank=0", f"model.tokenizer={tmp_path}", "export.dtype=auto")
    model = settings(run, 2, Kind.train).model
    assert model.path == f"{run_folder(ROOT, 1)}/model"
    assert model.tokenizer is model.chat_template is model.revision is None
    dtypes = [settings(run, number, Kind.train).export.dtype for number in (1, 2, 3)]
    assert dtypes == [Dtype.float32, Dtype.float32, Dtype.auto]


def test_what_a_round_is_trained_on(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.touch()
    b.touch()
    static = f"data.sources=[{{path: {a}, weight: 2.0}}, {{path: {b}, num_pairs: 30}}]"
    run = composed(static, "rounds.static_weight=0.25", "data.seed=7")
    own = settings_of(run, tmp_path, Phase(2, Kind.train))
    replies = tmp_path / "rounds/2/replies"
    assert [(s.path, s.weight, s.num_pairs) for s in own.data.sources] == [
        (f"{replies}/train.jsonl", 1.0, None),
        (str(a), 0.5, None),
        (str(b), 1.0, 8),
    ]
    # No pair of held-out replies: no held-out set.
    assert own.data.sources[0].test_path is None and own.data.seed == 8
    replies.mkdir(parents=True)
    (replies / "test.jsonl").write_text("{}\n")
    own = settings_of(run, tmp_path, Phase(2, Kind.train))
    assert own.data.sources[0].test_path == f"{replies}/test.jsonl"
    assert own.data.held_out_names()[0] == "on_policy"
    assert own.rounds.number == 0 and own.run_dir == f"{tmp_path}/rounds/2/run"
    assert own.monitor.metric == "rewards/accuracies"
    alone = settings_of(composed(static), tmp_path, Phase(2, Kind.train))
    assert len(alone.data.sources) == 1


def test_nothing_is_selected_by_held_out_pairs_that_are_not_there(tmp_path: Path) -> None:
    words = ("train.keep_best=true", "train.patience_evals=2", "train.eval_every=1")
    run, replies = composed(*words), tmp_path / "rounds/2/replies"
    own = settings_of(run, tmp_path, Phase(2, Kind.train)).train
    assert not own.keep_best and own.patience_evals == 0
    replies.mkdir(parents=True)
    (replies / "test.jsonl").write_text("{}\n")
    assert settings_of(run, tmp_path, Phase(2, Kind.train)).train == run.train


def figures(**series: list[float]) -> dict[int, dict[str, float]]:
    """Metrics by round."""
    keys = {"reward": "reply_reward", "kl": "reply_kl", "tokens": "reply_tokens"}
    columns = {keys[name]: values for name, values in series.items()}
    rows = zip(*columns.values(), strict=True)
    return {number: dict(zip(columns, row, strict=True)) for number, row in enumerate(rows)}


def test_rounds_end_when_nothing_is_gained_any_more() -> None:
    run = composed("rounds.patience=2")
    rewards = [0.1, 0.4, 0.3, 0.35]
    assert reason_to_end(run, figures(reward=rewards[:3])) == ""
    assert reason_to_end(run, figures(reward=rewards)) == (
        "rounds.patience=2 rounds without a better reply_reward than that of round 1"
    )
    assert kept_round(run, figures(reward=rewards)) == 1
    # The first model is never kept, and without patience the newest is.
    assert kept_round(run, figures(reward=[0.9, 0.4, 0.3])) == 1
    assert kept_round(composed(), figures(reward=rewards)) == 3


def test_rounds_end_beyond_a_limit() -> None:
    run = composed("rounds.max_kl=0.5", "rounds.max_length_ratio=1.5")
    calm = figures(reward=[0.1, 0.2], kl=[0.0, 0.5], tokens=[40, 60])
    assert reason_to_end(run, calm) == "" and exceeded(run, calm, 1) == []
    far = figures(reward=[0.1, 0.2, 0.3], kl=[0.0, 0.1, 0.75], tokens=[40, 44, 48])
    assert reason_to_end(run, far) == (
        "the model of round 2 is 0.750 nats per token from the first, beyond rounds.max_kl=0.5"
    )
    assert kept_round(run, far) == 1
    long = figures(reward=[0.1, 0.2], kl=[0.0, 0.1], tokens=[40, 70])
    assert reason_to_end(run, long) == (
        "the model of round 1 writes 1.75 times as much as the first, beyond "
        "rounds.max_length_ratio=1.5"
    )
    # There is no other than the one beyond.
    assert kept_round(run, long) == 1


def test_rounds_without_pairs_have_nothing_to_learn() -> None:
    words = ("train.pairs_per_step=4", "train.warmup_ratio=0.1", "train.epochs=1")
    run = composed(*words, "train.max_steps=null")
    assert nothing_to_learn(run, 5, 2) == ""
    assert nothing_to_learn(run, 0, 2) == (
        "no prompt of round 2 has replies with different scores: nothing to learn from"
    )
    # One step, in which the warm-up begins: training would refuse to begin.
    assert nothing_to_learn(run, 4, 2) == (
        "train.pairs_per_step: the replies of round 2 give 4 pairs, a run of 1 step, and the "
        "warm-up begins at learning rate 0: no weight would change (lower it, or more pairs by "
        "on_policy.num_prompts, on_policy.seeds, on_policy.max_new_tokens or rounds.prompts=all, "
        "or train.warmup_ratio=0)"
    )
    assert nothing_to_learn(composed(*words, "train.warmup_ratio=0.0"), 4, 2) == ""
    assert nothing_to_learn(composed(*words, "rounds.static_weight=0.5"), 4, 2) == ""


def test_a_model_without_a_reply_that_can_be_scored_is_not_kept() -> None:
    """All its replies are empty or cut off, so it has no reward either."""
    run, found = composed("rounds.patience=1"), figures(reward=[0.1, 0.2])
    found[2] = {"reply_kl": 0.1, "reply_tokens": 64.0}
    assert reason_to_end(run, found) == (
        "the model of round 2 gives no held-out reply with a score: they are empty, cut off "
        "(on_policy.max_new_tokens, keep_cut) or their ratings cannot be read"
    )
    assert kept_round(run, found) == kept_round(composed(), found) == 1
    # There is no other.
    assert kept_round(run, {0: found[0], 1: found[2]}) == 1


def test_rounds_without_the_metric_are_not_compared() -> None:
    """A round without held-out pairs has no accuracy."""
    run = composed("rounds.patience=2", "monitor.metric=rewards/accuracies")
    found = figures(reward=[0.1, 0.2, 0.3, 0.4])
    assert reason_to_end(run, found) == "" and kept_round(run, found) == 3
    found[1]["rewards/accuracies"], found[3]["rewards/accuracies"] = 0.75, 0.5
    assert reason_to_end(run, found) == "" and kept_round(run, found) == 1


def test_what_is_measured(tmp_path: Path) -> None:
    replies, trained = tmp_path / "rounds/2/replies", tmp_path / "rounds/1/run"
    replies.mkdir(parents=True)
    trained.mkdir(parents=True)
    measures = {"reward": 0.25, "kl": None, "prompts": 3, "win_rate": 0.6}
    both = {"train": {"reward": 0.5}, "test": measures}
    (replies / "measures.json").write_text(json.dumps(both))
    results = {
        "eval_before": {},
        "eval_after": {"loss": 2.0, "reply_tokens": 9.0},
        "findings": [],
        "train": {"steps": 1, "model_step": 1, "this_process_s": 1.0},
    }
    (trained / "results.json").write_text(json.dumps(results))
    assert measured(tmp_path, 1) == {
        "train": {"reply_reward": 0.5},
        "eval": {"loss": 2.0, "reply_tokens": 9.0, "reply_reward": 0.25, "reply_win_rate": 0.6},
    }


def test_models_of_rounds_side_by_side() -> None:
    first = {"reply_reward": 0.25, "reply_win_rate": 0.5, "reply_kl": 0.0}
    later = {"reply_reward": 0.5, "reply_win_rate": 0.75, "reply_kl": 0.0625, "loss": 2.0}
    assert rounds_table({0: first, 1: later}) == [
        {"model": "first model", "reward": "0.250", "win rate": "-", "KL": "-"},
        {"model": "round 1", "reward": "0.500", "win rate": "0.750", "KL": "0.062"},
    ]


def by_hand(folder: Path, words: str, number: int, kind: Kind) -> tuple[RunConfig, list[list[str]]]:
    """The settings of a phase of rounds with these words, and the commands that do its work."""
    run, phase = composed(*shlex.split(words)), Phase(number, kind)
    own = settings_of(run, folder, phase)
    (folder / "rounds/1/run/model").mkdir(parents=True)
    if own.model.lora.adapter:
        (folder / "rounds/1/run/model/adapter_config.json").write_text("{}")
    (folder / "command.txt").write_text(f"python -m simpo.train rounds.number=3 {words}\n")
    return own, [shlex.split(line) for line in commands_of(folder, own, phase).splitlines()]


def test_commands_by_hand(tmp_path: Path) -> None:
    words = "model.lora.rank=0 'model.path=a b' loss.beta=2 train.epochs=3 data.seed=1 "
    words += "'on_policy.seeds=[1,2]' train.precision=fp32 backend=fsdp "
    words += "backend.cpu_offload=true launcher.parallel=2"
    _, found = by_hand(tmp_path, words, 2, Kind.generate)
    told = ["model.lora.rank=0", "data.seed=1", "on_policy.seeds=[1,2]", "train.precision=fp32"]
    told += [f"model.path={tmp_path}/rounds/1/run/model", "model.chat_template=null"]
    told += [f"on_policy.folder={tmp_path}/rounds/2/replies", "on_policy.slices=3"]
    told += ["on_policy.slice=2"]
    assert found == [["python", "-m", f"simpo.{name}", *told] for name in ("generate", "annotate")]
    # Started from Python.
    run = composed()
    (tmp_path / "command.txt").unlink()
    assert commands_of(tmp_path, settings(run, 2, Kind.generate), Phase(2, Kind.generate)) == ""


@pytest.mark.parametrize("kind", [Kind.generate, Kind.train])
def test_commands_by_hand_if_a_file_of_the_users_makes_rounds(kind: Kind, tmp_path: Path) -> None:
    """It would make rounds of them, or be refused with settings that rounds make themselves."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/mine.yaml").write_text("rounds:\n  number: 3\n")
    (tmp_path / "rounds/2/replies").mkdir(parents=True)
    (tmp_path / "rounds/2/replies/train.jsonl").write_text("{}\n")
    words = f"--config-dir={tmp_path} experiments=mine"
    own, _ = by_hand(tmp_path, "", 2, kind)
    (tmp_path / "command.txt").write_text(f"python -m simpo.train {words}\n")
    for line in (found := commands_of(tmp_path, own, Phase(2, kind)).splitlines()):
        assert run_of_words(shlex.split(line)[3:]).rounds.number == 0
    assert len(found) == (2 if kind is Kind.generate else 1)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "model.lora.rank=0 loss.beta=3 train.epochs=3 experiments=objectives/simpo",
        "monitor.metric=win_rate benchmark=pairs judge.reward=rules rounds.start=first",
        "rounds.static_weight=0.25 'data.sources=[{path: {0}/a.jsonl, num_pairs: 30, columns: "
        "{x y: prompt}}]'",
    ],
)
def test_the_command_of_a_round_s_training(words: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    replies = tmp_path / "rounds/2/replies"
    replies.mkdir(parents=True)
    for split in ("train", "test"):
        (replies / f"{split}.jsonl").write_text("{}\n")
    own, found = by_hand(tmp_path, words.replace("{0}", str(tmp_path)), 2, Kind.train)
    ((_, _, module, *told),) = found
    assert module == "simpo.train"
    assert len({word.partition("=")[0] for word in told}) == len(told)
    again = compose_run(told)
    assert again == replace(own, rounds=again.rounds, on_policy=again.on_policy)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["on_policy.reward=null"], "on_policy.reward: required for rounds, but not given"),
        (
            ["on_policy.slices=3"],
            "on_policy.slices: rounds set it themselves, got 3 (leave it out)",
        ),
        (
            ["on_policy.folder=own"],
            "on_policy.folder: rounds set it themselves, got own (leave it out)",
        ),
        (["rounds.patience=-1"], "rounds.patience: must be 0 or more, got -1"),
        (["rounds.max_kl=0"], "rounds.max_kl: must be above 0, or null, got 0.0"),
        (
            ["rounds.max_length_ratio=1"],
            "rounds.max_length_ratio: must be above 1, or null, got 1.0",
        ),
        (["rounds.static_weight=-1"], "rounds.static_weight: must be 0 or more, got -1.0"),
        (
            ["rounds.static_weight=2000"],
            "rounds.static_weight: times data.sources[0].weight must be at most 1000, got 2000.0 "
            "times 1.0",
        ),
        (["rounds.generate_jobs=0"], "rounds.generate_jobs: must be 1 or more, got 0"),
        (
            ["export.push_to_hub=me/model"],
            "export.push_to_hub: rounds keep one of several models, when they have ended (leave it "
            "out, then simpo export RUN push_to_hub=OWNER/NAME)",
        ),
        (
            ["launcher=slurm", "launcher.gpus_per_node=8", "backend=fsdp"],
            "launcher.tasks_per_node: each phase starts its own processes, got 8 tasks "
            "(launcher.nodes=1 launcher.tasks_per_node=1 backend.processes=GPUS, or "
            "rounds.chain=true)",
        ),
        (
            ["rounds.chain=true"],
            "rounds.chain: needs launcher=slurm (leave it out: here phases follow one another)",
        ),
        (
            ["launcher=slurm", "rounds.chain=true", "rounds.generate_launcher={gpus: 1}"],
            "rounds.generate_launcher: launcher=slurm has no gpus (remove it)",
        ),
        (
            ["launcher=slurm", "rounds.chain=true", "rounds.generate_launcher={time_min: 0}"],
            "rounds.generate_launcher.time_min: must be 1 or more, got 0",
        ),
        (
            ["launcher=slurm", "rounds.chain=true", "rounds.generate_launcher={setup: module}"],
            "rounds.generate_launcher.setup: of the wrong type, got 'module' (see launcher.setup "
            "in docs/config.md)",
        ),
        (
            ["launcher=slurm", "rounds.chain=true", "rounds.generate_launcher={setup: [[a]]}"],
            "rounds.generate_launcher.setup: of the wrong type, got [['a']] (see launcher.setup "
            "in docs/config.md)",
        ),
        (
            ["launcher=slurm", "rounds.chain=true", "rounds.generate_launcher={time_min: x}"],
            "rounds.generate_launcher.time_min: of the wrong type, got 'x' (see launcher.time_min "
            "in docs/config.md)",
        ),
    ],
)
def test_settings_that_rounds_cannot_have(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        composed(*words)
    assert message in str(told.value).splitlines()


def test_rounds_too_small_to_change_a_weight_are_refused_before_they_reply() -> None:
    from simpo.launch.rounds.preflight import _step_problems

    words = ("train.pairs_per_step=4", "train.warmup_ratio=0.1", "train.epochs=1")
    assert _step_problems(composed(*words), 4) == [
        "train.pairs_per_step: a round gives at most 4 pairs (train prompts: 4), a run of 1 step, "
        "and the warm-up begins at learning rate 0: no weight would change (lower it, or more "
        "pairs by on_policy.num_prompts, on_policy.seeds, on_policy.max_new_tokens or "
        "rounds.prompts=all, or train.warmup_ratio=0)"
    ]
    assert not _step_problems(composed(*words), 5)
    # Six pairs of four replies; static data adds pairs that are not known yet.
    assert not _step_problems(composed(*words, "rounds.choice=all"), 1)
    assert not _step_problems(composed(*words, "rounds.static_weight=0.5"), 4)
    assert not _step_problems(composed(*words, "train.warmup_ratio=0.0"), 4)


def test_rounds_are_found_again_by_their_settings() -> None:
    from simpo.config.flat import run_id

    run = composed()
    placed = replace(run.rounds, generate_jobs=4)
    assert run_id(replace(run, rounds=placed)) == run_id(run)
    assert run_id(composed("on_policy.temperature=1.0")) != run_id(run)
    assert run_id(composed("rounds.start=best")) != run_id(run)
    # Without rounds, on_policy decides nothing.
    plain, other = compose_run([]), compose_run(["on_policy.temperature=1.0"])
    assert run_id(plain) == run_id(other)
    assert "rounds:" in run_yaml(plain)


def test_the_part_that_failed_is_told_and_not_the_one_that_was_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part ends, as generating does, with 75 once it is told to."""
    codes = [
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); "
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [15]); time.sleep(60)",
        "import sys, time; time.sleep(0.3); sys.exit(1)",
    ]

    def started(root: Path, phase: Phase, places: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", codes[phase.part - 1]])

    monkeypatch.setattr(driver, "_start", started)
    group = [Phase(1, Kind.generate, part) for part in (1, 2)]
    with pytest.raises(RunError) as told:
        driver.run_phases(composed(), tmp_path, group)
    assert type(told.value) is RunError
    assert str(told.value) == "round 1, generate, part 2: ended with exit code 1"
