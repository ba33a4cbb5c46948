"""Judges models: their answers to a benchmark's questions, compared with a baseline's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from simpo.config.backends import SingleConfig
from simpo.config.choices import BenchmarkKind
from simpo.config.errors import ConfigError, DataError
from simpo.config.schema import RunConfig
from simpo.judging.answers import (
    Contestant,
    before_training,
    contestant,
    draw,
    judged_folder,
    plain_name,
)
from simpo.judging.benchmarks import open_benchmark
from simpo.judging.hub_results import write_hub_result
from simpo.judging.judges import open_judge
from simpo.judging.pairs import BASE, CHOSEN
from simpo.judging.results import judged_as, judgements_of, result_lines
from simpo.judging.shapes import PROGRAMS, Answer, Benchmark, JudgedAnswers
from simpo.loop.console import libraries_quiet
from simpo.model.saved import naming
from simpo.run.atomic import make_folder
from simpo.run.judged import Judged
from simpo.run.progress import say


@dataclass
class Contest:
    """A model with the questions that it answers, and its answers once they are drawn.

    Attributes:
        name, folder: of the model, and where its results go.
        model: None if its answers came from a file.
    """

    benchmark: Benchmark
    name: str
    folder: Path
    model: Contestant | None
    answers: Mapping[str, Answer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@libraries_quiet()
def judge(run: RunConfig, sources: Sequence[str]) -> list[Judged]:
    """Draw answers of models, judge them, and write what was found beside them.

    Everything that was drawn or said stays: after an interruption the same call goes on.

    Args:
        run: its sections `benchmark` and `judge`, and `on_policy.engine` and `batch_prompts`.
        sources: folders of runs or models, hub ids, or the benchmark's own files of answers. At
            most one with `judge.annotations`.

    Raises:
        ConfigError: the benchmark's files, the judge or a model cannot be used.
        DataError: a file of the benchmark, answers or annotations cannot be read, or answers lack.
        RunError: the judge cannot go on, or the limit is reached.
    """
    # Models were trained in several processes, but answer, judge and score in this one.
    run = replace(run, backend=SingleConfig(name="single", device=run.backend.device))
    if run.judge.annotations is not None:
        return [_of_annotations(run, Path(run.judge.annotations).expanduser(), sources)]
    _refuse_no_baseline(run)
    # Pairs are those of each run's own data.
    same = None if run.benchmark.kind is BenchmarkKind.pairs else open_benchmark(run)
    contests = [_contest(run, source, same) for source in sources]
    _refuse_one_folder(sources, contests)
    asked = open_judge(run, *dict.fromkeys(contest.benchmark for contest in contests))
    # All answers before the first judgement: the judge may be a model that needs the memory.
    for contest in contests:
        _draw(run, contest)
    found, folders = [], [contest.folder for contest in contests]
    for contest in contests:
        benchmark, answers = contest.benchmark, contest.answers
        if len(contests) > 1:
            say(f"judging the answers of {contest.name} ...")
        judgements = judgements_of(run, benchmark, asked, answers)
        name = asked.name if asked is not None else PROGRAMS
        answered = JudgedAnswers(contest.name, name, answers, judgements)
        judged = judged_as(run, benchmark, answered, contest.notes)
        make_folder(contest.folder)
        benchmark.write(contest.folder, answered)
        judged.write(contest.folder)
        if contest.model is not None and contest.model.run is not None:
            write_hub_result(judged, Path(contest.model.saved.where))
        found.append(judged)
    say("", *result_lines(found, folders))
    return found


def check(run: RunConfig) -> None:
    """Check what judging the model of a run will need, before it is trained.

    Raises:
        ConfigError, DataError: the benchmark's files or the judge cannot be used.
    """
    _refuse_no_baseline(run)
    open_judge(run, open_benchmark(run))


def _refuse_no_baseline(run: RunConfig) -> None:
    """Check that the model that answers as baseline is there.

    Raises:
        ConfigError: it is not.
    """
    baseline = run.benchmark.baseline
    if run.benchmark.kind is BenchmarkKind.pairs and baseline not in (None, CHOSEN, BASE):
        with naming("benchmark.baseline"):
            contestant(run, str(baseline))


def _refuse_one_folder(sources: Sequence[str], contests: Sequence[Contest]) -> None:
    """
    Raises:
        ConfigError: two models would write their results into the same folder.
    """
    taken: dict[Path, str] = {}
    for source, contest in zip(sources, contests, strict=True):
        folder = contest.folder
        if folder in taken:
            raise ConfigError(
                [
                    f"RUN: {taken[folder]} and {source} both have their results in {folder} (give "
                    "one of them, or rename one)"
                ]
            )
        taken[folder] = source


def _contest(run: RunConfig, source: str, same: Benchmark | None) -> Contest:
    """A model before it answers the questions of `same`, or else those of its run's data; or the
    answers in a file.

    Raises:
        ConfigError: there is no model.
        DataError: the file is not of the benchmark's format, or lacks an answer.
    """
    if Path(source).expanduser().is_file():
        return _answered(run, Path(source).expanduser(), same or open_benchmark(run))
    model = contestant(run, source)
    return Contest(same or _open_own(run, model), model.name, model.folder, model)


def _open_own(run: RunConfig, model: Contestant) -> Benchmark:
    """The benchmark for a model: of pairs it is asked those of its own run's data."""
    if run.benchmark.kind is BenchmarkKind.pairs and model.run is not None:
        run = replace(run, data=model.run.data, loss=model.run.loss)
    return open_benchmark(run)


def _answered(run: RunConfig, path: Path, benchmark: Benchmark) -> Contest:
    name, answers = benchmark.read_answers(path)
    name = plain_name(name)
    lacking = [question.id for question in benchmark.questions if question.id not in answers]
    if lacking:
        raise DataError(
            f"{path}: no answer to {len(lacking)} of {len(benchmark.questions)} questions, such as "
            f"{lacking[0]} (benchmark.num_prompts takes the first ones alone)"
        )
    return Contest(benchmark, name, judged_folder(run, name), None, answers)


def _draw(run: RunConfig, contest: Contest) -> None:
    """Draw the answers of a model, and of one that is the baseline."""
    if contest.model is None:
        return
    benchmark = contest.benchmark
    baseline = benchmark.baseline_name
    if run.benchmark.kind is BenchmarkKind.pairs and baseline != CHOSEN:
        other = before_training(contest.model) if baseline == BASE else contestant(run, baseline)
        benchmark.baseline, notes = draw(run, benchmark.questions, other)
        contest.notes += [f"Baseline: {note}" for note in notes]
    contest.answers, notes = draw(run, benchmark.questions, contest.model)
    contest.notes += notes


def _of_annotations(run: RunConfig, path: Path, sources: Sequence[str]) -> Judged:
    """Judge by a file of judgements, without asking anybody."""
    model = contestant(run, sources[0]) if sources else None
    benchmark = _open_own(run, model) if model else open_benchmark(run)
    read = benchmark.read_annotations(path)
    answered = read._replace(model=plain_name(read.model), judge=plain_name(read.judge))
    judgements = answered.judgements
    if judgements and all(judgement.value is None for judgement in judgements):
        raise DataError(
            f"{path}: none of its {len(judgements):,} verdicts can be read (give those of a judge "
            "that keeps to the format)"
        )
    folder = model.folder if model else judged_folder(run, answered.model)
    judged = judged_as(run, benchmark, answered)
    make_folder(folder)
    judged.write(folder)
    say("", *result_lines([judged], [folder]))
    return judged
