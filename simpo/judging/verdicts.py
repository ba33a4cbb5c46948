"""Asks judges and rewards, and keeps what they say, so that nothing is asked or paid twice.

A judge has one file in `judge.folder`, which runs and processes share. A verdict is a line of it,
appended as soon as it is there, under a hash of all that decides it.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from simpo.config.benchmarks import JudgeConfig
from simpo.config.errors import DamagedError, RunError, unwritable
from simpo.config.schema import RunConfig
from simpo.judging.shapes import Judge, Query, Question, Reward, Said, Unanswered
from simpo.on_policy.files import content_hash
from simpo.run.progress import bar, say

FOLDER = "verdicts"
BYTES_PER_TOKEN = 4
"""Of English text, for estimates."""
ENOUGH = 50
"""Verdicts of which none can be read, or queries of which none is answered, before judging ends."""
KEPT = "verdicts so far are kept"


def verdicts_folder(run: RunConfig) -> Path:
    """The folder of all verdicts, which may not exist yet."""
    if run.judge.folder is not None:
        return Path(run.judge.folder).expanduser().absolute()
    return (Path(run.output_dir).expanduser() / FOLDER).absolute()


def repeats(run: RunConfig, queries: Sequence[Query]) -> list[Query]:
    """The queries about `judge.repeated_prompts` seeded questions once more, as `repeat` 1."""
    questions = list(dict.fromkeys(query.question for query in queries))
    count = min(run.judge.repeated_prompts, len(questions))
    chosen = set(random.Random(run.benchmark.seed).sample(questions, count))
    return [replace(query, repeat=1) for query in queries if query.question in chosen]


def said_to(
    run: RunConfig,
    judge: Judge,
    queries: Sequence[Query],
    is_readable: Callable[[Query, Said], bool] = lambda query, said: True,
) -> list[tuple[Query, Said]]:
    """What a judge says to queries, in their order; what it has said already is not asked again.

    `judge.temperature` and `judge.max_tokens`, where they are set, replace those of the queries. To
    a query that the judge cannot answer it says an empty text, and a line says how many those are.

    Args:
        is_readable: whether what was said is a verdict.

    Raises:
        RunError: the judge cannot go on, answers no query, or gives no verdict that can be read; or
            the verdicts cannot be written. What was said until then is kept.
        DamagedError: the file of verdicts is damaged.
    """
    asked = [_as_asked(run.judge, query) for query in queries]
    keys = [_key(query) for query in asked]
    kept = Kept(verdicts_folder(run), judge)
    missing = {k: q for k, q in zip(keys, asked, strict=True) if k not in kept.values}
    known = {k: q for k, q in zip(keys, asked, strict=True) if k in kept.values}
    count = sum(key in known for key in keys)
    say(_cost_line(run.judge, judge.name, len(queries), count, list(missing.values())))
    unanswered: dict[str, str] = {}
    if missing:
        kept.refuse_unwritable()
        any_readable = any(is_readable(q, kept.values[k]) for k, q in known.items())
        with bar("verdicts", len(missing), stays=True, in_batches=True) as shown:
            shown.begin_at(0)
            for query, said in judge.answers(list(missing.values())):
                key = _key(query)
                if isinstance(said, Unanswered):
                    unanswered[key] = said.reason
                    if not known and len(unanswered) in (ENOUGH, len(missing)):
                        raise RunError(f"{next(iter(unanswered.values()))} ({KEPT})")
                else:
                    about = {name: getattr(query, name) for name in ABOUT}
                    kept.add(key, {**about, "said": asdict(said)})
                    known[key] = query
                    any_readable = any_readable or is_readable(query, said)
                    if not any_readable and len(known) >= ENOUGH:
                        first = next(iter(known))
                        raise unreadable(judge.name, len(known), kept.values[first])
                shown.advance()
    _tell_unanswered(list(unanswered.values()), len(queries))
    return [
        (query, kept.values.get(key, Said(""))) for query, key in zip(queries, keys, strict=True)
    ]


def _tell_unanswered(reasons: Sequence[str], count: int) -> None:
    """Say how often each reason is given; those that differ only in numbers are the same."""
    alike: dict[str, list[str]] = {}
    for reason in reasons:
        alike.setdefault(re.sub(r"\d+", "0", reason), []).append(reason)
    for same in alike.values():
        say(
            f"note   {len(same):,} of {count:,} queries count as malformed verdicts, and are asked "
            f"again by the next command: {same[0]}"
        )


def unreadable(name: str, count: int, first: Said) -> RunError:
    """The error for a judge none of whose verdicts can be read."""
    return RunError(
        f"judge: none of {count} verdicts of {name} can be read; the first is "
        f"{first.text[:80]!r} (choose another judge, or a larger judge.max_tokens)"
    )


ABOUT = ("question", "turn", "order", "repeat")
"""What a line says about the query, for readers."""


def _as_asked(config: JudgeConfig, query: Query) -> Query:
    return replace(
        query,
        temperature=query.temperature if config.temperature is None else config.temperature,
        max_tokens=config.max_tokens or query.max_tokens,
    )


def _key(query: Query) -> str:
    """Hash of what decides a verdict, apart from the judge."""
    sampling = [query.max_tokens, query.temperature, query.top_logprobs]
    return content_hash([query.messages, sampling, query.order, query.repeat])


def _cost_line(
    config: JudgeConfig, name: str, count: int, known: int, missing: Sequence[Query]
) -> str:
    line = f"judge  {name}: {count:,} queries, {known:,} of them answered before"
    if not missing:
        return line
    texts = [message["content"] for query in missing for message in query.messages]
    input_tokens = sum(len(text.encode(errors="replace")) for text in texts) // BYTES_PER_TOKEN
    output_tokens = sum(query.max_tokens for query in missing)
    line += (
        f"; {len(missing):,} are asked: about {input_tokens:,} tokens in, at most "
        f"{output_tokens:,} out"
    )
    usd = cost_usd(config, input_tokens, output_tokens)
    return line if usd is None else f"{line}, about {usd:,.2f} USD if every verdict is that long"


def cost_usd(config: JudgeConfig, input_tokens: int, output_tokens: int) -> float | None:
    """Price of tokens at the endpoint; None if a price is not set, or another judge is."""
    prices = config.usd_per_million_input_tokens, config.usd_per_million_output_tokens
    if config.endpoint is None or prices[0] is None or prices[1] is None:
        return None
    return (input_tokens * prices[0] + output_tokens * prices[1]) / 1e6


def scored(run: RunConfig, reward: Reward, items: Sequence[tuple[Question, str]]) -> list[float]:
    """Scores of answers to the first turn of questions, in their order; known ones are reused.

    Raises:
        ConfigError: the reward cannot be loaded.
        RunError: it failed on a question, or the scores cannot be written; scores so far are kept.
        DamagedError: the file of scores is damaged.
    """
    keys = [content_hash([q.prompt, q.rule, text]) for q, text in items]
    kept = Kept(verdicts_folder(run), reward)
    missing = {k: item for k, item in zip(keys, items, strict=True) if k not in kept.values}
    with bar("scores of answers", len(missing)) as shown:
        for key, (question, text) in missing.items():
            (score,) = reward.score(question, [text])
            kept.add(key, {"question": question.id, "score": score})
            shown.advance()
    return [kept.values[key] for key in keys]


class Kept:
    """The verdicts of a judge, or the scores of a reward, in a file that several processes share.

    Writers lock the file. A line without an end, of a killed writer, counts for nothing, and the
    next writer removes it.

    Attributes:
        values: `Said`, or a score, by key. What another process has added since is learnt at the
            next `add`.
    """

    def __init__(self, folder: Path, judge: Judge | Reward) -> None:
        """
        Raises:
            RunError: the folder cannot be made, or the file not be read.
            DamagedError: a line is not a verdict.
        """
        name = re.sub(r"[^\w.-]+", "_", judge.name)[:100]
        self.path = folder / f"{name}-{judge.identity}.jsonl"
        self.values: dict[str, Any] = {}
        self._lines = self._bytes = 0  # read so far
        self._noted = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._learn(self.path.read_bytes() if self.path.exists() else b"")
        except OSError as error:
            raise unwritable(self.path, error) from error

    def refuse_unwritable(self) -> None:
        """Make the file, if it is not there.

        Raises:
            RunError: it cannot be written.
        """
        try:
            self.path.open("ab").close()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def add(self, key: str, line: Mapping[str, Any]) -> None:
        """Keep a verdict, unless another process has kept one meanwhile: then that one counts.

        Raises:
            RunError: it cannot be written.
            DamagedError: what another process has written is damaged.
        """
        try:
            with self.path.open("a+b") as file:
                self._lock(file)
                if file.seek(0, os.SEEK_END) < self._bytes:  # somebody has removed lines, or all
                    self._lines = self._bytes = 0
                file.seek(self._bytes)
                self._learn(file.read())
                if key in self.values:
                    return
                file.truncate(self._bytes)  # drops a line without an end
                text = json.dumps({"key": key, **line}) + "\n"
                file.write(text.encode())
                file.flush()  # where the disk is full, all that fits is written
                self._learn(text.encode())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _lock(self, file: Any) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # the file system has no locks
            if not self._noted:
                say(
                    f"note   {self.path} cannot be locked, so let only one process judge at a "
                    f"time: {error.strerror}"
                )
            self._noted = True

    def _learn(self, new: bytes) -> None:
        whole = new[: new.rfind(b"\n") + 1]
        for text in whole.splitlines():
            self._lines += 1
            key, value = _read(text)
            if value is None:
                raise DamagedError(
                    self.path, f"line {self._lines} is not a verdict", "remove that line"
                )
            self.values.setdefault(key, value)
        self._bytes += len(whole)


def _read(text: bytes) -> tuple[str, Said | float | None]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    match line:
        case {
            "key": str(key),
            "said": {
                "text": str(),
                "first_logprobs": {},
                "input_tokens": int(),
                "output_tokens": int(),
            } as said,
        } if len(said) == 4:
            return key, Said(**said)
        case {"key": str(key), "score": float(score)}:
            return key, score
    return "", None
