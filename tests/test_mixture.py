"""Which rows of which source are trained on, how often and in which order; and every row form."""

import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from simpo.config import DataConfig, SourceConfig
from simpo.data.mixture import SplitReport, load_mixture
from simpo.data.rows import to_pair

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def rows(name, count):
    return [
        {"prompt": f"{name} {i}?", "chosen": f"{name} {i}.", "rejected": "?"} for i in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def mixture(*sources, seed=42):
    sources = [SourceConfig(**source) for source in sources]
    return load_mixture(DataConfig(name="rows", sources=sources, seed=seed))


def chosen(pairs):
    return [pair.chosen for pair in pairs]


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
    assert loaded.test[2].place == "held.jsonl test row 3"


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
        SplitReport("a.jsonl", "train", rows=10, bad={}, taken=3),
        SplitReport("a.jsonl", "test", rows=3, bad={}, taken=3),
        SplitReport("b.jsonl", "train", rows=4, bad={}, taken=6),
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
    assert all(pair.rule for pair in loaded.train + loaded.test)
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


def test_folder_of_files(folder):
    (folder / "set").mkdir()
    write(folder / "set" / "train.jsonl", rows("a", 10))
    write(folder / "set" / "test.jsonl", rows("held", 3))
    loaded = mixture({"path": "./set"})
    assert chosen(loaded.train) == chosen(mixture({"path": "a.jsonl"}).train)
    assert chosen(loaded.test) == ["held 0.", "held 1.", "held 2."]
    assert loaded.test[0].place == "./set test row 1"


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
    assert (pair.chosen, pair.rejected, pair.place, pair.rule) == ("So.", "No.", "here", None)


def test_white_space_of_a_response_is_kept():
    pair = to_pair({"prompt": "Why?", "chosen": " So.\n", "rejected": "No."}, "here")
    assert pair.chosen == " So.\n"


def test_rules_out_of_parquet():
    # Parquet gives every rule the arguments of all others, as nulls.
    rules = [{"name": "bullets", "count": 2}, {"name": "json_keys", "keys": ["a"]}, None]
    made = [row | {"rule": rule} for row, rule in zip(rows("a", 3), rules, strict=True)]
    Dataset.from_list(made).to_parquet("rules.parquet")
    assert Dataset.from_parquet("rules.parquet")[0]["rule"]["keys"] is None
    pairs = sorted(mixture({"path": "rules.parquet"}).train, key=lambda pair: pair.chosen)
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
