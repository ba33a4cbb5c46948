"""Which replies to a prompt make pairs: choices worked out by hand."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from simpo.config.choices import ReplyChoice
from simpo.config.compose import compose_run
from simpo.on_policy.annotate import annotate
from simpo.on_policy.pairing import pairs_of_replies, with_wide_margins

SCORES = [1.0, 3.0, 0.0, 3.0, 0.0, 2.0]
"""The first of equal scores is the best, and the first is the worst: replies 1 and 2."""


def of_margins(*margins: float) -> list[dict[str, float]]:
    return [{"chosen_score": 1 + margin, "rejected_score": 1.0} for margin in margins]


def test_the_first_best_and_the_first_worst() -> None:
    for choice in (ReplyChoice.best_worst, ReplyChoice.margin):
        assert pairs_of_replies(SCORES, choice, "a") == [(1, 2)]


def test_each_two_of_different_scores() -> None:
    found = pairs_of_replies(SCORES, ReplyChoice.all, "a")
    assert len(found) == 13
    assert set(found) == {(i, j) for i, j in permutations(range(6), 2) if SCORES[i] > SCORES[j]}


def test_the_best_with_any_worse_one() -> None:
    """Drawn by the prompt: each worse reply about as often, and for a prompt always the same."""
    names = [f"prompt {i}" for i in range(400)]
    drawn = [pairs_of_replies(SCORES, ReplyChoice.best_random, name) for name in names]
    counts = Counter(pair for (pair,) in drawn)
    assert counts.keys() == {(1, 0), (1, 2), (1, 4), (1, 5)}
    assert all(75 <= count <= 125 for count in counts.values()), counts
    assert drawn == [pairs_of_replies(SCORES, ReplyChoice.best_random, name) for name in names]


@pytest.mark.parametrize("choice", ReplyChoice)
def test_equal_scores_make_no_pair(choice: ReplyChoice) -> None:
    assert pairs_of_replies([1.0, 1.0, 1.0], choice, "a") == []


def test_narrow_margins() -> None:
    """The median of 1, 2, 3, 4 is 2.5. Of equal margins none is narrow."""
    pairs = of_margins(4, 1, 3, 2)
    assert with_wide_margins(pairs, 0.5) == of_margins(4, 3)
    assert with_wide_margins(pairs, 0.9) == of_margins(4)
    assert with_wide_margins(of_margins(1, 1, 1), 0.5) == of_margins(1, 1, 1)
    assert with_wide_margins([], 0.5) == []


@pytest.mark.parametrize(
    ("more", "pairs", "counted"),
    [
        ([], {"ab": ["30"], "c": ["20"], "d": ["90"]}, "| 5       | 3     | 1    | 1 "),
        (
            ["on_policy.choice=margin"],
            {"ab": ["30"], "d": ["90"]},
            "| 5       | 2     | 1    | 1                                | 1 ",
        ),
        (
            ["on_policy.choice=margin", "on_policy.margin_quantile=0.9"],
            {"d": ["90"]},
            "| 5       | 1     | 1    | 1                                | 2 ",
        ),
        (
            ["on_policy.choice=all"],
            {"ab": ["31", "30", "10"], "c": ["20"], "d": ["90"]},
            "| 5       | 5     | 1    | 1 ",
        ),
    ],
)
def test_pairs_of_a_folder(
    more: list[str],
    pairs: dict[str, list[str]],
    counted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Replies are numbers, which are their scores. Margins are 3, 2 and 9; the held-out one is 1,
    and its own split's median."""
    texts = {"ab": "310", "c": "02", "d": "90", "e": "11", "f": ["-1", "-1.0"], "g": "01"}
    prompts: list[dict[str, Any]] = []
    replies: list[dict[str, Any]] = []
    for name, said in texts.items():
        split = "test" if name == "g" else "train"
        asked = [{"role": "user", "content": name}]
        prompts.append({"id": name, "split": split, "prompt": asked, "rule": None})
        replies += [
            {"id": name, "seed": seed, "response": text, "tokens": 1, "ended": True}
            for seed, text in enumerate(said)
        ]
    for file, rows in (("prompts", prompts), ("responses", replies)):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "numbers_say.py").write_text(
        "def so(prompt, responses, rule):\n    return [float(text) for text in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numbers_say", raising=False)
    words = [f"on_policy.folder={tmp_path}", "on_policy.reward=numbers_say:so", *more]
    annotate(compose_run(words))
    found: dict[str, list[str]] = {}
    for line in (tmp_path / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["prompt"][0]["content"], []).append(row["chosen"] + row["rejected"])
    assert found == pairs
    assert f"| train {counted}" in capsys.readouterr().out
    (held_out,) = (tmp_path / "test.jsonl").read_text().splitlines()
    assert json.loads(held_out)["chosen_score"] == 1
