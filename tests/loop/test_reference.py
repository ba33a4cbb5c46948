"""Losses with a reference model use the log-probs of the model that the run starts from."""

from __future__ import annotations

import copy
import csv
import importlib
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import numpy as np
import pytest
import torch

from simpo.backend import build_backend
from simpo.config.backends import SingleConfig
from simpo.config.choices import Precision
from simpo.config.compose import compose_run
from simpo.config.models import ADAPTER_FILE, LoraConfig, ModelConfig
from simpo.data import loader
from simpo.data.loader import PackedSet
from simpo.data.packing import pack
from simpo.data.pairs import TokenizedPair
from simpo.loop import reference
from simpo.loop.train import train
from simpo.loss.with_reference import DpoConfig
from simpo.model.load import load_policy
from simpo.model.policy import Policy
from tests.support.tiny_models import (
    padded_logps,
    random_pairs,
    tiny_adapter,
    tiny_model,
    token_set,
)
from tests.support.whole_runs import assert_same_run, logged, metrics_of, run, start, wait_for

DPO = ["loss=dpo", "loss.beta=0.5"]


def fingerprint(policy: Policy) -> str:
    return reference.model_fingerprint(policy, sorted(policy.state_dict().items()))


def test_scores_are_those_of_padded_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the padded float64 path, in another order than the rows'; then from the cache."""
    model = tiny_model("llama")
    tokens = random_pairs(np.random.default_rng(0), 5)
    data = token_set(tokens)
    rows = [pack([tokens[i] for i in order], order) for order in ((3, 0), (4, 2, 1))]
    backend = build_backend(SingleConfig(), Precision.fp32, 1.0)
    policy = Policy(model)
    origin = fingerprint(policy)

    def scored(origin: str) -> list[float]:
        found = reference.with_reference(policy, data, rows, origin, tmp_path, backend, DpoConfig())
        return [x for pair in found.tokens for x in pair.reference_logps or ()]

    sums, _ = padded_logps(copy.deepcopy(model).double(), tokens)
    expected = torch.stack(sums.chunk(2), dim=1).flatten().tolist()
    assert scored(origin) == pytest.approx(expected, rel=1e-5)

    monkeypatch.setattr(reference, "_score", lambda *_: pytest.fail("scored again"))
    assert scored(origin) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        scored("another model")
    (entry,) = (tmp_path / "reference").iterdir()
    file = entry / "scores.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        scored(origin)


def test_scores_are_cached_by_the_tokens_that_are_scored(tmp_path: Path) -> None:
    """The same tokens, of which the first of chosen is not scored: the rest is summed anew."""
    model, whole = tiny_model("llama"), random_pairs(np.random.default_rng(2), 3)
    whole = [pair for pair in whole if len(pair.chosen_ids) > 1]
    masks = [np.arange(len(pair.chosen_ids)) > 0 for pair in whole]
    masked = [replace(p, scored=(mask, None)) for p, mask in zip(whole, masks, strict=True)]
    backend = build_backend(SingleConfig(), Precision.fp32, 1.0)

    def scored(pairs: list[TokenizedPair]) -> list[float]:
        data, rows = token_set(pairs), [pack(pairs, range(len(pairs)))]
        found = reference.with_reference(
            Policy(model), data, rows, "origin", tmp_path, backend, DpoConfig()
        )
        return [pair.reference_logps[0] for pair in found.tokens if pair.reference_logps]

    assert token_set(whole).fingerprint == token_set(masked).fingerprint
    exact = copy.deepcopy(model).double()
    chosen = padded_logps(exact, whole)[0].chunk(2)[0]
    first = [replace(p, responses=(p.chosen_ids[:1], p.rejected_ids)) for p in whole]
    rest = chosen - padded_logps(exact, first)[0].chunk(2)[0]
    assert scored(whole) == pytest.approx(chosen.tolist(), rel=1e-5)
    assert scored(masked) == pytest.approx(rest.tolist(), rel=1e-5)
    assert scored(whole) == pytest.approx(chosen.tolist(), rel=1e-5)


def test_weights_of_tokens_are_cached_by_the_code_of_a_users_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same settings with other code in the user's module are another loss."""
    code = """
        from dataclasses import dataclass
        from typing import ClassVar
        from simpo.loss.with_reference import DpoConfig

        @dataclass(kw_only=True)
        class Own(DpoConfig):
            weighs_tokens: ClassVar[bool] = True
            name: str = "own"

            def token_weights(self, tokens):
                return FACTOR * tokens.logps.new_ones(len(tokens.logps))
    """
    monkeypatch.syspath_prepend(str(tmp_path))
    model, pairs = tiny_model("llama"), random_pairs(np.random.default_rng(3), 3)
    backend = build_backend(SingleConfig(), Precision.fp32, 1.0)

    def scored(factor: str) -> np.ndarray:
        (tmp_path / "own_weights.py").write_text(dedent(code).replace("FACTOR", factor))
        importlib.invalidate_caches()
        sys.modules.pop("own_weights", None)
        loss = importlib.import_module("own_weights").Own(module="own_weights")
        rows = [pack(pairs, range(len(pairs)))]
        found = reference.with_reference(
            Policy(model), token_set(pairs), rows, "origin", tmp_path, backend, loss
        )
        assert found.tokens.reference_logps is not None
        return found.tokens.reference_logps

    assert scored("0.25") * 4 == pytest.approx(scored("1"), rel=1e-6)


def test_scores_of_a_set_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 pairs give the padded float64 numbers too; a cached set is not laid out."""
    model = tiny_model("llama")
    tokens = random_pairs(np.random.default_rng(1), 11)
    data = token_set(tokens)
    backend = build_backend(SingleConfig(), Precision.fp32, 1.0)
    packed = PackedSet(data, 40)
    monkeypatch.setattr(loader, "BLOCK_PAIRS", 4)

    def scored() -> list[float]:
        found = reference.with_reference(
            Policy(model), data, packed.rows(), "origin", tmp_path, backend, DpoConfig()
        )
        return [x for pair in found.tokens for x in pair.reference_logps or ()]

    sums, _ = padded_logps(copy.deepcopy(model).double(), tokens)
    expected = torch.stack(sums.chunk(2), dim=1).flatten().tolist()
    assert scored() == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(loader, "rows_of_pairs", lambda *_: pytest.fail("laid out"))
    assert scored() == pytest.approx(expected, rel=1e-5)


def test_the_fingerprint_is_of_every_weight() -> None:
    model = Policy(tiny_model("llama"))
    same = fingerprint(copy.deepcopy(model))
    assert fingerprint(model) == same
    for parameter in model.parameters():
        old = parameter.data.flatten()[-1].item()
        parameter.data.view(-1)[-1] = old + 1e-3
        assert fingerprint(model) != same
        parameter.data.view(-1)[-1] = old


def test_the_fingerprint_is_of_all_that_a_model_computes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal weights: settings of model and adapter, kernel, libraries and code count, the place
    of the files does not."""

    def loaded(base: Path, adapter: Path | None = None) -> Policy:
        lora = LoraConfig(adapter=str(adapter) if adapter else None)
        config = ModelConfig(name="tiny", path=str(base), lora=lora)
        return load_policy(config, tmp_path, torch.device("cpu"), 0)

    def found(base: Path, adapter: Path | None = None) -> str:
        return fingerprint(loaded(base, adapter))

    def copied(folder: Path, name: str, **settings: object) -> Path:
        new = shutil.copytree(folder, tmp_path / name)
        file = new / ("config.json" if (new / "config.json").is_file() else ADAPTER_FILE)
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return new

    policy = loaded(tiny_folder)
    same = fingerprint(policy)
    assert found(copied(tiny_folder, "copy")) == same
    rope = {"rope_theta": 500.0, "rope_type": "default"}
    assert found(copied(tiny_folder, "rope", rope_parameters=rope)) != same
    assert found(copied(tiny_folder, "eps", rms_norm_eps=1e-3)) != same

    adapter = tiny_adapter(tiny_folder, tmp_path / "adapter", lora_alpha=8)
    adapted = found(tiny_folder, adapter)
    assert found(tmp_path / "copy", copied(adapter, "adapter_copy")) == adapted
    assert found(tiny_folder, copied(adapter, "alpha", lora_alpha=16)) != adapted

    with monkeypatch.context() as other:
        other.setattr(reference, "package_versions", lambda _: {"transformers": "0.1"})
        assert fingerprint(policy) != same
    with monkeypatch.context() as other:
        other.setattr(reference, "sha256", lambda file: file.name)
        assert fingerprint(policy) != same
    with monkeypatch.context() as other:
        remote = ModuleType("transformers_modules.own")
        remote.__file__ = __file__
        other.setitem(sys.modules, remote.__name__, remote)
        assert fingerprint(policy) != same
    assert fingerprint(policy) == same
    policy.base.set_attn_implementation("eager")
    assert fingerprint(policy) != same


def test_other_settings_of_the_model_are_another_reference(
    tiny_folder: Path, tiny_run: list[str], tmp_path: Path
) -> None:
    """The same weights with another rope_theta, and the same cache: log-ratios begin at 0."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    words = [*tiny_run, *DPO, f"model.path={folder}", "train.max_steps=1", "sample.num_prompts=0"]
    for theta in (10_000.0, 50.0):
        settings["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
        (folder / "config.json").write_text(json.dumps(settings))
        train(compose_run([*words, "train.warmup_ratio=0", f"run_dir={tmp_path / str(theta)}"]))
        first = metrics_of(tmp_path / str(theta))[0]
        assert first["eval/loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert abs(first["eval/rewards/chosen"]) < 1e-4


def test_a_run_starts_at_its_reference(tiny_run: list[str], tmp_path: Path) -> None:
    """Every log-ratio is 0 before the first step, and moves afterwards."""
    folder = tmp_path / "run"
    train(compose_run([*tiny_run, *DPO, f"run_dir={folder}"]))
    lines = metrics_of(folder)
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(lines[0]["eval/rewards/chosen"]) < 1e-4
    # The reward is beta times what the log-prob of all tokens has gained.
    sums = []
    for step in (0, 6):
        with (folder / f"held_out/step-{step:06d}.csv").open(newline="") as file:
            sums.append([-float(pair["chosen_nll"]) for pair in csv.DictReader(file)])
    gained = sum(sums[1]) / 16 - sum(sums[0]) / 16
    assert abs(gained) > 0.5
    assert lines[-1]["eval/rewards/chosen"] == pytest.approx(0.5 * gained, rel=1e-3)


@pytest.mark.matrix
def test_neither_a_stop_nor_other_processes_move_the_reference(
    tiny_run: list[str], tmp_path: Path
) -> None:
    """Stopped and continued without its cache, bit for bit; in two processes, to rounding."""
    long = [*tiny_run, *DPO, "train.max_steps=12", "train.epochs=2", "train.eval_every=0"]
    run([*long, f"run_dir={tmp_path / 'whole'}"])
    stopped = [*long, f"run_dir={tmp_path / 'stopped'}"]
    process = start(stopped)
    wait_for(logged(tmp_path / "stopped", 5), process)
    process.terminate()
    assert process.wait(timeout=60) == 75
    shutil.rmtree(tmp_path / "cache" / "reference")
    run(stopped)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", tmp_path)
    shutil.rmtree(tmp_path / "cache" / "reference")
    run([*long, "backend=fsdp", "backend.processes=2", f"run_dir={tmp_path / 'two'}"])
    lines = zip(metrics_of(tmp_path / "two"), metrics_of(tmp_path / "whole"), strict=True)
    for ours, theirs in lines:
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
