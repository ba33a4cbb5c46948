"""A judge behind an endpoint: what is sent, faults of the server, the key, the limit."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from simpo.config.benchmarks import JudgeConfig
from simpo.config.errors import ConfigError, RunError
from simpo.judging import endpoint
from simpo.judging.completions import seconds_until
from simpo.judging.endpoint import EndpointJudge
from simpo.judging.shapes import Query, Said, Unanswered
from tests.support.programs import skip_without
from tests.support.stub_judge import Fault, StubJudge, stub_judge

KEY = "sk-very-secret-5a7"


def query(text: str, top_logprobs: int = 0, max_tokens: int = 10) -> Query:
    messages = ({"role": "system", "content": "Judge."}, {"role": "user", "content": text})
    return Query(text, 0, 0, messages, max_tokens, 0.5, top_logprobs)


def judge_of(stub: StubJudge, **settings: Any) -> EndpointJudge:
    return EndpointJudge(JudgeConfig(endpoint=stub.url, model="arbiter", **settings))


def ask(stub: StubJudge, queries: Sequence[Query], **settings: Any) -> dict[str, Said]:
    found = {q.question: said for q, said in judge_of(stub, **settings).answers(queries)}
    assert all(isinstance(said, Said) for said in found.values()), found
    return cast("dict[str, Said]", found)


def error_of(stub: StubJudge, queries: Sequence[Query], **settings: Any) -> str:
    with pytest.raises(RunError) as caught:
        ask(stub, queries, **settings)
    return str(caught.value)


def echo(messages: Any) -> str:
    return f"said {messages[-1]['content']}"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSE_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_what_is_sent_and_said() -> None:
    with stub_judge(echo) as stub:
        said = ask(stub, [query("a")])
    assert stub.asked == [
        {
            "model": "arbiter",
            "messages": [
                {"role": "system", "content": "Judge."},
                {"role": "user", "content": "a"},
            ],
            "max_tokens": 10,
            "temperature": 0.5,
        }
    ]
    assert stub.keys == [None]
    assert said == {"a": Said("said a", {}, 2, 2)}


def test_log_probs_of_the_first_token() -> None:
    with stub_judge(lambda _: ("m", {"m": -0.1, "M": -2.5, " m": -9.0})) as stub:
        said = ask(stub, [query("a", top_logprobs=2)])
    assert stub.asked[0]["logprobs"] is True and stub.asked[0]["top_logprobs"] == 2
    assert said["a"].first_logprobs == {"m": -0.1, "M": -2.5}


@pytest.mark.parametrize("refuses", [True, False])
def test_a_server_without_log_probs(refuses: bool) -> None:
    """It refuses them, or answers without."""
    with stub_judge(echo, gives_logprobs=False) as stub:
        if not refuses:
            answer = json.dumps({"choices": [{"message": {"content": "m"}, "logprobs": None}]})
            stub.faults.append(Fault(200, answer))
        reason = "400 Bad Request: logprobs are not supported by this model"
        assert error_of(stub, [query("a", top_logprobs=5)]) == (
            f"judge.endpoint: arbiter at {stub.url} gives no log-probs, from which this benchmark "
            f"reads verdicts: {reason if refuses else 'the answer has none'} (choose another "
            "judge.model or server)"
        )
    assert len(stub.seen) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500),
        Fault(503, "<html>busy</html>"),
        Fault(408),
        Fault(409),
        Fault(429, headers={"Retry-After": "0"}),
        Fault(200, "{not json"),
        Fault(200, "[]"),
        Fault(200, '{"choices": []}'),
        Fault(200, '{"choices": [{"message": {"content": null}}]}'),
        Fault(200, '{"choices": [{"message": null}]}'),
    ],
)
def test_tried_again(fault: Fault) -> None:
    with stub_judge(echo, [fault, fault]) as stub:
        said = ask(stub, [query("a")], retries=2)
    assert said["a"].text == "said a" and len(stub.seen) == 3


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault(200, '{"error": {"message": "no credits", "code": 402}}'), "no credits"),
        (Fault(200, "<html>log in</html>"), "<html>log in</html>"),
        (Fault(200, 'data: {"choices": []}\n\n'), 'data: {"choices": []}'),
        (Fault(200, '{"choices": "many"}'), "{'choices': 'many'}"),
        (Fault(200, ""), "an empty body"),
    ],
)
def test_what_no_model_has_said_is_no_verdict(fault: Fault, told: str) -> None:
    """It would be kept, and never asked again."""
    with stub_judge(echo, [fault] * 2) as stub:
        assert error_of(stub, [query("a")], retries=1) == (
            f"judge.endpoint: {stub.url}: it answers with no chat completion, but {told}, tried 2 "
            "times (verdicts so far are kept: the same command goes on)"
        )


def completion_of(message: Mapping[str, Any], **choice: Any) -> Fault:
    usage = {"prompt_tokens": 7, "completion_tokens": 9}
    return Fault(200, json.dumps({"choices": [{"message": message, **choice}], "usage": usage}))


def test_a_text_that_thoughts_left_no_room_for_is_paid_once() -> None:
    thoughts = {"content": None, "reasoning_content": "hm [[A]]"}
    with stub_judge(echo, [completion_of(thoughts, finish_reason="length")]) as stub:
        assert ask(stub, [query("a")], retries=6) == {"a": Said("", {}, 7, 9)}
        assert len(stub.seen) == 1
        # Without log-probs of a text there is no verdict either.
        stub.faults.append(completion_of({"content": ""}, finish_reason="length"))
        assert ask(stub, [query("a", top_logprobs=5)])["a"].text == ""
        assert len(stub.seen) == 2


def test_a_text_in_parts() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "[["}]
    parts.append({"type": "text", "text": "B]]"})
    with stub_judge(echo, [completion_of({"content": parts})]) as stub:
        assert ask(stub, [query("a")])["a"].text == "[[B]]"


@pytest.mark.parametrize("usage", ["many", [1], {"prompt_tokens": -5, "completion_tokens": 1e999}])
def test_nonsense_counts_are_none(usage: Any) -> None:
    """So the worst case counts."""
    body = json.dumps({"choices": [{"message": {"content": "x"}}], "usage": usage})
    with stub_judge(echo, [Fault(200, body)]) as stub:
        judge = judge_of(stub, limit_usd=100, concurrency=1, **PRICE)
        with pytest.raises(RunError, match=r"exceed 100 USD, 65\.00 are spent; 1 of 2 queries"):
            list(judge.answers([query("a"), query("b")]))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_query_that_is_refused(status: int) -> None:
    """The others are asked all the same."""
    message = "maximum context length is 64 tokens. However, you requested 65"
    with stub_judge(echo, [Fault(status, json.dumps({"error": {"message": message}}))]) as stub:
        judge = judge_of(stub, concurrency=1)
        (_, refused), (_, said) = judge.answers([query("a"), query("b")])
    assert isinstance(refused, Unanswered) and refused.reason.endswith(f": {message}")
    assert said == Said("said b", {}, 2, 2)


def test_a_server_that_leads_elsewhere() -> None:
    place = {"Location": "https://elsewhere/v1/chat/completions"}
    with stub_judge(echo, [Fault(308, "", place)]) as stub:
        assert error_of(stub, [query("a")]) == (
            f"judge.endpoint: {stub.url} leads elsewhere: 308 Permanent Redirect, to "
            "https://elsewhere/v1/chat/completions (name that base URL; verdicts so far are kept)"
        )


def test_a_body_that_cannot_be_unpacked_is_asked_for_again() -> None:
    with stub_judge(echo, [Fault(200, "no gzip", {"Content-Encoding": "gzip"})]) as stub:
        assert ask(stub, [query("a")])["a"].text == "said a"


def test_half_a_surrogate_pair() -> None:
    with stub_judge(echo) as stub:
        assert ask(stub, [query("a\ud800")])["a\ud800"].text == "said a\ud800"


def test_waits_that_no_clock_can_hold() -> None:
    assert seconds_until("9" * 400) == 86_400
    assert seconds_until("Fri, 31 Dec 9999 23:59:59 GMT") == 86_400
    assert seconds_until("Fri, 31 Dec 99999 00:00:00 GMT") is None
    assert seconds_until("-5") is None and seconds_until("soon") is None


def test_an_environment_in_which_nothing_can_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "odd://127.0.0.1:9")
    with pytest.raises(ConfigError) as caught:
        EndpointJudge(JudgeConfig(endpoint="http://judge.example/v1", model="arbiter"))
    assert str(caught.value) == (
        "judge.endpoint: nothing can be sent: Unknown scheme for proxy URL "
        "URL('odd://127.0.0.1:9') (mend the variables of proxies and certificates in the "
        "environment)"
    )


def test_a_certificate_that_nobody_has_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused at once, and can be named."""
    skip_without("openssl", "openssl")
    file = tmp_path / "own.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-keyout", file, "-out", file.with_suffix(".crt"), "-subj", "/CN=judge"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    file.write_text(file.read_text() + file.with_suffix(".crt").read_text())
    with stub_judge(echo, certificate=file) as stub:
        told = error_of(stub, [query("a")], retries=9)
        assert re.sub(r" \(_ssl.*?\)", "", told) == (
            f"judge.endpoint: {stub.url}: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify "
            "failed: self-signed certificate (name the file of its certificate in SSL_CERT_FILE)"
        )
        monkeypatch.setenv("SSL_CERT_FILE", str(file.with_suffix(".crt")))
        assert ask(stub, [query("a")], retries=0)["a"].text == "said a"


def test_a_server_without_tls() -> None:
    with stub_judge(echo) as stub:
        stub.url = stub.url.replace("http://", "https://")
        told = error_of(stub, [query("a")], retries=9)
    assert told.startswith(f"judge.endpoint: {stub.url}: [SSL")
    assert told.endswith("(the server speaks no TLS: write http://)")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://a:b/v1", "must be http(s)://HOST[:PORT]/PATH, got http://a:b/v1"),
        ("http://a:99999/v1", "must be http(s)://HOST[:PORT]/PATH, got http://a:99999/v1"),
        ("http://[::1/v1", "must be http(s)://HOST[:PORT]/PATH, got http://[::1/v1"),
        (
            "http://a/v1/chat/completions/",
            "must be the base URL, got http://a/v1/chat/completions/ (leave out /chat/completions)",
        ),
        (
            "http://a/v1?key=sk-1",
            "must end with its path, without ? and # (a key belongs into judge.key_env)",
        ),
    ],
)
def test_an_endpoint_that_cannot_be_one(url: str, told: str) -> None:
    assert list(JudgeConfig(endpoint=url, model="x").problems()) == [f"endpoint: {told}"]


def test_a_model_without_an_endpoint() -> None:
    """Which would be judged by rules, where questions have them."""
    assert list(JudgeConfig(model="gpt-4.1").problems()) == [
        "model: needs judge.endpoint, got gpt-4.1 (judge.local is a model here)"
    ]


def test_a_key_that_is_a_part_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """As servers of one's own are given: it hides no words, and is no secret in a verdict."""
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    refusal = json.dumps({"error": {"message": "max_tokens: use max_completion_tokens, Bearer x"}})
    with stub_judge(lambda _: "x [[A]]", [Fault(400, refusal)] * 2) as stub:
        ((_, refused),) = judge_of(stub).answers([query("a")])
        assert isinstance(refused, Unanswered)
        assert refused.reason.endswith("max_tokens: use max_completion_tokens, Bearer ***")
        assert ask(stub, [query("a")])["a"].text == "x [[A]]"
    assert "max_completion_tokens" in stub.seen[1]


def test_a_server_that_says_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with stub_judge(lambda _: f"{KEY} [[A]]") as stub:
        assert ask(stub, [query("a")])["a"].text == "*** [[A]]"


def test_a_verdict_that_stays_malformed_is_empty() -> None:
    with stub_judge(echo, [Fault(200, '{"choices": []}')] * 3) as stub:
        said = ask(stub, [query("a"), query("b")], retries=2, concurrency=1)
    assert said == {"a": Said(""), "b": Said("said b", {}, 2, 2)}


def test_a_server_that_stays_broken() -> None:
    """What was in flight is not lost."""
    with stub_judge(echo, [Fault(500)] * 3) as stub:
        judge = judge_of(stub, retries=2, concurrency=1)
        said: list[tuple[Query, Said | Unanswered]] = []
        with pytest.raises(RunError) as caught:
            said.extend(judge.answers([query("a"), query("b")]))
        assert said == []
        assert str(caught.value) == (
            f"judge.endpoint: {stub.url}: 500 Internal Server Error: overloaded, tried 3 times "
            "(verdicts so far are kept: the same command goes on)"
        )
        stub.faults.extend([Fault(404, '{"message": "no\\n such model"}', wait_s=0.1)])
        with pytest.raises(RunError) as caught:
            said.extend(judge_of(stub, concurrency=2).answers([query(c) for c in "abcd"]))
    # Of the first two requests either may have met the fault.
    assert {q.question for q, _ in said} & {"a", "b"} and len(stub.asked) == len(said)
    assert str(caught.value) == (
        f"judge.endpoint: {stub.url} refuses arbiter: 404 Not Found: no such model (verdicts so "
        "far are kept)"
    )


def test_a_server_that_hangs_or_is_not_there() -> None:
    with stub_judge(echo, [Fault(wait_s=5)]) as stub:
        began = time.monotonic()
        assert ask(stub, [query("a")], timeout_s=0.2)["a"].text == "said a"
        assert time.monotonic() - began < 2
        stub.faults.append(Fault(wait_s=5))
        assert error_of(stub, [query("a")], timeout_s=0.2, retries=0) == (
            f"judge.endpoint: {stub.url}: no answer within judge.timeout_s=0.2, tried once "
            "(verdicts so far are kept: the same command goes on)"
        )
    assert error_of(stub, [query("a")], retries=1) == (
        f"judge.endpoint: {stub.url}: [Errno 111] Connection refused, tried 2 times "
        "(verdicts so far are kept: the same command goes on)"
    )


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_obeyed(as_date: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds, or as a date, whose parts of a second are cut off."""
    wanted = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    with stub_judge(echo, [Fault(429, headers={"Retry-After": wanted})]) as stub:
        began = time.monotonic()
        said = ask(stub, [query("a")])
        waited = time.monotonic() - began
    assert said["a"].text == "said a"
    assert 0.9 <= waited < 3


def test_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    with stub_judge(echo) as stub:
        judge = judge_of(stub)
    pauses = []
    for tried in (0, 1, 2, 5, 2000):
        one = endpoint._Try(0.0, query("a"), tried)
        later = judge._later(one, endpoint._Again("busy"))
        pauses.append((later.due - time.monotonic()) / endpoint.PAUSE_S)
        assert later.tried == tried + 1
    for pause, factor in zip(pauses, (1, 2, 4, 32, 1024), strict=True):
        assert 0.4 * factor <= pause <= factor
    monkeypatch.setattr(endpoint, "PAUSE_S", 1e9)
    assert judge._later(one, endpoint._Again("busy")).due - time.monotonic() <= 60


def test_so_many_at_a_time() -> None:
    with stub_judge(echo, wait_s=0.05) as stub:
        said = ask(stub, [query(str(i)) for i in range(12)], concurrency=3)
    assert len(said) == 12 and stub.most_at_once == 3


def test_a_model_that_wants_another_name_for_the_length() -> None:
    refusal = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    with stub_judge(echo, [Fault(400, json.dumps({"error": {"message": refusal}}))]) as stub:
        assert len(ask(stub, [query("a"), query("b")], concurrency=1, retries=0)) == 2
    assert ["max_tokens" in body for body in stub.seen] == [True, False, False]
    assert stub.asked[0]["max_completion_tokens"] == 10


def test_the_key_appears_nowhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    refused = Fault(400, json.dumps({"error": {"message": f"what is {KEY}?"}}))
    with stub_judge(echo, [Fault(500, f"busy with {KEY}"), refused], key=KEY) as stub:
        judge = judge_of(stub, key_env="MY_KEY")
        ((_, unanswered),) = judge.answers([query("a")])
        assert unanswered == Unanswered(
            f"judge.endpoint: {stub.url} refuses arbiter: 400 Bad Request: what is ***?"
        )
        assert ask(stub, [query("a")], key_env="MY_KEY")["a"].text == "said a"
        assert stub.keys == [f"Bearer {KEY}"] * 3
        monkeypatch.setenv("MY_KEY", "sk-another")
        wrong = error_of(stub, [query("a")], key_env="MY_KEY")
        monkeypatch.delenv("MY_KEY")
        none = error_of(stub, [query("a")], key_env="MY_KEY")
    assert wrong == (
        f"judge.key_env: {stub.url} refuses the key in MY_KEY: 401 Unauthorized: Incorrect API key "
        "provided: Bearer ***"
    )
    assert none == (
        f"judge.key_env: {stub.url} wants a key, but MY_KEY is not set: 401 Unauthorized: "
        "Incorrect API key provided: None (set it, or name another variable)"
    )
    monkeypatch.setenv("MY_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(ConfigError) as unfit:
        judge_of(stub, key_env="MY_KEY")
    assert str(unfit.value) == (
        "judge.key_env: the key in MY_KEY holds letters that no key has (set it anew)"
    )
    shown = [*capsys.readouterr(), repr(judge), str(unanswered), judge.identity]
    assert KEY not in "".join(shown)


# 1 USD a token.
PRICE = {"usd_per_million_input_tokens": 1e6, "usd_per_million_output_tokens": 1e6}


def worst(one: Query) -> int:
    return sum(len(m["content"]) for m in one.messages) + 3 * 16 + one.max_tokens


def test_nothing_is_sent_that_could_exceed_the_limit() -> None:
    """Each costs 4 in fact, but could cost 65."""
    queries = [query(str(i)) for i in range(9)]
    assert worst(queries[0]) == 65
    said: list[tuple[Query, Said | Unanswered]] = []
    with stub_judge(echo, wait_s=0.02) as stub:
        # Two fit beside each other, then one beside what was spent: 65 + 65, 8 + 65, 12 + 65, ...
        judge = judge_of(stub, limit_usd=130 + 4, **PRICE)
        with pytest.raises(RunError) as caught:
            said.extend(judge.answers([*queries, *[query(str(i)) for i in range(9, 30)]]))
    assert stub.most_at_once == 2
    # The last one was sent at 68 spent, since 68 + 65 <= 134; at 72 no other could be.
    assert len(said) == len(stub.seen) == 18
    assert str(caught.value) == (
        "judge.limit_usd: the next request could exceed 134 USD, 72.00 are spent; 12 of 30 "
        "queries are left (verdicts so far are kept: raise it, and the same command goes on)"
    )


def test_the_limit_is_that_of_all_models_of_a_command() -> None:
    """The judge is asked about one model after another, and each time it spends."""
    with stub_judge(echo) as stub:
        judge = judge_of(stub, limit_usd=70, concurrency=1, **PRICE)
        assert len(list(judge.answers([query("a")]))) == 1  # costs 4
        assert len(list(judge.answers([query("b")]))) == 1  # 4 + 65 <= 70
        with pytest.raises(RunError, match=r"exceed 70 USD, 8\.00 are spent; 1 of 1 queries"):
            list(judge.answers([query("c")]))
    assert len(stub.seen) == 2


def test_what_may_have_been_paid_counts() -> None:
    """An answer that did not arrive in time, or without a count, counts with its worst case."""
    with stub_judge(echo, [Fault(wait_s=1)]) as stub:
        judge = judge_of(stub, limit_usd=100, timeout_s=0.2, **PRICE)
        with pytest.raises(RunError, match=r"exceed 100 USD, 65\.00 are spent; 1 of 1 queries"):
            list(judge.answers([query("a")]))
        uncounted = Fault(200, '{"choices": [{"message": {"content": "x"}}]}')
        stub.faults.append(uncounted)
        judge = judge_of(stub, limit_usd=100, concurrency=1, **PRICE)
        with pytest.raises(RunError, match=r"exceed 100 USD, 65\.00 are spent; 1 of 2 queries"):
            list(judge.answers([query("a"), query("b")]))
        stub.faults.append(Fault(500))  # which costs nothing
        assert ask(stub, [query("a")], limit_usd=100, **PRICE)["a"].text == "said a"


def test_judges_are_told_apart() -> None:
    def identity(url: str, model: str) -> str:
        return EndpointJudge(JudgeConfig(endpoint=url, model=model)).identity

    assert identity("http://a/v1", "x") == identity("http://a/v1/", "x")
    assert len({identity(u, m) for u in ("http://a/v1", "http://b/v1") for m in "xy"}) == 4


def test_a_proxy_does_not_lead_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with stub_judge(echo) as stub:
        assert ask(stub, [query("a")], retries=0)["a"].text == "said a"
        with pytest.raises(httpx.ConnectError):
            httpx.get(stub.url)
