"""What the replies of a folder are like, worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, DamagedError, RunError
from simpo.on_policy.annotate import annotate
from simpo.on_policy.files import read_stored_replies
from simpo.on_policy.generate import generate
from simpo.on_policy.measures import read_measures, reply_scores, win_rate, write_measures

RULE = {"name": "bullets", "count": 1}
"""A reply scores 1 if it is one bullet, else 0."""
TRAIN = {
    # Scores 1, 0, 0; then a cut one and an empty one. Four texts are different.
    "a": [("- A", 3, 0.5), ("B", 1, 0.0), (" B", 2, 0.0), ("- C", 8, 0.5), (" ", 0, 0.0)],
    # One different reply: no pair, and all scores equal.
    "b": [("- D", 3, 0.0), ("- D", 3, 0.0)],
}
CUT = ("a", 3)


def write(folder: Path, **splits: dict[str, list[tuple[str, int, float]]]) -> Path:
    """A folder of replies: text, tokens and repetition, with seeds from 0."""
    prompts: list[dict[str, Any]] = []
    replies: list[dict[str, Any]] = []
    folder.mkdir(exist_ok=True)
    for split, drawn in splits.items():
        for name, said in drawn.items():
            asked = [{"role": "user", "content": name}]
            prompts.append({"id": name, "split": split, "prompt": asked, "rule": RULE})
            for seed, (text, tokens, repetition) in enumerate(said):
                row = {"id": name, "seed": seed, "response": text, "tokens": tokens}
                replies.append(row | {"ended": (name, seed) != CUT, "repetition": repetition})
    for file, rows in (("prompts", prompts), ("responses", replies)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def annotated(folder: Path, *more: str) -> dict[str, Any]:
    annotate(compose_run([f"on_policy.folder={folder}", "on_policy.reward=rules", *more]))
    return read_measures(folder)


def test_replies_of_which_none_can_be_scored(tmp_path: Path) -> None:
    """A user is told to generate others; rounds measure them, and end."""
    folder = write(tmp_path, train={"a": [("", 0, 0.0)] * 2}, test={"c": [(" ", 1, 0.0)]})
    run = compose_run([f"on_policy.folder={folder}", "on_policy.reward=rules"])
    with pytest.raises(ConfigError, match="no replies in"):
        annotate(run)
    annotate(run, demanding=False)
    found = read_measures(folder)
    assert found["test"]["reward"] is None and found["test"]["pass_rate"] == 0
    assert found["train"]["without_pair"] == found["train"]["empty"] == 1
    assert not (folder / "train.jsonl").read_text()
    assert win_rate(folder, folder) == 0.5


def test_measures_by_hand(tmp_path: Path) -> None:
    found = annotated(write(tmp_path, train=TRAIN, test={"c": [("- E", 5, 0.25)]}))
    assert found["train"] == pytest.approx(
        {
            "prompts": 2,
            "replies": 7,
            "reward": 3 / 5,  # 1, 0, 0 and 1, 1
            "reward_spread": (math.sqrt(2 / 9) + 0) / 2,  # variance of 1, 0, 0 is 2/9
            "pass_rate": 3 / 7,  # the cut and the empty one do not pass
            "reply_tokens": 20 / 7,
            "cut": 1 / 7,
            "empty": 1 / 7,
            "repetition": 1 / 7,
            "distinct": (4 / 5 + 1 / 2) / 2,
            "without_pair": 1 / 2,
            "margin": 1.0,
        }
    )
    # One reply has no spread, and makes no pair.
    assert found["test"] == {
        **{"prompts": 1, "replies": 1, "reward": 1.0, "reward_spread": None, "pass_rate": 1.0},
        **{"reply_tokens": 5.0, "cut": 0.0, "empty": 0.0, "repetition": 0.25, "distinct": 1.0},
        **{"without_pair": 1.0, "margin": None},
    }
    kept = annotated(tmp_path, "on_policy.keep_cut=true")["train"]
    assert (kept["reward"], kept["pass_rate"]) == pytest.approx((4 / 6, 4 / 7))
    assert kept["reward_spread"] == pytest.approx(0.5 / 2)  # 1, 0, 0, 1
    assert kept["cut"] == pytest.approx(1 / 7)


def test_every_kept_reply_has_its_score(tmp_path: Path) -> None:
    annotated(write(tmp_path, train=TRAIN, test={"c": [("- E", 5, 0.0), ("F", 5, 0.0)]}))
    out = -math.inf
    assert reply_scores(tmp_path, "train") == {
        **{("a", 0): 1, ("a", 1): 0, ("a", 2): 0, ("a", 3): out, ("a", 4): out},
        **{("b", 0): 1, ("b", 1): 1},
    }
    assert reply_scores(tmp_path) == {("c", 0): 1, ("c", 1): 0}


@pytest.mark.parametrize(
    ("more", "rate"),
    [
        (["on_policy.pass_reward=0"], 5 / 7),
        (["on_policy.pass_reward=1.5"], 0),
        (["on_policy.reward=rewards_of_mine:half"], None),
        (["on_policy.reward=rewards_of_mine:half", "on_policy.pass_reward=0.5"], 3 / 7),
    ],
)
def test_what_passes(
    more: list[str], rate: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score from which replies pass is known of `rules` alone."""
    (tmp_path / "rewards_of_mine.py").write_text(
        "def half(prompt, responses, rule):\n"
        "    return [0.5 * text.strip().startswith('-') for text in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, train=TRAIN)
    annotated(tmp_path)  # what it leaves is not kept
    found = annotated(tmp_path, *more)["train"].get("pass_rate")
    assert found == (None if rate is None else pytest.approx(rate))


def test_nothing_of_prompts_without_replies(tmp_path: Path) -> None:
    found = annotated(write(tmp_path, train=TRAIN, test={"c": []}))["test"]
    assert found == {
        **{"prompts": 1, "replies": 0, "reward": None, "reward_spread": None, "pass_rate": None},
        **{"reply_tokens": None, "cut": None, "empty": None, "repetition": None, "distinct": None},
        **{"without_pair": 1.0, "margin": None},
    }


def test_no_pair_since_replies_were_cut_off(tmp_path: Path) -> None:
    name, seed = CUT
    folder = write(tmp_path, train={name: [(f"- {n}", 5, 0.0) for n in range(seed + 1)]})
    with pytest.raises(RunError) as caught:
        annotated(folder)
    assert str(caught.value) == (
        f"{folder}: no train prompt has replies with different scores (generate with more "
        "on_policy.seeds, or take those cut off with on_policy.keep_cut=true, or continue "
        "simpo.generate if it was stopped)"
    )


def test_no_pair_is_no_error_of_held_out_prompts_alone(tmp_path: Path) -> None:
    held_out = write(tmp_path / "one", test={"c": [("- E", 5, 0.0), ("- F", 5, 0.0)]})
    assert annotated(held_out).keys() == {"test"}
    equal = write(tmp_path / "two", train={"b": TRAIN["b"]})
    with pytest.raises(RunError, match="no train prompt has replies with different scores"):
        annotated(equal)
    assert read_measures(equal)["train"]["without_pair"] == 1
    annotated(equal, "on_policy.held_out_only=true")


def test_keys_of_others_stay(tmp_path: Path) -> None:
    both = {"train": TRAIN, "test": {"c": [("- E", 5, 0.0)]}}
    first = annotated(write(tmp_path, **both))
    write_measures(tmp_path, {**first, "test": {**first["test"], "kl": 0.5}}, [])
    assert annotated(tmp_path) == {**first, "test": {**first["test"], "kl": 0.5}}
    write(tmp_path, train=TRAIN)
    assert annotated(tmp_path).keys() == {"train"}
    (tmp_path / "measures.json").write_text("[")
    with pytest.raises(DamagedError) as caught:
        annotated(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/measures.json: is not JSON (remove it, and run simpo annotate again)"
    )


def test_how_often_one_beats_another(tmp_path: Path) -> None:
    """Seeds 0 to 4 of one prompt: won, tied, lost, left out by both, left out here alone."""
    said = {
        "own": [("- A", 1, 0.0), ("- B", 1, 0.0), ("C", 1, 0.0), ("", 0, 0.0), ("", 0, 0.0)],
        "base": [("A", 1, 0.0), ("- D", 1, 0.0), ("- C", 1, 0.0), (" ", 0, 0.0), ("E", 1, 0.0)],
    }
    own, base = (
        write(tmp_path / name, train=TRAIN, test={"c": replies, name: replies})
        for name, replies in said.items()
    )
    for folder in (own, base):
        annotated(folder)
    assert win_rate(own, base) == pytest.approx((1 + 0.5 + 0 + 0.5 + 0) / 5)
    assert win_rate(base, own) == pytest.approx(1 - win_rate(own, base))
    other = write(tmp_path / "other", train=TRAIN, test={"d": said["own"]})
    with pytest.raises(ConfigError) as caught:
        win_rate(own, other)
    assert (
        str(caught.value) == f"on_policy.folder: no scores of replies in {other} (simpo annotate)"
    )
    annotated(other)
    with pytest.raises(ConfigError) as caught:
        win_rate(own, other)
    assert str(caught.value) == (
        f"on_policy.folder: {own} and {other} have no held-out prompt with replies of the same "
        "seed (generate both with the same data and on_policy.seeds)"
    )


def test_different_rewards_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lengths_say.py").write_text(
        "def so(prompt, responses, rule):\n    return [len(text) for text in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    one, other = (
        write(tmp_path / name, train=TRAIN, test={"c": [("- E", 5, 0.0)]}) for name in "ab"
    )
    annotated(one)
    annotated(other, "on_policy.reward=lengths_say:so")
    with pytest.raises(ConfigError) as caught:
        win_rate(one, other)
    assert str(caught.value) == (
        f"on_policy.reward: {one} and {other} were scored by different rewards (run simpo annotate "
        "in both with the same one)"
    )


def test_a_damaged_file_of_scores(tmp_path: Path) -> None:
    annotated(write(tmp_path, train=TRAIN))
    file = tmp_path / "reply_scores.jsonl"
    file.write_text(file.read_text() + '{"id": "a"}\n')
    with pytest.raises(DamagedError) as caught:
        reply_scores(tmp_path)
    assert str(caught.value) == f"{file}: line 8 is not a score of a reply (remove that line)"


def test_what_generate_keeps_of_a_reply(tiny_run: list[str], tmp_path: Path) -> None:
    """Ids of held-out replies, as they were drawn: their texts may have other ones."""
    words = ["on_policy.num_prompts=2", "on_policy.max_new_tokens=8", "on_policy.seeds=[1,2]"]
    run = compose_run([*tiny_run, *words, f"on_policy.folder={tmp_path}/own"])
    folder = generate(run)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    held_out = {row["id"] for row in rows if row["split"] == "test"}
    replies = read_stored_replies(folder)
    assert len(replies) == 8
    for reply in replies:
        assert reply.repetition is not None
        assert (reply.ids is not None) == (reply.id in held_out)
        assert reply.ids is None or len(reply.ids) == reply.tokens
