"""Files of judgements of held-out prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpo.config.compose import compose_run
from simpo.config.errors import DataError
from simpo.data.pairs import Message, Pair
from simpo.judging.pairs import Pairs, open_pairs

LINE = {
    "question": "1",
    "prompt": [{"role": "user", "content": "Say it."}],
    "model": "m",
    "answer": "It.",
    "baseline": "chosen",
    "baseline_answer": "Is it?",
    "judge": "j",
    "order": 0,
    "repeat": 0,
    "preference": 1.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "n"}, "another model, judge or baseline than above"),
        ({"answer": None}, "answer must be a text"),
        ({"question": [1]}, "question must be a text"),
        ({"order": "x"}, "order must be 0 or 1"),
        ({"prompt": None}, "prompt must be a list of messages"),
        ({"said": "A"}, "said must be an object with text"),
        ({"said": {"text": "", "more": 1}}, "said must be an object with text"),
        ({"said": {"text": "", "input_tokens": "1"}}, "said must be an object with text"),
        ({}, "question 1 is judged twice, or other answers to it .keep one of both lines."),
        ({"order": 1, "answer": "That."}, "question 1 is judged twice, or other answers to it"),
    ],
)
def test_lines_that_cannot_be_used(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "judgements.jsonl"
    file.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | change))
    with pytest.raises(DataError, match=f"judgements.jsonl:2: {message}"):
        Pairs({}, "chosen", 0).read_annotations(file)


def test_without_a_verdict_there_is_no_win_rate(tmp_path: Path) -> None:
    file = tmp_path / "judgements.jsonl"
    file.write_text(json.dumps(LINE | {"preference": None}))
    pairs = Pairs({}, "chosen", 0)
    _, _, answers, judgements = pairs.read_annotations(file)
    assert pairs.figures(judgements, answers) == ({}, ["No verdict could be read."])


@pytest.mark.parametrize("baseline", ["chosen", "base"])
def test_prompts_of_dialogues(baseline: str, tmp_path: Path) -> None:
    """Those of loss=sft; against another model its replies are not looked at."""
    asked, told = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}
    line = {"messages": [asked, told, asked, told]}
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    sources = f"[{{path: {tmp_path}/train.jsonl, test_path: {tmp_path}/test.jsonl}}]"
    words = ["loss=sft", "data=jsonl", f"data.sources={sources}", f"cache_dir={tmp_path}/cache"]
    words += ["benchmark=pairs", f"benchmark.baseline={baseline}", "judge.reward=own:function"]
    (question,) = open_pairs(compose_run(words)).questions
    assert list(question.prompt) == [asked]


def test_chosen_responses_that_are_no_text() -> None:
    """A call of a tool has no text, and of several turns the first alone is one."""
    asked: Message = {"role": "user", "content": "How warm is it?"}
    text: Message = {"role": "assistant", "content": "Warm."}
    call: Message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}
    responses = {"text": (text,), "call": (call,), "turns": (text, asked, text)}
    made = {key: Pair((asked,), chosen, (text,), key) for key, chosen in responses.items()}
    told = (
        "2 of 3 chosen responses call tools or have several turns: what is compared is the text of "
        "their first turn alone (benchmark.baseline=base compares two models instead)."
    )
    notes = {name: Pairs(made, name, 0).figures([], {})[1] for name in ("chosen", "base")}
    assert told in notes["chosen"] and told not in notes["base"]
    assert "chosen" not in "".join(Pairs({"text": made["text"]}, "chosen", 0).figures([], {})[1])
