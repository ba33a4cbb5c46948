"""What a judge found about a model, as it lies in a run's folder.

<run>/benchmarks/<benchmark>/
    judged.json      this
    answers.jsonl    the model's answers
    ...              the benchmark's own files, which its own scripts read
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from simpo.config.choices import BenchmarkKind
from simpo.config.errors import DamagedError
from simpo.run.atomic import write_json
from simpo.run.files import is_number, is_there, read_json

FOLDER = "benchmarks"
FILE = "judged.json"
REMEDY = "remove it: simpo judge writes it anew"
EXAMPLE = {"question": str, "model": str, "baseline": str, "preference": float}
"""What an example of a judgement holds."""
NEWER = "if a newer simpo wrote it, use that one; else judge again"


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % intervals.

    Attributes:
        value: in the unit of the benchmark: percent, or for MT-Bench points from 1 to 10.
        low, high: by resampling the questions (all judgements of a question together).
        official_low, official_high: as the benchmark's own script computes them; None if it has
            none.
    """

    value: float
    low: float | None = None
    high: float | None = None
    official_low: float | None = None
    official_high: float | None = None


@dataclass(frozen=True)
class Judged:
    """A model judged on a benchmark.

    Attributes:
        benchmark, kind: of `BenchmarkConfig`.
        model, baseline, judge: names.
        figures: by key, such as win_rate, lc_win_rate, style_win_rate, score, score_turn_1,
            pass_rate; the first is the one to compare models by.
        by_question: the value of each question, by its id: the preference for the model (0 to 1),
            its points or whether it passed. Two models are compared by those that both have.
        questions, asked, malformed: number of questions that count, of verdicts, and of those that
            could not be read, which count nowhere.
        position_bias: share of the questions asked in both orders whose verdicts follow the
            position, minus nothing for ties: 0 is no bias; None if no question was.
        first_share: mean preference for the answer shown first; 0.5 is no bias.
        agreement: share of repeated questions with the same verdict; None if none was.
        mean_chars: mean length of the answers, by `model` and `baseline`.
        examples: questions clearly won and lost: `question`, `model`, `baseline`, `preference`.
        notes: what a reader must know, such as an approximation; a sentence each.
        input_tokens, output_tokens, cost_usd: of all verdicts, also of those paid earlier; the
            cost is None if no price is known, or not the tokens of all.
    """

    benchmark: str
    kind: str
    model: str
    baseline: str
    judge: str
    figures: dict[str, Figure]
    by_question: dict[str, float]
    questions: int
    asked: int
    malformed: int = 0
    position_bias: float | None = None
    first_share: float | None = None
    agreement: float | None = None
    mean_chars: dict[str, float] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = None

    @property
    def has_points(self) -> bool:
        """Whether its values are points from 1 to 10; else they are shares, and figures percent."""
        return self.kind == BenchmarkKind.mt_bench.value

    def write(self, folder: Path) -> None:
        """Write judged.json into the folder of the benchmark."""
        write_json(folder / FILE, asdict(self))

    @staticmethod
    def read(path: Path) -> Judged:
        """Read a judged.json.

        Raises:
            DamagedError: it is not one.
        """
        raw = read_json(path, REMEDY)
        try:
            for kind, values in (
                (Judged, raw),
                *((Figure, one) for one in raw["figures"].values()),
            ):
                if unknown := values.keys() - {one.name for one in fields(kind)}:
                    raise DamagedError(path, f"has an unknown key, {min(unknown)}", NEWER)
            figures = {key: Figure(**values) for key, values in raw.pop("figures").items()}
            found = Judged(figures=figures, **raw)
            _check(found)
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedError(path, "holds no judgement", REMEDY) from error
        return found


def _check(found: Judged) -> None:
    """Check the types of what a file holds, which is any JSON.

    Raises:
        TypeError, KeyError: one is wrong.
    """
    values = [
        (getattr(one, name), kind)
        for one in (found, *found.figures.values())
        for name, kind in get_type_hints(type(one)).items()
    ]
    values += [(one[key], kind) for one in found.examples for key, kind in EXAMPLE.items()]
    if not all(_is_of(value, kind) for value, kind in values):
        raise TypeError


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is as a type hint says; a number of a float's may be whole."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if kind is float:
        return is_number(value)
    if origin is dict:
        return type(value) is dict and all(_is_of(one, inner[1]) for one in value.values())
    if origin is list:
        return type(value) is list and all(_is_of(one, inner[0]) for one in value)
    if origin is UnionType:
        return any(_is_of(value, one) for one in inner)
    return type(value) is kind


def read_judged(run_dir: Path) -> Mapping[str, Judged]:
    """All that was judged of a run, by benchmark.

    Raises:
        DamagedError: a file cannot be read.
    """
    folder = run_dir / FOLDER
    files = [place / FILE for place in sorted(folder.iterdir())] if folder.is_dir() else []
    return {file.parent.name: Judged.read(file) for file in files if is_there(file, REMEDY)}
