"""Verdicts are kept: asked once, shared, and not lost by kill -9, a limit or a damaged file."""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simpo.config.benchmarks import JudgeConfig
from simpo.config.compose import compose_run
from simpo.config.errors import DamagedError, RunError
from simpo.config.schema import RunConfig
from simpo.judging import endpoint, verdicts
from simpo.judging.endpoint import EndpointJudge
from simpo.judging.shapes import Answer, Judgement, Query, Question, Said, by_question
from simpo.judging.verdicts import repeats, said_to, scored
from simpo.judging.win_rates import (
    agreement,
    first_share,
    mean_figure,
    position_bias,
)
from tests.support.stub_judge import Fault, StubJudge, biased, chance, stub_judge
from tests.support.toy_benchmark import Toy, shown

PRICES = {"usd_per_million_input_tokens": 2.0, "usd_per_million_output_tokens": 8.0}
FORK = multiprocessing.get_context("fork")


def query(text: str, **more: Any) -> Query:
    return Query(text, 0, 0, ({"role": "user", "content": text},), 10, 0.5, **more)


def queries(count: int) -> list[Query]:
    return [query(f"question {i}") for i in range(count)]


@pytest.fixture(scope="module")
def composed() -> RunConfig:
    return compose_run([])


@pytest.fixture
def run(composed: RunConfig, tmp_path: Path) -> RunConfig:
    return replace(composed, output_dir=str(tmp_path))


def with_judge(run: RunConfig, stub: StubJudge, **settings: Any) -> RunConfig:
    return replace(run, judge=JudgeConfig(endpoint=stub.url, model="arbiter", **settings))


def ask(run: RunConfig, asked: Sequence[Query]) -> list[str]:
    return [said.text for _, said in said_to(run, EndpointJudge(run.judge), asked)]


def lines(run: RunConfig) -> list[dict[str, Any]]:
    (file,) = verdicts.verdicts_folder(run).iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


def echo(messages: Any) -> str:
    return f"said {messages[0]['content']}"


def test_a_verdict_is_asked_once(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stub_judge(echo) as stub:
        run = with_judge(run, stub, **PRICES)
        few = [query("b"), query("a"), query("b")]
        assert ask(run, few) == ["said b", "said a", "said b"]
        assert len(stub.asked) == 2
        # 2 letters in are no token; 20 tokens out cost 160 millionths of a dollar.
        assert capsys.readouterr().out == (
            "judge  arbiter: 3 queries, 0 of them answered before; 2 are asked: about 0 tokens in, "
            "at most 20 out, about 0.00 USD if every verdict is that long\n"
        )
        assert ask(run, few) == ["said b", "said a", "said b"]
        assert capsys.readouterr().out == ("judge  arbiter: 3 queries, 3 of them answered before\n")
        # All that decides a verdict makes another one of it.
        ask(run, [replace(query("a"), question="another name")])
        assert len(stub.asked) == 2
        others: list[Mapping[str, Any]] = [
            {"order": 1},
            {"repeat": 1},
            {"max_tokens": 9},
            {"temperature": 0.0},
            {"top_logprobs": 0, "messages": ({"role": "user", "content": "a "},)},
        ]
        ask(run, [replace(query("a"), **other) for other in others])
        assert len(stub.asked) == 7
        # Another judge has a file of its own.
        ask(replace(run, judge=replace(run.judge, model="another")), [query("a")])
    assert len(stub.asked) == 8
    assert sorted(file.name[:8] for file in (tmp_path / "verdicts").iterdir()) == [
        "another-",
        "arbiter-",
    ]


def test_a_line_of_the_file(run: RunConfig) -> None:
    with stub_judge(lambda _: ("m", {"m": -0.25})) as stub:
        run = with_judge(run, stub)
        (found,) = said_to(run, EndpointJudge(run.judge), [query("abcde", top_logprobs=5)])
        again = said_to(run, EndpointJudge(run.judge), [query("abcde", top_logprobs=5)])
    assert found == again[0] == (query("abcde", top_logprobs=5), Said("m", {"m": -0.25}, 2, 1))
    (line,) = lines(run)
    assert len(line.pop("key")) == 16
    assert line == {
        **{"question": "abcde", "turn": 0, "order": 0, "repeat": 0},
        "said": {
            **{"text": "m", "first_logprobs": {"m": -0.25}},
            **{"input_tokens": 2, "output_tokens": 1},
        },
    }


def test_own_sampling_of_the_judge(run: RunConfig) -> None:
    with stub_judge(echo) as stub:
        run = with_judge(run, stub, temperature=0.0, max_tokens=7)
        ((returned, _),) = said_to(run, EndpointJudge(run.judge), [query("a")])
    assert (stub.asked[0]["temperature"], stub.asked[0]["max_tokens"]) == (0.0, 7)
    assert returned == query("a")


def test_the_price_is_said_before(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """4 bytes a token: 2 M tokens in at 2 USD, 300 k out at 8 USD."""
    with stub_judge(lambda _: "x", [Fault(404)]) as stub:
        run = with_judge(run, stub, **PRICES)
        long = replace(query("a" * 8_000_000), max_tokens=300_000)
        with pytest.raises(RunError):
            ask(run, [long])
        assert capsys.readouterr().out == (
            "judge  arbiter: 1 queries, 0 of them answered before; 1 are asked: about 2,000,000 "
            "tokens in, at most 300,000 out, about 6.40 USD if every verdict is that long\n"
        )
        ask(with_judge(run, stub), [query("a")])
    assert capsys.readouterr().out.endswith("about 0 tokens in, at most 10 out\n")


def test_a_limit_keeps_what_was_paid(run: RunConfig) -> None:
    with stub_judge(echo) as stub:
        # A request costs at most 12 + 32 letters and 10 tokens, in fact 3 and 5: after two of them
        # 16 are spent, and 54 more are too many.
        run = with_judge(run, stub, concurrency=1, limit_usd=63 / 1e6, **{k: 1.0 for k in PRICES})
        with pytest.raises(RunError) as caught:
            ask(run, [query(f"question {i:03}") for i in range(5)])
        assert str(caught.value).endswith(
            "3 of 5 queries are left (verdicts so far are kept: raise it, and the same command "
            "goes on)"
        )
        assert len(lines(run)) == len(stub.asked) == 2
        run = with_judge(run, stub)
        assert len(ask(run, [query(f"question {i:03}") for i in range(5)])) == 5
    assert len(stub.asked) == 5


def test_the_key_is_in_no_file(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret-5a7")
    with stub_judge(echo, key="sk-very-secret-5a7") as stub:
        ask(with_judge(run, stub, key_env="MY_KEY"), queries(3))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"question 2" in written and b"sk-very" not in written
    assert "sk-very" not in "".join(capfd.readouterr())


def _in_a_process(run: RunConfig, count: int) -> None:
    ask(run, queries(count))


@pytest.mark.process
def test_kill_9_in_the_middle(run: RunConfig, tmp_path: Path) -> None:
    """The same file as without: nothing is asked again but what was in flight, twice here."""
    with stub_judge(echo, wait_s=0.01) as stub:
        whole = ask(with_judge(run, stub), queries(60))
        expected = sorted(map(json.dumps, lines(run)))
        stub.asked.clear()
        killed = with_judge(replace(run, output_dir=str(tmp_path / "killed")), stub, concurrency=4)
        for until in (15, 35):
            process = FORK.Process(target=_in_a_process, args=(killed, 60))
            process.start()
            while len(stub.asked) < until:
                assert process.is_alive()
                time.sleep(0.001)
            process.kill()
            process.join()
            assert process.exitcode == -9
        (file,) = verdicts.verdicts_folder(killed).iterdir()
        assert 0 < len(lines(killed)) < 60
        with file.open("a") as half:  # as kill -9 in the middle of a write leaves it
            half.write('{"key": "ab')
        assert ask(killed, queries(60)) == whole
        assert 60 <= len(stub.asked) <= 60 + 2 * 4
    assert sorted(map(json.dumps, lines(killed))) == expected


@pytest.mark.process
def test_two_processes_at_once(run: RunConfig) -> None:
    """Each with questions of its own and some of both: a line each, whole, and one truth."""
    count = iter(range(1000))
    with stub_judge(lambda m: f"{next(count)} " + "x" * 5000, wait_s=0.002) as stub:
        run = with_judge(run, stub, concurrency=4)
        processes = [FORK.Process(target=_in_a_process, args=(run, size)) for size in (40, 60)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        found = ask(run, queries(60))
    assert sorted(line["question"] for line in lines(run)) == sorted(
        query.question for query in queries(60)
    )
    kept = {line["question"]: line["said"]["text"] for line in lines(run)}
    assert found == [kept[query.question] for query in queries(60)]


def test_what_another_process_said_first_counts(run: RunConfig) -> None:
    """Both asked; the file has one line, and both go on with it."""

    def asks_too(messages: Any) -> str:
        if stub.seen[1:]:
            return "second"
        assert ask(run, [query("a")]) == ["second"]  # while the first request is in work
        return "first"

    with stub_judge(asks_too) as stub:
        run = with_judge(run, stub)
        assert ask(run, [query("a")]) == ["second"]
    assert len(stub.asked) == 2 and len(lines(run)) == 1


@pytest.mark.parametrize("harm", ["nothing", "[]", '{"key": "a"}', '{"key": "a", "said": {}}'])
def test_a_damaged_file(run: RunConfig, harm: str) -> None:
    with stub_judge(echo) as stub:
        run = with_judge(run, stub)
        ask(run, [query("a")])
        (file,) = verdicts.verdicts_folder(run).iterdir()
        with file.open("a") as more:
            more.write(f"{harm}\n")
        with pytest.raises(DamagedError) as caught:
            ask(run, [query("a")])
    assert str(caught.value) == f"{file}: line 2 is not a verdict (remove that line)"


def test_a_folder_that_cannot_be(run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with stub_judge(echo) as stub, pytest.raises(RunError) as caught:
        ask(with_judge(run, stub, folder=str(tmp_path / "taken" / "own")), [query("a")])
    assert str(caught.value).endswith(
        ".jsonl: Not a directory (something else lies in its place: move that away)"
    )
    assert stub.seen == []


def test_a_disk_that_is_full_for_a_moment(run: RunConfig) -> None:
    """What fits of a line is written; the next writer, when there is room again, removes it."""
    with stub_judge(echo) as stub:
        run = with_judge(run, stub, concurrency=1)
        ask(run, [query("a")])
        (file,) = verdicts.verdicts_folder(run).iterdir()
        kept = verdicts.Kept(file.parent, EndpointJudge(run.judge))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 9, before[1]))
        try:
            with pytest.raises(RunError) as caught:
                kept.add("b", lines(run)[0])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert str(caught.value) == (
            f"{file}: File too large (make room, and the same command continues)"
        )
        kept.add("c", {"score": 1.0})
        assert [line["key"] for line in lines(run)][1:] == ["c"]


def test_a_file_that_is_removed_meanwhile(run: RunConfig) -> None:
    with stub_judge(echo) as stub:
        run = with_judge(run, stub)
        ask(run, queries(3))
        (file,) = verdicts.verdicts_folder(run).iterdir()
        kept = verdicts.Kept(file.parent, EndpointJudge(run.judge))
        file.unlink()
        kept.add("d", {"score": 1.0})
    assert lines(run) == [{"key": "d", "score": 1.0}] and len(kept.values) == 4


def test_a_file_that_cannot_be_written_is_known_before_a_request(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refused(path: Path, *how: Any, **options: Any) -> Any:
        if path.suffix == ".jsonl":
            raise OSError(30, "Read-only file system")
        return opened(path, *how, **options)

    with stub_judge(echo) as stub:
        run = with_judge(run, stub)
        monkeypatch.setattr(Path, "open", refused)
        with pytest.raises(RunError) as caught:
            ask(run, queries(3))
    assert stub.seen == []
    assert str(caught.value).endswith(
        ".jsonl: Read-only file system (let this user write there, or choose another folder)"
    )


TOO_LONG = "maximum context length is 64 tokens. However, you requested {} tokens"


def too_long(tokens: int) -> Fault:
    return Fault(400, json.dumps({"error": {"message": TOO_LONG.format(tokens)}}))


def test_queries_that_a_server_refuses(
    run: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count as malformed, are named each time, and nothing of them is kept."""
    with stub_judge(echo, [too_long(65), too_long(99)]) as stub:
        run = with_judge(run, stub, concurrency=1)
        assert ask(run, queries(4)) == ["", "", "said question 2", "said question 3"]
        assert capsys.readouterr().out.splitlines()[1:] == [
            "note   2 of 4 queries count as malformed verdicts, and are asked again by the next "
            f"command: judge.endpoint: {stub.url} refuses arbiter: 400 Bad Request: "
            f"{TOO_LONG.format(65)}"
        ]
        assert len(lines(run)) == 2
        stub.faults.extend([too_long(65), too_long(99)])
        assert ask(run, queries(4))[:2] == ["", ""]
        assert ask(run, queries(4))[:2] == ["said question 0", "said question 1"]
        # If it answers none, that is an error, after not too many.
        monkeypatch.setattr(verdicts, "ENOUGH", 5)
        run = replace(run, judge=replace(run.judge, model="another"))
        stub.seen.clear()
        stub.faults.extend([too_long(65)] * 9)
        with pytest.raises(RunError) as caught:
            ask(run, queries(9))
    assert len(stub.seen) <= 6
    assert str(caught.value) == (
        f"judge.endpoint: {stub.url} refuses another: 400 Bad Request: {TOO_LONG.format(65)} "
        "(verdicts so far are kept)"
    )


def test_a_judge_that_gives_no_verdict_is_not_paid_for_long(run: RunConfig) -> None:
    with stub_judge(echo) as stub:
        run, asked = with_judge(run, stub, concurrency=1), queries(200)
        judge = EndpointJudge(run.judge)
        with pytest.raises(RunError) as caught:
            said_to(run, judge, asked, lambda query, said: False)
        assert len(lines(run)) == 50 and len(stub.seen) <= 51
        assert str(caught.value) == (
            "judge: none of 50 verdicts of arbiter can be read; the first is 'said question 0' "
            "(choose another judge, or a larger judge.max_tokens)"
        )
        # One that can be read is enough to go on, also one of before.
        said_to(run, judge, asked, lambda query, said: said.text == "said question 7")
    assert len(lines(run)) == 200


def test_a_full_disk(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with stub_judge(echo) as stub:
        run = with_judge(run, stub)
        monkeypatch.setattr(verdicts.Kept, "_lock", full)
        with pytest.raises(RunError) as caught:
            ask(run, [query("a")])
    assert str(caught.value).endswith(
        "No space left on device (make room, and the same command continues)"
    )


def test_a_file_system_without_locks(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(verdicts.fcntl, "flock", no_locks)
    with stub_judge(echo) as stub:
        run = with_judge(run, stub)
        ask(run, queries(3))
    (file,) = verdicts.verdicts_folder(run).iterdir()
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"note   {file} cannot be locked, so let only one process judge at a time: "
        "Function not implemented"
    ]


def test_repeats_are_verdicts_of_their_own(run: RunConfig) -> None:
    asked = [replace(q, order=order) for q in queries(30) for order in (0, 1)]
    run = replace(run, judge=replace(run.judge, repeated_prompts=4))
    again = repeats(run, asked)
    assert len(again) == 8 and {q.repeat for q in again} == {1}
    assert len({q.question for q in again}) == 4
    assert [replace(q, repeat=0) for q in again] == [
        q for q in asked if q.question in {a.question for a in again}
    ]
    assert repeats(run, asked) == again
    other = replace(run, benchmark=replace(run.benchmark, seed=1))
    assert repeats(other, asked) != again
    assert len(repeats(replace(run, judge=JudgeConfig(repeated_prompts=99)), asked)) == 60
    assert repeats(replace(run, judge=JudgeConfig(repeated_prompts=0)), asked) == []
    with stub_judge(echo) as stub:
        run = with_judge(run, stub)
        ask(run, [*asked, *again])
    assert len(stub.asked) == 68


class Length:
    """A reward that counts what it scores."""

    name, identity = "module:length", "0123"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def score(self, question: Question, texts: Sequence[str]) -> list[float]:
        self.asked += [(question.id, text) for text in texts]
        if "bad" in texts:
            raise RunError("a bad answer")
        return [float(len(text)) for text in texts]


def test_scores_are_kept(run: RunConfig) -> None:
    reward = Length()
    one, two = (Question(name, ({"role": "user", "content": name},)) for name in "ab")
    items = [(one, "x"), (two, "xyz"), (one, "xy"), (one, "x")]
    with pytest.raises(RunError):
        scored(run, reward, [*items[:2], (one, "bad"), *items[2:]])
    assert scored(run, reward, items) == [1.0, 3.0, 2.0, 1.0]
    assert reward.asked == [("a", "x"), ("b", "xyz"), ("a", "bad"), ("a", "xy")]
    assert scored(run, reward, [(replace(one, rule={"name": "x"}), "x")]) == [1.0]
    assert len(reward.asked) == 5
    (file,) = verdicts.verdicts_folder(run).iterdir()
    assert file.name == "module_length-0123.jsonl"


def test_planted_biases_are_recovered(run: RunConfig) -> None:
    """A judge that prefers the first answer in a known share, and else the longer one."""
    toy, share, true_rate = Toy(200), 0.3, 0.7
    answers = {
        q.id: Answer(q.id, (("better " if chance("is better", q.id) < true_rate else "") + q.id,))
        for q in toy.questions
    }
    decide = biased(shown, lambda p: "A" if p > 0.5 else "B", for_first=share)
    with stub_judge(decide) as stub:
        run = with_judge(run, stub)
        judge, asked = EndpointJudge(run.judge), toy.queries(answers, both_orders=True)
        found = said_to(run, judge, [*asked, *repeats(run, asked)])
    judgements = [Judgement(query, said, toy.value(query, said)) for query, said in found]
    assert len(judgements) == 440 and agreement(judgements) == 1.0
    # Counted from the plan alone: which pairs are drawn by position, and whose answer is longer.
    pairs = {q.id: (answers[q.id].turns[0], toy.baseline[q.id].turns[0]) for q in toy.questions}
    blind = {name for name, pair in pairs.items() if chance(*sorted(pair)) < share}
    won = {name for name, (ours, theirs) in pairs.items() if len(ours) > len(theirs)}
    assert 0.2 < len(blind) / 200 < 0.4 and 0.6 < len(won) / 200 < 0.8
    assert position_bias(judgements) == pytest.approx(len(blind) / 200)
    firsts = first_share(judgements)
    assert firsts == pytest.approx(0.5 + len(blind) / 400)
    both = mean_figure(list(by_question(judgements).values()))
    assert both.value == pytest.approx((len(won - blind) + len(blind) / 2) / 2)
    assert firsts is not None
    seen = 1 - 2 * (firsts - 0.5)  # the share that was read
    unbiased = (both.value - 100 * (1 - seen) / 2) / seen
    assert unbiased == pytest.approx(100 * len(won - blind) / (200 - len(blind)))
    # Asked in one order, the model shown first looks better than it is.
    once = [j for j in judgements if j.query.order == 0]
    assert mean_figure(list(by_question(once).values())).value > 100 * len(won) / 200 + 3


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(endpoint, "PAUSE_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield
