"""Which records of which source are used, how often and in which order; every form of record."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from simpo.config.compose import compose_run
from simpo.config.data import DataConfig, SourceConfig
from simpo.config.errors import DataError
from simpo.data.mixture import SplitReport, load_mixture
from simpo.data.reading.records import RecordFault, to_dialogue, to_pair, to_prompt
from simpo.loop.train import train

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def rows(name, count):
    return [
        {"prompt": f"{name} {i}?", "chosen": f"{name} {i}.", "rejected": "?"} for i in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def mixture(*several, seed=42, read_record=to_pair, **settings):
    sources = [SourceConfig(**source) for source in several]
    return load_mixture(
        DataConfig(name="rows", sources=sources, seed=seed, **settings), read_record
    )


def chosen(pairs):
    return [pair.chosen[0]["content"] for pair in pairs]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Ten rows and three held-out ones, with a path that is short in messages."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", rows("a", 10))
    write(tmp_path / "held.jsonl", rows("held", 3))
    return tmp_path


@pytest.mark.parametrize(
    ("weight", "taken", "least", "most"),
    [(0.5, 5, 0, 1), (1.0, 10, 1, 1), (1.3, 13, 1, 2), (2.5, 25, 2, 3), (3.0, 30, 3, 3)],
)
def test_weight(weight, taken, least, most):
    train = chosen(mixture({"path": "a.jsonl", "weight": weight}).train)
    counts = Counter({f"a {i}.": 0 for i in range(10)})
    counts.update(train)
    assert len(train) == taken
    assert len(counts) == 10
    assert set(counts.values()) == {least, most}
    # Whole passes come before the part: no row a second time until all came once.
    for begin in range(0, taken, 10):
        assert len(set(train[begin : begin + 10])) == len(train[begin : begin + 10])


@pytest.mark.parametrize("part", [{"weight": 0.5}, {"weight": 2.5}, {"num_pairs": 5}])
def test_the_seed_decides_which_rows(part):
    source = {"path": "a.jsonl"} | part
    once, again = mixture(source), mixture(source)
    assert once.train == again.train
    others = [Counter(chosen(mixture(source, seed=seed).train)) for seed in range(5)]
    assert any(other != Counter(chosen(once.train)) for other in others)


def test_num_pairs():
    train = chosen(mixture({"path": "a.jsonl", "num_pairs": 4}).train)
    assert len(train) == len(set(train)) == 4
    assert len(mixture({"path": "a.jsonl", "num_pairs": 10}).train) == 10


def test_rows_are_shuffled_before_they_are_taken():
    order = [f"a {i}." for i in range(10)]
    everything = chosen(mixture({"path": "a.jsonl"}).train)
    assert everything != order
    assert sorted(everything) == order
    firsts = [chosen(mixture({"path": "a.jsonl", "num_pairs": 3}, seed=s).train) for s in range(5)]
    assert any(not set(first) <= set(order[:3]) for first in firsts)


def test_test_rows_are_whole_and_in_order():
    loaded = mixture({"path": "a.jsonl", "test_path": "held.jsonl", "weight": 0.2})
    assert chosen(loaded.test) == ["held 0.", "held 1.", "held 2."]
    assert loaded.test[2].place == "held.jsonl test record 3"


def test_a_file_alone_holds_nothing_out():
    assert mixture({"path": "a.jsonl"}).test == []
    held = mixture({"path": "a.jsonl", "test_path": "held.jsonl", "test_split": None})
    assert held.test == []


def test_two_sources_and_the_table(folder):
    write(folder / "b.jsonl", rows("b", 4))
    loaded = mixture(
        {"path": "a.jsonl", "num_pairs": 3, "test_path": "held.jsonl"},
        {"path": "b.jsonl", "weight": 1.5},
    )
    assert Counter(text[0] for text in chosen(loaded.train)) == {"a": 3, "b": 6}
    assert loaded.table == [
        SplitReport("a.jsonl", "train", records=10, bad={}, taken=3),
        SplitReport("a.jsonl", "test", records=3, bad={}, taken=3),
        SplitReport("b.jsonl", "train", records=4, bad={}, taken=6),
    ]


def test_a_source_draws_the_same_rows_whatever_comes_after_it(folder):
    write(folder / "b.jsonl", rows("b", 4))
    alone = mixture({"path": "a.jsonl", "weight": 0.5}).train
    assert mixture({"path": "a.jsonl", "weight": 0.5}, {"path": "b.jsonl"}).train[:5] == alone


def test_the_same_file_twice_draws_anew():
    train = chosen(mixture(*[{"path": "a.jsonl", "num_pairs": 5}] * 2).train)
    assert train[:5] != train[5:]


def test_a_source_only_held_out():
    loaded = mixture(
        {"path": "a.jsonl"},
        {"path": "held.jsonl", "train_split": None, "test_path": "held.jsonl"},
    )
    assert len(loaded.train) == 10
    assert chosen(loaded.test) == ["held 0.", "held 1.", "held 2."]


def test_demo():
    loaded = mixture({"path": "builtin:demo"}, seed=3)
    assert [report.split for report in loaded.table] == ["train", "test"]
    assert all(pair.rule for pair in [*loaded.train, *loaded.test])
    assert not {p.prompt[-1]["content"] for p in loaded.train} & {
        p.prompt[-1]["content"] for p in loaded.test
    }


def test_a_byte_order_mark_and_blank_lines(folder):
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows("ä", 2))
    (folder / "bom.jsonl").write_text(text, encoding="utf-8-sig")
    assert sorted(chosen(mixture({"path": "bom.jsonl"}).train)) == ["ä 0.", "ä 1."]


def test_json(folder):
    (folder / "list.json").write_text(json.dumps(rows("a", 10)))
    write(folder / "lines.json", rows("a", 10))
    expected = chosen(mixture({"path": "a.jsonl"}).train)
    assert chosen(mixture({"path": "list.json"}).train) == expected
    assert chosen(mixture({"path": "lines.json"}).train) == expected


def test_parquet():
    Dataset.from_list(rows("a", 10)).to_parquet("a.parquet")
    Dataset.from_list(rows("held", 3)).to_parquet("held.parquet")
    loaded = mixture({"path": "a.parquet", "test_path": "held.parquet"})
    assert chosen(loaded.train) == chosen(mixture({"path": "a.jsonl"}).train)
    assert chosen(loaded.test) == ["held 0.", "held 1.", "held 2."]


@pytest.mark.parametrize("path", ["a.parquet", "set"])
def test_other_rows_under_the_same_time_stamp(folder, path):
    """Nothing on the way keeps rows by the file's time."""
    (folder / "set").mkdir()
    file = folder / "set" / "train.parquet" if path == "set" else folder / path
    for name in ("a", "b"):
        Dataset.from_list(rows(name, 3)).to_parquet(file)
        os.utime(file, ns=(10**18, 10**18))
        train = chosen(mixture({"path": path, "test_split": None}).train)
        assert sorted(train) == [f"{name} {i}." for i in range(3)]


def test_folder_of_files(folder):
    (folder / "set").mkdir()
    write(folder / "set" / "train.jsonl", rows("a", 10))
    write(folder / "set" / "test.jsonl", rows("held", 3))
    loaded = mixture({"path": "./set"})
    assert chosen(loaded.train) == chosen(mixture({"path": "a.jsonl"}).train)
    assert chosen(loaded.test) == ["held 0.", "held 1.", "held 2."]
    assert loaded.test[0].place == "./set test record 1"


def test_saved_with_splits():
    sets = {"prefs": Dataset.from_list(rows("a", 10)), "held": Dataset.from_list(rows("held", 3))}
    DatasetDict(sets).save_to_disk("saved")
    loaded = mixture({"path": "./saved", "train_split": "prefs", "test_split": "held"})
    assert chosen(loaded.train) == chosen(mixture({"path": "a.jsonl"}).train)
    assert chosen(loaded.test) == ["held 0.", "held 1.", "held 2."]


def test_saved_without_splits_is_not_held_out_from_itself():
    Dataset.from_list(rows("a", 10)).save_to_disk("saved")
    loaded = mixture({"path": "./saved", "test_split": None})
    assert (len(loaded.train), loaded.test) == (10, [])
    with pytest.raises(Exception, match="no such split, only train"):
        mixture({"path": "./saved"})


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ASKED = [user("Why?")]
SYSTEM = {"role": "system", "content": "Be brief."}
LONG = [SYSTEM, user("Hi."), assistant("Hello."), user("Why?")]

FORMS = {
    "plain strings": ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, ASKED),
    "prompt and responses": (
        {"prompt": LONG, "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
        LONG,
    ),
    "prompt of messages, responses of text": (
        {"prompt": LONG, "chosen": "So.", "rejected": "No."},
        LONG,
    ),
    "prompt repeated in the responses": (
        {
            "prompt": LONG,
            "chosen": [*LONG, assistant("So.")],
            "rejected": [*LONG, assistant("No.")],
        },
        LONG,
    ),
    "whole dialogues": (
        {"chosen": [*LONG, assistant("So.")], "rejected": [*LONG, assistant("No.")]},
        LONG,
    ),
    "ultrafeedback": (
        {
            "prompt": "Why?",
            "prompt_id": "1",
            "chosen": [*ASKED, assistant("So.")],
            "rejected": [*ASKED, assistant("No.")],
            "messages": [*ASKED, assistant("So.")],
            "score_chosen": 9.0,
        },
        ASKED,
    ),
    "keys beside role and content": (
        {
            "prompt": [user("Why?") | {"name": "me"}],
            "chosen": [assistant("So.") | {"tool_calls": None}],
            "rejected": "No.",
        },
        ASKED,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_row_forms(form):
    row, prompt = FORMS[form]
    pair = to_pair(row, "here")
    assert pair.prompt == tuple(prompt)
    assert pair.responses == ((assistant("So."),), (assistant("No."),))
    assert (pair.place, pair.rule) == ("here", None)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"system": "Be brief.", "prompt": "Why?"}, [SYSTEM, *ASKED]),
        ({"system_prompt": "Be brief.", "prompt": ASKED}, [SYSTEM, *ASKED]),
        ({"system": "Be brief.", "prompt": LONG}, LONG),
        ({"system": "", "system_prompt": None, "prompt": "Why?", "tools": []}, ASKED),
    ],
)
def test_a_system_column_is_the_system_turn(row, prompt):
    assert to_pair(row | {"chosen": "So.", "rejected": "No."}, "x").prompt == tuple(prompt)
    assert to_prompt(row, "x").prompt == tuple(prompt)


def test_a_system_column_beside_dialogues():
    replies = {"chosen": [*ASKED, assistant("So.")], "rejected": [*ASKED, assistant("No.")]}
    system = {"system": "Be brief."}
    assert to_pair(replies | system, "x").prompt == (SYSTEM, *ASKED)
    imitated = {"messages": [*ASKED, assistant("So.")]} | system
    assert to_dialogue(imitated, "x").prompt == (SYSTEM, *ASKED)


@pytest.mark.parametrize("turns", [[assistant("Hi."), *ASKED], [SYSTEM, assistant("Hi."), *ASKED]])
def test_imitation_needs_a_first_turn_of_the_user(turns):
    row = {"prompt": turns, "chosen": "So.", "rejected": "No."}
    assert to_pair(row, "x").prompt == tuple(turns)
    with pytest.raises(RecordFault) as caught:
        to_dialogue(row, "x")
    assert str(caught.value) == "prompt: begins with the assistant, whose reply answers nothing"


def test_where_every_row_is_bad_none_can_be_left_out(folder):
    write(folder / "odd.jsonl", [{"prompt": "Why?", "chosen": "So.", "rejected": "So."}] * 2)
    with pytest.raises(DataError) as caught:
        mixture({"path": "odd.jsonl", "test_path": "held.jsonl"})
    assert str(caught.value).splitlines()[-1] == (
        "(no record is good: bring them into one of the forms of docs/data.md)"
    )


def test_what_looks_wrong_is_counted(folder):
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    write(
        folder / "odd.jsonl",
        [
            row | {"score_chosen": 1, "score_rejected": 2.5},
            row | {"score_chosen": 2, "score_rejected": 2, "prompt_id": "a", "n": None},
            row | {"score_chosen": 3, "score_rejected": float("nan"), "prompt_id": "b"},
            row | {"score_chosen": 3, "score_rejected": 2},
            row | {"prompt": "\n\nHuman: Why?\n\nAssistant:"},
            row | {"prompt": "Why?\n\nAssistant: So.\n\nHuman: Why?", "extra": 0},
            row | {"prompt": [user("Why?") | {"name": "me", "weight": None}]},
            row | {"chosen": [*ASKED, assistant("a")], "rejected": [*ASKED, assistant("b")]},
            {
                "prompt": "Another?",
                "chosen": [*ASKED, assistant("a")],
                "rejected": [*ASKED, assistant("b")],
            },
        ],
    )
    loaded = mixture({"path": "odd.jsonl", "test_path": "held.jsonl"})
    assert loaded.notes == [
        "note   odd.jsonl train: read as prompt and two texts, 9 records",
        "note   odd.jsonl train: 1 of 9 records: score_chosen is below score_rejected",
        "note   odd.jsonl train: 1 of 9 records: score_chosen equals score_rejected",
        "note   odd.jsonl train: 2 of 9 records: a text contains turns (Human: ...), which are "
        "read as one",
        "note   odd.jsonl train: 1 of 9 records: prompt is not in the dialogue (prompt is ignored)",
        "note   odd.jsonl train: columns not read: prompt_id, extra, prompt[].name",
        "note   held.jsonl test: read as prompt and two texts, 3 records",
        "note   odd.jsonl train: 5 records repeat an earlier one",
    ]
    assert mixture({"path": "a.jsonl", "test_path": "held.jsonl"}).notes == [
        "note   a.jsonl train: read as prompt and two texts, 10 records",
        "note   held.jsonl test: read as prompt and two texts, 3 records",
    ]


def test_a_split_of_which_nothing_comes(folder):
    write(folder / "empty.jsonl", [])
    loaded = mixture({"path": "a.jsonl", "test_path": "empty.jsonl"}, {"path": "empty.jsonl"})
    assert len(loaded.train) == 10 and loaded.test == []
    assert loaded.notes == ["note   a.jsonl train: read as prompt and two texts, 10 records"] + [
        f"note   empty.jsonl {split}: no good record in 0, so none is taken"
        for split in ("test", "train")
    ]


def test_messages_are_read_to_imitate_and_else_not(folder):
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    write(folder / "m.jsonl", [row | {"messages": [*ASKED, assistant("So.")]}])
    assert mixture({"path": "m.jsonl"}, read_record=to_dialogue).notes == [
        "note   m.jsonl train: read as messages, 1 record"
    ]
    assert mixture({"path": "m.jsonl"}).notes == [
        "note   m.jsonl train: read as prompt and two texts, 1 record",
        "note   m.jsonl train: columns not read: messages",
    ]


def test_overlap_of_train_and_test(folder):
    """Two prompts are held out too, one with the same replies; a reply alone is none."""
    again = [
        {"prompt": "held 0?", "chosen": "held 0.\n", "rejected": "?"},
        {"prompt": [user("held 1? ")], "chosen": "Another.", "rejected": "?"},
        {"prompt": "New?", "chosen": "held 2.", "rejected": "?"},
    ]
    write(folder / "again.jsonl", again)
    sources = ({"path": "a.jsonl", "test_path": "held.jsonl"}, {"path": "again.jsonl", "weight": 2})
    loaded = mixture(*sources)
    assert loaded.notes[3:] == [
        "note   4 of 16 train pairs have a prompt that is also held out, 2 of them with the same "
        "replies (data.drop_overlap=true leaves them out of training)"
    ]
    without = mixture(*sources, drop_overlap=True)
    assert [note for note in without.notes if ": read as " not in note] == []
    assert [report.left_out for report in without.table] == [{}, {}, {"drop_overlap": 2}]
    assert sorted(chosen(without.train)) == sorted([f"a {i}." for i in range(10)] + ["held 2."] * 2)
    with pytest.raises(DataError) as caught:
        mixture({"path": "held.jsonl", "test_path": "held.jsonl"}, drop_overlap=True)
    assert str(caught.value) == (
        "data.sources: no record left to train on (held.jsonl train: 3 records, 0 bad, "
        "held.jsonl test: 3 records, 0 bad; 3 left out by data.drop_overlap)"
    )
    assert without.test == loaded.test
    assert [report.taken for report in without.table] == [10, 3, 2]


def test_a_run_says_what_looks_wrong(tiny_run, tmp_path, capsys):
    """In its start lines and in data.json; and what it found of its caches."""
    run = [*tiny_run, "train.max_steps=2", "sample.num_prompts=0"]
    for name in ("train", "test"):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(rows("both", 1)[0] | {"score_chosen": 1}) + "\n")
    train(compose_run([*run, f"run_dir={tmp_path}/once"]))
    for entry in (tmp_path / "cache" / "tokenized").iterdir():
        (entry / "ids.npy").unlink()
    capsys.readouterr()
    train(compose_run([*run, f"run_dir={tmp_path}/again"]))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    overlap = (
        "note   1 of 25 train pairs have a prompt that is also held out, 1 of them with the same "
        "replies (data.drop_overlap=true leaves them out of training)"
    )
    read_as = [
        f"note   {tmp_path}/train.jsonl train: read as prompt and replies as messages, 25 records",
        f"note   {tmp_path}/test.jsonl test: read as prompt and replies as messages, 17 records",
    ]
    assert notes[:3] == [*read_as, overlap]
    assert [re.sub(r"\S+/tokenized/\w+", "ENTRY", note) for note in notes[3:]] == [
        "note   cache: ENTRY is damaged and made anew: ids.npy is missing"
    ] * 2
    assert json.loads((tmp_path / "again" / "data.json").read_text())["notes"] == [
        *read_as,
        overlap,
    ]


def test_white_space_of_a_response_is_kept():
    pair = to_pair({"prompt": "Why?", "chosen": " So.\n", "rejected": "No."}, "here")
    assert pair.chosen == (assistant(" So.\n"),)


def test_rules_out_of_parquet():
    # Parquet gives every rule the arguments of all others, as nulls.
    rules = [{"name": "bullets", "count": 2}, {"name": "json_keys", "keys": ["a"]}, None]
    made = [row | {"rule": rule} for row, rule in zip(rows("a", 3), rules, strict=True)]
    Dataset.from_list(made).to_parquet("rules.parquet")
    assert Dataset.from_parquet("rules.parquet")[0]["rule"]["keys"] is None
    pairs = sorted(
        mixture({"path": "rules.parquet"}).train, key=lambda pair: pair.chosen[0]["content"]
    )
    assert [pair.rule for pair in pairs] == rules


@pytest.mark.parametrize(
    ("name", "train", "test"), [("llmbar", 309, 110), ("pandalm_human", 562, 198)]
)
def test_real_files(name, train, test):
    if not (REAL / f"{name}.train.jsonl").exists():
        pytest.skip(f"no real pairs at {REAL}")
    paths = {"path": f"{REAL}/{name}.train.jsonl", "test_path": f"{REAL}/{name}.test.jsonl"}
    loaded = mixture(paths)
    assert (len(loaded.train), len(loaded.test)) == (train, test)
    assert [report.bad for report in loaded.table] == [{}, {}]
    assert len({pair.place for pair in loaded.train}) == train
