"""What rounds check before the first of them starts."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DataError
from simpo.config.schema import RunConfig
from simpo.data.pairs import PackedPairs
from simpo.launch.rounds.phases import Phase, settings_of
from simpo.launch.rounds.preflight import check_rounds
from simpo.model.memory import Estimate
from simpo.model.memory import Memory as MemoryOfStep
from simpo.run.rounds import Kind

Usage = namedtuple("Usage", "total used free")
Memory = namedtuple("Memory", "available")


@pytest.fixture
def words(tiny_run: list[str], tmp_path: Path) -> list[str]:
    return [*tiny_run, "rounds.number=2", "on_policy.reward=rules", "on_policy.max_new_tokens=8"]


def checked(words: list[str], tmp_path: Path) -> str:
    run: RunConfig = replace(compose_run(words), run_dir=str(tmp_path))
    return check_rounds(run, settings_of(run, tmp_path, Phase(1, Kind.check)))[0]


def test_what_is_counted(words: list[str], tmp_path: Path) -> None:
    assert checked(words, tmp_path) == "24 prompts to train on in 2 slices, 16 held out"


def test_every_fault_of_the_prompts_at_once(words: list[str], tmp_path: Path) -> None:
    record = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "a", "rejected": "b"}
    (tmp_path / "one.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ConfigError) as told:
        checked([*words, f"data.sources=[{{path: {tmp_path}/one.jsonl}}]"], tmp_path)
    assert told.value.problems == [
        "rounds.prompts: 2 slices need as many train prompts, there are 1 (more data, fewer "
        "rounds, or rounds.prompts=all)",
        "data.sources: no prompt is held out, and rounds are compared by held-out replies "
        "(test_split or test_path)",
        "on_policy.reward: rules needs a rule, 1 of 1 prompts have none (name another)",
    ]


def test_a_reward_that_is_not_there(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder, got /no/where"):
        checked([*words, "on_policy.reward=/no/where"], tmp_path)


def test_static_pairs_that_are_none(words: list[str], tmp_path: Path) -> None:
    """Prompts alone do for the model's own replies."""
    rule = {"name": "bullets", "count": 2}
    lines = [json.dumps({"prompt": f"Hi {i}", "rule": rule}) + "\n" for i in range(24)]
    (tmp_path / "a.jsonl").write_text("".join(lines[:16]))
    (tmp_path / "b.jsonl").write_text("".join(lines[16:]))
    sources = f"data.sources=[{{path: {tmp_path}/a.jsonl, test_path: {tmp_path}/b.jsonl}}]"
    checked([*words, sources], tmp_path)
    with pytest.raises(DataError, match="fits no shape of record"):
        checked([*words, sources, "rounds.static_weight=0.5"], tmp_path)


def test_a_share_of_static_pairs_that_is_none(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError) as told:
        checked([*words, "rounds.static_weight=0.01"], tmp_path)
    assert str(told.value) == (
        "data.sources[0].weight: 0.01 of 24 records rounds to none (raise it)"
    )


def test_a_benchmark_that_cannot_be_judged(words: list[str], tmp_path: Path) -> None:
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as told:
        checked([*words, "benchmark=pairs", f"benchmark.baseline={empty}"], tmp_path)
    assert str(told.value).startswith(
        f"benchmark.baseline: must hold a run or a model, got {empty}"
    )


def test_memory_of_replies_and_of_a_step(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token's keys and values are 2 * 2 layers * 2 heads * 8 numbers in fp32: 256 bytes."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: psutil_memory(2**30))
    words = [*words, "train.check_memory=true"]
    checked(words, tmp_path)
    with pytest.raises(ConfigError) as told:
        checked([*words, "on_policy.batch_prompts=4096"], tmp_path)
    assert str(told.value) == (
        "on_policy.batch_prompts: 4096 replies at a time need about 2.00 GiB, there are 1.00 GiB "
        "(lower it; train.check_memory=false tries all the same)"
    )
    monkeypatch.setattr(psutil, "virtual_memory", lambda: psutil_memory(2**20))
    with pytest.raises(ConfigError, match="check_memory: a step needs about"):
        checked(words, tmp_path)
    checked([*words, "train.check_memory=false"], tmp_path)


def test_memory_of_a_step_on_all_replies(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record has as many replies of 8 tokens as there are seeds; two make no longer row fit."""
    rows: list[PackedPairs] = []
    step = Estimate.step

    def looked_at(self: Estimate, row: PackedPairs) -> MemoryOfStep:
        rows.append(row)
        return step(self, row)

    monkeypatch.setattr(Estimate, "step", looked_at)
    lengths = ["data.max_length_tokens=40", "data.max_prompt_tokens=30", "train.tokens_per_row=250"]
    words = [*words, *lengths, "train.check_memory=true", "on_policy.seeds=[1,2,3,4]"]
    checked(words, tmp_path)
    checked([*words, "loss.compare=all", "rounds.choice=ranked"], tmp_path)
    pairs, ranked = rows
    assert (pairs.num_responses, len(pairs.pairs), pairs.input_ids.numel()) == (2, 5, 240)
    assert (ranked.num_responses, len(ranked.pairs), ranked.input_ids.numel()) == (4, 3, 192)


def psutil_memory(available: int) -> object:
    return Memory(available)


def test_room_for_the_models_of_all_rounds(
    words: list[str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models in fp32, and three checkpoints with the weights and two means each."""
    weights = load_file(tiny_folder / "model.safetensors").values()
    needed = 4 * sum(tensor.numel() for tensor in weights) * (2 + 3 * 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed))
    checked(words, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed - 1))
    with pytest.raises(ConfigError) as told:
        checked(words, tmp_path)
    assert str(told.value) == (
        f"run_dir: models of 2 rounds and checkpoints of one take 0.00 GiB, but {tmp_path} has "
        "0.00 GiB free (make room, or choose another output_dir)"
    )
