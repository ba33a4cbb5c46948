"""A judge on loopback with OpenAI's interface, whose verdicts a function gives, and its faults."""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Message = Mapping[str, str]
Text = str | tuple[str, Mapping[str, float]]
"""What is said, or that and the log-probs of the likeliest first tokens."""
Decide = Callable[[Sequence[Message]], Text]


@dataclass(frozen=True)
class Fault:
    """What the server does instead of answering one request.

    Attributes:
        body: sent as it is.
        wait_s: time until it is sent.
    """

    status: int = 500
    body: str = '{"error": {"message": "overloaded"}}'
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_s: float = 0.0


@dataclass
class StubJudge:
    """A running server.

    Attributes:
        url: base URL, for `judge.endpoint`.
        decide: says what is answered to messages.
        faults: what happens to the next requests; answered without fault once it is empty.
        key: requests without it are refused with 401; None: all are answered.
        gives_logprobs: requests for log-probs are refused with 400 otherwise.
        wait_s: time until a request is answered.
        asked: bodies of all requests that were answered without fault, in order of arrival.
        seen: bodies of all requests.
        keys: Authorization headers of all requests.
        most_at_once: largest number of requests in work at the same time.
    """

    url: str
    decide: Decide
    faults: deque[Fault] = field(default_factory=deque)
    key: str | None = None
    gives_logprobs: bool = True
    wait_s: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, body: dict[str, Any], key: str | None) -> Fault:
        """The answer to a request."""
        with self._lock:
            self.seen.append(body)
            self.keys.append(key)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            fault = self.faults.popleft() if self.faults else None
        try:
            time.sleep(fault.wait_s if fault else self.wait_s)
            if fault:
                return fault
            if self.key is not None and key != f"Bearer {self.key}":
                return _refused(401, f"Incorrect API key provided: {key}")
            if body.get("logprobs") and not self.gives_logprobs:
                return _refused(400, "logprobs are not supported by this model")
            with self._lock:
                self.asked.append(body)
            return Fault(200, json.dumps(completion(body, self.decide(body["messages"]))))
        finally:
            with self._lock:
                self._at_once -= 1


def _refused(status: int, message: str) -> Fault:
    return Fault(status, json.dumps({"error": {"message": message, "type": "invalid_request"}}))


def completion(body: Mapping[str, Any], said: Text) -> dict[str, Any]:
    """A chat completion as OpenAI's servers send it; a token has four letters."""
    text, logprobs = (said, {}) if isinstance(said, str) else said
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": None,
    }
    if body.get("logprobs"):
        top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
        first = {"token": text, "logprob": max(logprobs.values(), default=0.0)}
        choice["logprobs"] = {"content": [first | {"top_logprobs": top[: body["top_logprobs"]]}]}
    letters = sum(len(message["content"]) for message in body["messages"])
    usage = {"prompt_tokens": -(-letters // 4), "completion_tokens": -(-len(text) // 4)}
    return {"object": "chat.completion", "model": "x", "choices": [choice], "usage": usage}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    judge: StubJudge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("/v1/chat/completions"):
            answer = _refused(404, f"no such path {self.path}")
        else:
            answer = self.judge.reply(body, self.headers.get("Authorization"))
        content = answer.body.encode()
        try:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # whoever asked is gone
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def stub_judge(
    decide: Decide, faults: Iterable[Fault] = (), certificate: Path | None = None, **more: Any
) -> Iterator[StubJudge]:
    """Serve a judge on loopback within the block.

    Args:
        decide: maps the messages of a request to what is said.
        faults: what happens to the first requests instead.
        certificate: a file with a certificate and its key, for https.
        more: other attributes of `StubJudge`.
    """

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"http{'s' * bool(certificate)}://127.0.0.1:{server.server_port}/v1"
    judge = Handler.judge = StubJudge(url, decide, deque(faults), **more)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def chance(*parts: str) -> float:
    """A number from 0 to 1, the same for the same texts."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def longer(first: str, second: str) -> float:
    """Preference for the first answer of a judge who likes length: 1, 0, or 0.5 if equal."""
    return (float(len(first) > len(second)) + float(len(first) >= len(second))) / 2


def biased(
    shown: Callable[[Sequence[Message]], tuple[str, str]],
    says: Callable[[float], Text],
    for_first: float = 0.0,
    better: Callable[[str, str], float] = longer,
) -> Decide:
    """A judge with known biases.

    Of the pairs of answers it prefers the one shown first in a share `for_first`, drawn by a hash
    of the two answers, so these are the same pairs in both orders. In the others it prefers what is
    better.

    Args:
        shown: the two answers in the messages of a request, in the order in which they are shown.
        says: what is said for a preference for the first answer, 0 to 1.
        better: preference for the first of two answers, 0 to 1.
    """

    def decide(messages: Sequence[Message]) -> Text:
        answers = shown(messages)
        blind = chance(*sorted(answers)) < for_first
        return says(1.0 if blind else better(*answers))

    return decide
