"""The files of AlpacaEval: questions, answers and the judge's prompt, and where they lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simpo.config.errors import ConfigError, DataError
from simpo.config.schema import RunConfig
from simpo.data.pairs import Message
from simpo.judging.jsonl import COPY, SPLIT, read_text, records
from simpo.run.judged import FOLDER

BASELINE = "gpt4_1106_preview"
OUTPUTS = "model_outputs.json"
PROMPT = "evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
PART = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
PLACES = re.compile(r"\{(instruction|output_1|output_2)\}")
OWN_PROMPT = """<|im_start|>system
You compare two answers to the same instruction and say which one people would rather have.
<|im_end|>
<|im_start|>user
# Instruction
{instruction}

# Answer m
{output_1}

# Answer M
{output_2}

# Which answer is better?
Reply with the name of the better answer alone, one letter: m or M.
<|im_end|>"""


def read_outputs(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The generator and the rows of a model_outputs.json.

    Raises:
        DataError: it is not one.
    """
    rows = read_rows(path, ("instruction", "output", "generator"))
    names = sorted({row["generator"] for row in rows})
    if len(names) > 1:
        raise DataError(f"{path}: answers of {names[0]} and {names[1]} ({SPLIT})")
    return names[0], rows


def read_rows(path: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """A list of objects with some texts, each instruction once."""
    rows = [record for _, record in records(path)]
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        for key in texts:
            if not isinstance(row.get(key), str):
                raise DataError(f"{path}: item {number}: {key} must be a text ({COPY})")
        if (first := seen.setdefault(row["instruction"], number)) != number:
            raise DataError(
                f"{path}: item {number}: the instruction of item {first} again (keep one of both)"
            )
    return rows


def questions_file(run: RunConfig) -> tuple[Path, Path | None]:
    """The file of the questions, and the checkout if there is one."""
    remedy = "git clone https://github.com/tatsu-lab/alpaca_eval"
    if run.benchmark.path is None:
        raise ConfigError([f"benchmark.path: required with alpaca_eval, but not given ({remedy})"])
    path = Path(run.benchmark.path).expanduser()
    if path.is_file():
        return path, None
    if (path / "results").is_dir():
        return path / "results" / BASELINE / OUTPUTS, path
    if (path / OUTPUTS).is_file():
        return path / OUTPUTS, None
    raise ConfigError(
        [f"benchmark.path: must be a checkout of alpaca_eval or a {OUTPUTS}, got {path} ({remedy})"]
    )


def baseline_file(run: RunConfig, questions: Path, checkout: Path | None, generator: str) -> Path:
    """The file of the baseline's answers."""
    name = run.benchmark.baseline
    if name is None:
        return questions
    path = Path(name).expanduser()
    folders = [path, path / FOLDER / run.benchmark.name]
    if checkout:
        folders.append(checkout / "results" / name)
    candidates = [path, *(folder / OUTPUTS for folder in folders)]
    if found := next((file for file in candidates if file.is_file()), None):
        return found
    if checkout is None and name in (BASELINE, generator):
        return questions
    where = checkout / "results" if checkout else questions
    raise ConfigError([f"benchmark.baseline: no answers of {name} in {where} ({OUTPUTS})"])


def judge_prompt(checkout: Path | None) -> tuple[list[Message], bool]:
    """The messages of the judge's prompt, with places for texts, and whether it is published.

    Raises:
        DataError: the file cannot be read, or does not hold such a prompt.
    """
    package = find_spec("alpaca_eval")
    candidates = [checkout / "src/alpaca_eval" / PROMPT] if checkout else []
    if package and package.origin:
        candidates.append(Path(package.origin).parent / PROMPT)
    path = next((path for path in candidates if path.is_file()), None)
    text = read_text(path) if path else OWN_PROMPT
    messages = [{"role": role, "content": part.strip()} for role, part in PART.findall(text)]
    places = [place for message in messages for place in PLACES.findall(message["content"])]
    if sorted(places) != ["instruction", "output_1", "output_2"]:
        raise DataError(
            f"{path}: must be parts in <|im_start|> ... <|im_end|>, with {{instruction}}, "
            "{output_1} and {output_2} once each (restore it)"
        )
    return messages, path is not None
