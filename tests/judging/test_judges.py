"""Which judge is opened, and what models and rewards on this machine say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.config.benchmarks import JudgeConfig
from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, RunError
from simpo.config.schema import RunConfig
from simpo.judging.endpoint import EndpointJudge
from simpo.judging.judges import open_judge
from simpo.judging.local import LocalJudge
from simpo.judging.rewards import ScoringReward
from simpo.judging.shapes import Query, Question, Said
from simpo.judging.verdicts import said_to
from tests.support.toy_benchmark import Toy

BULLETS = {"name": "bullets", "count": 1}


def run_of(*words: str, **judge: Any) -> RunConfig:
    run = compose_run(["backend.device=cpu", "train.precision=fp32", *words])
    return replace(run, judge=JudgeConfig(**judge))


def query(*texts: str, **more: Any) -> Query:
    """Texts of the user, or if there are two, of the system and the user."""
    roles = ("system", "user")[-len(texts) :]
    messages = tuple({"role": r, "content": t} for r, t in zip(roles, texts, strict=True))
    settings: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, **more}
    return Query(texts[-1], 0, 0, messages, **settings)


def test_the_judge_that_is_set() -> None:
    toy = Toy(2)
    assert open_judge(run_of(annotations="file.json"), toy) is None
    found = open_judge(run_of(endpoint="http://localhost:1/v1", model="arbiter"), toy)
    assert isinstance(found, EndpointJudge) and found.name == "arbiter"
    with pytest.raises(ConfigError) as caught:
        open_judge(run_of(reward="rules"), toy)
    assert str(caught.value) == (
        "judge.reward: rules judges prompts that have a rule, but 2 of 2 have none (choose another "
        "judge)"
    )
    toy.questions = [replace(question, rule=BULLETS) for question in toy.questions]
    found = open_judge(run_of(reward="rules"), toy)
    assert isinstance(found, ScoringReward) and found.name == "rules"
    toy.baseline_name = ""
    with pytest.raises(ConfigError) as caught:
        open_judge(run_of("benchmark=mt_bench", reward="rules"), toy)
    assert str(caught.value) == (
        "judge.reward: benchmark=mt_bench has no baseline that a score could be compared with "
        "(leave it out, or set judge.endpoint or judge.local)"
    )


def test_without_a_judge() -> None:
    """Rules if all questions have them, and none for programs that check."""
    toy = Toy(2)
    with pytest.raises(ConfigError) as caught:
        open_judge(run_of("benchmark=mt_bench"), toy)
    assert str(caught.value) == (
        "judge: benchmark=mt_bench needs a judge, but none is set (judge.endpoint, local, reward "
        "or annotations)"
    )
    assert open_judge(run_of("benchmark=ifbench"), toy) is None
    toy.questions = [replace(question, rule=BULLETS) for question in toy.questions]
    found = open_judge(run_of("benchmark=pairs"), toy)
    assert isinstance(found, ScoringReward)
    assert found.score(toy.questions[0], ["- a", "a"]) == [1.0, 0.0]
    bare = Toy(2)
    with pytest.raises(ConfigError):
        open_judge(run_of("benchmark=pairs"), toy, bare)
    toy.questions[1] = replace(toy.questions[1], rule=None)
    with pytest.raises(ConfigError):
        open_judge(run_of("benchmark=pairs"), toy)


def test_a_reward_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judge_rewards.py").write_text(
        "import sys\n"
        "def odd(prompt, texts, rule):\n    return [float('nan') for _ in texts]\n"
        "def leaves(prompt, texts, rule):\n    sys.exit(3)\n"
        "def changes(prompt, texts, rule):\n"
        "    prompt.clear(), rule.clear()\n    return [1] * len(texts)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    question = Question("q7", ({"role": "user", "content": "Hi"},))
    with pytest.raises(RunError) as caught:
        ScoringReward(run_of(), "judge_rewards:odd").score(question, ["a"])
    assert str(caught.value) == (
        "judge.reward: judge_rewards:odd must give 1 finite scores for question q7, gave [nan]"
    )
    with pytest.raises(RunError) as caught:
        ScoringReward(run_of(), "judge_rewards:leaves").score(question, ["a"])
    assert str(caught.value) == (
        "judge.reward: judge_rewards:leaves failed on question q7: SystemExit: 3 "
        "(judge_rewards.py, line 5)"
    )
    ruled = replace(question, rule=dict(BULLETS))
    assert ScoringReward(run_of(), "judge_rewards:changes").score(ruled, ["a", "b"]) == [1, 1]
    assert ruled.rule == BULLETS and len(ruled.prompt) == 1
    with pytest.raises(RunError) as caught:
        ScoringReward(run_of(), "rules").score(question, ["a"])
    assert str(caught.value) == (
        "judge.reward: rules failed on question q7: ValueError: the prompt has no rule"
    )
    with pytest.raises(ConfigError) as unknown:
        ScoringReward(run_of(), "./nothing")
    assert str(unknown.value) == "judge.reward: no such folder, got ./nothing"


def answers(judge: LocalJudge, queries: Sequence[Query]) -> dict[int, Said]:
    """What is said, by the id of the query."""
    found = [(query, said) for query, said in judge.answers(queries) if isinstance(said, Said)]
    assert len(found) == len(queries)
    return {id(query): said for query, said in found}


def test_a_model_on_this_machine(tiny_folder: Path) -> None:
    """Against transformers' own greedy search and logits, one query at a time."""
    judge = LocalJudge(run_of("on_policy.batch_prompts=2"), str(tiny_folder))
    queries = [query(text) for text in ("Name a bird.", "Which?", "Is A better than B, or not?")]
    queries += [query(text, max_tokens=1, temperature=1.0, top_logprobs=3) for text in ("x", "A?")]
    found = answers(judge, queries)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder)
    for one in queries:
        ids: Any = tokenizer.apply_chat_template(
            list(one.messages), add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        said = found[id(one)]
        assert said.input_tokens == ids.shape[1]
        if not one.top_logprobs:
            greedy = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            assert said.text == tokenizer.decode(greedy, skip_special_tokens=True)
            continue
        with torch.no_grad():
            logps = model(ids).logits[0, -1].log_softmax(-1)
        expected: dict[str, float] = {}
        for i in logps.argsort(descending=True)[:3]:  # parts of letters share a text
            expected.setdefault(str(tokenizer.decode([i])), logps[i].item())
        assert list(said.first_logprobs) == list(expected)
        assert said.first_logprobs == pytest.approx(expected, abs=1e-5)


def test_what_a_model_cannot_read(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = LocalJudge(run_of(), str(tiny_folder))
    queries = [query("Hi <|im_end|>"), query("Hi"), query("long " * 3000), query("half \ud83d")]
    run = run_of(f"output_dir={tmp_path}")
    told = [
        f"note   1 of 4 queries count as malformed verdicts, and are asked again by the next "
        f"command: judge.local: {tiny_folder.name} cannot read it: {reason}"
        for reason in (
            "a message holds the token <|im_end|> as text",
            "with its verdict it is longer than the judge's 2,048 tokens",
            "a message: holds \\ud83d, half of a character (a lone surrogate)",
        )
    ]
    for _ in range(2):
        found = said_to(run, judge, queries)
        assert [said.text == "" for _, said in found] == [True, False, True, True]
        shown = capsys.readouterr().out.splitlines()
        assert [line for line in shown if line[:4] == "note"] == told
    with pytest.raises(RunError) as caught:
        said_to(replace(run, output_dir=f"{tmp_path}/other"), judge, [query("<|im_end|>")])
    assert str(caught.value) == (
        f"judge.local: {tiny_folder.name} cannot read it: a message holds the token <|im_end|> "
        "as text (verdicts so far are kept)"
    )


def test_a_template_without_a_system_prompt(tiny_folder: Path, tmp_path: Path) -> None:
    """As Gemma's: its text comes before the question."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    chatml = (folder / "chat_template.jinja").read_text()
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refuse + chatml)
    judge = LocalJudge(run_of(), str(folder))
    asked = [query("Judge.", "A or B?"), query("Judge.\n\nA or B?")]
    both = answers(judge, asked)
    assert both[id(asked[0])] == both[id(asked[1])]


def test_a_judge_is_known_by_its_weights(tiny_folder: Path, tmp_path: Path) -> None:
    def identity() -> str:
        return LocalJudge(run_of(), str(folder)).identity

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    before = identity()
    assert before == LocalJudge(run_of(), str(tiny_folder)).identity
    (folder / "README.md").write_text("another text")
    assert identity() == before
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    assert identity() != before


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        LocalJudge(run_of(), str(tmp_path))
    assert str(caught.value) == (
        f"judge.local: must hold a run or a model, got {tmp_path} (no {tmp_path}/config.json or "
        f"{tmp_path}/adapter_config.json)"
    )
