"""The held-out prompts of a run's own data, answered better or worse than something else.

The prompt to the judge is our own. Its verdict is the last of [[A]], [[B]] and [[C]] (a tie).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simpo.config.errors import ConfigError, DataError
from simpo.config.schema import RunConfig
from simpo.data.mixture import load_held_out
from simpo.data.pairs import Pair
from simpo.data.reading.for_loss import reader_of
from simpo.data.reading.records import to_prompt
from simpo.data.rules import obeys
from simpo.judging.jsonl import ONE_LINE, read_jsonl, write_jsonl
from simpo.judging.shapes import (
    Answer,
    Benchmark,
    JudgedAnswers,
    Judgement,
    Query,
    Question,
    Said,
    by_question,
    orders_of,
    request_text,
)
from simpo.judging.win_rates import mean_figure
from simpo.on_policy.files import prompt_id
from simpo.run.judged import Figure

CHOSEN, BASE = "chosen", "base"
"""Baselines that a run has by itself: the responses of the data, the model before training."""
JUDGEMENTS = "judgements.jsonl"
MAX_TOKENS = 1024
LABEL = re.compile(r"\[\[([ABC])\]\]")
SAID = {"text": str, "first_logprobs": dict, "input_tokens": int, "output_tokens": int}
"""Types of what a judge said in a line of judgements.jsonl; all but the text may lack."""
VALUES = {"A": 1.0, "B": 0.0, "C": 0.5}
"""Preference for the answer shown first."""
SYSTEM = """You compare two answers to the same request. Decide which of them serves the person \
who asked better: does it do what was asked, is it right, is it clear? Neither the order in which \
the answers are shown nor their length counts for or against them. Give your reasons in a few \
sentences. Then write your verdict as the last line, and nothing behind it: [[A]] if answer A is \
better, [[B]] if answer B is better, [[C]] if they are equally good."""
USER = """The request:

{request}

Answer A:

{first}

Answer B:

{second}"""


def open_pairs(run: RunConfig) -> Pairs:
    """The held-out prompts of a run's data, each once.

    Raises:
        ConfigError: no pair is held out.
        DataError: the data cannot be read.
    """
    baseline = _named(run.benchmark.baseline or CHOSEN)
    is_chosen = baseline == CHOSEN
    # Against another baseline no response of the data is looked at.
    read = reader_of(run.loss) if is_chosen else to_prompt
    found: dict[str, Pair] = {}
    for pair in load_held_out(run.data, read, Path(run.cache_dir).expanduser()):
        if pair.chosen or not is_chosen:  # an undesirable reply alone is no answer to compare with
            found.setdefault(prompt_id(pair), pair)
    kept = dict(list(found.items())[: run.benchmark.num_prompts])
    if not kept:
        raise ConfigError(
            [
                "benchmark: pairs needs held-out pairs, but the data has none (set test_path or "
                "test_split of a source)"
            ]
        )
    return Pairs(kept, baseline, run.benchmark.seed)


def _named(baseline: str) -> str:
    """A folder by its whole path: however it was written, runs compared with it are comparable."""
    folder = Path(baseline).expanduser()
    is_word = baseline in (CHOSEN, BASE)
    return str(folder.resolve()) if folder.is_dir() and not is_word else baseline


class Pairs(Benchmark):
    """Held-out prompts.

    Without `chosen` as baseline its answers are not known yet: `baseline` is set when they are
    drawn.
    """

    def __init__(self, pairs: Mapping[str, Pair], baseline: str, seed: int) -> None:
        self.questions = [
            Question(key, pair.prompt, rule=pair.rule, tools=pair.tools)
            for key, pair in pairs.items()
        ]
        self._seed = seed
        self.baseline_name = baseline
        self.baseline = {}
        # Neither judges nor rules see calls of tools, and an answer is one text.
        self._not_texts = 0
        if baseline == CHOSEN:
            self._not_texts = sum(
                len(pair.chosen) > 1 or "tool_calls" in pair.chosen[0] for pair in pairs.values()
            )
            self.baseline = {
                key: Answer(key, (str(pair.chosen[0]["content"] or ""),))
                for key, pair in pairs.items()
            }
        self._by_id = {question.id: question for question in self.questions}

    def queries(self, answers: Mapping[str, Answer], both_orders: bool) -> list[Query]:
        """A query about each question, or one in each order; else in a seeded order."""
        asked = []
        for question in self.questions:
            own, other = (side[question.id].turns[0] for side in (answers, self.baseline))
            for order in orders_of(question.id, both_orders, self._seed):
                first, second = (other, own) if order else (own, other)
                text = USER.format(
                    request=request_text(question.prompt), first=first, second=second
                )
                messages = (
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": text},
                )
                asked.append(Query(question.id, 0, order, messages, MAX_TOKENS, 0.0))
        return asked

    def value(self, query: Query, said: Said) -> float | None:
        """The preference in the last label; None without one."""
        labels = LABEL.findall(said.text)
        if not labels:
            return None
        return 1 - VALUES[labels[-1]] if query.order else VALUES[labels[-1]]

    def figures(
        self, judgements: Sequence[Judgement], answers: Mapping[str, Answer]
    ) -> tuple[dict[str, Figure], list[str]]:
        """win_rate; and pass_rate of the questions that have a rule."""
        values = list(by_question(judgements).values())
        found = {"win_rate": mean_figure(values)} if values else {}
        passed = [
            float(obeys(question.rule, answers[question.id].turns[0]))
            for question in self.questions
            if question.rule is not None and question.id in answers
        ]
        if passed:
            found["pass_rate"] = mean_figure(passed)
        notes = [] if values else ["No verdict could be read."]
        if self.baseline_name == CHOSEN and self._not_texts:
            notes.append(
                f"{self._not_texts:,} of {len(self.questions):,} chosen responses call tools or "
                "have several turns: what is compared is the text of their first turn alone "
                "(benchmark.baseline=base compares two models instead)."
            )
        return found, notes

    def write(self, folder: Path, judged: JudgedAnswers) -> None:
        """Write judgements.jsonl: a line for each judgement, with both answers."""
        lines: list[dict[str, Any]] = []
        for judgement in judged.judgements:
            query, key = judgement.query, judgement.query.question
            lines.append(
                {
                    "question": key,
                    "prompt": list(self._by_id[key].prompt),
                    "model": judged.model,
                    "answer": judged.answers[key].turns[0],
                    "baseline": self.baseline_name,
                    "baseline_answer": self.baseline[key].turns[0],
                    "judge": judged.judge,
                    "order": query.order,
                    "repeat": query.repeat,
                    "preference": judgement.value,
                    "said": asdict(judgement.said),
                }
            )
        write_jsonl(folder / JUDGEMENTS, lines)

    def read_annotations(self, path: Path) -> JudgedAnswers:
        """Read a judgements.jsonl; its questions need not be those of the data."""
        answers: dict[str, Answer] = {}
        baseline: dict[str, Answer] = {}
        judgements = []
        seen = set()
        model = judge = ""
        keys = ("question", "model", "answer", "baseline", "baseline_answer", "judge", "preference")
        for number, line in enumerate(read_jsonl(path, (*keys, "order", "repeat", "prompt")), 1):
            value, key = line["preference"], line["question"]
            if not (value is None or (isinstance(value, int | float) and 0 <= value <= 1)):
                raise DataError(f"{path}:{number}: preference must be from 0 to 1, got {value}")
            _check_line(f"{path}:{number}", line)
            names = line["model"], line["judge"], line["baseline"]
            if number > 1 and names != (model, judge, self.baseline_name):
                raise DataError(
                    f"{path}:{number}: another model, judge or baseline than above (one a file)"
                )
            model, judge, self.baseline_name = names
            asked = key, line["order"], line["repeat"]
            own, other = Answer(key, (line["answer"],)), Answer(key, (line["baseline_answer"],))
            same_answers = (answers.setdefault(key, own), baseline.setdefault(key, other))
            if asked in seen or same_answers != (own, other):
                raise DataError(
                    f"{path}:{number}: question {key} is judged twice, or other answers to it "
                    f"({ONE_LINE})"
                )
            seen.add(asked)
            if key not in self._by_id:
                self._by_id[key] = Question(key, tuple(line["prompt"]))
            query = Query(key, 0, line["order"], (), MAX_TOKENS, 0.0, repeat=line["repeat"])
            judgements.append(Judgement(query, Said(**line.get("said", {"text": ""})), value))
        self.questions, self.baseline = [self._by_id[key] for key in answers], baseline
        return JudgedAnswers(model, judge, answers, judgements)


def _check_line(place: str, line: Mapping[str, Any]) -> None:
    """Check a line of judgements.jsonl, all but its preference.

    Raises:
        DataError: a value has the wrong type.
    """
    for key in ("question", "model", "answer", "baseline", "baseline_answer", "judge"):
        if not isinstance(line[key], str):
            raise DataError(f"{place}: {key} must be a text (restore the file)")
    for key in ("order", "repeat"):
        if line[key] not in (0, 1):
            raise DataError(f"{place}: {key} must be 0 or 1 (restore the file)")
    turns, said = line["prompt"], line.get("said", {"text": ""})
    if not (
        isinstance(turns, list)
        and turns
        and all(isinstance(turn, dict) and turn.keys() >= {"role", "content"} for turn in turns)
    ):
        raise DataError(f"{place}: prompt must be a list of messages (restore the file)")
    if not (
        isinstance(said, dict)
        and {"text"} <= said.keys() <= SAID.keys()
        and all(isinstance(value, SAID[key]) for key, value in said.items())
    ):
        raise DataError(f"{place}: said must be an object with text (restore the file)")
