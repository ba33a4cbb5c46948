"""Whole runs of a tiny model: the files they write, and that each can be continued."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.backend import build_backend
from simpo.config.check import load_run
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DataError, RunError
from simpo.data.demo.records import demo_records
from simpo.data.mixture import load_mixture
from simpo.loop.setup import set_up
from simpo.loop.train import train
from simpo.loss.simpo import SigmoidConfig
from simpo.model import pretrained
from simpo.run.files import read_results
from tests.support.whole_runs import (
    assert_same_run,
    logged,
    metrics_of,
    run,
    start,
    state_of,
    wait_for,
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_finished_run_whose_model_was_removed(tiny_run: list[str], run_dir: Path) -> None:
    """The message says what is missing, and what it advises works."""
    run = compose_run([*tiny_run, f"run_dir={run_dir}"])
    train(run)
    weights = (run_dir / "model/model.safetensors").read_bytes()
    shutil.rmtree(run_dir / "model")
    message = (
        f"run_dir: {run_dir} holds a finished run, but no model (choose another; or remove "
        f"{run_dir}/status.json, and the same command writes the model from the last checkpoint)"
    )
    # An error that is kept would keep the folder's lock.
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        train(run)
    (run_dir / "status.json").unlink()
    train(run)
    assert (run_dir / "model/model.safetensors").read_bytes() == weights
    shutil.rmtree(run_dir / "model")
    shutil.rmtree(run_dir / "checkpoints")
    message = message.partition(", but")[0] + (
        ", but neither its model nor a checkpoint (choose another)"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        train(run)


def test_the_models_settings_are_loaded_once(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = pretrained.load_pretrained

    def noted(key: str, source: str, loader: Any, **options: Any) -> Any:
        loaded.append(loader.__name__)
        return load(key, source, loader, **options)

    monkeypatch.setattr(pretrained, "load_pretrained", noted)
    run = compose_run(tiny_run)
    set_up(run, build_backend(run.backend, run.train.precision))
    assert loaded == ["AutoConfig", "AutoModelForCausalLM"]


def test_what_a_run_leaves(tiny_run: list[str], run_dir: Path, tiny_folder: Path) -> None:
    run = compose_run([*tiny_run, f"run_dir={run_dir}"])
    after = read_results(train(run))["eval_after"]
    assert load_run(run_dir / "run.yaml") == run
    assert json.loads((run_dir / "status.json").read_text()) == {
        "state": "finished",
        "step": 6,
        "total_steps": 6,
        "error": "",
    }
    lines = metrics_of(run_dir)
    assert [x["step"] for x in lines if "train/loss" in x] == [1, 2, 3, 4, 5, 6]
    evaluations = [x for x in lines if "eval/loss" in x]
    assert [x["step"] for x in evaluations] == [0, 3, 6]
    assert after == {k.removeprefix("eval/"): v for k, v in evaluations[-1].items() if k != "step"}
    assert {"loss", "rewards/accuracies", "rewards/margins", "rule_pass_rate"} <= after.keys()
    results = json.loads((run_dir / "results.json").read_text())
    assert results["eval_after"] == after
    assert results["eval_before"]["loss"] == evaluations[0]["eval/loss"]
    assert len(json.loads((run_dir / "samples/step-000006.json").read_text())) == 3
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        "step-000004",
        "step-000006",
    ]
    with (run_dir / "held_out/step-000006.csv").open(newline="") as file:
        pairs = list(csv.DictReader(file))
    places = [pair.place for pair in load_mixture(run.data).test]
    assert [pair["pair"] for pair in pairs] == places and len(places) == 16
    for key in ("rewards/margins", "rewards/accuracies", "logps/chosen", "rejected_tokens"):
        assert sum(float(pair[key]) for pair in pairs) / 16 == pytest.approx(after[key])
    # Each line is of its own pair: the reply and the token that ends it.
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for pair, line in zip(load_mixture(run.data).test, pairs, strict=True):
        reply = tokenizer(pair.chosen[0]["content"], add_special_tokens=False).input_ids
        assert float(line["chosen_tokens"]) == len(reply) + 1
    data = json.loads((run_dir / "data.json").read_text())
    assert [row["taken"] for row in data["mixture"]] == [24, 16]
    assert "torch" in json.loads((run_dir / "environment.json").read_text())["packages"]
    # From Python; tests/test_api.py runs it.
    command = f"python -m simpo.launch.member {run_dir}\n"
    assert (run_dir / "command.txt").read_text() == command

    card = (run_dir / "model/README.md").read_text()
    assert "loss = -log sigmoid(2*(l_w - l_l) - 1)" in card
    assert f"\n{tiny_folder.name} after preference optimisation" in card
    assert str(tiny_folder) not in card and data["train_fingerprint"] in card
    assert f"{after['loss']:.3f}" in card and "pairs_per_step: 4" in card
    assert (run_dir / "model/curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_model_is_the_trained_one(
    tiny_run: list[str], run_dir: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    train(compose_run([*tiny_run, f"run_dir={run_dir}"]))
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    assert model.config.use_cache is True
    assert model.generation_config.eos_token_id in (2, [2])
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_folder).chat_template
    state = state_of(run_dir, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, state[f"state.policy.model.{name}"]), name
        assert not torch.equal(weight, base[name]), f"{name} was not trained"


def test_adapter_is_saved_alone_and_loads(tiny_run: list[str], run_dir: Path) -> None:
    train(compose_run([*tiny_run, "model.lora.rank=4", f"run_dir={run_dir}"]))
    names = {p.name for p in (run_dir / "model").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    adapters = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert adapters and all(p.abs().sum() > 0 for p in adapters)


@pytest.mark.matrix
def test_continues_bit_exactly_after_sigkill(tiny_run: list[str], tmp_path: Path) -> None:
    """A real process, killed at five random steps; each time the same command goes on."""
    overrides = [*tiny_run, "train.epochs=2", "sample.num_prompts=1"]
    whole = tmp_path / "whole"
    run([*overrides, f"run_dir={whole}"])
    rng = random.Random(0)
    for attempt, at_step in enumerate(rng.sample(range(1, 11), 5)):
        folder = tmp_path / f"killed-{attempt}"
        process = start([*overrides, f"run_dir={folder}"])
        wait_for(logged(folder, at_step), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (folder / "model").exists()
        output = run([*overrides, f"run_dir={folder}"])
        if at_step > 3:
            assert "continued after step" in output
        assert_same_run(whole, folder, tmp_path)


def test_same_command_finds_its_unfinished_run(tiny_run: list[str], tmp_path: Path) -> None:
    run = compose_run(tiny_run)
    train(run)
    parent = tmp_path / "outputs" / run.name
    (first,) = parent.iterdir()
    status = json.loads((first / "status.json").read_text())
    (first / "status.json").write_text(json.dumps(status | {"state": "running"}))
    train(run)
    assert list(parent.iterdir()) == [first]
    assert [x["step"] for x in metrics_of(first) if "eval/loss" in x] == [0, 3, 6]
    # Finished now: the same command begins a new run; so do other settings.
    train(run)
    train(compose_run([*tiny_run, "loss.beta=3"]))
    assert len(list(parent.iterdir())) == 3


def test_other_settings_or_data_under_a_run_are_refused(
    tiny_run: list[str], tmp_path: Path, run_dir: Path
) -> None:
    overrides = [*tiny_run, f"run_dir={run_dir}"]
    train(compose_run(overrides))
    with pytest.raises(ConfigError, match=rf"^run_dir: {run_dir} holds a finished run \(choose"):
        train(compose_run(overrides))
    status = run_dir / "status.json"
    status.write_text(status.read_text().replace("finished", "running"))
    with pytest.raises(ConfigError, match=r"^loss.beta: the run in .* has 2.0, got 3.0 \(restore"):
        train(compose_run([*overrides, "loss.beta=3"]))
    rows = demo_records(1, "train")[:24]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="data changed under this run: train_fingerprint was"):
        train(compose_run(overrides))


def test_a_loss_that_is_not_a_number_stops_the_run(
    tiny_run: list[str], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 meets a NaN: the rows are named, checkpoint 2 is what a continuation starts from."""
    import simpo.loop.step

    real, calls = simpo.loop.step.pair_table, []

    def poisoned(*args: object) -> torch.Tensor:
        calls.append(1)
        table = real(*args)  # type: ignore[arg-type]
        bad = torch.is_grad_enabled() and len(calls) > 6
        return table * float("nan") if bad else table

    monkeypatch.setattr(simpo.loop.step, "pair_table", poisoned)
    with pytest.raises(
        RunError, match=r"step \d: the loss is not finite; not updated; pairs: .*train"
    ):
        train(compose_run([*tiny_run, f"run_dir={run_dir}"]))
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
    monkeypatch.setattr(simpo.loop.step, "pair_table", real)
    train(compose_run([*tiny_run, f"run_dir={run_dir}"]))


def test_the_order_of_pairs_depends_on_the_seed_only(tiny_run: list[str], tmp_path: Path) -> None:
    losses = []
    for name, extra in (("a", []), ("b", ["train.tokens_per_row=90"]), ("c", ["train.seed=1"])):
        train(compose_run([*tiny_run, *extra, f"run_dir={tmp_path / name}"]))
        losses.append([x["train/loss"] for x in metrics_of(tmp_path / name) if "train/loss" in x])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-2)


def test_a_prompt_for_each_response(tiny_run: list[str], tmp_path: Path) -> None:
    """train.share_prefix=false computes more tokens, and the same losses."""
    logs = []
    for share in ("true", "false"):
        folder = tmp_path / share
        train(compose_run([*tiny_run, f"train.share_prefix={share}", f"run_dir={folder}"]))
        logs.append([x for x in metrics_of(folder) if "train/loss" in x])
    shared, repeated = ([x["train/loss"] for x in log] for log in logs)
    assert shared == pytest.approx(repeated, rel=1e-4)


def test_a_run_that_cannot_fit_is_refused(tiny_run: list[str], monkeypatch) -> None:
    run = [*tiny_run, "train.pairs_per_step=24", "train.tokens_per_row=2000"]
    run += ["train.check_memory=true"]
    run += ["train.warmup_ratio=0"]  # else the only step is at learning rate 0
    free = SimpleNamespace(available=0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(ConfigError, match=r"^train\.check_memory: a step needs about 0\.\d\d GiB"):
        train(compose_run(run))
    train(compose_run([*run, "train.check_memory=false"]))


def test_bf16_stays_near_fp32(tiny_run: list[str], tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        train(compose_run([*tiny_run, f"train.precision={precision}", f"run_dir={folder}"]))
        losses.append([x["train/loss"] for x in metrics_of(folder) if "train/loss" in x])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


@pytest.mark.process
def test_exit_codes(tiny_run: list[str], tmp_path: Path) -> None:
    """2 for bad settings and data, each with one line and no traceback."""
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Hi", "chosen": "a", "rejected": ""}\n')
    for bad, message in (
        ("loss.beta=0", "loss.beta: must be above 0, got 0.0 (the paper uses 2.0 to 10)\n"),
        (
            f"data.sources=[{{path: {tmp_path}/bad.jsonl}}]",
            f"{tmp_path}/bad.jsonl train record 1: rejected: the response is empty\n"
            "(no record is good: bring them into one of the forms of docs/data.md)\n",
        ),
    ):
        process = start([*tiny_run, bad], fresh=True)
        _, errors = process.communicate()
        assert process.returncode == 2
        assert errors == message


@pytest.mark.matrix
def test_real_model_on_real_pairs(real_data: Path, smollm2: Path, run_dir: Path) -> None:
    """PandaLM's and LLMBar's pairs through SmolLM2's own tokenizer, and two steps of training."""
    sources = ", ".join(
        f"{{path: {real_data}/{name}.train.jsonl, test_path: {real_data}/{name}.test.jsonl, "
        f"num_pairs: 4}}"
        for name in ("pandalm_human", "llmbar")
    )
    run = compose_run(
        [
            "data=jsonl",
            f"data.sources=[{sources}]",
            "train.pairs_per_step=4",
            "data.max_length_tokens=256",
            "data.max_prompt_tokens=128",
            "sample.num_prompts=1",
            "sample.max_new_tokens=4",
            f"run_dir={run_dir}",
        ]
    )
    # All 308 held-out pairs would take minutes here.
    for source in run.data.sources:
        source.test_path = None
    train(run)
    lines = metrics_of(run_dir)
    assert [x["step"] for x in lines] == [1, 2]
    assert all(0 < x["train/loss"] < 5 for x in lines)


@pytest.mark.matrix
def test_a_sweep_runs_every_member(tiny_run: list[str], tmp_path: Path) -> None:
    """Four settings give four finished runs; a bad value is refused before the first of them."""
    sweep = ["-m", "loss.beta=2,2.5", "loss.gamma_beta_ratio=0.3,0.5"]
    process = start([*sweep[:2], "loss.gamma_beta_ratio=0.3,-1", *tiny_run])
    assert process.communicate()[1] == "loss.gamma_beta_ratio: must be 0 or more, got -1.0\n"
    assert process.returncode == 2
    assert not (tmp_path / "outputs").exists()
    process = start([*sweep, *tiny_run])
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    runs = [load_run(path) for path in (tmp_path / "outputs").rglob("run.yaml")]
    losses = [run.loss for run in runs if isinstance(run.loss, SigmoidConfig)]
    assert {(loss.beta, loss.gamma_beta_ratio) for loss in losses} == {
        (2.0, 0.3),
        (2.0, 0.5),
        (2.5, 0.3),
        (2.5, 0.5),
    }
    states = [
        json.loads(p.read_text())["state"] for p in (tmp_path / "outputs").rglob("status.json")
    ]
    assert states == ["finished"] * 4
