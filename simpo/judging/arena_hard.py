"""Arena-Hard: hard prompts, each answer compared with a baseline's in both orders.

Paper: https://arxiv.org/abs/2406.11939. Files, verdicts and figures are those of
lmarena/arena-hard-auto; see `simpo.judging.arena_files`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
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
    file_name,
    read_answers,
    read_baselines,
    read_prompts,
    read_questions,
    refuse_other_version,
)
from simpo.judging.arena_verdicts import GAMES, MODEL_FIRST, Verdicts
from simpo.judging.games import Game, Games
from simpo.judging.jsonl import write_jsonl
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
)
from simpo.judging.style_control import style_differences, style_win_rates, styles
from simpo.run.judged import Figure

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
LEFT_OUT = (
    "{} files of {} are left out of style_win_rate: the answers of the model are not in "
    "model_answer/, or it was compared with another baseline."
)
NO_STYLE = "There is no style control, which needs the texts of both answers."
SEPARATED = (
    "There is no style control{}: in so few games style alone tells who wins, so its regression "
    "has no solution."
)


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
    refuse_other_version(config, folder, categories)
    questions = questions[: config.num_prompts]
    prompts = read_prompts(folder)
    baselines, answers = read_baselines(config, folder, prompts, categories)
    baseline = {
        question.id: answers[question.category][question.id]
        for question in questions
        if question.id in answers[question.category]
    }
    official = prompts.official and set(categories) <= prompts.system.keys()
    notes = [] if official else [OWN_PROMPTS]
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
    verdicts, judged = Verdicts(prompts.patterns), _judged(run.judge, folder)
    known = {question.id for question in questions}
    peers, left_out = _peers(judged, verdicts, known, set(baselines.values()))
    if left_out:
        notes.append(LEFT_OUT.format(left_out, judged))
    return ArenaHard(
        questions, names, baseline, baselines, prompts, folder, tuple(notes), config.seed,
        verdicts, judged, peers,
    )  # fmt: skip


def _judged(judge: JudgeConfig, folder: Path) -> Path | None:
    """The folder with judgements of other models by the same judge."""
    if judge.annotations is not None:
        found = Path(judge.annotations).expanduser().absolute().parent
        return found if found.parent.name == "model_judgment" else None
    name = judge.model or judge.local
    return folder / "model_judgment" / file_name(name) if name else None


def _peers(
    judged: Path | None, verdicts: Verdicts, known: set[str], baselines: set[str]
) -> tuple[list[ModelGames], int]:
    """Models that the same judge compared with the same baselines, and the number of others.

    Raises:
        DataError: a file is damaged.
    """
    found, files = [], sorted(judged.glob("*.jsonl")) if judged else []
    for path in files:
        answers = path.parents[2] / "model_answer" / path.name
        if answers.is_file():
            one = verdicts.read(path, known)
            if one.baselines <= baselines:
                games = verdicts.games(one.judgements)
                found.append(ModelGames(games, read_answers(answers)[1]))
    return found, len(files) - len(found)


@dataclass(frozen=True)
class ArenaHard(Benchmark):
    """The questions of a version of Arena-Hard.

    Attributes:
        baselines: names of the models to compare with, by category of questions.
        prompts: what the judge is told.
        folder: with the benchmark's files.
        notes: about all figures.
        seed: of the order in which the judge sees the answers, where it sees them once.
        verdicts: reads them.
        judged: the folder with judgements of other models by the same judge.
        peers: those models.
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
    verdicts: Verdicts
    judged: Path | None
    peers: Sequence[ModelGames]

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
        """The preference in the verdict, 0, 0.5 or 1; None without a label."""
        return self.verdicts.value(query, said)

    def by_question(
        self, judgements: Sequence[Judgement], answers: Mapping[str, Answer]
    ) -> dict[str, float]:
        """The value of each question that counts in the score."""
        counted = {game.question for game in self.verdicts.games(judgements)}
        return {key: value for key, value in by_question(judgements).items() if key in counted}

    def figures(
        self, judgements: Sequence[Judgement], answers: Mapping[str, Answer]
    ) -> tuple[dict[str, Figure], list[str]]:
        """`score` in percent, and `style_win_rate` and `equal_style_win_rate` where both answers
        are known; with several categories each of them by category, too. First askings count.

        A question of which a verdict cannot be read counts nowhere, as in show_result.py.
        """
        games = self.verdicts.games(judgements)
        model, notes = ModelGames(games, answers), [*self.notes, NARROW]
        if not games:
            return {}, notes
        figures = {"score": Games.of([games]).score()}
        several = len(self.baselines) > 1
        if several:
            figures["score"] = replace(figures["score"], official_low=None, official_high=None)
            notes.append(ALL_CATEGORIES)
        peers = [peer for peer in self.peers if not _same(peer.answers, answers)]
        known = [self._with_texts(one) for one in (model, *peers)]
        for category in self.baselines:
            name = f"_{category}" if several else ""
            if own := self._within(category, model).games:
                figures[f"score{name}"] = Games.of([own]).score()
            models = [self._within(category, one) for one in known]
            if models[0].games:
                if style := _style(models, self.baseline):
                    figures |= {f"{key}{name}": value for key, value in style.items()}
                else:
                    notes.append(SEPARATED.format(f" of {category}" if several else ""))
        return figures, [*notes, *self._style_notes(model, known)]

    def _style_notes(self, model: ModelGames, known: Sequence[ModelGames]) -> list[str]:
        """What to know about the figures with style controlled.

        Args:
            known: that model and the others, with the games whose texts are known.
        """
        with_texts, all_games = (
            len({game.question for game in one.games}) for one in (known[0], model)
        )
        if not with_texts:
            return [NO_STYLE]
        notes = []
        if with_texts < all_games:
            notes.append(
                f"style_win_rate and equal_style_win_rate are of the {with_texts} of {all_games} "
                "questions whose answers are known."
            )
        others = len(known) - 1
        of = f"style_win_rate has {others} other models of {self.judged} in it."
        return [*notes, of if others else ALONE]

    def _within(self, category: str, model: ModelGames) -> ModelGames:
        """Its games of a category."""
        inside = {question.id for question in self.questions if question.category == category}
        return replace(model, games=[game for game in model.games if game.question in inside])

    def _with_texts(self, model: ModelGames) -> ModelGames:
        """Its games of which both answers are known."""
        known = model.answers.keys() & self.baseline.keys()
        return replace(model, games=[game for game in model.games if game.question in known])

    def write(self, folder: Path, judged: JudgedAnswers) -> None:
        """Write model_answer/<model>.jsonl and model_judgment/<judge>/<model>.jsonl.

        `tstamp` is 0: when an answer was generated is not known. A game that was not asked is null;
        repeats are left out.
        """
        model, judge, answers, judgements = judged
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
                    "score": self.verdicts.label_of(judgement),
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

    def read_answers(self, path: Path) -> tuple[str, dict[str, Answer]]:
        """Read a file of model_answer/."""
        model, answers = read_answers(path)
        asked = [question.id for question in self.questions if question.id in answers]
        return model, {key: answers[key] for key in asked}

    def read_annotations(self, path: Path) -> JudgedAnswers:
        """Read a file of model_judgment/; the answers come from model_answer/ beside it, or else of
        the benchmark's folder, and are empty if neither has any. A null game was not asked.

        Raises:
            DataError: it is not of that format, has no question of the benchmark, or compares with
                another baseline.
        """
        known = {question.id for question in self.questions}
        found = self.verdicts.read(path, known)
        if not found.judgements:
            raise DataError(f"{path}: judges no question of {self.folder} (set benchmark.path)")
        if others := sorted(found.baselines - set(self.baselines.values())):
            raise DataError(
                f"{path}: compares with {others[0]}, not with {self.baseline_name} "
                "(set benchmark.baseline)"
            )
        folders = (*path.absolute().parents[1:3], self.folder)
        files = [folder / "model_answer" / path.name for folder in folders]
        answers = next((read_answers(file)[1] for file in files if file.is_file()), {})
        return JudgedAnswers(found.model, found.judge, answers, found.judgements)


def _same(some: Mapping[str, Answer], others: Mapping[str, Answer]) -> bool:
    """Whether two models gave the same answers, as a model and a copy of its files do."""
    common = some.keys() & others.keys()
    return bool(common) and all(some[key].turns == others[key].turns for key in common)


def _style(models: Sequence[ModelGames], baseline: Mapping[str, Answer]) -> dict[str, Figure]:
    """Figures with style controlled of the first model; empty if its regression has no solution.

    Args:
        models: with games of which both answers are known.
    """
    pairs = [
        styles(model.answers[game.question], baseline[game.question])
        for model in models
        for game in model.games
    ]
    differences = style_differences(*zip(*pairs, strict=True))
    found = style_win_rates(Games.of([model.games for model in models]), differences)
    # It is empty, or has both.
    return dict(zip(("style_win_rate", "equal_style_win_rate"), found, strict=False))
