"""Each check of train pairs, on both sides of its threshold; and what a mixture leaves out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simpo.config.compose import compose_run
from simpo.config.data import DataConfig, SourceConfig
from simpo.config.errors import ConfigError, DataError
from simpo.config.filters import FilterConfig
from simpo.config.flat import run_id, trajectory
from simpo.data.cleaning.benchmarks import Benchmarks
from simpo.data.cleaning.duplicates import near_duplicates, words
from simpo.data.cleaning.filter import CHECKS, left_out
from simpo.data.mixture import load_mixture
from simpo.data.pairs import Pair
from simpo.data.reading.records import to_pair
from simpo.loop.train import train

EN = "Could you please explain how the engine of a car works?"
FR = "Le moteur brûle de l'essence dans ses cylindres, et la voiture avance."
DE = "Der Motor verbrennt Benzin in seinen Zylindern, und das Auto fährt."
ZH = "发动机在汽缸内燃烧汽油。活塞推动曲轴。于是汽车就能够向前行驶。"
ENGINE = "It burns fuel in its cylinders, and the car moves forward."
SENTENCE = "one two three four five six seven eight"


def pair(prompt: str, chosen: str, rejected: str, place: str = "here") -> Pair:
    return to_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}, place)


def found(key: str, setting: Any, *pairs: Pair, held_out: Sequence[Pair] = ()) -> list[str | None]:
    (check,) = (check for check in CHECKS if check.key == key)
    return check.find(pairs, setting, held_out)


def test_turns_of_another_response_are_no_repetition() -> None:
    a, b, c = ({"role": "assistant", "content": text} for text in "abc")
    first = to_pair({"prompt": "?", "chosen": [a, b], "rejected": [c]}, "first")
    other = to_pair({"prompt": "?", "chosen": [a], "rejected": [b, c]}, "other")
    assert found("filter.exact_duplicates", True, first, other, first) == [
        None, None, "the same as first",
    ]  # fmt: skip


def test_length_ratio() -> None:
    """At four times as long a pair stays, with one character more it goes."""
    pairs = [pair("?", "x" * n, "y" * 10) for n in (40, 41, 2, 3)]
    assert found("filter.max_length_ratio", 4.0, *pairs) == [
        None,
        "chosen is 4.1 times as long as rejected: 41 and 10 characters",
        "rejected is 5.0 times as long as chosen: 10 and 2 characters",
        None,
    ]
    turns = [{"role": "user", "content": "Go on, and on."}, {"role": "assistant", "content": "xx"}]
    several = {"chosen": [{"role": "assistant", "content": "x"}, *turns], "rejected": "abc"}
    assert found("filter.max_length_ratio", 1.5, to_pair({"prompt": "?"} | several, "")) == [None]
    assert found("filter.max_length_ratio", 1.0, replace(pairs[0], rejected=None)) == [None]
    # A call counts as it is written: f({"a": 1})
    function = {"name": "f", "arguments": {"a": 1}}
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    called = to_pair({"prompt": "?", "chosen": [calls], "rejected": "x" * 44}, "")
    assert found("filter.max_length_ratio", 4.0, called) == [None]
    assert found("filter.max_length_ratio", 3.9, called) == [
        "rejected is 4.0 times as long as chosen: 44 and 11 characters"
    ]


def scored(**scores: Any) -> Pair:
    return to_pair({"prompt": "?", "chosen": "a", "rejected": "b"} | scores, "here")


def test_score_margin() -> None:
    pairs = [
        scored(score_chosen=8, score_rejected=7.5),
        scored(chosen_score=8.0, rejected_score=7.6),
        scored(chosen_rating=1, rejected_rating=4),
        scored(**{"chosen-rating": 5.0, "rejected-rating": 5.0}),
        scored(score_chosen=8),
        scored(score_chosen="8.5", score_rejected="8.1"),  # as in a CSV file
        scored(score_chosen=0.7, score_rejected=0.2),  # 0.49999999999999994
    ]
    why = "score of chosen less score of rejected: "
    assert found("filter.min_score_margin", 0.5, *pairs) == [
        None, f"{why}0.4", f"{why}-3", f"{why}0", None, f"{why}0.4", None,
    ]  # fmt: skip
    for odd in (float("nan"), float("inf"), 10**400, "8 of 10"):
        assert scored(score_chosen=odd, score_rejected=1).score_margin is None


FINISHED = [
    "Blue.",
    "42",
    "Paris",
    f"{SENTENCE}.",
    f"{SENTENCE}?  \n",
    f"He said: *{SENTENCE}*",
    f"{SENTENCE} 🙂",
    "Yours sincerely,\nJohn Smith of the Royal Society",
    f"- {SENTENCE}\n- {SENTENCE}",
    f"1. {SENTENCE}\n2. {SENTENCE} nine",
    "Earth, Mercury, Jupiter, Mars, Uranus, Venus, Saturn, Neptune",
    f"## {SENTENCE}",
    f"| {SENTENCE} | nine |",
    "```python\nprint(1)\n```",
    f"    return {SENTENCE.replace(' ', ' + ')}",
    "发动机在汽缸内燃烧汽油。",
    "เครื่องยนต์เผาไหม้น้ำมันในกระบอกสูบ",
    f"{SENTENCE}: https://example.org/engine",
]
CUT = [
    (SENTENCE, "four five six seven eight"),
    (f"All well.\n\n{SENTENCE}, and", "five six seven eight, and"),
    (f"{SENTENCE},", "four five six seven eight,"),
    (f"{SENTENCE} (", "five six seven eight ("),
    (f"- {SENTENCE}.\n- {SENTENCE}", "four five six seven eight"),
    ("发动机在汽缸内燃烧汽", "发动机在汽缸内燃烧汽"),
]


def test_cut_off() -> None:
    finished = [pair("?", text, "B.") for text in FINISHED]
    assert found("filter.cut_off", True, *finished) == [None] * len(FINISHED)
    for text, end in CUT:
        assert found("filter.cut_off", True, pair("?", text, "B."), pair("?", "B.", text)) == [
            f"chosen ends with: {end}",
            f"rejected ends with: {end}",
        ]
    open_block = "Like this:\n```python\nprint(1)"
    assert found("filter.cut_off", True, pair("?", open_block, "B.")) == [
        "chosen ends inside a code block"
    ]
    assert found("filter.cut_off", True, pair("?", SENTENCE.removesuffix(" eight"), "B.")) == [None]


def test_language() -> None:
    pairs = [
        pair(EN, ENGINE, "It is a machine that turns fuel into motion."),
        pair(EN, FR, ENGINE),
        pair(EN, ENGINE, ZH),
        pair(FR, DE, FR + " Oui."),
        pair(FR, FR + " Oui.", FR + " Non."),
        pair(EN, "Oui.", "No."),
        pair(EN, f"```\n{FR}\n```", ENGINE),
        pair("x = 3; print(x)", FR, ENGINE),
        # A tool's result is not what was asked.
        replace(
            pair(FR, FR + " Oui.", FR),
            prompt=({"role": "user", "content": FR}, {"role": "tool", "content": ENGINE}),
        ),
    ]
    assert found("filter.language", True, *pairs) == [
        None,
        "the prompt is in en, chosen in fr",
        "the prompt is in en, rejected in zh",
        "the prompt is in fr, chosen in de",
        None, None, None, None, None,
    ]  # fmt: skip


def test_exact_duplicates() -> None:
    """White space around a text does not count; the replies of a prompt may differ."""
    pairs = [
        pair("Why?", "So.", "No.", "a"),
        pair("Why? ", "So.\n", "No.", "b"),
        pair("Why?", "So!", "No.", "c"),
        pair("Why?", "No.", "So.", "d"),
        pair("Why?", "So!", "No.", "e"),
    ]
    assert found("filter.exact_duplicates", True, *pairs) == [
        None, "the same as a", None, None, "the same as c",
    ]  # fmt: skip
    tools = [replace(pairs[0], tools=({"name": name},)) for name in ("f", "g", "f")]
    assert found("filter.exact_duplicates", True, *tools) == [None, None, "the same as a"]


def test_held_out_prompts() -> None:
    held = [pair("Why?", "So.", "No.", "held 1"), pair("How?", "So.", "No.", "held 2")]
    pairs = [pair("How? ", "a", "b"), pair("how?", "a", "b")]
    assert found("drop_overlap", True, *pairs, held_out=held) == ["the prompt of held 2", None]


def numbered(*ranges: range) -> str:
    return " ".join(f"w{i}" for r in ranges for i in r)


def test_near_duplicates_at_known_jaccard() -> None:
    """92 different words have 90 3-grams; with the last k replaced, 90 - k of 90 + k are shared."""
    texts = [numbered(range(92))]
    texts += [numbered(range(92 - k), range(1000 * k, 1000 * k + k)) for k in (9, 10, 11, 30)]
    repeats = near_duplicates(texts, 0.8)
    assert repeats == [None, (0, 81 / 99), (0, 0.8), None, None]
    assert near_duplicates([*texts, texts[3].upper()], 0.8)[5] == (3, 1.0)
    # 0.56 * 25 is above 14 as a float: the 14 3-grams of one text are among the other's 25.
    assert near_duplicates([numbered(range(27)), numbered(range(16))], 0.56) == [None, (0, 0.56)]
    assert near_duplicates([], 0.8) == []
    assert near_duplicates(["Hi", "hi ", "Hi there", "", " ", "."], 1.0) == [
        None, (0, 1.0), None, None, (3, 1.0), None,
    ]  # fmt: skip


def shingles(text: str) -> set[tuple[str, ...]]:
    split = text.split()
    return {tuple(split[i : i + 3]) for i in range(len(split) - 2)}


def edited_texts(seed: int, number: int) -> Iterator[str]:
    """Texts of a few words out of 40, most of them edits of earlier ones."""
    rng = random.Random(seed)
    texts: list[list[str]] = []
    for _ in range(number):
        text = list(rng.choice(texts)) if texts and rng.random() < 0.7 else []
        text = text or [f"v{rng.randrange(40)}" for _ in range(rng.randrange(3, 60))]
        for _ in range(rng.randrange(4)):
            text[rng.randrange(len(text))] = f"v{rng.randrange(40)}"
        texts.append(text)
        yield " ".join(text)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.95, 1.0])
def test_near_duplicates_are_those_of_all_pairs(threshold: float) -> None:
    """Neither more nor fewer than when each text is compared with all that stay before it.

    A third of the texts have a template in common, which is longer than the rest of them.
    """
    template = " ".join(f"t{i}" for i in range(60))
    texts = list(edited_texts(seed=3, number=400))
    texts[::3] = [f"{template} {text}" for text in texts[::3]]
    sets = [shingles(text) for text in texts]
    expected: list[tuple[int, float] | None] = []
    for index, own in enumerate(sets):
        kept = [j for j in range(index) if expected[j] is None]
        indices = {j: len(own & sets[j]) / len(own | sets[j]) for j in kept}
        best = max(indices.values(), default=0.0)
        first = next((j for j in kept if indices[j] == best), 0)
        expected.append((first, best) if best >= threshold else None)
    assert near_duplicates(texts, threshold) == expected
    assert 20 < sum(repeat is not None for repeat in expected) < 380


def test_near_duplicates_of_pairs() -> None:
    """A long system message that all pairs share does not make them alike.

    The first and the last have 23 different 3-grams each and differ in two of them: 21 of 25.
    """
    system = {"role": "system", "content": numbered(range(200))}
    pairs = [
        to_pair(
            {
                "prompt": [system, {"role": "user", "content": numbered(range(a, a + 10))}],
                "chosen": numbered(range(a, a + 20)),
                "rejected": f"No {end}.",
            },
            f"record {a}{end}",
        )
        for a, end in ((300, "x"), (400, "x"), (300, "y"))
    ]
    assert found("filter.near_duplicates", 0.8, *pairs) == [
        None, None, "Jaccard index 0.840 with record 300x",
    ]  # fmt: skip


def test_words() -> None:
    assert words("Don't SAY 3,5 x") == ["don", "'", "t", "say", "3", ",", "5", "x"]
    assert words("GPU的价格是ab") == ["gpu", "的", "价", "格", "是", "ab"]


THIRTEEN = numbered(range(13))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.txt", f"Name a colour.\n\n{THIRTEEN}\n"),
        ("b.csv", f'id,question\n1,Name a colour.\n2,"{THIRTEEN}"\n'),
        ("b.jsonl", f'{{"prompt": "Name a colour."}}\n{{"turns": ["Ah.", "{THIRTEEN}"]}}\n'),
        ("b.json", json.dumps(["Name a colour.", {"prompt": [
            {"role": "system", "content": "Be terse."}, {"role": "user", "content": THIRTEEN}]}])),
    ],
)  # fmt: skip
def test_benchmarks(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "deep" / "folder.txt").mkdir(parents=True)
    for beside in (".hidden.json", "dataset_infos.json"):
        (tmp_path / "deep" / beside).write_text("{}")
    (tmp_path / "deep" / name).write_text(content)
    pairs = [
        pair(f"First, {THIRTEEN.upper()} at last.", "a", "b"),
        pair(f"First, {numbered(range(12))} at last.", "a", "b"),
        pair("name a colour.", "a", "b"),
        pair("Name a colour. Now.", "a", "b"),
        pair("Be terse.", "a", THIRTEEN),
    ]
    for path in (tmp_path / "deep" / name, tmp_path):
        assert found("filter.benchmarks", [str(path)], *pairs) == [
            f"{name} record 2: {THIRTEEN}",
            None,
            f"{name} record 1: name a colour .",
            None,
            None,
        ]


def test_faults_of_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    Path("odd.jsonl").write_text('{"prompt": "Hi"}\n{"answer": "Hi"}\n')
    Path("bad.jsonl").write_text('{"prompt": \n')
    Path("bad.txt").write_bytes(b"\xff\n")
    Path("dots.txt").write_text(" \n")
    faults = {
        "none": "data.filter.benchmarks: none must hold a .txt, .jsonl, .json, .csv, .tsv, "
        ".parquet or .arrow file",
        "odd.jsonl": "data.filter.benchmarks: odd.jsonl record 2: no prompt in it (name its column "
        "one of prompt, question, instruction, problem, query, input, turns, messages, text, ctx)",
        "bad.jsonl": "data.filter.benchmarks: bad.jsonl record 1: not JSON: Expecting value at "
        "column 11",
        "dots.txt": "data.filter.benchmarks: dots.txt: no prompt in it (leave it out)",
        "bad.txt": "data.filter.benchmarks: bad.txt: cannot be read: 'utf-8' codec can't decode "
        "byte 0xff in position 0: invalid start byte",
    }
    for path, fault in faults.items():
        with pytest.raises(DataError) as caught:
            Benchmarks([path])
        assert str(caught.value) == fault


def test_settings_are_checked(tmp_path: Path) -> None:
    (tmp_path / "b.xlsx").touch()
    with pytest.raises(ConfigError) as caught:
        compose_run(
            [
                "data.filter.max_length_ratio=0.5",
                "data.filter.near_duplicates=0.4",
                f"data.filter.benchmarks=[{tmp_path}/none.jsonl, {tmp_path}/b.xlsx]",
            ]
        )
    assert caught.value.problems == [
        "data.filter.max_length_ratio: must be 1 or more, or null, got 0.5",
        "data.filter.near_duplicates: must be from 0.5 to 1, or null, got 0.4",
        f"data.filter.benchmarks[0]: no such file or folder, got {tmp_path}/none.jsonl",
        "data.filter.benchmarks[1]: must be a .txt, .jsonl, .json, .csv, .tsv, .parquet or "
        f".arrow file, or a folder of them, got {tmp_path}/b.xlsx (convert it)",
    ]


def test_the_settings_decide_the_numbers_of_a_run() -> None:
    plain, filtered = compose_run([]), compose_run(["data.filter.cut_off=true"])
    assert run_id(plain) != run_id(filtered)
    assert trajectory(filtered)["data.filter.cut_off"] is True


def test_a_pair_counts_under_the_first_check() -> None:
    """And one that goes takes no duplicate with it."""
    held = pair("Held?", "So.", "No.")
    pairs = [
        pair("Held?", "So.", "x" * 90),
        pair("Long?", "So.", "x" * 90),
        pair(numbered(range(50)), SENTENCE, "No."),
        pair(numbered(range(50)), SENTENCE + ".", "No."),
        pair(numbered(range(50)), SENTENCE + ".", "No."),
        pair(numbered(range(50)), SENTENCE + "!", "No."),
    ]
    config = DataConfig(
        name="x",
        drop_overlap=True,
        filter=FilterConfig(
            max_length_ratio=20, cut_off=True, exact_duplicates=True, near_duplicates=0.8
        ),
    )
    assert left_out(pairs, [held], config) == [
        "drop_overlap",
        "filter.max_length_ratio",
        "filter.cut_off",
        None,
        "filter.exact_duplicates",
        "filter.near_duplicates",
    ]
    assert left_out(pairs, [held], DataConfig(name="x")) == [None] * 6


ROWS = [
    {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "score_chosen": 2, "score_rejected": 1},
    {"prompt": "How?", "chosen": "So.", "rejected": "No.", "score_chosen": 1, "score_rejected": 1},
    {"prompt": "When?", "chosen": "Now.", "rejected": "No."},
]


def test_what_a_mixture_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Duplicates are found across sources, weights repeat what stays, test pairs all stay."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (("a", ROWS), ("b", [*ROWS[:1], ROWS[2] | {"chosen": "Soon."}])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        SourceConfig(path="a.jsonl", test_path="b.jsonl"),
        SourceConfig(path="b.jsonl", weight=2),
    ]
    settings = FilterConfig(min_score_margin=0.5, exact_duplicates=True)
    config = DataConfig(name="x", sources=sources, filter=settings)
    loaded = load_mixture(config)
    assert [(report.taken, report.left_out) for report in loaded.table] == [
        (2, {"filter.min_score_margin": 1}),
        (2, {}),
        (2, {"filter.exact_duplicates": 1}),
    ]
    assert loaded.notes[-2] == (
        "note   2 of 5 train pairs have no scores, so data.filter.min_score_margin does not leave "
        "them out"
    )
    assert sorted(pair.chosen[0]["content"] for pair in loaded.train) == [
        "Now.", "So.", "Soon.", "Soon.",
    ]  # fmt: skip
    assert loaded == load_mixture(config)
    assert [pair.place for pair in loaded.read] == [
        "a.jsonl train record 1", "a.jsonl train record 2", "a.jsonl train record 3",
        "b.jsonl train record 1", "b.jsonl train record 2",
    ]  # fmt: skip


def test_a_run_counts_what_is_left_out(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its start lines and in data.json."""
    file = tmp_path / "train.jsonl"
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    run = [*tiny_run, "train.max_steps=2", "sample.num_prompts=0", f"run_dir={tmp_path}/run"]
    train(compose_run([*run, "data.filter.exact_duplicates=true"]))
    first, second = json.loads((tmp_path / "run" / "data.json").read_text())["mixture"]
    assert first["left out"] == {"filter.exact_duplicates": 1} and second["left out"] == 0
    assert "| filter.exact_duplicates: 1 | 24    |" in capsys.readouterr().out
