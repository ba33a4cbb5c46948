"""Arena-Hard: hard prompts, each answer compared with a baseline's in both orders.

Paper: https://arxiv.org/abs/2406.11939. Files, verdicts and figures are those of
lmarena/arena-hard-auto; see `simpo.judging.arena_files`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpo.config.benchmarks import JudgeConfig
from simpo.config.errors import DataError
from simpo.config.schema import RunConfig
from simpo.judging.arena_files import (
    OWN_SYSTEM,
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
            judged_answers, compared = verdicts.read(path, known)
            if compared <= baselines:
                games = verdicts.games(judged_answers.judgements)
                found.append(ModelGames(games, read_answers(answers)[1]))
    return found, len(files) - len(found)


class ArenaHard(Benchmark):
    """The questions of a version of Arena-Hard, asked of a judge that compares two answers.

    Attributes:
        notes: about all figures.
    """

    def __init__(self, run: RunConfig) -> None:
        """Open the version that `run.benchmark` names.

        Questions without an answer of the baseline are left out, unless `judge.annotations` are
        scored, which need no answers.

        Raises:
            ConfigError: `benchmark.path` or `benchmark.baseline` does not name its files.
            DataError: a file is not as expected, or there are no answers of the baseline.
        """
        config = run.benchmark
        self._seed = config.seed
        self._folder = benchmark_folder(config)
        questions = read_questions(self._folder / "question.jsonl")
        categories = list(dict.fromkeys(question.category for question in questions))
        refuse_other_version(config, self._folder, categories)
        self.questions = questions[: config.num_prompts]
        self._prompts = read_prompts(self._folder)
        self._baselines, answers = read_baselines(config, self._folder, self._prompts, categories)
        self.baseline_name = ", ".join(dict.fromkeys(self._baselines.values()))
        self.baseline = {
            question.id: answers[question.category][question.id]
            for question in self.questions
            if question.id in answers[question.category]
        }
        official = self._prompts.official and set(categories) <= self._prompts.system.keys()
        notes = [] if official else [OWN_PROMPTS]
        if run.judge.annotations is None:
            if not self.baseline:
                file = f"{self._baselines[questions[0].category]}.jsonl"
                raise DataError(
                    f"{self._folder / 'model_answer' / file}: no answers of the baseline (get the "
                    "file, or set benchmark.baseline)"
                )
            if missing := len(self.questions) - len(self.baseline):
                notes.append(f"{missing} questions without an answer of the baseline are left out.")
            self.questions = [one for one in self.questions if one.id in self.baseline]
        self._verdicts = Verdicts(self._prompts.patterns)
        self._judged = _judged(run.judge, self._folder)
        known = {question.id for question in self.questions}
        self._peers, left_out = _peers(
            self._judged, self._verdicts, known, set(self._baselines.values())
        )
        if left_out:
            notes.append(LEFT_OUT.format(left_out, self._judged))
        self.notes = tuple(notes)

    def queries(self, answers: Mapping[str, Answer], both_orders: bool) -> list[Query]:
        """Two games of each answered question, or one in a seeded order."""
        queries = []
        for question in self.questions:
            if question.id in answers:
                games = GAMES if both_orders else orders_of(question.id, False, self._seed)
                queries += [self._query(question, answers[question.id], order) for order in games]
        return queries

    def _query(self, question: Question, answer: Answer, order: int) -> Query:
        shown = [answer.turns[-1], self.baseline[question.id].turns[-1]]
        first, second = shown if order == MODEL_FIRST else reversed(shown)
        asked = self._prompts.template.format(
            QUESTION=question.prompt[-1]["content"], ANSWER_A=first, ANSWER_B=second
        )
        told = self._prompts.system.get(question.category, OWN_SYSTEM)
        return Query(
            question.id,
            turn=0,
            order=order,
            messages=(
                {"role": "system", "content": told},
                {"role": "user", "content": asked},
            ),
            max_tokens=self._prompts.max_tokens,
            temperature=self._prompts.temperature,
        )

    def value(self, query: Query, said: Said) -> float | None:
        """The preference in the verdict, 0, 0.5 or 1; None without a label."""
        return self._verdicts.value(query, said)

    def by_question(
        self, judgements: Sequence[Judgement], answers: Mapping[str, Answer]
    ) -> dict[str, float]:
        """The value of each question that counts in the score."""
        counted = {game.question for game in self._verdicts.games(judgements)}
        return {key: value for key, value in by_question(judgements).items() if key in counted}

    def figures(
        self, judgements: Sequence[Judgement], answers: Mapping[str, Answer]
    ) -> tuple[dict[str, Figure], list[str]]:
        """`score` in percent, and `style_win_rate` and `equal_style_win_rate` where both answers
        are known; with several categories each of them by category, too. First askings count.

        A question of which a verdict cannot be read counts nowhere, as in show_result.py.
        """
        games = self._verdicts.games(judgements)
        model, notes = ModelGames(games, answers), [*self.notes, NARROW]
        if not games:
            return {}, notes
        figures = {"score": Games.of([games]).score()}
        several = len(self._baselines) > 1
        if several:
            figures["score"] = replace(figures["score"], official_low=None, official_high=None)
            notes.append(ALL_CATEGORIES)
        peers = [peer for peer in self._peers if not _same(peer.answers, answers)]
        known = [_within(one.answers.keys() & self.baseline.keys(), one) for one in (model, *peers)]
        for category in self._baselines:
            name = f"_{category}" if several else ""
            asked = {question.id for question in self.questions if question.category == category}
            if own := _within(asked, model).games:
                figures[f"score{name}"] = Games.of([own]).score()
            models = [_within(asked, one) for one in known]
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
        of = f"style_win_rate has {others} other models of {self._judged} in it."
        return [*notes, of if others else ALONE]

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
                    "score": self._verdicts.label_of(judgement),
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
                    "baseline": self._baselines[question.category],
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
        found, baselines = self._verdicts.read(path, known)
        if not found.judgements:
            raise DataError(f"{path}: judges no question of {self._folder} (set benchmark.path)")
        if others := sorted(baselines - set(self._baselines.values())):
            raise DataError(
                f"{path}: compares with {others[0]}, not with {self.baseline_name} "
                "(set benchmark.baseline)"
            )
        folders = (*path.absolute().parents[1:3], self._folder)
        files = [folder / "model_answer" / path.name for folder in folders]
        answers = next((read_answers(file)[1] for file in files if file.is_file()), {})
        return found._replace(answers=answers)


def _within(questions: Set[str], model: ModelGames) -> ModelGames:
    """The games of a model about some questions."""
    return replace(model, games=[game for game in model.games if game.question in questions])


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
