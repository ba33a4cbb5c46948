"""Arena-Hard: hard prompts, each answer compared with a baseline's in both orders.

Paper: https://arxiv.org/abs/2406.11939. Files, verdicts and figures are those of
lmarena/arena-hard-auto; see `simpo.judging.arena_files`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simpo.config.benchmarks import JudgeConfig
from simpo.config.errors import DataError
from simpo.config.schema import RunConfig
from simpo.judging.arena_files import (
    OWN_SYSTEM,
    Prompts,
    answer_record,
    benchmark_folder,
    fault,
    file_name,
    read_answers,
    read_baselines,
    read_judged,
    read_prompts,
    read_questions,
)
from simpo.judging.games import Game, Games
from simpo.judging.jsonl import write_jsonl
from simpo.judging.shapes import Answer, Benchmark, Judgement, Query, Question, Said, orders_of
from simpo.judging.style_control import style_differences, style_win_rates, styles
from simpo.run.judged import Figure

BASELINE_FIRST, MODEL_FIRST = 1, 0
"""Orders of a query; the answer shown first is A."""
GAMES = (BASELINE_FIRST, MODEL_FIRST)
"""Orders of the first and the second game of a question in the files."""
LABELS = {
    "A>B": 1.0,
    "A>>B": 1.0,
    "A=B": 0.5,
    "A<B": 0.0,
    "A<<B": 0.0,
    "B>A": 0.0,
    "B>>A": 0.0,
    "B=A": 0.5,
    "B<A": 1.0,
    "B<<A": 1.0,
}
"""Verdicts, and the preference for answer A of each."""
MADE_LABELS = {1.0: "A>B", 0.5: "A=B", 0.0: "B>A"}
"""Verdicts for preferences that no judge put into words, such as those of a reward."""
COPIES = 3
"""How often a verdict with >> or << counts."""
OWN_PROMPTS = (
    "The judge's prompts are not the benchmark's own, which were not found: the score cannot be "
    "compared with published ones."
)
NARROW = (
    "The official interval (5-95 %) resamples single games and copies of games, as if the two "
    "orders of a question were independent, so it is too narrow."
)
ALL_CATEGORIES = "score is over all categories; show_result.py has one for each category alone."
ALONE = (
    "style_win_rate is at the average style of this model's answers, since no judgements of other "
    "models by the same judge were found: equal_style_win_rate tells what style is worth."
)
NO_STYLE = "There is no style control, which needs the texts of both answers."


@dataclass(frozen=True)
class ModelGames:
    """The games of a model, and its answers by question id."""

    games: Sequence[Game]
    answers: Mapping[str, Answer]


def open_arena_hard(run: RunConfig) -> ArenaHard:
    """Open the benchmark that `run.benchmark` names.

    Questions without an answer of the baseline are left out, unless `judge.annotations` are scored,
    which need no answers.

    Raises:
        ConfigError: `benchmark.path` or `benchmark.baseline` does not name its files.
        DataError: a file is not as expected, or there are no answers of the baseline.
    """
    config = run.benchmark
    folder = benchmark_folder(config)
    questions = read_questions(folder / "question.jsonl")
    categories = list(dict.fromkeys(question.category for question in questions))
    questions = questions[: config.num_prompts]
    prompts = read_prompts(folder)
    baselines, answers = read_baselines(config, folder, prompts, categories)
    baseline = {
        question.id: answers[question.category][question.id]
        for question in questions
        if question.id in answers[question.category]
    }
    notes = [] if prompts.official else [OWN_PROMPTS]
    if run.judge.annotations is None:
        if not baseline:
            path = folder / "model_answer" / f"{baselines[questions[0].category]}.jsonl"
            raise DataError(
                f"{path}: no answers of the baseline (get the file, or set benchmark.baseline)"
            )
        if missing := len(questions) - len(baseline):
            notes.append(f"{missing} questions without an answer of the baseline are left out.")
        questions = [question for question in questions if question.id in baseline]
    names = ", ".join(dict.fromkeys(baselines.values()))
    return ArenaHard(
        questions, names, baseline, baselines, prompts, folder, tuple(notes), config.seed, run.judge
    )


@dataclass(frozen=True)
class ArenaHard(Benchmark):
    """The questions of a version of Arena-Hard.

    Attributes:
        baselines: names of the models to compare with, by category of questions.
        prompts: what the judge is told.
        folder: with the benchmark's files.
        notes: about all figures.
        seed: of the order in which the judge sees the answers, where it sees them once.
        judge: its settings, which name the judge whose other judgements are read.
    """

    # Without field() the defaults of Benchmark would be theirs.
    questions: Sequence[Question]
    baseline_name: str = field()
    baseline: Mapping[str, Answer] = field()
    baselines: Mapping[str, str]
    prompts: Prompts
    folder: Path
    notes: tuple[str, ...]
    seed: int
    judge: JudgeConfig

    def queries(self, answers: Mapping[str, Answer], both_orders: bool) -> list[Query]:
        """Two games of each answered question, or one in a seeded order."""
        queries = []
        for question in self.questions:
            if question.id in answers:
                games = GAMES if both_orders else orders_of(question.id, False, self.seed)
                queries += [self._query(question, answers[question.id], order) for order in games]
        return queries

    def _query(self, question: Question, answer: Answer, order: int) -> Query:
        shown = [answer.turns[-1], self.baseline[question.id].turns[-1]]
        first, second = shown if order == MODEL_FIRST else reversed(shown)
        asked = self.prompts.template.format(
            QUESTION=question.prompt[-1]["content"], ANSWER_A=first, ANSWER_B=second
        )
        told = self.prompts.system.get(question.category, OWN_SYSTEM)
        return Query(
            question.id,
            turn=0,
            order=order,
            messages=(
                {"role": "system", "content": told},
                {"role": "user", "content": asked},
            ),
            max_tokens=self.prompts.max_tokens,
            temperature=self.prompts.temperature,
        )

    def value(self, query: Query, said: Said) -> float | None:
        """The preference in the verdict, 0, 0.5 or 1; None without one of `LABELS`."""
        for_a = LABELS.get(self.label(said.text))
        return for_a if for_a is None or query.order == MODEL_FIRST else 1 - for_a

    def label(self, text: str) -> str:
        """The verdict in what a judge said, as gen_judgment.py finds it; empty without one."""
        for pattern in self.prompts.patterns:
            if matches := [match for match in re.findall(pattern, text.upper()) if match]:
                return str(matches[-1]).strip("\n")
        return ""

    def figures(
        self, judgements: Sequence[Judgement], answers: Mapping[str, Answer]
    ) -> tuple[dict[str, Figure], list[str]]:
        """`score` in percent, and `style_win_rate` and `equal_style_win_rate` where both answers
        are known; with several categories each of them by category, too. First askings count.

        A question of which a verdict cannot be read counts nowhere, as in show_result.py.
        """
        model, notes = ModelGames(self._games(judgements), answers), [*self.notes, NARROW]
        asked = {judgement.query.question for judgement in judgements}
        if unread := len(asked - {game.question for game in model.games}):
            notes.append(f"{unread} questions of which a verdict cannot be read are left out.")
        if not model.games:
            return {}, notes
        figures = {"score": Games.of([model.games]).score()}
        several = len(self.baselines) > 1
        if several:
            figures["score"] = replace(figures["score"], official_low=None, official_high=None)
            notes.append(ALL_CATEGORIES)
        peers = list(self._peers())
        for category in self.baselines:
            models = [self._within(category, one) for one in (model, *peers)]
            name = f"_{category}" if several else ""
            if models[0].games:
                figures[f"score{name}"] = Games.of([models[0].games]).score()
                figures |= {f"{key}{name}": value for key, value in self._style(models).items()}
        if not any("style" in key for key in figures):
            notes.append(NO_STYLE)
        elif not peers:
            notes.append(ALONE)
        else:
            notes.append(f"style_win_rate has {len(peers)} other models of {self._judged()} in it.")
        return figures, notes

    def _games(self, judgements: Sequence[Judgement]) -> list[Game]:
        """The games that count: of questions whose verdicts can all be read, of the same number."""
        first: dict[str, dict[int, Judgement]] = defaultdict(dict)
        for judgement in judgements:
            if not judgement.query.repeat:
                first[judgement.query.question][judgement.query.order] = judgement
        wanted = max(map(len, first.values()), default=0)
        games = []
        for question, orders in first.items():
            readable = [
                Game(question, one.value, self._copies(one))
                for one in orders.values()
                if one.value is not None
            ]
            games += readable if len(readable) == wanted else []
        return games

    def _copies(self, judgement: Judgement) -> int:
        label = self.label(judgement.said.text)
        return COPIES if label in LABELS and (">>" in label or "<<" in label) else 1

    def _within(self, category: str, model: ModelGames) -> ModelGames:
        """Its games of a category."""
        inside = {question.id for question in self.questions if question.category == category}
        return replace(model, games=[game for game in model.games if game.question in inside])

    def _style(self, models: Sequence[ModelGames]) -> dict[str, Figure]:
        """Figures with style controlled of the first model; empty if texts are not known."""
        known = [
            replace(
                model,
                games=[
                    game
                    for game in model.games
                    if game.question in model.answers and game.question in self.baseline
                ],
            )
            for model in models
        ]
        if not known[0].games:
            return {}
        pairs = [
            styles(model.answers[game.question], self.baseline[game.question])
            for model in known
            for game in model.games
        ]
        differences = style_differences(*zip(*pairs, strict=True))
        average, equal = style_win_rates(Games.of([model.games for model in known]), differences)
        return {"style_win_rate": average, "equal_style_win_rate": equal}

    def _judged(self) -> Path | None:
        """The folder with judgements of other models by the same judge."""
        if self.judge.annotations is not None:
            folder = Path(self.judge.annotations).expanduser().absolute().parent
            return folder if folder.parent.name == "model_judgment" else None
        judge = self.judge.model or self.judge.local
        return self.folder / "model_judgment" / file_name(judge) if judge else None

    def _peers(self) -> Iterator[ModelGames]:
        """Other models that the same judge compared with the same baselines."""
        folder, own = self._judged(), self.judge.annotations
        for path in sorted(folder.glob("*.jsonl")) if folder else ():
            answers = path.parents[2] / "model_answer" / path.name
            if (own and path.samefile(own)) or not answers.is_file():
                continue
            baselines, judgements = self._read(path)[2:]
            if baselines <= set(self.baselines.values()):
                yield ModelGames(self._games(judgements), read_answers(answers)[1])

    def write(
        self,
        folder: Path,
        model: str,
        judge: str,
        answers: Mapping[str, Answer],
        judgements: Sequence[Judgement],
    ) -> None:
        """Write model_answer/<model>.jsonl and model_judgment/<judge>/<model>.jsonl.

        `tstamp` is 0: when an answer was generated is not known. A game that was not asked is null;
        repeats are left out.
        """
        questions = [question for question in self.questions if question.id in answers]
        name = f"{file_name(model)}.jsonl"
        write_jsonl(
            folder / "model_answer" / name,
            (answer_record(model, question, answers[question.id]) for question in questions),
        )
        games: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        for judgement in judgements:
            query = judgement.query
            if not query.repeat:
                games[query.question][query.order] = {
                    "score": self._said_label(judgement),
                    "judgment": {"answer": judgement.said.text},
                    "prompt": list(query.messages),
                }
        write_jsonl(
            folder / "model_judgment" / file_name(judge) / name,
            (
                {
                    "uid": question.id,
                    "category": question.category,
                    "judge": judge,
                    "model": model,
                    "baseline": self.baselines[question.category],
                    "games": [games[question.id].get(order) for order in GAMES],
                }
                for question in self.questions
                if question.id in games
            ),
        )

    def _said_label(self, judgement: Judgement) -> str | None:
        """The verdict of a game; of a preference without words, such as a reward's, made up."""
        value, order = judgement.value, judgement.query.order
        if value is None:
            return None
        label = self.label(judgement.said.text)
        return label or MADE_LABELS[value if order == MODEL_FIRST else 1 - value]

    def read_answers(self, path: Path) -> tuple[str, dict[str, Answer]]:
        """Read a file of model_answer/."""
        model, answers = read_answers(path)
        asked = [question.id for question in self.questions if question.id in answers]
        return model, {key: answers[key] for key in asked}

    def read_annotations(
        self, path: Path
    ) -> tuple[str, str, Mapping[str, Answer], list[Judgement]]:
        """Read a file of model_judgment/; the answers come from model_answer/ beside it, or else of
        the benchmark's folder, and are empty if neither has any. A null game was not asked.

        Raises:
            DataError: it is not of that format, has no question of the benchmark, or compares with
                another baseline.
        """
        model, judge, baselines, judgements = self._read(path)
        if not judgements:
            raise DataError(f"{path}: judges no question of {self.folder} (set benchmark.path)")
        if others := sorted(baselines - set(self.baselines.values())):
            raise DataError(
                f"{path}: compares with {others[0]}, not with {self.baseline_name} "
                "(set benchmark.baseline)"
            )
        folders = (*path.absolute().parents[1:3], self.folder)
        files = [folder / "model_answer" / path.name for folder in folders]
        answers = next((read_answers(file)[1] for file in files if file.is_file()), {})
        return model, judge, answers, judgements

    def _read(self, path: Path) -> tuple[str, str, set[str], list[Judgement]]:
        """Names of model, judge and baselines in a file of model_judgment/, and its judgements."""
        known = {question.id for question in self.questions}
        model, judge, baselines = path.stem, path.absolute().parent.name, set()
        judgements = []
        for line, record in read_judged(path):
            if record["uid"] not in known:
                continue
            model, judge = record.get("model") or model, record.get("judge") or judge
            baselines |= {record["baseline"]} if record.get("baseline") else set()
            for order, game in zip(GAMES, record["games"], strict=True):
                if game is not None:
                    query = Query(record["uid"], 0, order, (), max_tokens=0, temperature=0.0)
                    said = self._said(game)
                    if said is None:
                        raise fault(path, line, "has a game without score or judgment")
                    judgements.append(Judgement(query, said, self.value(query, said)))
        return model, judge, baselines, judgements

    def _said(self, game: Mapping[str, Any]) -> Said | None:
        """What was said in a game of a file; its score is what counts."""
        match game:
            case {"score": str() | None as score, "judgment": {"answer": str(text)} | str(text)}:
                same = self.label(text) == (score or "")
                return Said(text if same else f"[[{score}]]" if score else "")
        return None
