"""A judge behind OpenAI's chat-completions interface, at a provider or on an own server.

The interface: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import heapq
import json
import os
import random
import re
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import httpx

from simpo.config.benchmarks import PATH, JudgeConfig
from simpo.config.errors import ConfigError, RunError, first_line
from simpo.judging.completions import count_in, first_logprobs_in, seconds_until, text_in
from simpo.judging.shapes import Query, Said, Unanswered
from simpo.judging.verdicts import KEPT, cost_usd
from simpo.on_policy.files import content_hash
from simpo.run.progress import say

PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Pause before a request is tried again: at first, and at most unless the server asks for more."""
TOKENS_PER_MESSAGE = 16
"""Bound for what a chat template adds to a message and to the prompt."""
LONGEST_SHOWN = 300
"""Letters of a server's message."""
FUTILE = {
    "CERTIFICATE_VERIFY_FAILED": "name the file of its certificate in SSL_CERT_FILE",
    "WRONG_VERSION_NUMBER": "the server speaks no TLS: write http://",
    "record layer failure": "the server speaks no TLS: write http://",
}
"""Faults of a connection, by OpenSSL's words, that another try does not mend; and what does."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SHORTEST_KEY = 8
"""Letters of a key that could be one: `EMPTY` and `x` are for servers that want none."""
OF_ONE_QUERY = (400, 413, 422)
"""Status codes by which a server refuses a query: it is too long, or a filter does not like it."""


@dataclass(frozen=True)
class _Again:
    """Why a request is to be tried again.

    Attributes:
        after_s: how long the server wants to be left alone; None if it does not say.
        malformed: the model answered, but without a text.
        paid: it may have been paid for.
    """

    reason: str
    after_s: float | None = None
    malformed: bool = False
    paid: bool = False


_Outcome = Said | Unanswered | _Again | Exception


@dataclass(order=True)
class _Try:
    """A query, how often it was tried, and when it may be tried again."""

    due: float
    query: Query = field(compare=False)
    tried: int = field(default=0, compare=False)


class EndpointJudge:
    """Asks a model behind an endpoint, several queries at a time.

    The key is read from the environment and appears in no file, message or `repr`.
    """

    def __init__(self, config: JudgeConfig) -> None:
        """
        Raises:
            ConfigError: the key cannot be sent, or nothing can: the environment names a proxy or
                certificates that cannot be used.
        """
        assert config.endpoint is not None and config.model is not None
        self.name = config.model
        self._url = config.endpoint.rstrip("/")
        self.identity = content_hash([self._url, self.name])
        self._config = config
        self._spent_usd = 0.0  # of all calls: the limit is that of a command
        self._secret = _secret(config.key_env)
        self._length_key = "max_tokens"
        self._client().close()

    def answers(self, queries: Sequence[Query]) -> Iterator[tuple[Query, Said | Unanswered]]:
        """Yield (query, said) as they come. A verdict that stays malformed is an empty text.

        This thread decides what is sent and when; others send a request each and wait for it.

        Raises:
            RunError: the server refuses, does not answer, or `judge.limit_usd` is reached. Answers
                to what was sent are yielded first.
        """
        sent: SimpleQueue[_Try | None] = SimpleQueue()
        done: SimpleQueue[tuple[_Try, _Outcome]] = SimpleQueue()
        threads = min(self._config.concurrency, len(queries))
        with self._client() as client:
            for _ in range(threads):
                # Daemons, so that a program which is interrupted need not wait for them.
                args = (client, sent, done)
                threading.Thread(target=self._send_all, args=args, daemon=True).start()
            try:
                yield from self._conduct(queries, sent, done)
            finally:
                for _ in range(threads):
                    sent.put(None)

    def _conduct(
        self,
        queries: Sequence[Query],
        sent: SimpleQueue[_Try | None],
        done: SimpleQueue[tuple[_Try, _Outcome]],
    ) -> Iterator[tuple[Query, Said | Unanswered]]:
        fresh, paused = deque(_Try(0.0, query) for query in queries), list[_Try]()
        in_flight, worst_usd = 0, 0.0
        fault: Exception | None = None
        while True:
            blocked = False
            while fault is None and (next_one := self._next(fresh, paused, in_flight)):
                worst = self._worst_usd(next_one.query)
                limit = self._config.limit_usd
                blocked = limit is not None and self._spent_usd + worst_usd + worst > limit
                if blocked:
                    if not in_flight:
                        left = len(fresh) + len(paused)
                        fault = self._over_limit(left, len(queries))
                    break
                (heapq.heappop(paused) if paused and paused[0] is next_one else fresh.popleft())
                in_flight, worst_usd = in_flight + 1, worst_usd + worst
                sent.put(next_one)
            if not in_flight and (fault or not (fresh or paused)):
                break
            waits = paused and not blocked and not fault
            try:
                tried, outcome = done.get(
                    timeout=max(0.0, paused[0].due - time.monotonic()) if waits else None
                )
            except Empty:
                continue
            worst = self._worst_usd(tried.query)
            in_flight, worst_usd = in_flight - 1, worst_usd - worst
            if isinstance(outcome, Said | Unanswered):
                if isinstance(outcome, Said):
                    self._spent_usd += self._paid_usd(outcome, worst)
                yield tried.query, outcome
            elif isinstance(outcome, Exception):
                fault = fault or outcome
            else:
                self._spent_usd += worst * outcome.paid
                if tried.tried < self._config.retries:
                    heapq.heappush(paused, self._later(tried, outcome))
                elif outcome.malformed:
                    yield tried.query, Said("")
                else:
                    fault = fault or self._gave_up(outcome)
        if fault:
            raise fault

    def _next(self, fresh: deque[_Try], paused: list[_Try], in_flight: int) -> _Try | None:
        """What to send now. A paused one keeps its place, so a busy server gets fewer requests."""
        if paused and paused[0].due <= time.monotonic():
            return paused[0]
        room = in_flight + len(paused) < self._config.concurrency
        return fresh[0] if fresh and room else None

    def _later(self, tried: _Try, outcome: _Again) -> _Try:
        jitter = random.Random().uniform  # not of the seeded generator
        if outcome.after_s is None:
            pause_s = min(LONGEST_PAUSE_S, PAUSE_S * 2 ** min(tried.tried, 10)) * jitter(0.5, 1.0)
        else:
            pause_s = outcome.after_s + jitter(0, PAUSE_S)
            if outcome.after_s > LONGEST_PAUSE_S:
                say(f"note   {self._url} wants to be asked again in {outcome.after_s:,.0f} s")
        return _Try(time.monotonic() + pause_s, tried.query, tried.tried + 1)

    def _worst_usd(self, query: Query) -> float:
        """Upper bound of the price of a request: no token is shorter than a byte."""
        letters = sum(len(m["content"].encode(errors="replace")) for m in query.messages)
        most = letters + TOKENS_PER_MESSAGE * (len(query.messages) + 1)
        return cost_usd(self._config, most, query.max_tokens) or 0.0

    def _paid_usd(self, said: Said, worst: float) -> float:
        if not said.input_tokens:  # the server does not count
            return worst
        return cost_usd(self._config, said.input_tokens, said.output_tokens) or 0.0

    def _over_limit(self, left: int, count: int) -> RunError:
        limit, spent = self._config.limit_usd, self._spent_usd
        return RunError(
            f"judge.limit_usd: the next request could exceed {limit:g} USD, {spent:.2f} are "
            f"spent; {left:,} of {count:,} queries are left ({KEPT}: raise it, and the same "
            "command goes on)"
        )

    def _gave_up(self, outcome: _Again) -> RunError:
        times = f"tried {self._config.retries + 1} times" if self._config.retries else "tried once"
        return RunError(
            f"judge.endpoint: {self._url}: {outcome.reason}, {times} ({KEPT}: the same command "
            "goes on)"
        )

    def _client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        address = urlsplit(self._url)
        # A proxy for the internet does not lead to this machine. Its certificates may be one's own.
        elsewhere = address.hostname not in LOOPBACK
        own_certificates = elsewhere or address.scheme == "https"
        limits = httpx.Limits(max_connections=self._config.concurrency)
        try:
            return httpx.Client(
                headers=headers,
                timeout=self._config.timeout_s,
                trust_env=elsewhere,
                limits=limits,
                verify=httpx.create_ssl_context(trust_env=own_certificates),
            )
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            raise ConfigError(
                [
                    f"judge.endpoint: nothing can be sent: {self._shown(first_line(error))} (mend "
                    "the variables of proxies and certificates in the environment)"
                ]
            ) from error

    def _send_all(
        self,
        client: httpx.Client,
        sent: SimpleQueue[_Try | None],
        done: SimpleQueue[tuple[_Try, _Outcome]],
    ) -> None:
        while one := sent.get():
            try:
                done.put((one, self._send(client, one.query)))
            except Exception as error:
                done.put((one, error))

    def _send(self, client: httpx.Client, query: Query) -> Said | Unanswered | _Again:
        """One request.

        Raises:
            RunError: the server refuses this and all others.
        """
        length_key = self._length_key
        body: dict[str, Any] = {
            "model": self.name,
            "messages": list(query.messages),
            length_key: query.max_tokens,
            "temperature": query.temperature,
        }
        if query.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": query.top_logprobs}
        try:
            # As ASCII: half a surrogate pair, which a file of answers may hold, is no UTF-8.
            response = client.post(
                f"{self._url}{PATH}",
                content=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
        except httpx.TimeoutException as error:
            unsent = isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout)
            waited = f"no answer within judge.timeout_s={self._config.timeout_s:g}"
            return _Again(waited, paid=not unsent)
        except httpx.RequestError as error:
            reason = self._shown(first_line(error))
            for fault, remedy in FUTILE.items():
                if fault in reason:
                    raise RunError(f"judge.endpoint: {self._url}: {reason} ({remedy})") from error
            return _Again(reason, paid=not isinstance(error, httpx.ConnectError))
        if response.status_code == 200:
            return self._read(query, response)
        message = self._message(response)
        if length_key == "max_tokens" and "max_completion_tokens" in message:
            self._length_key = "max_completion_tokens"  # newer models of OpenAI take only this
            return self._send(client, query)
        return self._refusal(query, response, message)

    def _read(self, query: Query, response: httpx.Response) -> Said | _Again:
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, Mapping) or not isinstance(answer.get("choices"), list):
            # An error with the status of success, or the page of a proxy: no model has answered.
            told = self._shown(self._message(response)) or "an empty body"
            return _Again(f"it answers with no chat completion, but {told}", paid=True)
        malformed = _Again("an answer without a text", malformed=True, paid=True)
        try:
            choice = answer["choices"][0]
            text, ended = text_in(choice["message"]["content"]), choice.get("finish_reason")
            logprobs = first_logprobs_in(choice) if query.top_logprobs else {}
        except (ValueError, LookupError, TypeError, AttributeError):
            return malformed
        tokens = [count_in(answer.get("usage"), f"{of}_tokens") for of in ("prompt", "completion")]
        if text is None or (query.top_logprobs and not text):
            # It would end for the same reason again: all tokens went into thoughts, or a filter.
            return malformed if ended in (None, "stop") else Said("", {}, *tokens)
        if query.top_logprobs and not logprobs:
            raise self._no_logprobs("the answer has none")
        if len(self._secret) >= SHORTEST_KEY:
            text = text.replace(self._secret, "***")
        return Said(text, logprobs, *tokens)

    def _refusal(self, query: Query, response: httpx.Response, message: str) -> Unanswered | _Again:
        """
        Raises:
            RunError: neither trying again nor another query would help.
        """
        status, shown = response.status_code, self._shown(message)
        told = f"{status} {response.reason_phrase}".strip() + (f": {shown}" if shown else "")
        if status in (408, 409, 429) or status >= 500:
            return _Again(told, seconds_until(response.headers.get("Retry-After")))
        if status in (401, 403):
            raise self._no_entry(told)
        if query.top_logprobs and "logprob" in message.lower():
            raise self._no_logprobs(told)
        if response.has_redirect_location:
            place = self._shown(response.headers["Location"])
            raise RunError(
                f"judge.endpoint: {self._url} leads elsewhere: {told}, to {place} (name that base "
                f"URL; {KEPT})"
            )
        refused = f"judge.endpoint: {self._url} refuses {self.name}: {told}"
        if status in OF_ONE_QUERY:
            return Unanswered(refused)
        raise RunError(f"{refused} ({KEPT})")

    def _no_entry(self, told: str) -> RunError:
        variable = self._config.key_env
        if self._secret:
            return RunError(f"judge.key_env: {self._url} refuses the key in {variable}: {told}")
        return RunError(
            f"judge.key_env: {self._url} wants a key, but {variable} is not set: {told} (set it, "
            "or name another variable)"
        )

    def _no_logprobs(self, told: str) -> RunError:
        return RunError(
            f"judge.endpoint: {self.name} at {self._url} gives no log-probs, from which this "
            f"benchmark reads verdicts: {told} (choose another judge.model or server)"
        )

    def _message(self, response: httpx.Response) -> str:
        """What a server says about a refusal."""
        try:
            found = response.json()
        except (ValueError, RecursionError):
            found = response.text
        for key in ("error", "message", "detail"):
            if isinstance(found, Mapping) and found.get(key):
                found = found[key]
        return str(found) if found else ""

    def _shown(self, text: str) -> str:
        """A server's text in one line, without the key."""
        if len(self._secret) >= SHORTEST_KEY:
            text = text.replace(self._secret, "***")
        elif self._secret:  # only where it stands alone: it may be a part of any word
            text = re.sub(rf"(?<!\w){re.escape(self._secret)}(?!\w)", "***", text)
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        return textwrap.shorten(text, LONGEST_SHOWN, placeholder=" ...")


def _secret(variable: str) -> str:
    """The key in an environment variable; empty if there is none.

    Raises:
        ConfigError: it cannot be sent.
    """
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(
            [f"judge.key_env: the key in {variable} holds letters that no key has (set it anew)"]
        )
    return key
