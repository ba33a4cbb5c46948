"""Rounds of replies, scores and training, as a user starts them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from simpo.run.runs import State, find_runs, read_progress, read_runs
from tests.support.whole_runs import Process, finish, start, wait_for

REWARD = """
import time

def vowels(prompt, replies, rule):
    time.sleep({pause_s})
    return [sum(map(text.count, "aeiou")) / (1 + len(text)) for text in replies]
"""
PAIRS = ("train.jsonl", "test.jsonl", "measures.json", "reply_scores.jsonl")


def write_reward(folder: Path, pause_s: float = 0.0) -> None:
    (folder / "own_rewards.py").write_text(REWARD.format(pause_s=pause_s))


@pytest.fixture
def rounds(tiny_run: list[str], tmp_path: Path) -> list[str]:
    """Overrides of two rounds on 24 prompts with a reward of the user's."""
    write_reward(tmp_path)
    return [
        *tiny_run,
        "rounds=2",
        "on_policy.seeds=[1,2,3]",
        "on_policy.max_new_tokens=8",
        "on_policy.keep_cut=true",
        "on_policy.reward=own_rewards:vowels",
        "sample.num_prompts=0",
        "train.eval_every=0",
    ]


def begin(words: list[str], folder: Path) -> Process:
    return start(["rounds", *words], module="simpo", env={"PYTHONPATH": str(folder)})


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def has_text(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def state_once_dead(root: Path) -> State:
    """The state of rounds whose processes are being killed."""
    deadline = time.monotonic() + 30
    while (progress := read_progress([root])[0]).state is State.running:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return progress.state


def written(root: Path) -> dict[str, bytes]:
    """What rounds wrote that may not depend on interruptions, by path."""
    names = ("metrics.jsonl", "responses*.jsonl", *PAIRS, "*.safetensors")
    files = [file for name in names for file in root.rglob(name)]
    return {
        str(file.relative_to(root)): without_times(file) for file in files if not file.is_symlink()
    }


def without_times(file: Path) -> bytes:
    if file.name != "metrics.jsonl":
        return file.read_bytes()
    kept = [{k: v for k, v in line.items() if "_per_s" not in k} for line in read_lines(file)]
    return json.dumps(kept).encode()


@pytest.mark.process
def test_rounds_are_the_single_commands_one_after_the_other(
    rounds: list[str], tmp_path: Path
) -> None:
    said = finish(begin([*rounds, f"run_dir={tmp_path}/out"], tmp_path))
    root = tmp_path / "out"
    ours = written(root)
    # Each round has its own half of the prompts, and all that are held out.
    prompts = [read_lines(root / f"rounds/{n}/replies/prompts.jsonl") for n in (1, 2, 3)]
    train = [{line["id"] for line in one if line["split"] == "train"} for one in prompts]
    held_out = [{line["id"] for line in one if line["split"] == "test"} for one in prompts]
    assert [len(one) for one in train] == [12, 12, 0] and not train[0] & train[1]
    assert held_out[0] == held_out[1] == held_out[2] and len(held_out[0]) == 16

    # What a user types to get the same.
    for number in (1, 2, 3):
        folder = root / f"rounds/{number}/replies"
        for command in (folder / "command.txt").read_text().splitlines():
            _, _, module, *words = shlex.split(command)
            words = [f"on_policy.folder={tmp_path}/hand" if "folder=" in w else w for w in words]
            process = start(words, module=module, env={"PYTHONPATH": str(tmp_path)})
            finish(process)
        for name in ("train.jsonl", "test.jsonl", "responses.jsonl"):
            assert (tmp_path / "hand" / name).read_bytes() == (folder / name).read_bytes()
        shutil.rmtree(tmp_path / "hand")
    (command,) = (root / "rounds/2/run/command.txt").read_text().splitlines()
    _, _, module, *words = shlex.split(command)
    words = [f"run_dir={tmp_path}/hand" if "run_dir=" in word else word for word in words]
    finish(start(words, module=module))
    by_hand = (tmp_path / "hand/model/model.safetensors").read_bytes()
    assert by_hand == ours["rounds/2/run/model/model.safetensors"]

    # Its figures are those of the files, and it reads as a run whose steps are rounds.
    (run,), damaged = read_runs(find_runs([root]))
    assert not damaged and run.progress.text() == "finished, round 2 of 2"
    measures = [
        json.loads((root / f"rounds/{n}/replies/measures.json").read_text()) for n in (1, 2, 3)
    ]
    rewards = [one["test"]["reward"] for one in measures]
    assert [run.evaluations[n]["reply_reward"] for n in (0, 1, 2)] == rewards
    assert run.monitored == rewards[2] == run.results["eval_after"]["reply_reward"]
    assert run.evaluations[0]["reply_win_rate"] == 0.5
    # The first model is not compared with itself.
    assert f"first model: held-out replies: reward {rewards[0]:.3f}, tokens " in said
    for name, reward in zip(("first model", "round 1", "round 2"), rewards, strict=True):
        assert f"| {name.ljust(11)} | {reward:.3f} " in said
    assert (root / "model").resolve() == root / "rounds/2/run/model"
    assert f"kept   the model of round 2: {root}/model" in said
    assert f"chat   python -m simpo.chat {root} base=true" in said
    # A line as each phase begins and ends; what phases print is in their logs.
    told = [line for line in said.splitlines() if re.match("round . of 2:|after round", line)]
    ends = [line for line in told if not line.endswith(" ...")]
    assert len(told) == 2 * len(ends)
    assert [re.sub(r"\([0-9.]+ (s|min)\)", "(N s)", line) for line in ends] == [
        "round 1 of 2: check: 24 prompts to train on in 2 slices, 16 held out (N s)",
        "round 1 of 2: generate: 28 prompts, 3 replies each (N s)",
        "round 1 of 2: annotate: 12 pairs of 12 train prompts, "
        "16 pairs of 16 held-out prompts (N s)",
        "round 1 of 2: train: 3 steps (N s)",
        "round 2 of 2: generate: 28 prompts, 3 replies each (N s)",
        "round 2 of 2: annotate: 12 pairs of 12 train prompts, "
        "16 pairs of 16 held-out prompts (N s)",
        "round 2 of 2: train: 3 steps (N s)",
        "after round 2: generate, held-out prompts: 16 prompts, 3 replies each (N s)",
        "after round 2: annotate, held-out prompts: 16 pairs of 16 held-out prompts (N s)",
    ]
    assert [line for line in said.splitlines() if line.startswith("note ")] == [
        f"note   {tmp_path}/train.jsonl train: read as prompt and replies as messages, 24 records",
        f"note   {tmp_path}/test.jsonl test: read as prompt and replies as messages, 16 records",
        "note   only 3 steps, 1 of them at learning rate 0 (fewer train.pairs_per_step or more "
        "train.epochs make more)",
    ]
    for number in (1, 2):
        assert "\nmodel  " in (root / f"rounds/{number}/train.log").read_text()
    assert "\nmodel  " not in said
    # Its checkpoints would be those of three models.
    assert not list(root.rglob("checkpoints"))


@pytest.mark.matrix
def test_rounds_killed_in_every_phase_end_the_same(rounds: list[str], tmp_path: Path) -> None:
    whole, root = tmp_path / "whole", tmp_path / "killed"
    write_reward(tmp_path, pause_s=0.02)
    finish(begin([*rounds, f"run_dir={whole}"], tmp_path))
    begun_in = (
        *("1/replies/responses.jsonl", "1/replies/scores-own_rewards_vowels.jsonl"),
        *("1/run/metrics.jsonl", "2/replies/responses.jsonl", "2/run/metrics.jsonl"),
        "3/replies/scores-own_rewards_vowels.jsonl",
    )
    for name in begun_in:
        process, file = begin([*rounds, f"run_dir={root}"], tmp_path), root / "rounds" / name
        wait_for(partial(has_text, file), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (root / "results.json").exists()
    assert state_once_dead(root) is State.killed
    finish(begin([*rounds, f"run_dir={root}"], tmp_path))
    assert written(root) == written(whole)


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 75, "SIGTERM: stopped in round 1, annotate (the same command continues)"),
        (signal.SIGINT, 130, "interrupted: stopped in round 1, annotate"),
    ],
)
def test_a_signal_stops_rounds(
    number: int, code: int, said: str, rounds: list[str], tmp_path: Path
) -> None:
    write_reward(tmp_path, pause_s=0.2)
    process = begin([*rounds, f"run_dir={tmp_path}/out"], tmp_path)
    scores = tmp_path / "out/rounds/1/replies/scores-own_rewards_vowels.jsonl"
    wait_for(scores.is_file, process)
    process.send_signal(number)
    output = finish(process, code)
    assert said in output and "Traceback" not in output
    (run,), _ = read_runs(find_runs([tmp_path / "out"]))
    assert run.progress.text() == "stopped, round 0 of 2"


@pytest.mark.matrix
def test_a_sweep_over_rounds(rounds: list[str], tmp_path: Path) -> None:
    swept = ["-m", "rounds=1", "rounds.choice=best_worst,all", "loss.beta=2,10"]
    said = finish(begin([*rounds, *swept, f"launcher.sweep_dir={tmp_path}/sweep"], tmp_path))
    found, damaged = read_runs(find_runs([tmp_path / "sweep"]))
    assert not damaged and len(found) == 4
    rewards = {run.folder.name: run.evaluations[1]["reply_reward"] for run in found}
    best = max(rewards, key=lambda name: rewards[name])
    assert f"best   {best}: reply_reward {rewards[best]:.4f}\n" in said
    pairs = {
        run.folder.name: len(read_lines(run.folder / "rounds/1/replies/train.jsonl"))
        for run in found
    }
    # All pairs of three replies, where the scores differ.
    assert pairs["loss.beta=2,rounds.choice=best_worst"] == 24
    assert pairs["loss.beta=2,rounds.choice=all"] > 60
    again = finish(begin([*rounds, *swept, f"launcher.sweep_dir={tmp_path}/sweep"], tmp_path))
    assert "4 of 4 members finished already" in again


@pytest.mark.matrix
def test_rounds_that_end_early_with_adapters_on_two_processes(
    rounds: list[str], tmp_path: Path
) -> None:
    """Parts that generate at the same time, ddp, a LoRA that is trained further, a limit of KL."""
    words = ["rounds=3", "model.lora.rank=4", "train.learning_rate=1e-2", "train.epochs=4"]
    words += ["backend=ddp", "backend.processes=2", "rounds.generate_jobs=2", "rounds.max_kl=1e-4"]
    words += ["rounds.static_weight=0.5", "rounds.prompts=all"]
    said = finish(begin([*rounds, *words, f"run_dir={tmp_path}/out"], tmp_path))
    root = tmp_path / "out"
    (run,), _ = read_runs(find_runs([root]))
    assert run.progress.text() == "finished, round 1 of 3"
    kl = run.evaluations[1]["reply_kl"]
    reason = f"the model of round 1 is {kl:.3f} nats per token from the first, beyond "
    assert f"ended  {reason}rounds.max_kl=0.0001\n" in said and kl > 1e-4
    assert (root / "model/adapter_config.json").is_file()
    # Its own pairs, and half of the 24 static ones.
    data = json.loads((root / "rounds/1/run/data.json").read_text())
    static = [line for line in data["mixture"] if line["source"] == f"{tmp_path}/train.jsonl"]
    assert [line["taken"] for line in static if line["split"] == "train"] == [12]
    assert not (root / "rounds/3").exists()
