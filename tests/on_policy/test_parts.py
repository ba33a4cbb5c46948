"""Replies that several commands generate in one folder: the pairs are those of one command."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from simpo.config.compose import compose_run
from simpo.config.errors import ConfigError, RunError
from simpo.on_policy.annotate import annotate
from simpo.on_policy.files import read_lines, working_in
from simpo.on_policy.generate import generate
from tests.support.forked import Forked
from tests.support.whole_runs import finish

MADE = ("train.jsonl", "test.jsonl")


@pytest.fixture
def words(tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that draw three replies to eight prompts, in four batches for each seed."""
    code = (
        "def so(prompt, responses, rule):\n    return [sum(map(ord, text)) for text in responses]\n"
    )
    (tmp_path / "sums_say.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sums_say", raising=False)
    return [
        *tiny_run,
        "on_policy.reward=sums_say:so",
        "on_policy.num_prompts=4",
        "on_policy.seeds=[3,1,2]",
        "on_policy.max_new_tokens=3",
        "on_policy.batch_prompts=2",
        "on_policy.keep_cut=true",
    ]


def draw(words: list[str], folder: Path, parts: int, part: int) -> None:
    own = [f"on_policy.folder={folder}", f"on_policy.parts={parts}", f"on_policy.part={part}"]
    generate(compose_run([*words, *own]))


def pairs(words: list[str], folder: Path) -> list[str]:
    annotate(compose_run([*words, f"on_policy.folder={folder}"]))
    return [(folder / name).read_text() for name in MADE]


def test_pairs_do_not_depend_on_parts(words: list[str], tmp_path: Path) -> None:
    """Commands of any parts in any order, some of them killed while they wrote, then all of some
    number of parts."""
    draw(words, tmp_path / "whole", 1, 1)
    expected = pairs(words, tmp_path / "whole")
    assert all(expected)
    luck = random.Random(0)
    for trial in range(3):
        folder = tmp_path / str(trial)
        for _ in range(1 + trial % 2):
            parts = luck.choice((1, 2, 3))
            draw(words, folder, parts, luck.randrange(parts) + 1)
            file = luck.choice(sorted(folder.glob("responses*.jsonl")))
            file.write_bytes(file.read_bytes()[: luck.randrange(file.stat().st_size)])
        parts = 2 + trial % 2
        for part in luck.sample(range(1, parts + 1), parts):
            draw(words, folder, parts, part)
        assert pairs(words, folder) == expected, trial


def test_each_part_has_its_share_of_the_batches(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(words, tmp_path / "own", 2, 1)
    assert "\n8 prompts, 3 replies each, part 1 of 2\n" in capsys.readouterr().out
    assert pairs(words, tmp_path / "own")
    assert capsys.readouterr().out.startswith(
        "note   4 of 8 prompts lack replies with some of the on_policy.seeds [1, 2, 3]: "
        "simpo.generate was stopped (its command continues it)\n|"
    )
    draw(words, tmp_path / "own", 2, 2)
    capsys.readouterr()
    assert pairs(words, tmp_path / "own")
    assert capsys.readouterr().out.startswith("|")
    drawn = [len(read_lines(tmp_path / "own" / f"responses-{part}.jsonl")) for part in (1, 2)]
    assert drawn == [12, 12]


def test_a_seed_of_which_all_replies_are_missing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_batch = [*words, "on_policy.batch_prompts=8", "on_policy.seeds=[1,2]"]
    draw(one_batch, tmp_path / "own", 2, 1)
    assert {row["seed"] for row in read_lines(tmp_path / "own" / "responses-1.jsonl")} == {1}
    capsys.readouterr()
    annotate_words = [*one_batch, "on_policy.folder=" + str(tmp_path / "own")]
    with pytest.raises(RunError, match="no train prompt has replies with different scores"):
        annotate(compose_run(annotate_words))
    assert capsys.readouterr().out.startswith(
        "note   8 of 8 prompts lack replies with some of the on_policy.seeds [1, 2]: "
    )


def test_a_line_that_another_part_is_writing_stays(words: list[str], tmp_path: Path) -> None:
    draw(words, tmp_path, 2, 1)
    file = tmp_path / "responses-1.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    draw(words, tmp_path, 2, 2)
    assert file.read_bytes() == whole[:-5]
    draw(words, tmp_path, 2, 1)
    rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert rows == [json.loads(line) for line in whole.splitlines()]


def test_who_may_work_at_the_same_time(tmp_path: Path) -> None:
    whole = f"on_policy.folder: another process works in {tmp_path} (wait for it)"
    same = (
        f"on_policy.part: another process generates part 1 in {tmp_path} "
        "(wait for it, or set another part)"
    )
    for first, second, told in (
        (1, 2, None),
        (1, 1, same),
        (1, None, whole),
        (None, 1, whole),
        (None, None, whole),
    ):
        with working_in(tmp_path, part=first):
            if told is None:
                with working_in(tmp_path, part=second):
                    continue
            with pytest.raises(ConfigError) as caught, working_in(tmp_path, part=second):
                pass
            assert str(caught.value) == told
    with working_in(tmp_path):
        pass


@pytest.mark.matrix
def test_parts_at_the_same_time(words: list[str], tmp_path: Path) -> None:
    draw(words, tmp_path / "whole", 1, 1)
    own = [f"on_policy.folder={tmp_path}/own", "on_policy.parts=3"]
    started = [
        Forked(["-m", "simpo.generate", *words, *own, f"on_policy.part={part}"])
        for part in (1, 2, 3)
    ]
    for process in started:
        finish(process, 0)
    assert pairs(words, tmp_path / "own") == pairs(words, tmp_path / "whole")
