"""The plainest benchmark: which of two answers is better."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpo.judging.shapes import Answer, Benchmark, Query, Question, Said
from simpo.run.judged import Figure


class Toy(Benchmark):
    """Which of two answers is better, asked in the plainest way."""

    def __init__(self, count: int) -> None:
        self.questions = [
            Question(str(i), ({"role": "user", "content": f"{i}?"},)) for i in range(count)
        ]
        self.baseline_name = "base"
        self.baseline = {q.id: Answer(q.id, (f"base {q.id}",)) for q in self.questions}

    def queries(self, answers: Mapping[str, Answer], both_orders: bool) -> list[Query]:
        found = []
        for question in self.questions:
            both = [answers[question.id].turns[0], self.baseline[question.id].turns[0]]
            for order in (0, 1) if both_orders else (0,):
                text = "\n".join(both[::-1] if order else both)
                messages = ({"role": "user", "content": text},)
                found.append(Query(question.id, 0, order, messages, 1, 0.0))
        return found

    def value(self, query: Query, said: Said) -> float | None:
        first = {"A": 1.0, "B": 0.0, "C": 0.5}.get(said.text)
        return 1 - first if query.order and first is not None else first

    def figures(self, *_: Any) -> tuple[dict[str, Figure], list[str]]:
        raise NotImplementedError

    def write(self, *_: Any) -> None:
        raise NotImplementedError

    def read_annotations(self, path: Path) -> Any:
        raise NotImplementedError


def shown(messages: Any) -> tuple[str, str]:
    first, second = messages[0]["content"].split("\n")
    return first, second
