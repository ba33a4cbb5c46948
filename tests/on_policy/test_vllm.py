"""Replies and verdicts of vLLM, by a stand-in with its signatures and its way of stopping."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config
from peft import LoraConfig as PeftLoraConfig

from simpo.__main__ import main
from simpo.config.benchmarks import JudgeConfig
from simpo.config.choices import Quantization
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, RunError
from simpo.config.models import LoraConfig, ModelConfig
from simpo.data.chats.chat import Chat
from simpo.judging.local import LocalJudge
from simpo.judging.shapes import Query, Said
from simpo.loop.train import train
from simpo.model.generate import Sampling
from simpo.model.tokenizer import load_tokenizer
from simpo.on_policy.engines import with_transformers, with_vllm
from simpo.on_policy.generate import generate
from tests.support import stand_in_vllm
from tests.support.stand_in_vllm import Asked
from tests.support.tiny_models import tiny_adapter
from tests.support.whole_runs import tiny_overrides

WITHOUT = "on_policy.engine=transformers does without it"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return stand_in_vllm.install(monkeypatch)


def query(text: str, **more: Any) -> Query:
    settings: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, **more}
    return Query(text, 0, 0, ({"role": "user", "content": text},), **settings)


def verdicts(folder: Path, engine: str, queries: Sequence[Query]) -> list[Said]:
    words = ["backend.device=cpu", "train.precision=fp32", f"on_policy.engine={engine}"]
    run = replace(compose_run(words), judge=JudgeConfig(local=str(folder)))
    found = {id(one): said for one, said in LocalJudge(run, str(folder)).answers(queries)}
    said = [found[id(one)] for one in queries]
    assert all(isinstance(one, Said) for one in said)
    return said  # type: ignore[return-value]


def test_a_judge_says_what_it_says_with_transformers(tiny_folder: Path, asked: Asked) -> None:
    queries = [query("Name a bird."), query("Is A better than B?")]
    queries += [query("A?", max_tokens=1, temperature=1.0, top_logprobs=3)]
    expected = verdicts(tiny_folder, "transformers", queries)
    # Some other token of a reply is the tokenizer's EOS: a reply goes on to its own end.
    ours = verdicts(tiny_folder, "vllm", queries)
    drawn = LocalJudge(compose_run([]), str(tiny_folder))._chat.tokenizer(expected[0].text)
    asked.eos_id = drawn["input_ids"][0]
    again = verdicts(tiny_folder, "vllm", queries)
    for found in (ours, again):
        assert [said.text for said in found[:2]] == [said.text for said in expected[:2]]
        assert [(s.input_tokens, s.output_tokens) for s in found] == [
            (s.input_tokens, s.output_tokens) for s in expected
        ]
        assert list(found[2].first_logprobs) == list(expected[2].first_logprobs)
        assert found[2].first_logprobs == pytest.approx(expected[2].first_logprobs, abs=1e-5)


def test_each_reply_has_its_seed(tiny_run: list[str], tmp_path: Path, asked: Asked) -> None:
    words = [*tiny_run, f"on_policy.folder={tmp_path}/own", "on_policy.seeds=[1,2]"]
    words += ["on_policy.max_new_tokens=8", "on_policy.batch_prompts=2", "on_policy.num_prompts=3"]
    words += ["on_policy.engine=vllm", "model.dtype=bfloat16"]
    run = compose_run(words)
    file = generate(run) / "responses.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len(asked.requests) == 12
    assert len({how.seed for _, how in asked.requests}) == 12
    for _, how in asked.requests:
        assert (how.temperature, how.top_p, how.max_tokens) == (0.8, 0.95, 8)
    (loaded,) = asked.models
    # Else vLLM would take the ends of replies from generation_config.json.
    assert loaded["generation_config"] == "vllm" and loaded["dtype"] == "bfloat16"
    assert loaded["model"] == loaded["tokenizer"] == run.model.path
    # Replies do not depend on those beside them.
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    text = (generate(run) / "responses.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == rows


def test_models_are_loaded_one_after_the_other(
    tiny_folder: Path, tmp_path: Path, asked: Asked
) -> None:
    """Two runs, the model before training and the judge: each needs the whole GPU."""
    words = [*tiny_overrides(tiny_folder, tmp_path), "train.max_steps=1", "train.eval_every=0"]
    words += ["sample.num_prompts=0", "train.warmup_ratio=0"]
    runs = [tmp_path / name for name in "ab"]
    for run in runs:
        train(compose_run([*words, f"run_dir={run}"]))
    more = ["benchmark=pairs", "benchmark.baseline=base", "benchmark.max_new_tokens=4"]
    more += ["benchmark.num_prompts=2", "judge.max_tokens=2", f"judge.local={tiny_folder}"]
    more += [f"output_dir={tmp_path}", "on_policy.engine=vllm"]
    with pytest.raises(SystemExit) as ended:
        main(["judge", *map(str, runs), *more])
    assert ended.value.code == 1, "no verdict of the tiny model can be read"
    assert [one["model"] for one in asked.models] == [
        *(str(tiny_folder), str(runs[0] / "model"), str(runs[1] / "model")),
        str(tiny_folder),
    ]


@pytest.mark.parametrize(
    ("form", "max_rank"), [({"r": 4}, 8), ({"r": 16, "use_rslora": True}, 16), ({"r": 20}, 32)]
)
def test_an_adapter_beside_its_base(
    form: dict[str, Any], max_rank: int, tiny_folder: Path, tmp_path: Path, asked: Asked
) -> None:
    """Greedy replies are those of transformers with the adapter, and others than the base's."""
    adapter = tiny_adapter(tiny_folder, tmp_path / "adapter", **form)
    base = ModelConfig(name="tiny", path=str(tiny_folder))
    model = replace(base, lora=LoraConfig(adapter=str(adapter)))
    run = replace(compose_run(["backend.device=cpu", "train.precision=fp32"]), model=model)
    chat = Chat(load_tokenizer(model, tmp_path))
    prompts, greedy = chat.encode(["Hi", "Owls are birds"]), Sampling(0.0, 1.0, 12, seed=0)
    expected = with_transformers(run, chat)(prompts, greedy)
    assert with_vllm(model, tmp_path, chat)(prompts, greedy) == expected
    (loaded,) = asked.models
    assert (loaded["enable_lora"], loaded["max_lora_rank"]) == (True, max_rank)
    assert with_vllm(base, tmp_path, chat)(prompts, greedy) != expected
    assert "enable_lora" not in asked.models[1]


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules beside an adapter"),
        ({"trainable_token_indices": [3]}, "single tokens beside an adapter"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"rank_pattern": {"q_proj": 2}}, "ranks or alphas of single layers"),
        ({"alpha_pattern": {"q_proj": 2}}, "ranks or alphas of single layers"),
        ({"r": 513}, "ranks above 512"),
    ],
)
def test_adapters_that_vllm_does_not_take(
    form: dict[str, Any], fault: str, tmp_path: Path, asked: Asked
) -> None:
    """What it refuses, and what it would leave out without a word."""
    PeftLoraConfig(target_modules=["q_proj"], **form).save_pretrained(str(tmp_path))
    lora = LoraConfig(adapter=str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        with_vllm(ModelConfig(name="tiny", path="tiny", lora=lora), tmp_path, None)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"model.lora.adapter: vllm does not take {fault}, which {tmp_path} has (merge it with "
        "simpo export, or set on_policy.engine=transformers)"
    )
    assert asked.models == []


def test_other_adapters_and_quantised_models(
    tiny_folder: Path, tmp_path: Path, asked: Asked
) -> None:
    IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(str(tmp_path))
    model = ModelConfig(name="tiny", path=str(tiny_folder))
    refused = [
        (
            replace(model, lora=LoraConfig(adapter=str(tmp_path))),
            f"model.lora.adapter: vllm does not take adapters of type IA3, which {tmp_path} has "
            "(merge it with simpo export, or set on_policy.engine=transformers)",
        ),
        (
            replace(model, quantization=Quantization.nf4),
            f"model.quantization: vllm does not quantise here, got nf4 ({WITHOUT})",
        ),
    ]
    for one, text in refused:
        with pytest.raises(ConfigError) as caught:
            with_vllm(one, tiny_folder, None)  # type: ignore[arg-type]
        assert str(caught.value) == text
    assert asked.models == []


def test_errors_of_vllm_are_one_line(tiny_folder: Path, asked: Asked) -> None:
    queries = [query("Name a bird.")]
    keep = with_vllm(ModelConfig(name="tiny", path=str(tiny_folder)), tiny_folder, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        verdicts(tiny_folder, "vllm", queries)
    assert str(caught.value) == (
        f"judge.local: vllm cannot load {tiny_folder}: Free memory on device cuda:0 is less than "
        f"desired ({WITHOUT})"
    )
    del keep
    asked.broken = "EngineCore encountered an issue.\n  See stack trace above.\n" + "x " * 300
    with pytest.raises(RunError) as failed:
        verdicts(tiny_folder, "vllm", queries)
    message = str(failed.value)
    assert message.startswith("vllm failed: EngineCore encountered an issue. See stack trace above")
    assert message.endswith(f"x ... (the same command continues; {WITHOUT})")
    assert len(message) < 450 and "\n" not in message
