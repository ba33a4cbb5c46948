"""Which replies to a prompt make pairs: choices worked out by hand."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from simpo.config.choices import ReplyChoice
from simpo.config.compose import compose_run
from simpo.config.data import DataConfig, SourceConfig
from simpo.data.mixture import load_mixture
from simpo.data.reading.records import to_ranking
from simpo.launch.commands import annotate as command
from simpo.on_policy.annotate import annotate
from simpo.on_policy.pairing import pairs_of_replies, with_wide_margins

SCORES = [1.0, 3.0, 0.0, 3.0, 0.0, 2.0]
"""The first of equal scores is the best, and the first is the worst: replies 1 and 2."""


def of_margins(*margins: float) -> list[dict[str, float]]:
    return [{"chosen_score": 1 + margin, "rejected_score": 1.0} for margin in margins]


def test_the_first_best_and_the_first_worst() -> None:
    for choice in (ReplyChoice.best_worst, ReplyChoice.margin, ReplyChoice.ranked):
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


BY_NUMBER = ["on_policy.reward=numbers_say:so"]


def write_numbers(
    texts: Mapping[str, Sequence[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write replies to prompts, and the reward that reads them as numbers; g is held out."""
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
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "numbers_say.py").write_text(
        "def so(prompt, responses, rule):\n    return [float(text) for text in responses]\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "numbers_say", raising=False)


def test_ranked_records_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All different replies of a prompt, best first. Read for pairs they are best_worst's."""
    texts = {
        "a": ["1", "3", "0", "3.0", "0.0", "2", "2"],
        **{"c": ["0", "2"], "e": ["1", "1"], "f": ["1", "1.0"], "g": ["0", "1", "2", "3"]},
    }
    write_numbers(texts, tmp_path, monkeypatch)
    words = [f"on_policy.folder={tmp_path}", *BY_NUMBER]
    sources = [SourceConfig(path=f"{tmp_path}/train.jsonl", test_path=f"{tmp_path}/test.jsonl")]
    data = DataConfig(name="own", sources=sources)
    annotate(compose_run(words))
    pairs = load_mixture(data)
    by_pairs = [*pairs.train, *pairs.test]
    annotate(compose_run([*words, "on_policy.choice=ranked"]))
    assert "| train | 4       | 2     | 1    | 1 " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "a"}],
        "responses": ["3", "3.0", "2", "1", "0.0", "0"],
        "scores": [3.0, 3.0, 2.0, 1.0, 0.0, 0.0],
        "rule": None,
    }
    measures = json.loads((tmp_path / "measures.json").read_text())
    assert measures["train"]["margin"] == (3 + 2) / 2 and measures["test"]["margin"] == 3
    again = load_mixture(data)
    for both in zip(by_pairs, (*again.train, *again.test), strict=True):
        one, other = ((pair.prompt, pair.responses, pair.score_margin) for pair in both)
        assert one == other
    ranked = load_mixture(data, to_ranking)
    found = {pair.prompt[0]["content"]: pair for pair in (*ranked.train, *ranked.test)}
    assert [turns[0]["content"] for turns in found["a"].responses] == [
        *("3", "0", "3.0", "2", "1", "0.0")
    ]
    assert found["g"].scores == (3, 0, 2, 1) and len(found) == 3
    assert ranked.notes == [
        f"note   {tmp_path}/{split}.jsonl {name}: read as replies with scores, {count}"
        for split, name, count in (
            ("train", "train", "2 records of 2 to 6 replies"),
            ("test", "test", "1 record of 4 replies"),
        )
    ]


@pytest.mark.parametrize(
    ("choice", "model", "model_word", "more"),
    [
        ("best_worst", "builtin:smollm2", "", ""),
        ("ranked", "my/model", "model=... ", " loss.compare=all"),
    ],
)
def test_the_next_command_trains_on_what_was_written(
    choice: str,
    model: str,
    model_word: str,
    more: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ranked records whole, and another model than the built-in one by its own settings."""
    write_numbers({"a": ["1", "3", "0"], "e": ["1", "2"]}, tmp_path, monkeypatch)
    (tmp_path / "settings.json").write_text(json.dumps({"model.path": model}) + "\n")
    command.main([f"on_policy.folder={tmp_path}", *BY_NUMBER, f"on_policy.choice={choice}"])
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"next   python -m simpo.train {model_word}data=jsonl "
        f"'data.sources=[{{path: {tmp_path}/train.jsonl}}]'{more}"
    )


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
    write_numbers(texts, tmp_path, monkeypatch)
    annotate(compose_run([f"on_policy.folder={tmp_path}", *BY_NUMBER, *more]))
    found: dict[str, list[str]] = {}
    for line in (tmp_path / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["prompt"][0]["content"], []).append(row["chosen"] + row["rejected"])
    assert found == pairs
    assert f"| train {counted}" in capsys.readouterr().out
    (held_out,) = (tmp_path / "test.jsonl").read_text().splitlines()
    assert json.loads(held_out)["chosen_score"] == 1
