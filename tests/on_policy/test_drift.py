"""Entropy and divergence along replies, against transformers' logits in float64."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DamagedError
from simpo.config.models import LoraConfig, ModelConfig
from simpo.config.schema import RunConfig
from simpo.model import head
from simpo.on_policy import drift
from simpo.on_policy.annotate import annotate
from simpo.on_policy.drift import measure_drift
from simpo.on_policy.files import read_lines
from simpo.on_policy.generate import generate
from simpo.on_policy.measures import read_measures
from tests.support.tiny_models import tiny_adapter, tiny_model


def family_folder(family: str, tiny_folder: Path, folder: Path, seed: int = 0) -> Path:
    """A tiny model of a family with the tokenizer of the tiny one."""
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    tiny_model(family, seed, vocab_size=384).save_pretrained(folder)
    return folder


@pytest.fixture
def words(tiny_run: list[str], tmp_path: Path) -> list[str]:
    """Overrides that draw two short replies to five held-out prompts; some are cut off."""
    return [
        *tiny_run,
        f"on_policy.folder={tmp_path}/own",
        "on_policy.held_out_only=true",
        "on_policy.num_prompts=5",
        "on_policy.seeds=[1,2]",
        "on_policy.max_new_tokens=12",
        "on_policy.reward=rules",
        "on_policy.keep_cut=true",
    ]


def expected_sums(run: RunConfig, model: ModelConfig) -> list[tuple[int, float, float]]:
    """Tokens, summed log-prob and summed entropy of each reply, in float64, one after the other."""
    folder = Path(str(run.on_policy.folder))
    tokenizer: Any = AutoTokenizer.from_pretrained(run.model.path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float64)
    if model.lora.adapter:
        loaded = PeftModel.from_pretrained(loaded, model.lora.adapter).double()
    prompts = {line["id"]: line["prompt"] for line in read_lines(folder / "prompts.jsonl")}
    sums = []
    for reply in read_lines(folder / "responses.jsonl"):
        asked = tokenizer.apply_chat_template(
            prompts[reply["id"]], add_generation_prompt=True, return_dict=False
        )
        ids = reply["ids"] + [tokenizer.eos_token_id] * reply["ended"]
        with torch.no_grad():
            logits = loaded(torch.tensor([asked + ids])).logits[0, len(asked) - 1 : -1]
        logps = logits.double().log_softmax(-1)
        own = logps.gather(-1, torch.tensor(ids)[:, None]).sum().item()
        sums.append((len(ids), own, -(logps.exp() * logps).sum().item()))
    return sums


def expected(run: RunConfig, base: ModelConfig) -> dict[str, float]:
    ours, theirs = expected_sums(run, run.model), expected_sums(run, base)
    tokens = sum(count for count, _, _ in ours)
    kl = sum(one[1] - two[1] for one, two in zip(ours, theirs, strict=True))
    entropy = sum(one[2] for one in ours)
    return {"entropy": entropy / tokens, "kl": kl / tokens, "kl_reply": kl / len(ours)}


def measured(run: RunConfig, base: ModelConfig) -> dict[str, Any]:
    measure_drift(run, base)
    found = read_measures(Path(str(run.on_policy.folder)))["test"]
    return {key: found[key] for key in drift.DRIFT}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
def test_against_logits_in_float64(
    family: str,
    words: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several rows, in several parts of logits; gemma2 caps its logits."""
    monkeypatch.setattr(head, "LOGITS_BYTES", 4 * 384 * 5)
    monkeypatch.setattr(drift, "ROW_TOKENS", 100)
    paths = [family_folder(family, tiny_folder, tmp_path / name, i) for i, name in enumerate("ab")]
    run = compose_run([*words, f"model.path={paths[0]}"])
    base = replace(run.model, path=str(paths[1]))
    generate(run)
    found = measured(run, base)
    assert found == pytest.approx(expected(run, base), rel=1e-4)
    assert found["kl"] > 0.1


def test_an_adapter_and_its_base(words: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tiny_folder, tmp_path / "adapter")
    run = compose_run([*words, f"model.lora.adapter={adapter}"])
    base = replace(run.model, lora=LoraConfig())
    generate(run)
    assert measured(run, base) == pytest.approx(expected(run, base), rel=1e-4)


def test_the_same_content_does_not_diverge(
    words: list[str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is a copy of the model: one is loaded."""
    loaded: list[str] = []
    load = drift.load_policy

    def loading(model: ModelConfig, *args: Any, **more: Any) -> Any:
        loaded.append(model.path)
        return load(model, *args, **more)

    monkeypatch.setattr(drift, "load_policy", loading)
    run = compose_run(words)
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    generate(run)
    found = measured(run, replace(run.model, path=str(copy)))
    assert (found["kl"], found["kl_reply"]) == (0, 0)
    assert found["entropy"] == pytest.approx(expected(run, run.model)["entropy"], rel=1e-4)
    assert loaded == [run.model.path]


def test_what_is_computed_is_kept(
    words: list[str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped command continues; other replies and another base are computed anew."""
    run = compose_run(words)
    base = replace(run.model, path=str(family_folder("llama", tiny_folder, tmp_path / "base")))
    folder = generate(run)
    whole = measured(run, base)
    file = folder / "drift.jsonl"
    text = file.read_text()
    assert len(text.splitlines()) == 2 * 10
    file.write_text(text[: len(text) // 4])  # within a line of the first model
    assert measured(run, base) == pytest.approx(whole, rel=1e-5)
    assert len(file.read_text().splitlines()) == 2 * 10
    monkeypatch.setattr(drift, "load_policy", None)
    assert measured(run, base) == pytest.approx(whole, rel=1e-5)
    monkeypatch.undo()
    more = compose_run([*words, "on_policy.seeds=[1,2,3]"])
    generate(more)
    assert measured(more, base) == pytest.approx(expected(more, base), rel=1e-4)
    assert len(file.read_text().splitlines()) == 2 * 15
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(DamagedError) as caught:
        measure_drift(more, base)
    assert str(caught.value) == f"{file}: line 31 is no log-prob of a reply (remove that line)"


def test_neither_loses_the_measures_of_the_other(
    words: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    def measures(*order: str) -> dict[str, Any]:
        own = f"on_policy.folder={tmp_path}/{len(list(tmp_path.iterdir()))}"
        run = compose_run([*words, "on_policy.held_out_only=false", own])
        folder = generate(run)
        for name in order:
            if name == "drift":
                measure_drift(run, run.model)
            else:
                annotate(compose_run([*words, own]))  # no train pair is no error then
        text = (folder / "measures.json").read_text()
        found: dict[str, Any] = json.loads(text)
        return {"text": text, **found}

    first = measures("annotate", "drift")
    assert first["train"]["prompts"] == first["test"]["prompts"] == 5
    assert first["test"].keys() == {*first["train"], *drift.DRIFT}
    assert measures("drift", "annotate") == first
    assert measures("annotate", "drift", "annotate", "drift", "annotate") == first


def test_replies_whose_drift_cannot_be_measured(
    words: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    run = compose_run(words)
    own = tmp_path / "own"
    with pytest.raises(ConfigError) as caught:
        measure_drift(run, run.model)
    assert str(caught.value) == (
        f"on_policy.folder: no replies to held-out prompts in {own} (run simpo.generate)"
    )
    generate(run)
    other = family_folder("llama", tiny_folder, tmp_path / "other")
    with pytest.raises(ConfigError) as caught:
        measure_drift(replace(run, model=replace(run.model, path=str(other))), run.model)
    assert f"model.path: the replies in {own} were generated with {tiny_folder}, got " in str(
        caught.value
    )
    nothing = replace(run.model, path="nobody/nothing")
    with pytest.raises(ConfigError) as caught:
        measure_drift(run, nothing)
    assert str(caught.value).startswith("base: nobody/nothing cannot be loaded: ")
    file = own / "responses.jsonl"
    rows = [{k: v for k, v in row.items() if k != "ids"} for row in read_lines(file)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError) as caught:
        measure_drift(run, run.model)
    assert str(caught.value) == (
        f"on_policy.folder: the replies in {own} have no token ids, an earlier version wrote them "
        "(generate into another on_policy.folder)"
    )
