"""Rounds whose loss compares all replies to a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpo.run.runs import find_runs, read_runs
from tests.support.whole_runs import finish, start

REWARD = """
def vowels(prompt, replies, rule):
    return [sum(map(text.count, "aeiou")) / (1 + len(text)) for text in replies]
"""


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.matrix
def test_rounds_on_ranked_replies_with_static_pairs(tiny_run: list[str], tmp_path: Path) -> None:
    (tmp_path / "own_rewards.py").write_text(REWARD)
    words = [
        *tiny_run,
        *("rounds=2", "loss.compare=all", "rounds.static_weight=0.5"),
        *("on_policy.seeds=[1,2,3,4]", "on_policy.max_new_tokens=8", "on_policy.keep_cut=true"),
        *("on_policy.reward=own_rewards:vowels", "sample.num_prompts=0", "train.eval_every=0"),
        f"run_dir={tmp_path}/out",
    ]
    env = {"PYTHONPATH": str(tmp_path)}
    said = finish(start(["rounds", *words], module="simpo", env=env), 2)
    assert said == (
        "on_policy.choice: the loss compares all replies to a prompt, got best_worst "
        "(set on_policy.choice=ranked)\n"
    )
    words.append("rounds.choice=ranked")
    said = finish(start(["rounds", *words], module="simpo", env=env))
    root = tmp_path / "out"
    assert f"kept   the model of round 2: {root}/model" in said
    (run,), damaged = read_runs(find_runs([root]))
    assert not damaged and run.progress.text() == "finished, round 2 of 2"
    for number in (1, 2):
        records = read_lines(root / f"rounds/{number}/replies/train.jsonl")
        assert 8 < len(records) <= 12 and max(len(line["responses"]) for line in records) == 4
        for line in records:
            assert line["scores"] == sorted(line["scores"], reverse=True)
            assert len(line["scores"]) == len(line["responses"]) == len(set(line["responses"]))
        data = json.loads((root / f"rounds/{number}/run/data.json").read_text())
        taken = [line["taken"] for line in data["mixture"] if line["split"] == "train"]
        assert taken == [len(records), 12]
