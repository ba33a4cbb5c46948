"""Single replies with a label, which KTO trains on: from records to rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpo.config.choices import Reasoning
from simpo.config.compose import compose_run
from simpo.config.data import DataConfig, FilterConfig, SourceConfig
from simpo.config.errors import ConfigError, DataError
from simpo.data.chats.chat import Chat
from simpo.data.loader import load_data
from simpo.data.mixture import Mixture, load_mixture
from simpo.data.pairs import Pair, kind_of_pairs
from simpo.data.reading.for_loss import reader_of
from simpo.data.reading.records import RecordFault, to_dialogue, to_labelled, to_pair
from simpo.loop.train import train
from simpo.loss.with_coupled_steps import AotConfig, KtoConfig
from simpo.loss.without_reference import SftConfig
from simpo.model.tokenizer import load_tokenizer

ASKED = {"role": "user", "content": "Why?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("So.", "No."))
RECORD = {"prompt": "Why?", "completion": "So.", "label": True}
SCORES = " (decimals may be scores: write true for a good reply, false for a bad one)"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mixture(*records: Any, columns: dict[str, str] | None = None, **settings: Any) -> Mixture:
    Path("a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = [SourceConfig(path="a.jsonl", columns=columns or {})]
    return load_mixture(DataConfig(name="labels", sources=sources, **settings), to_labelled)


def read(record: dict[str, Any], **settings: Any) -> Pair:
    (pair,) = mixture(record, **settings).train
    return pair


def parts(pair: Pair) -> tuple[Any, Any, Any]:
    return pair.prompt, pair.chosen, pair.rejected


@pytest.mark.parametrize("label", [True, 1, "true", "True", "1"])
def test_a_desirable_reply_is_chosen(label: Any) -> None:
    pair = read(RECORD | {"label": label})
    assert parts(pair) == ((ASKED,), (GOOD,), None)
    assert pair.responses == ((GOOD,),) and pair.names == ("chosen",)


@pytest.mark.parametrize("label", [False, 0, "false", "0"])
def test_an_undesirable_reply_is_rejected(label: Any) -> None:
    pair = read(RECORD | {"completion": "No.", "label": label})
    assert parts(pair) == ((ASKED,), (), (BAD,))
    assert pair.responses == ((BAD,),) and pair.names == ("rejected",)


def test_messages_and_other_columns() -> None:
    messages = {"prompt": [ASKED], "completion": [BAD], "label": False, "system": "Be brief."}
    expected = ({"role": "system", "content": "Be brief."}, ASKED)
    assert parts(read(messages)) == (expected, (), (BAD,))
    assert parts(read({"prompt": "Why?", "response": "No.", "label": False}))[2] == (BAD,)
    cells = {"prompt": json.dumps([ASKED]), "completion": json.dumps([BAD]), "label": "False"}
    assert parts(read(cells)) == ((ASKED,), (), (BAD,))
    sharegpt = {"from": "gpt", "value": "No."}
    assert read(messages | {"completion": sharegpt}).rejected == (BAD,)
    named = {"question": "Why?", "answer": "So.", "thumb": True}
    columns = {"question": "prompt", "answer": "completion", "thumb": "label"}
    assert read(named, columns=columns).chosen == (GOOD,)
    found = mixture(RECORD | {"id": 7})
    assert found.notes == [
        "note   a.jsonl train: read as replies with labels, 1 record, 1 desirable, 0 undesirable",
        "note   a.jsonl train: columns not read: id",
    ]
    more = mixture(RECORD, *(RECORD | {"prompt": f"Why {i}?", "label": False} for i in range(2)))
    assert more.notes == [
        "note   a.jsonl train: read as replies with labels, 3 records, 1 desirable, 2 undesirable"
    ]


def test_a_converted_record_without_a_prompt() -> None:
    """No shape has looked at what a user's function gives."""
    with pytest.raises(RecordFault) as fault:
        to_labelled({"completion": "So.", "label": True}, "x")
    assert str(fault.value) == "prompt: missing (the record has completion, label)"


def test_pairs_are_read_as_pairs() -> None:
    pair = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    assert parts(read(pair)) == ((ASKED,), (GOOD,), (BAD,))
    with_more = pair | {"completion": "Maybe.", "label": True}
    assert parts(read(with_more)) == ((ASKED,), (GOOD,), (BAD,))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"label": 2}, "label: must be true or false, got 2"),
        (
            {"label": 1.0},
            f"label: must be true or false, got 1.0{SCORES}",
        ),
        (
            {"label": None},
            "label: missing (the record has prompt, completion)",
        ),
        ({"completion": " "}, "completion: the response is empty"),
        ({"completion": 3}, "completion: must be text or a list of messages, got a number"),
        (
            {"completion": [ASKED, GOOD]},
            "completion: the first turn must be the assistant's, got user",
        ),
        (
            {"completion": [GOOD, ASKED]},
            "completion: the last turn must be the assistant's, got user",
        ),
        ({"prompt": [ASKED, GOOD]}, "prompt: the last turn must be the user's, got assistant"),
    ],
)  # fmt: skip
def test_faults(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(DataError) as error:
        mixture(RECORD, RECORD | change)
    assert str(error.value).splitlines()[0] == f"a.jsonl train record 2: {fault}"


@pytest.mark.parametrize(("label", "remedy"), [(1.0, SCORES), ("0.0", SCORES), ("good", "")])
def test_no_label_is_one(label: Any, remedy: str) -> None:
    """Also where no record has a proper label, by which the shape would be known."""
    with pytest.raises(DataError) as error:
        mixture(RECORD | {"label": label})
    assert str(error.value).splitlines() == [
        f"a.jsonl train record 1: label: must be true or false, got {label}{remedy}",
        "(no record is good: bring them into one of the forms of docs/data.md)",
    ]


def test_which_loss_reads_what() -> None:
    assert reader_of(KtoConfig()) is to_labelled
    assert reader_of(AotConfig()) is to_pair
    assert reader_of(SftConfig()) is to_dialogue
    with pytest.raises(ConfigError) as error:
        compose_run(["loss=kto", "data.compat=paper"])
    assert str(error.value) == (
        "data.compat: paper applies to preference pairs only (with loss=kto set data.compat=none)"
    )


def test_checks_of_the_data_name_the_reply() -> None:
    """And the same reply as desirable and undesirable is no repetition."""
    cut = "It is so because the sky is blue and the light of the sun is"
    both = [RECORD | {"completion": cut, "label": label} for label in (True, False)]
    settings = FilterConfig(cut_off=True, max_length_ratio=2, exact_duplicates=True)
    found = mixture(RECORD, *both, RECORD | {"label": False}, filter=settings)
    (report,) = found.table
    assert report.left_out == {"filter.cut_off": 2}
    assert sorted(len(pair.chosen) for pair in found.train) == [0, 1]


def test_reasoning_is_dropped() -> None:
    thought = "<think>Hm.</think>No."
    for label, place in ((True, 1), (False, 2)):
        pair = read(RECORD | {"completion": thought, "label": label}, reasoning=Reasoning.drop)
        assert parts(pair)[place] == (BAD,)
        assert parts(pair)[3 - place] == (None if label else ())


def test_tokens_of_a_run(tiny_run: list[str], tmp_path: Path) -> None:
    """Each reply has its place and a mismatched one; what a reply has is that of its pair."""
    file = tmp_path / "mixed.jsonl"
    records = [
        {"prompt": f"Why {i}?", "completion": text, "label": label}
        for i in range(3)
        for text, label in (("So it is.", True), ("No.", False))
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [*tiny_run, "loss=kto", f"data.sources=[{{path: {file}, test_split: null}}]"]
    run = compose_run(words)
    chat = Chat(load_tokenizer(run.model, Path(run.cache_dir)))
    train = load_data(run, chat, Path(run.cache_dir)).train
    again = load_data(run, chat, Path(run.cache_dir)).train
    texts = [chat.tokenizer.decode(max(each.responses[:2], key=len)) for each in train.tokens]
    for each, text, same in zip(train.tokens, texts, again.tokens, strict=True):
        chosen, rejected, mismatched = map(len, each.responses)
        assert mismatched and (chosen == 0) is (rejected > 0) is text.startswith("No.")
        assert [ids.tolist() for ids in each.responses] == [ids.tolist() for ids in same.responses]
    assert train.report.pairs == 6
    assert train.tokens.kind == "replies" and kind_of_pairs([1, 2]) == "pairs and replies"
    places = [int(place.split()[-1]) for place in train.places]
    for at, each in enumerate(train.tokens):
        following = next(
            j % 6
            for j in range(at + 1, at + 6)
            if (places[j % 6] - 1) // 2 != (places[at] - 1) // 2
        )
        source = train.tokens[following].responses[:2]
        assert each.responses[2].tolist() == max(source, key=len).tolist()


def test_without_pairs_there_is_no_accuracy(tiny_run: list[str], tmp_path: Path) -> None:
    """To select by it is refused before weights are loaded."""
    file = tmp_path / "labels.jsonl"
    lines = [RECORD, RECORD | {"prompt": "How?", "label": False}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = f"data.sources=[{{path: {file}, test_path: {file}}}]"
    words = [*tiny_run, "loss=kto", sources, "train.keep_best=true", "sample.num_prompts=0"]
    with pytest.raises(ConfigError) as error:
        train(compose_run([*words, f"run_dir={tmp_path / 'run'}"]))
    assert str(error.value) == (
        "monitor.metric: no such held-out metric, got rewards/accuracies (loss, rewards/chosen, "
        "rewards/rejected, logps/chosen, logps/rejected, chosen_tokens, rejected_tokens)"
    )
