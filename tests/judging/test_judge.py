"""`simpo judge`: answers drawn and resumed, pairs judged by rules and by words, runs compared."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.__main__ import main
from simpo.config.compose import compose_run
from simpo.config.composer import CONF
from simpo.config.errors import ConfigError, DamagedError, DataError, RunError
from simpo.data.rules import obeys
from simpo.judging import answers as drawing
from simpo.judging import judge as judging
from simpo.judging.local import LocalJudge
from simpo.judging.pairs import open_pairs
from simpo.judging.results import without_thoughts
from simpo.judging.shapes import Query, Said
from simpo.launch.commands.judge import USAGE
from simpo.loop.train import train
from simpo.run.files import read_results
from simpo.run.judged import Judged, read_judged
from simpo.run.runs import read_progress
from tests.support.tiny_models import tiny_reward_model
from tests.support.whole_runs import (
    Process,
    finish,
    start,
    status_of,
    tiny_overrides,
    wait_for,
)

ON_CPU = ["backend.device=cpu", "train.precision=fp32"]
SHORT = ["benchmark=pairs", "benchmark.max_new_tokens=8"]
TWO_STEPS = ["train.max_steps=2", "train.eval_every=0", "sample.num_prompts=0"]
REWARD = """def by_letters(prompt, replies, rule):
    return [float(sum(map(ord, reply)) % 97) for reply in replies]
"""


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs a and b."""
    folder = tmp_path_factory.mktemp("runs")
    words = [*tiny_overrides(tiny_folder, folder), *TWO_STEPS, "train.learning_rate=1e-2"]
    for seed, name in enumerate("ab"):
        train(compose_run([*words, f"train.seed={seed}", f"run_dir={folder}/{name}"]))
    return folder


class Toy:
    """Prefers the longer answer; of equal ones the first. Says it twice."""

    name, identity = "toy", "0"

    def answers(self, queries: Sequence[Query]) -> Iterator[tuple[Query, Said]]:
        for query in queries:
            first, second = query.messages[1]["content"].split("Answer A:")[1].split("Answer B:")
            label = "A" if len(first.strip()) >= len(second.strip()) else "B"
            yield query, Said(f"Not [[C]] but\n[[{label}]]", {}, 10, 2)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["judge", *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_two_runs_by_rules(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["judge", f"{folder}/a", f"{folder}/b", *SHORT, f"output_dir={tmp_path}"])
    shown = capsys.readouterr().out
    assert "minus a" in shown and "judge  rules against chosen: 16 questions" in shown
    assert "judging the answers of a ...\njudging the answers of b ...\n" in shown
    held_out = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    judged = read_judged(folder / "a")["pairs"]
    drawn = {
        line["question"]: line["text"]
        for line in lines(folder / "a" / "benchmarks" / "pairs" / "answers.jsonl")
        if "text" in line
    }
    rules = {q.id: q.rule for q in open_pairs(compose_run(_data(folder))).questions}
    assert len(held_out) == len(drawn) == judged.questions == 16
    own = [obeys(rules[key], text) for key, text in drawn.items()]  # type: ignore[arg-type]
    assert judged.figures["pass_rate"].value == pytest.approx(100 * sum(own) / 16)
    # The chosen responses of the demo obey their rules, so obeying is a draw, else lost.
    assert judged.figures["win_rate"].value == pytest.approx(50 * sum(own) / 16)


def _data(folder: Path) -> list[str]:
    source = f"data.sources=[{{path: {folder}/train.jsonl, test_path: {folder}/test.jsonl}}]"
    return ["data=jsonl", source, *SHORT]


def test_held_out_pairs_alone_are_read(folder: Path, tmp_path: Path) -> None:
    """So training records may be anything, or gone; held-out ones may not."""
    held_out = shutil.copy(folder / "test.jsonl", tmp_path)
    (tmp_path / "train.jsonl").write_text("gone")
    source = f"data.sources=[{{path: {tmp_path}/train.jsonl, test_path: {held_out}}}]"
    run = compose_run(["data=jsonl", source, *SHORT])
    (tmp_path / "train.jsonl").unlink()
    asked = open_pairs(run).questions
    assert asked == open_pairs(compose_run(_data(folder))).questions and len(asked) == 16
    Path(held_out).unlink()
    with pytest.raises(DataError) as caught:
        open_pairs(run)
    assert str(caught.value) == f"{held_out} test: cannot be read: no such file"
    with pytest.raises(ConfigError) as refusal:
        source = f"data.sources=[{{path: {folder}/train.jsonl}}]"
        open_pairs(compose_run(["data=jsonl", source, *SHORT]))
    assert str(refusal.value) == (
        "benchmark: pairs needs held-out pairs, but the data has none (set test_path or "
        "test_split of a source)"
    )


def test_the_built_in_model(
    folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base of the demo answers beside its runs by the name that runs have for it."""
    monkeypatch.setattr("simpo.model.pretrained.smollm2_folder", lambda cache_dir: tiny_folder)
    main(["judge", "builtin:smollm2", *_data(folder), f"output_dir={tmp_path}", *ON_CPU])
    drawn = tmp_path / "judged" / "builtin:smollm2" / "pairs" / "answers.jsonl"
    texts = {line["question"]: line["text"] for line in lines(drawn) if "text" in line}
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    question = open_pairs(compose_run(_data(folder))).questions[0]
    ids: Any = tokenizer.apply_chat_template(
        list(question.prompt), add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert len(texts) == 16
    assert texts[question.id] == tokenizer.decode(greedy, skip_special_tokens=True)
    assert LocalJudge(compose_run(ON_CPU), "builtin:smollm2").name == "builtin:smollm2"


def test_words_of_a_judge(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "open_judge", lambda run, benchmark: Toy())
    more = [*_data(folder), f"output_dir={tmp_path}", "benchmark.baseline=base"]
    (judged,) = judging.judge(compose_run(more), [f"{folder}/b"])
    assert judged.asked == 2 * 16 + 2 * 16 and judged.malformed == 0
    official = lines(folder / "b" / "benchmarks" / "pairs" / "judgements.jsonl")
    expected = []
    for line in official:
        one, other = len(line["answer"].strip()), len(line["baseline_answer"].strip())
        tie = 1.0 if line["order"] == 0 else 0.0
        expected.append(tie if one == other else float(one > other))
    assert [line["preference"] for line in official] == expected
    assert judged.figures["win_rate"].value == pytest.approx(100 * sum(expected) / len(expected))
    assert judged.agreement == 1.0 and judged.input_tokens == 10 * judged.asked
    # The file of judgements gives the same without a judge.
    path = folder / "b" / "benchmarks" / "pairs" / "judgements.jsonl"
    (again,) = judging.judge(compose_run([*more, f"judge.annotations={path}"]), [])
    assert again.figures["win_rate"] == judged.figures["win_rate"]
    assert (again.position_bias, again.by_question) == (judged.position_bias, judged.by_question)


def test_nothing_readable(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mute(Toy):
        name = "mute"

        def answers(self, queries: Sequence[Query]) -> Iterator[tuple[Query, Said]]:
            yield from ((query, Said("hm")) for query in queries)

    monkeypatch.setattr(judging, "open_judge", lambda run, benchmark: Mute())
    run = compose_run([*_data(folder), f"output_dir={tmp_path}"])
    with pytest.raises(RunError) as caught:
        judging.judge(run, [f"{folder}/a"])
    assert str(caught.value) == (
        "judge: none of 50 verdicts of mute can be read; the first is 'hm' (choose another judge, "
        "or a larger judge.max_tokens)"
    )


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("<think>[[A]] or</think>\n[[B]]", "\n[[B]]"),
        ("so [[A]]</think>[[B]]", "[[B]]"),
        ("\n<think>[[A]], but", ""),
        ("[[A]] <think>", "[[A]] <think>"),
        ("[[A]]", "[[A]]"),
    ],
)
def test_thoughts_are_no_verdict(text: str, spoken: str) -> None:
    assert without_thoughts(text) == spoken


def test_a_judge_that_thinks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the verdicts of every other question its thoughts were cut off."""

    class Thinks(Toy):
        def answers(self, queries: Sequence[Query]) -> Iterator[tuple[Query, Said]]:
            for i, query in enumerate(queries):
                yield query, Said("<think>[[A]]" + " or? </think> [[C]]" * (i % 2))

    monkeypatch.setattr(judging, "open_judge", lambda run, benchmark: Thinks())
    words = [*_data(folder), f"output_dir={tmp_path}", "judge.repeated_prompts=0"]
    (judged,) = judging.judge(compose_run(words), [f"{folder}/a"])
    assert (judged.malformed, judged.asked) == (16, 32)
    assert judged.figures["win_rate"].value == 50


def test_a_cut_file_of_answers_goes_on_to_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[str] = []
    show = drawing.bar

    def noted(what: str, total: int) -> Any:
        bars.append(what)
        return show(what, total)

    monkeypatch.setattr(drawing, "bar", noted)
    more = ["benchmark.temperature=1", "on_policy.batch_prompts=5"]
    run = compose_run([*_data(folder), *more, f"output_dir={tmp_path}"])
    model = replace(drawing.contestant(run, f"{folder}/a"), folder=tmp_path / "own")
    questions = open_pairs(run).questions
    questions = [replace(q, follow_ups=("And then?",)) for q in questions]
    whole, notes = drawing.draw(run, questions, model)
    assert notes == [] and all(len(answer.turns) == 2 for answer in whole.values())
    assert bars == ["answers of a to turn 1", "answers of a to turn 2"]
    file = tmp_path / "own" / "answers.jsonl"
    text = file.read_text()
    file.write_text(text[: text.index("\n", len(text) // 3) + 20])
    assert drawing.draw(run, questions, model)[0] == whole
    # Other settings are drawn beside them.
    other = replace(run, benchmark=replace(run.benchmark, seed=1))
    assert drawing.draw(other, questions, model)[0] != whole
    before = file.read_text()
    assert drawing.draw(run, questions, model)[0] == whole and file.read_text() == before


def test_commands_that_cannot_be_used(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused([f"{folder}/a"], capsys) == (
        "benchmark: required, but not given (choose from alpaca_eval_2, arena_hard_v0.1, "
        "arena_hard_v2, ifbench, mt_bench, pairs)\n"
    )
    assert refused(["benchmark=pairs"], capsys) == (
        "RUN: required, but not given (usage: simpo judge RUN [RUN2 ...] benchmark=NAME "
        "[key=value ...])\n"
    )
    assert refused([f"{folder}/a", "benchmark=pairs", "loss.beta=3"], capsys) == (
        "loss.beta: does not matter to judging (leave it out)\n"
    )
    assert refused([f"{tmp_path}/none", "benchmark=pairs"], capsys) == (
        f"RUN: no such folder or file, got {tmp_path}/none\n"
    )
    assert refused([f"{tmp_path}/loss.beta=3", "benchmark=pairs"], capsys) == (
        f"RUN: no such folder or file, got {tmp_path}/loss.beta=3\n"
    )
    with pytest.raises(ConfigError) as caught:
        compose_run(["monitor.metric=win_rate"])
    assert str(caught.value) == (
        "monitor.metric: win_rate is of a benchmark, but none is set (benchmark=pairs)"
    )
    with pytest.raises(ConfigError) as caught:
        compose_run(
            [*SHORT, "monitor.metric=win_rate", "train.keep_best=true", "train.eval_every=1"]
        )
    assert str(caught.value) == (
        "train.keep_best: needs a held-out metric, got monitor.metric=win_rate, which is known at "
        "the end of a run only (choose another metric)"
    )


def test_at_the_end_of_a_run(
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A judge that fails leaves the model; the same command judges without training again."""
    words = [*tiny_run, *TWO_STEPS, *SHORT, f"run_dir={tmp_path}/run"]
    from simpo.launch.start import start as start_run

    def fail(*args: object) -> None:
        raise RunError("judge: away (come back)")

    with monkeypatch.context() as patched:
        patched.setattr(judging, "judgements_of", fail)
        with pytest.raises(RunError) as caught:
            start_run(compose_run(words))
    run = tmp_path / "run"
    assert str(caught.value) == (
        f"{run}: the model is saved, but not judged: judge: away (come back) (the same command "
        f"judges it without training again, and so does simpo judge {run} benchmark=pairs with a "
        "judge)"
    )
    assert status_of(run)["state"] == "failed" and status_of(run)["judging"] == "pairs"
    # By hand on another benchmark's settings it stays as it is; on its own, with any judge, not.
    copied, by_hand = shutil.copytree(run, tmp_path / "copied"), ["judge.reward=rules"]
    text = (copied / "run.yaml").read_text()
    main(["judge", str(copied), *SHORT, *by_hand, "benchmark.seed=3", f"output_dir={tmp_path}"])
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"note   {copied} is still to be judged with benchmark.seed=0 (add that, and the run is "
        "finished)"
    )
    assert status_of(copied)["state"] == "failed" and "judging" in status_of(copied)
    main(["judge", str(copied), *SHORT, *by_hand, f"output_dir={tmp_path}"])
    assert status_of(copied) == {"state": "finished", "step": 2, "total_steps": 2, "error": ""}
    pass_rate = read_judged(copied)["pairs"].figures["pass_rate"].value
    assert read_results(copied)["eval_after"]["pass_rate"] == pass_rate
    assert (copied / "run.yaml").read_text() == text
    trained = (run / "model" / "model.safetensors").stat().st_mtime_ns
    assert "win_rate" not in read_results(run)["eval_after"]
    start_run(compose_run(words))
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == trained
    assert status_of(run)["state"] == "finished"
    figures = read_judged(run)["pairs"].figures
    after = read_results(run)["eval_after"]
    assert {key: after[key] for key in figures} == {k: f.value for k, f in figures.items()}


def test_a_run_of_several_processes_is_judged_in_one(
    folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Also by a model on this machine."""
    words = [*_data(folder), "backend=ddp", "backend.processes=2", "backend.device=cpu"]
    words += [f"judge.local={tiny_folder}", "judge.max_tokens=2", f"output_dir={tmp_path}"]
    run = compose_run([*words, "benchmark.num_prompts=1"])
    with pytest.raises(RunError, match="can be read; the first is"):
        judging.judge(run, [f"{folder}/a"])


def test_models_in_folders_of_one_name(folder: Path, tmp_path: Path) -> None:
    """A later command leaves the results of the other as they are."""
    run = compose_run([*_data(folder), f"output_dir={tmp_path}", *ON_CPU])
    found = {}
    for name in "ab":
        model = shutil.copytree(folder / name / "model", tmp_path / name / "model")
        (judged,) = judging.judge(run, [str(model)])
        found[name] = (judged, drawing.contestant(run, str(model)).folder)
    for judged, place in found.values():
        assert place.parent.name.startswith("model-") and place.parents[1] == tmp_path / "judged"
        assert Judged.read(place / "judged.json") == judged
    assert found["a"][0] != found["b"][0]


def run_of_other_data(folder: Path, tmp_path: Path, records: list[dict[str, Any]]) -> Path:
    """A copy of the run b with other held-out records."""
    other, held_out = shutil.copytree(folder / "b", tmp_path / "other"), tmp_path / "test.jsonl"
    held_out.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = (other / "run.yaml").read_text().replace(f"{folder}/test.jsonl", str(held_out))
    (other / "run.yaml").write_text(settings.replace(f"{folder}/b", str(other)))
    return other


def test_judgements_of_a_run_are_of_its_own_data(folder: Path, tmp_path: Path) -> None:
    """From which the rules come, which judgements.jsonl has not."""
    asked = [{"role": "user", "content": "Speak like an owl."}]
    (record, *_) = lines(folder / "test.jsonl")
    other = run_of_other_data(folder, tmp_path, [{**record, "prompt": asked}])
    words = [*SHORT, f"output_dir={tmp_path}", *ON_CPU]
    (judged,) = judging.judge(compose_run(words), [str(other)])
    assert set(judged.figures) == {"win_rate", "pass_rate"}
    path = other / "benchmarks" / "pairs" / "judgements.jsonl"
    (again,) = judging.judge(compose_run([*words, f"judge.annotations={path}"]), [str(other)])
    assert again.figures == judged.figures


def test_prompts_without_rules_of_a_later_run(folder: Path, tmp_path: Path) -> None:
    """Each run has its own data; all are looked at before an answer is drawn."""
    records = [{**record, "rule": None} for record in lines(folder / "test.jsonl")]
    bare = run_of_other_data(folder, tmp_path, records)
    for word, told in (
        ("judge.reward=rules", "judge.reward: rules judges prompts that have a rule, but 16 of 32"),
        ("benchmark.num_prompts=8", "judge: benchmark=pairs needs a judge, but none is set"),
    ):
        run = compose_run([*SHORT, f"output_dir={tmp_path}", word])
        with pytest.raises(ConfigError, match=told):
            judging.judge(run, [f"{folder}/a", str(bare)])


def test_the_usage_names_every_benchmark() -> None:
    assert all(name in USAGE for name in CONF.choices("benchmark") if name != "none")


def test_a_baseline_is_the_same_however_its_folder_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs are compared in reports if their baselines have one name."""
    monkeypatch.chdir(folder)
    for written in (f"{folder}/a", f"{folder}/a/", "a", "b/../a"):
        run = compose_run([*_data(folder), f"benchmark.baseline={written}"])
        assert open_pairs(run).baseline_name == str((folder / "a").resolve())


def test_models_and_baselines_that_cannot_be_judged(folder: Path, tmp_path: Path) -> None:
    """Known before an answer is drawn, or a model trained."""
    model = shutil.copytree(folder / "a" / "model", tmp_path / "same")
    run = compose_run([*_data(folder), f"output_dir={tmp_path}"])
    with pytest.raises(ConfigError) as caught:
        judging.judge(run, [str(model), f"{tmp_path}/same/../same"])
    place = drawing.contestant(run, str(model)).folder
    assert str(caught.value) == (
        f"RUN: {model} and {tmp_path}/same/../same both have their results in {place} (give one of "
        "them, or rename one)"
    )
    run = compose_run([*_data(folder), f"benchmark.baseline={tmp_path}"])
    for attempt in (judging.check, lambda run: judging.judge(run, [f"{folder}/a"])):
        with pytest.raises(ConfigError) as caught:
            attempt(run)
        assert str(caught.value) == (
            f"benchmark.baseline: must hold a run or a model, got {tmp_path} (no "
            f"{tmp_path}/config.json or {tmp_path}/adapter_config.json)"
        )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("nothing", "not a JSON object"),
        ('{"settings": "x"}', "no answer"),
        ('{"decide": {}}', "no answer"),
        ('{"settings": "x", "question": ["a"], "turn": 0, "text": "", "tokens": 1}', "no answer"),
    ],
)
def test_a_damaged_file_of_answers(folder: Path, tmp_path: Path, line: str, told: str) -> None:
    run = compose_run(_data(folder))
    model = replace(drawing.contestant(run, f"{folder}/a"), folder=tmp_path)
    (tmp_path / "answers.jsonl").write_text(f"{line}\n")
    with pytest.raises(DamagedError) as caught:
        drawing.draw(run, open_pairs(run).questions, model)
    assert str(caught.value) == (f"{tmp_path}/answers.jsonl: line 1 is {told} (remove that line)")


def test_answers_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    run = compose_run(_data(folder))
    model = replace(drawing.contestant(run, f"{folder}/a"), folder=tmp_path)
    (tmp_path / "answers.jsonl").mkdir()
    with pytest.raises(RunError) as caught:
        drawing.draw(run, open_pairs(run).questions, model)
    assert str(caught.value) == (
        f"{tmp_path}/answers.jsonl: Is a directory (something else lies in its place: move that "
        "away)"
    )


@pytest.fixture
def judged(tiny_run: list[str], tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Overrides of a run in several processes that a reward model judges, in time to disturb it."""
    tiny_reward_model(tiny_folder, tmp_path / "reward")
    words = [*tiny_run, *TWO_STEPS, *SHORT, f"judge.reward={tmp_path}/reward", "backend=ddp"]
    return [*words, "benchmark.max_new_tokens=150", "on_policy.batch_prompts=1"]


def stopped_while_judging(process: Process, run: Path, code: int) -> str:
    """The answers that were kept of a run that got a SIGTERM after the first ones."""
    file = run / "benchmarks" / "pairs" / "answers.jsonl"
    wait_for(lambda: file.is_file() and file.read_text().count("\n") > 2, process)
    assert read_progress([run])[0].text() == "running, step 2 of 2, judging on pairs"
    process.send_signal(signal.SIGTERM)
    told = f"SIGTERM: trained, not yet judged, in {run} (the same command continues)\n"
    assert told in finish(process, code)
    assert read_progress([run])[0].text() == "stopped, step 2 of 2, not yet judged on pairs"
    return file.read_text()


def finished(run: Path, before: str) -> None:
    """Judging went on where it was, and its figures are those of the run."""
    assert (run / "benchmarks" / "pairs" / "answers.jsonl").read_text().startswith(before)
    assert status_of(run)["state"] == "finished"
    rate = read_judged(run)["pairs"].figures["win_rate"]
    assert read_results(run)["eval_after"]["win_rate"] == rate.value


@pytest.mark.process
def test_stopped_while_judging_and_a_sweep(judged: list[str], tmp_path: Path) -> None:
    """The process that started two ranks judges once they have ended."""
    run = tmp_path / "run"
    words = [*judged, "backend.processes=2", f"run_dir={run}"]
    before = stopped_while_judging(start(words), run, 75)
    assert "saving the model" not in finish(start(words))
    finished(run, before)
    (tmp_path / "my_rewards.py").write_text(REWARD)
    sweep = ["-m", "train.seed=1,2", "judge.reward=my_rewards:by_letters"]
    sweep += [word for word in judged if not word.startswith(("backend=", "judge."))]
    sweep += ["benchmark.max_new_tokens=8", "monitor.metric=win_rate"]
    env = {"PYTHONPATH": str(tmp_path)}
    shown = finish(start([*sweep, f"launcher.sweep_dir={tmp_path}/sweep"], env=env))
    rates = {
        seed: read_judged(tmp_path / "sweep" / f"train.seed={seed}")["pairs"].figures["win_rate"]
        for seed in (1, 2)
    }
    best = max(rates, key=lambda seed: rates[seed].value)
    assert f"best   train.seed={best}: win_rate {rates[best].value:.4f}" in shown


@pytest.mark.matrix
def test_stopped_while_judging_under_torchrun(judged: list[str], tmp_path: Path) -> None:
    """Rank 0 judges when the other has ended. In the second life the other comes late."""
    run = tmp_path / "run"
    words = [*judged, f"run_dir={run}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = (*torchrun, "--nproc_per_node=2", "-m", "simpo.train")
    before = stopped_while_judging(start(words, *command), run, 1)  # torchrun's own code
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    first = start(words, env=place | {"RANK": "0", "LOCAL_RANK": "0"})

    def waits_for_the_other() -> bool:
        with socket.socket() as link:
            return link.connect_ex(("127.0.0.1", port)) == 0

    wait_for(waits_for_the_other, first)
    finish(start(words, env=place | {"RANK": "1", "LOCAL_RANK": "1"}), timeout_s=60)
    assert "saving the model" not in finish(first)
    finished(run, before)
