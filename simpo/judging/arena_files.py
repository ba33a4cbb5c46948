"""Reads the files of lmarena/arena-hard-auto: questions, answers, judgements and judge prompts.

<clone>/
    config/<benchmark>.yaml         template of the judge's prompt, patterns of verdicts, sampling
    utils/judge_utils.py            judge's instructions and the baseline of each category
    data/<benchmark>/
        question.jsonl
        model_answer/<model>.jsonl
        model_judgment/<judge>/<model>.jsonl
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simpo.config.benchmarks import BenchmarkConfig
from simpo.config.errors import ConfigError, DataError
from simpo.judging.jsonl import ONE_LINE, SPLIT, answer_id, fault, read_text, records
from simpo.judging.shapes import Answer, Question
from simpo.judging.style_control import estimated_tokens, style_counts
from simpo.run.judged import FOLDER

FOLDERS = {"arena_hard_v0.1": "arena-hard-v0.1", "arena_hard_v2": "arena-hard-v2.0"}
"""Folders in data/, by `benchmark.name`."""
CLONE = "git clone https://github.com/lmarena/arena-hard-auto"


@dataclass(frozen=True)
class Prompts:
    """What the judge is told.

    Attributes:
        system: instructions by category of questions.
        baselines: names of the models to compare with, by category.
        template: of the user's message, with {QUESTION}, {ANSWER_A} and {ANSWER_B}.
        patterns: of verdicts; the last match of the first one that matches is the verdict.
        temperature, max_tokens: of the judge's sampling.
        official: whether they are the benchmark's own.
    """

    system: Mapping[str, str]
    baselines: Mapping[str, str]
    template: str
    patterns: tuple[str, ...]
    temperature: float
    max_tokens: int
    official: bool


OWN_SYSTEM = """\
You compare two answers to a question: one by assistant A, one by assistant B. Work out your own \
answer first. Then check both answers for errors and omissions. Prefer the one that is correct, \
helpful, relevant and no longer than it must be. Which one is shown first, and how it is \
formatted, must not matter.

Give your reasons, and end with exactly one of these labels:
[[A>>B]] A is much better
[[A>B]] A is a little better
[[A=B]] they are about as good
[[B>A]] B is a little better
[[B>>A]] B is much better"""
OWN_TEMPLATE = """\
Question:
{QUESTION}

Answer of assistant A:
{ANSWER_A}

Answer of assistant B:
{ANSWER_B}"""
BASELINES = {
    "arena_hard_v0.1": {"arena-hard-v0.1": "gpt-4-0314"},
    "arena_hard_v2": {
        "hard_prompt": "o3-mini-2025-01-31",
        "creative_writing": "gemini-2.0-flash-001",
    },
}
"""Names of the models to compare with, by `benchmark.name` and category of questions."""
_BY_CATEGORY = BASELINES["arena_hard_v0.1"] | BASELINES["arena_hard_v2"]
OWN = Prompts(
    system=dict.fromkeys(_BY_CATEGORY, OWN_SYSTEM),
    baselines=_BY_CATEGORY,
    template=OWN_TEMPLATE,
    patterns=(r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]"),
    temperature=0.0,
    max_tokens=4096,
    official=False,
)
"""Used where the benchmark's own prompts are not beside its data."""


def refuse_other_version(config: BenchmarkConfig, folder: Path, categories: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: the questions are those of another version of the benchmark.
    """
    for name, baselines in BASELINES.items():
        if name != config.name and config.name in BASELINES and baselines.keys() & set(categories):
            what = f"{folder} holds the questions of {FOLDERS[name]}"
            raise ConfigError([f"benchmark.path: {what} (set benchmark={name})"])


def benchmark_folder(config: BenchmarkConfig) -> Path:
    """The folder with question.jsonl.

    Raises:
        ConfigError: there is none.
    """
    if config.path is None:
        raise ConfigError([f"benchmark.path: required for {config.name}, but not given ({CLONE})"])
    path = Path(config.path).expanduser().absolute()
    inside = path / "data" / FOLDERS.get(config.name, config.name)
    for folder in (inside, path):
        if (folder / "question.jsonl").is_file():
            return folder
    raise ConfigError([f"benchmark.path: {inside}/question.jsonl is not there ({CLONE})"])


def read_prompts(folder: Path) -> Prompts:
    """The judge prompts of the clone that a benchmark's folder lies in, or else our own.

    Raises:
        DataError: the clone's files are not as expected.
    """
    clone = folder.parent.parent
    config, settings = clone / "config" / f"{folder.name}.yaml", clone / "utils" / "judge_utils.py"
    if not (config.is_file() and settings.is_file()):
        return OWN
    categories: Any = _literals(settings).get("JUDGE_SETTINGS")
    try:
        wanted = yaml.safe_load(read_text(config))
        prompts = Prompts(
            system={key: str(one["system_prompt"]) for key, one in categories.items()},
            baselines={key: str(one["baseline"]) for key, one in categories.items()},
            template=str(wanted["prompt_template"]),
            patterns=tuple(re.compile(str(one)).pattern for one in wanted["regex_patterns"]),
            temperature=float(wanted["temperature"]),
            max_tokens=int(wanted["max_tokens"]),
            official=True,
        )
        prompts.template.format(QUESTION="", ANSWER_A="", ANSWER_B="")
    except (
        *(yaml.YAMLError, OSError, re.error),
        *(AttributeError, IndexError, KeyError, TypeError, ValueError),
    ) as error:
        raise DataError(
            f"{config}: lacks a setting, or {settings} has no JUDGE_SETTINGS as expected (restore "
            f"both files: git checkout)"
        ) from error
    return prompts


def _literals(path: Path) -> dict[str, Any]:
    """The literals that a Python file assigns to names, without running it."""
    found: dict[str, Any] = {}

    class Known(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.Constant(found[node.id]) if node.id in found else node

    try:
        body = ast.parse(read_text(path)).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not Python (restore the file: git checkout)") from error
    for statement in body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                try:
                    found[name] = ast.literal_eval(Known().visit(value))
                except ValueError:  # computed, not a literal
                    continue
    return found


NAMES = ("model", "judge", "baseline")
"""Of a record of model_judgment/; they may be missing."""


def read_questions(path: Path) -> list[Question]:
    """Read question.jsonl, of today or as it was before April 2025 (`turns`).

    Raises:
        DataError: a line is not a question, or an id comes twice.
    """
    questions: dict[str, Question] = {}
    for line, record in records(path):
        match record:
            case {"uid": str(key), "category": str(category), "prompt": str(prompt)}:
                pass
            case {
                "question_id": str(key),
                "category": str(category),
                "turns": [{"content": str(prompt)}],
            }:
                pass
            case _:
                raise fault(path, line, "not a question with uid, category and prompt")
        if key in questions:
            raise fault(path, line, f"uid {key} comes twice", ONE_LINE)
        messages = ({"role": "user", "content": prompt},)
        questions[key] = Question(key, messages, category=category, record=record)
    return list(questions.values())


def read_answers(path: Path) -> tuple[str, dict[str, Answer]]:
    """Read a file of model_answer/: the name of the model, and its answers by question id.

    Lines are as the scripts write them today, or as those before April 2025 did (`choices`).
    Tokens are those of the file; 0 where it has none.

    Raises:
        DataError: a line is not an answer, or answers a question in other words than an earlier
            one, or the file is of several models.
    """
    models: set[str] = set()
    answers: dict[str, Answer] = {}
    for line, record in records(path):
        match record:
            case {
                "uid": str(key),
                "messages": [*_, {"content": {"answer": str(text)} | str(text)}],
            }:
                model, answer = record.get("model"), Answer(key, (text,), _tokens(record))
            case {
                "question_id": str(key),
                "choices": [{"turns": [*_, {"content": str(text)} as last]}, *_],
            }:
                model = record.get("model_id")
                answer = Answer(key, (text,), _tokens({"metadata": last}))
            case _:
                raise fault(path, line, "not an answer with uid and messages")
        models |= {str(model)} if model else set()
        if len(models) > 1:
            raise fault(
                path, line, f"a file has one model, got {' and '.join(sorted(models))}", SPLIT
            )
        if answers.setdefault(key, answer).turns != answer.turns:
            raise fault(path, line, f"uid {key} comes twice with other answers", ONE_LINE)
    return next(iter(models), path.stem), answers


def _tokens(record: Mapping[str, Any]) -> int:
    match record:
        case {"metadata": {"token_len": int(tokens)}}:
            return tokens
    return 0


def read_baselines(
    config: BenchmarkConfig, folder: Path, prompts: Prompts, categories: Sequence[str]
) -> tuple[dict[str, str], dict[str, Mapping[str, Answer]]]:
    """Names of the baselines, and the answers of each by question id, both by category.

    Without answers where the benchmark's files have none.

    Raises:
        ConfigError: a category has no baseline, or `benchmark.baseline` is a run without answers.
        DataError: a file of answers is not as expected.
    """
    given = config.baseline
    if given is not None and (path := _outside(Path(given).expanduser(), config.name)):
        name, answers = read_answers(path)
        return dict.fromkeys(categories, name), dict.fromkeys(categories, answers)
    names = {key: given or prompts.baselines.get(key, "") for key in categories}
    for key, name in names.items():
        if not name:
            raise ConfigError([f"benchmark.baseline: required for questions of category {key}"])
    files = {name: folder / "model_answer" / f"{name}.jsonl" for name in set(names.values())}
    found = {name: read_answers(path)[1] for name, path in files.items() if path.is_file()}
    return names, {key: found.get(name, {}) for key, name in names.items()}


def _outside(path: Path, benchmark: str) -> Path | None:
    """The file of answers that `benchmark.baseline` names: itself, or that of a run's folder."""
    if not path.is_dir():
        return path if path.is_file() else None
    answers = path / FOLDER / benchmark / "model_answer"
    files = sorted(answers.glob("*.jsonl"))
    if not files:
        raise ConfigError(
            [f"benchmark.baseline: {answers} holds no file of answers (judge that run first)"]
        )
    if len(files) > 1:
        names = " and ".join(file.name for file in files[:2])
        raise ConfigError([f"benchmark.baseline: {answers} holds {names} (name one of the files)"])
    return files[0]


def answer_record(model: str, question: Question, answer: Answer) -> dict[str, Any]:
    """A line of model_answer/. `tstamp` is 0, since the time of an answer is not known."""
    text = answer.turns[-1]
    told = {"role": "assistant", "content": {"answer": text}}
    return {
        "uid": question.id,
        "ans_id": answer_id(model, question.id, text),
        "model": model,
        "messages": [*question.prompt, told],
        "tstamp": 0.0,
        "metadata": style_counts(text, answer.tokens or estimated_tokens(answer)),
    }


def read_judged(path: Path) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """The line and the record of each question in a file of model_judgment/, with `uid`, which was
    `question_id` before April 2025.

    Raises:
        DataError: a line is not a question with its games.
    """
    for line, record in records(path):
        match record:
            case {"uid": str(key), "games": [{} | None, {} | None]} | {
                "question_id": str(key),
                "games": [{} | None, {} | None],
            } if all(isinstance(record.get(name), str | None) for name in NAMES):
                yield line, {**record, "uid": key}
            case _:
                raise fault(path, line, "not a judgement with uid and two games")


def file_name(model: str) -> str:
    """The name of a model's files and a judge's folder; a hub id has a slash."""
    return model.replace("/", "__")
