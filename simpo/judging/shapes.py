"""What passes between benchmarks and judges.

A benchmark has questions and a baseline's answers. It makes queries of them, a judge says something
to each, and the benchmark reads a value out of that.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Protocol, runtime_checkable

from simpo.config.errors import ConfigError
from simpo.data.pairs import Message
from simpo.data.reading.messages import all_text
from simpo.run.judged import Figure

PROGRAMS = "programs"
"""What stands for the name of a judge where programs check the answers."""


@dataclass(frozen=True)
class Question:
    """A question of one or several turns.

    Attributes:
        id: the benchmark's own, as text.
        prompt: messages of the first turn, which end with the user's.
        follow_ups: the user's later turns.
        category: the benchmark's own; may be empty.
        references: a reference answer of each turn; empty without.
        temperature: of the answers, where the question has its own.
        rule: what `simpo.data.rules` checks, if the question has a rule.
        record: the benchmark's own record, for its files.
        tools: JSON schemas of the tools that the model may call; None without tools.
    """

    id: str
    prompt: tuple[Message, ...]
    follow_ups: tuple[str, ...] = ()
    category: str = ""
    references: tuple[str, ...] = ()
    temperature: float | None = None
    rule: Mapping[str, Any] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] | None = None

    @property
    def num_turns(self) -> int:
        return 1 + len(self.follow_ups)


@dataclass(frozen=True)
class Answer:
    """The answer to a question: a text of each turn.

    Attributes:
        tokens: of all turns; 0 if not known.
        ended: False if a turn was cut off.
    """

    question: str
    turns: tuple[str, ...]
    tokens: int = 0
    ended: bool = True


@dataclass(frozen=True)
class Query:
    """What a judge is asked.

    Attributes:
        question, turn: what it is about; `turn` counts from 0.
        order: 0 if the model's answer is shown first, 1 if the baseline's; 0 where one answer is
            rated alone.
        repeat: 0, or 1 for a query asked a second time to measure the judge's agreement.
        top_logprobs: how many likeliest first tokens are wanted with their log-probs; 0: none.
    """

    question: str
    turn: int
    order: int
    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float
    top_logprobs: int = 0
    repeat: int = 0


@dataclass(frozen=True)
class Said:
    """What a judge said to a query.

    Attributes:
        first_logprobs: log-probs of the likeliest first tokens, by token; empty if not known.
        input_tokens, output_tokens: as the server counts them; 0 if it does not.
    """

    text: str
    first_logprobs: Mapping[str, float] = field(default_factory=dict)
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class Unanswered:
    """A judge cannot answer a query: it is too long, or refused. That is free and not kept, so
    another command asks again.

    Attributes:
        reason: with the setting that names the judge, for messages.
    """

    reason: str


@dataclass(frozen=True)
class Judgement:
    """A query with what was said and what it means.

    Attributes:
        value: the preference for the model from 0 to 1 (0.5 a draw), or points where the benchmark
            rates; None if what was said cannot be read.
    """

    query: Query
    said: Said
    value: float | None


class JudgedAnswers(NamedTuple):
    """The answers of a model, and what a judge found about them.

    Attributes:
        model, judge: names.
        answers: by question id.
        judgements: empty if programs check the answers.
    """

    model: str
    judge: str
    answers: Mapping[str, Answer]
    judgements: Sequence[Judgement]


def by_question(judgements: Iterable[Judgement]) -> dict[str, float]:
    """The mean value of each question over orders, turns and repeats; unreadable ones left out.

    Each order counts the same, however often it was repeated.
    """
    values: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for judgement in judgements:
        if judgement.value is not None:
            query = judgement.query
            values[query.question][query.turn, query.order].append(judgement.value)
    return {
        question: fmean(fmean(same) for same in orders.values())
        for question, orders in values.items()
    }


def orders_of(question: str, both: bool, seed: int) -> tuple[int, ...]:
    """The orders in which a judge sees the answers to a question: both, or one drawn by `seed`."""
    return (0, 1) if both else (random.Random(f"{seed} {question}").randrange(2),)


def request_text(turns: Sequence[Message]) -> str:
    """Messages as a judge reads them: the text of the only one, or all with their roles."""
    if len(turns) == 1:
        return all_text(turns[0])
    return "\n\n".join(f"[{turn['role']}]\n{all_text(turn)}" for turn in turns)


class Judge(Protocol):
    """Answers queries; `simpo.judging.judges` opens one."""

    name: str
    """What to call it in files and tables."""
    identity: str
    """Hash of all that decides what it says to a query, such as model, revision and code."""

    def answers(self, queries: Sequence[Query]) -> Iterator[tuple[Query, Said | Unanswered]]:
        """Yield (query, said) as they come, in any order; each query once.

        Raises:
            RunError: it cannot go on; what was yielded stays.
        """


@runtime_checkable
class Reward(Protocol):
    """Scores answers instead of comparing them; higher is better."""

    name: str
    identity: str

    def score(self, question: Question, texts: Sequence[str]) -> list[float]:
        """A finite score of each text as an answer to the question's first turn."""


class Benchmark(ABC):
    """Questions, and how answers to them are judged. One class a kind, in its own module.

    Attributes:
        questions: all that are asked, in the benchmark's order.
        baseline_name: what the answers are compared with; empty if they are rated alone.
        baseline: its answers by question id; empty likewise.
        even: the value of a question that is neither won nor lost; None for the mean of all.
    """

    questions: Sequence[Question]
    baseline_name: str = ""
    baseline: Mapping[str, Answer] = {}
    even: float | None = 0.5

    @abstractmethod
    def queries(self, answers: Mapping[str, Answer], both_orders: bool) -> list[Query]:
        """What a judge is asked about the answers of a model, by question id.

        Empty if programs check the answers and no judge is needed.
        """

    @abstractmethod
    def value(self, query: Query, said: Said) -> float | None:
        """What was said, as `Judgement.value`; None if it cannot be read."""

    def by_question(
        self, judgements: Sequence[Judgement], answers: Mapping[str, Answer]
    ) -> dict[str, float]:
        """The value of each question: of its judgements, or where programs check the answers 1.0
        if they pass and 0.0 if not."""
        return by_question(judgements)

    @abstractmethod
    def figures(
        self, judgements: Sequence[Judgement], answers: Mapping[str, Answer]
    ) -> tuple[dict[str, Figure], list[str]]:
        """The benchmark's figures, the first being the main one, and notes about them."""

    @abstractmethod
    def write(self, folder: Path, judged: JudgedAnswers) -> None:
        """Write the answers and judgements as the benchmark's own scripts read them."""

    def read_answers(self, path: Path) -> tuple[str, dict[str, Answer]]:
        """Read the benchmark's own file of answers: the model's name, and its answers by question
        id. Answers to other questions are left out.

        Raises:
            ConfigError: the benchmark has no such files.
            DataError: the file is not of that format.
        """
        raise ConfigError(
            [f"RUN: {path} is a file, and models answer this benchmark (give the folder of one)"]
        )

    @abstractmethod
    def read_annotations(self, path: Path) -> JudgedAnswers:
        """Read the benchmark's own file of judgements, whose queries have no messages, and of the
        answers those that are known.

        Raises:
            DataError: the file is not of that format.
        """
