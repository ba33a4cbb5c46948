"""The settings of a benchmark, and of the judge that compares answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from simpo.config.choices import BenchmarkKind
from simpo.config.ranges import above_zero, at_least

KINDS = "endpoint, local, reward or annotations"
PATH = "/chat/completions"
"""Of a server with OpenAI's interface, below its base URL."""


FIGURES = (
    *("win_rate", "lc_win_rate", "style_win_rate", "equal_style_win_rate"),
    *("pass_rate", "pass_rate_loose", "score", "score_turn_1", "score_turn_2"),
)
"""Figures of benchmarks that `monitor.metric` may name; known at the end of a run only."""


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Questions that a trained model answers, and what its answers are compared with."""

    name: str = "none"
    """The choice of conf/benchmark; none: the model is not judged."""
    kind: BenchmarkKind = BenchmarkKind.none
    """Whose files, prompts and figures; set by the choice."""
    path: str | None = None
    """Folder with its own files, such as a clone of its repository; for alpaca_eval and arena_hard
    also its data set on the hub, `owner/name` or `hf://datasets/owner/name@revision`. null: the
    files of its Python package, if it has one."""
    baseline: str | None = None
    """What the answers are compared with: a name in the benchmark's files, a file of answers, the
    folder of a run, or for pairs `chosen` (responses of the data) and `base` (the model before
    training). null: the benchmark's own."""
    temperature: float | None = None
    """Sampling temperature of the answers, 0: greedy. null: that of the benchmark, or of the paper
    for the model."""
    top_p: float = 1.0
    """Nucleus sampling: tokens come from the likeliest ones that sum to this probability."""
    max_new_tokens: int = 4096
    """Longest answer of a turn."""
    seed: int = 0
    """Seed of the answers, and of the order in which a judge sees them."""
    num_prompts: int | None = None
    """Number of questions, from the start; null: all."""
    difficulty: str | None = None
    """alpaca_eval: its instruction_difficulty.csv, for the exact length-controlled win rate."""
    gamed: str | None = None
    """alpaca_eval: its df_gamed.csv, likewise."""

    def problems(self) -> Iterator[str]:
        for key in ("path", "baseline", "difficulty", "gamed"):
            if getattr(self, key) == "":
                yield f"{key}: must not be empty (null is none)"
        for key in ("difficulty", "gamed"):
            path = getattr(self, key)
            if path and not os.path.isfile(os.path.expanduser(path)):
                yield f"{key}: no such file, got {path}"
        yield from at_least(self, 0, "temperature", zero="greedy")
        if not 0 < self.top_p <= 1:
            yield f"top_p: must be above 0 and at most 1, got {self.top_p}"
        yield from at_least(self, 1, "max_new_tokens", "num_prompts")
        yield from at_least(self, 0, "seed")


@dataclass(kw_only=True)
class JudgeConfig:
    """What says which of two answers is better: one of `endpoint`, `local`, `reward`,
    `annotations`. null everywhere: `reward: rules` if the questions have rules."""

    endpoint: str | None = None
    """Base URL of a server with OpenAI's interface, such as http://localhost:8000/v1."""
    model: str | None = None
    """Name of the model there."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key of the endpoint. The key is never written or shown."""
    local: str | None = None
    """A model that judges on this machine: a folder, a run or a hub id. `on_policy.engine` says
    with which library."""
    reward: str | None = None
    """A score instead of a judgement: a reward model, `module:function` or `rules`, as
    `on_policy.reward`. The better score wins."""
    annotations: str | None = None
    """Judgements that exist: the benchmark's own file of them. Nothing is asked."""
    folder: str | None = None
    """Folder of all verdicts, shared by runs. null: <output_dir>/verdicts."""
    both_orders: bool = True
    """Ask about each pair of answers twice, in both orders. False: once, in a seeded order."""
    repeated_prompts: int = 20
    """Questions asked a second time, to measure how often the judge agrees with itself."""
    temperature: float | None = None
    """Of the judge's own sampling; null: the benchmark's."""
    max_tokens: int | None = None
    """Longest verdict; null: the benchmark's."""
    concurrency: int = 8
    """Requests at a time."""
    retries: int = 6
    """How often a request is tried again after an error of the server or the network."""
    timeout_s: float = 120.0
    """Longest wait for an answer to a request."""
    usd_per_million_input_tokens: float | None = None
    """Price of the endpoint's prompts; null: not known."""
    usd_per_million_output_tokens: float | None = None
    """Price of the endpoint's answers; null: not known."""
    limit_usd: float | None = None
    """No request is sent that could exceed this sum; verdicts so far are kept. null: no limit."""

    def problems(self) -> Iterator[str]:
        given = [key for key in ("endpoint", "local", "reward", "annotations") if self.asks(key)]
        if len(given) > 1:
            yield f"{given[1]}: must not be set beside judge.{given[0]} (one of {KINDS})"
        for key in ("endpoint", "model", "local", "reward", "annotations", "folder", "key_env"):
            if getattr(self, key) == "":
                yield f"{key}: must not be empty"
        if self.endpoint:
            yield from _endpoint_problems(self.endpoint)
            if self.model is None:
                yield "model: required with judge.endpoint, but not given"
        elif self.model is not None:
            yield f"model: needs judge.endpoint, got {self.model} (judge.local is a model here)"
        if self.annotations and not os.path.exists(os.path.expanduser(self.annotations)):
            yield f"annotations: no such file, got {self.annotations}"
        prices = [f"usd_per_million_{way}_tokens" for way in ("input", "output")]
        yield from at_least(self, 0, "repeated_prompts", "retries", "temperature")
        yield from at_least(self, 0, *prices, "limit_usd")
        yield from at_least(self, 1, "concurrency", "max_tokens")
        yield from above_zero(self, "timeout_s")
        if self.limit_usd is not None and None in [getattr(self, key) for key in prices]:
            yield f"limit_usd: needs the prices judge.{prices[0]} and judge.{prices[1]}"

    def asks(self, key: str) -> bool:
        """Whether a kind of judge is set."""
        return getattr(self, key) is not None


def _endpoint_problems(url: str) -> Iterator[str]:
    try:
        address = urlsplit(url)
        known = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # no port, or half an IPv6 address
        known = False
    if not known:
        yield f"endpoint: must be http(s)://HOST[:PORT]/PATH, got {url}"
    elif address.username or address.password:
        yield "endpoint: must hold no key (put it into the variable judge.key_env names)"
    elif address.query or address.fragment:
        yield "endpoint: must end with its path, without ? and # (a key belongs into judge.key_env)"
    elif address.path.rstrip("/").endswith(PATH):
        yield f"endpoint: must be the base URL, got {url} (leave out {PATH})"
