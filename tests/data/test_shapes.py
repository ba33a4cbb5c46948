"""Every shape of record that people have, by small records whose pairs are written by hand."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as fuzz
from hypothesis import strategies as st

from simpo.config.choices import OnBadRecord, PairChoice
from simpo.config.compose import compose_run
from simpo.config.data import FORMATS, DataConfig, SourceConfig
from simpo.config.errors import DataError
from simpo.data.mixture import load_mixture
from simpo.data.reading.records import (
    RecordFault,
    to_dialogue,
    to_labelled,
    to_pair,
    to_prompt,
    to_ranking,
)
from simpo.data.reading.shapes import SHAPES, Gives


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, records):
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def mixture(*records, read_record=to_pair, seed=42, on_bad_record=OnBadRecord.stop, **source):
    write("a.jsonl", records)
    sources = [SourceConfig(path="a.jsonl", **source)]
    config = DataConfig(name="shapes", sources=sources, seed=seed, on_bad_record=on_bad_record)
    return load_mixture(config, read_record)


def error(*records, **settings):
    with pytest.raises(DataError) as caught:
        mixture(*records, **settings)
    return str(caught.value).splitlines()


ASKED, SO, NO = [user("Why?")], [assistant("So.")], [assistant("No.")]
LONG = [user("Hi."), assistant("Hello."), user("Why?")]
HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
HUMAN, GPT = {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}

# What a record looks like, the name and the title of its shape, and the turns of its prompt; the
# replies are "So." and "No.".
PAIRS: dict[str, tuple[Any, str, str, Any]] = {
    "texts": (
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        *("pair", "prompt and two texts", ASKED),
    ),
    "messages": (
        {"prompt": LONG, "chosen": SO, "rejected": NO},
        *("pair", "prompt and replies as messages", LONG),
    ),
    "a message each": (
        {"prompt": ASKED, "chosen": SO[0], "rejected": NO[0]},
        *("pair", "prompt and replies as messages", ASKED),
    ),
    "from and value": (
        {
            "prompt": [HUMAN],
            "chosen": [GPT],
            "rejected": [{"from": "gpt", "value": "No."}],
        },
        *("pair", "prompt and replies as messages", ASKED),
    ),
    "ultrafeedback": (
        {"prompt": "Why?", "chosen": ASKED + SO, "rejected": ASKED + NO, "score_chosen": 8.0},
        *("ultrafeedback", "UltraFeedback binarized", ASKED),
    ),
    "dialogues": (
        {"chosen": LONG + SO, "rejected": LONG + NO},
        *("dialogues", "whole dialogues", LONG),
    ),
    "hh": (
        {"chosen": f"{HH} So.", "rejected": f"{HH} No.\n"},
        *("hh_rlhf", "HH-RLHF text", LONG),
    ),
    "hh with its prompt": (
        {"prompt": HH, "chosen": " So.", "rejected": " No."},
        *("hh_rlhf", "HH-RLHF text", LONG),
    ),
    "hh with its prompt in each": (
        {"prompt": HH, "chosen": f"{HH} So.", "rejected": f"{HH} No."},
        *("hh_rlhf", "HH-RLHF text", LONG),
    ),
    "orca": (
        {"system": "Be brief.", "question": "Why?", "chosen": "So.", "rejected": "No."},
        *("orca", "Orca", [system("Be brief."), *ASKED]),
    ),
    "orca by its other name": (
        {"system": "", "input": "Why?", "chosen": "So.", "rejected": "No."},
        *("orca", "Orca", ASKED),
    ),
    "alpaca": (
        {"instruction": "Why?", "input": "The sky.", "output": ["So.", "No."]},
        *("alpaca", "Alpaca with two outputs", [user("Why?\nThe sky.")]),
    ),
    "alpaca with history": (
        {
            "instruction": "Why?",
            "input": "",
            "history": [["Hi.", "Hello."]],
            "chosen": "So.",
            "rejected": "No.",
        },
        *("alpaca", "Alpaca with chosen and rejected", LONG),
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi."},
                {"from": "gpt", "value": "Hello."},
                HUMAN,
            ],
            "chosen": GPT,
            "rejected": {"from": "gpt", "value": "No."},
        },
        *("sharegpt", "ShareGPT with two replies", [system("Be brief."), *LONG]),
    ),
    "sharegpt with texts": (
        {"conversations": ASKED, "chosen": "So.", "rejected": NO[0]},
        *("sharegpt", "ShareGPT with two replies", ASKED),
    ),
    "openai": (
        {"input": {"messages": LONG}, "preferred_output": SO, "non_preferred_output": NO},
        *("openai", "OpenAI preferences", LONG),
    ),
    "pku": (
        {"prompt": "Why?", "response_0": "No.", "response_1": "So.", "better_response_id": 1},
        *("comparison", "two replies and which is better", ASKED),
    ),
    "pku, safer": (
        {"prompt": "Why?", "response_0": "So.", "response_1": "No.", "safer_response_id": "0"},
        *("comparison", "two replies and which is better", ASKED),
    ),
    "helpsteer 3": (
        {"context": LONG, "response1": "So.", "response2": "No.", "overall_preference": -2},
        *("comparison", "two replies and which is better", LONG),
    ),
    "helpsteer 2 preferences": (
        {"prompt": "Why?", "response_1": "No.", "response_2": "So.", "preference_strength": 1},
        *("comparison", "two replies and which is better", ASKED),
    ),
    "a winner": (
        {"instruction": "Why?", "response_a": "No.", "response_b": "So.", "winner": "model_b"},
        *("comparison", "two replies and which is better", ASKED),
    ),
    "an index of those from 1": (
        {"prompt": "Why?", "response_1": "So.", "response_2": "No.", "chosen": 1.0},
        *("comparison", "two replies and which is better", ASKED),
    ),
    "scores beside": (
        {"prompt": "Why?", "responses": ["Hm.", "No.", "So."], "scores": [2, 1, 3.5]},
        *("replies", "replies with scores", ASKED),
    ),
    "ranks beside": (
        {"question": "Why?", "answers": ["So.", "Hm.", "No."], "ranks": ["1", "2", "3"]},
        *("replies", "replies with scores", ASKED),
    ),
    "ultrafeedback raw": (
        {
            "instruction": "Why?",
            "completions": [
                {"response": "No.", "overall_score": 2.0, "model": "a"},
                {"response": "So.", "overall_score": 7.5, "model": "b"},
                {"response": "Hm.", "overall_score": 3.0, "model": "c"},
            ],
        },
        *("replies", "replies with scores", ASKED),
    ),
    "nectar": (
        {
            "prompt": HH,
            "answers": [{"answer": "No.", "rank": 3.0}, {"answer": "So.", "rank": 1.0}],
        },
        *("replies", "replies with scores", LONG),
    ),
}


TWO_OF_MORE = (
    "uses two of the scored replies (pairs: all of the source makes a pair of each two, "
    "loss.compare=all compares all of them)"
)
OF_THREE = ("scores beside", "ranks beside", "ultrafeedback raw")


@pytest.mark.parametrize("looks", PAIRS)
def test_pairs(looks):
    record, name, title, prompt = PAIRS[looks]
    unused = f"note   a.jsonl train: 2 of 2 records: best_worst {TWO_OF_MORE}"
    for form in (None, name):
        loaded = mixture(record, {**record, "id": 3}, format=form)
        assert [(list(p.prompt), p.responses) for p in loaded.train] == [
            (prompt, (tuple(SO), tuple(NO)))
        ] * 2
        assert loaded.notes == [
            f"note   a.jsonl train: read as {title}, 2 records",
            *([unused] if looks in OF_THREE else []),
            "note   a.jsonl train: columns not read: id",
            "note   a.jsonl train: 1 records repeat an earlier one",
        ]
    (asked,) = mixture(record, read_record=to_prompt).train
    assert (list(asked.prompt), asked.chosen, asked.rejected) == (prompt, (), None)
    loaded = mixture(record, read_record=to_dialogue)
    (imitated,) = loaded.train
    assert not any(TWO_OF_MORE in note for note in loaded.notes)  # it imitates one in any case
    assert (list(imitated.prompt), imitated.chosen, imitated.rejected) == (prompt, tuple(SO), None)


DIALOGUES: dict[str, tuple[Any, str, str]] = {
    "messages": ({"messages": LONG + SO}, "messages", "messages"),
    "conversations": (
        {"conversations": [{"from": "user", "value": "Hi."}, assistant("Hello."), HUMAN, GPT]},
        *("sharegpt", "ShareGPT"),
    ),
    "output": (
        {"instruction": "Why?", "input": None, "output": "So.", "history": [["Hi.", "Hello."]]},
        *("alpaca", "Alpaca"),
    ),
}


@pytest.mark.parametrize("column", DIALOGUES)
def test_dialogues_are_imitated_only(column):
    record, name, title = DIALOGUES[column]
    for form in (None, name):
        loaded = mixture(record, read_record=to_dialogue, format=form)
        (pair,) = loaded.train
        assert [*pair.prompt, *pair.chosen] == LONG + SO
        assert loaded.notes == [f"note   a.jsonl train: read as {title}, 1 record"]
        assert error(record, format=form) == [
            f"a.jsonl train record 1: {column} has no rejected reply (loss=sft imitates it)"
        ]


@pytest.mark.parametrize("reader", [to_dialogue, to_prompt])
def test_a_dialogue_keeps_its_rule(reader):
    rule = {"name": "no_commas"}
    assert reader({"messages": LONG + SO, "rule": rule}, "x").rule == rule
    with pytest.raises(RecordFault, match="rule: unknown rule name 'odd'"):
        reader({"messages": LONG + SO, "rule": {"name": "odd"}}, "x")


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"prompt": "Why?", "id": 1}, "Why?"),
        ({"instruction": "Why?", "input": "Sky."}, "Why?\nSky."),
        ({"question": "Why?"}, "Why?"),
        ({"prompt": json.dumps(ASKED)}, "Why?"),
    ],
)
def test_prompts_alone(record, text):
    for form in (None, "prompt"):
        loaded = mixture(record, read_record=to_prompt, format=form)
        assert loaded.train[0].prompt == (user(text),)
        assert loaded.notes[0] == "note   a.jsonl train: read as prompts, 1 record"
    assert error(record, format="prompt") == [
        "a.jsonl train record 1: a prompt alone has no replies (simpo generate makes some)"
    ]


def test_the_names_of_the_settings_are_those_of_the_shapes():
    assert dict.fromkeys(s.name for s in SHAPES if s.gives is not Gives.nothing) == dict.fromkeys(
        FORMATS
    )


def test_speakers_of_hh_text_stand_at_the_start_of_a_paragraph():
    text = "Human: Say\nHuman: x, or Assistant: y.\n\nAssistant: A.\n\nB Human: C.\n\n\n\nHuman: D?"
    record = {
        "chosen": f"{text}\r\n\r\nAssistant: So.",
        "rejected": f"\n\n{text}\n\nAssistant: No.",
    }
    (pair,) = mixture(record).train
    assert list(pair.prompt) == [
        user("Say\nHuman: x, or Assistant: y."),
        assistant("A.\n\nB Human: C."),
        user("D?"),
    ]
    assert pair.responses == (tuple(SO), tuple(NO))


def test_hh_dialogues_that_part_early():
    begin = "\n\nHuman: Why?\n\nAssistant:"
    (pair,) = mixture(
        {"chosen": f"{begin} Hm?\n\nHuman: Yes.\n\nAssistant: So.", "rejected": f"{begin} No."}
    ).train
    assert list(pair.prompt) == ASKED
    assert pair.responses == ((assistant("Hm?"), user("Yes."), *SO), tuple(NO))


def test_tools_of_sharegpt_and_openai_become_messages():
    """Whether they can be trained on is decided where messages are read."""
    call = {"name": "look", "arguments": {"at": "sky"}}
    calls = [{"type": "function", "function": call}]
    made = {"role": "assistant", "content": "", "tool_calls": calls}
    by_name = {shape.title: shape for shape in SHAPES}
    record = {
        "conversations": [
            HUMAN,
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "blue"},
        ],
        "chosen": GPT | {"weight": 1},
        "rejected": "No.",
        "tools": "[]",
    }
    assert by_name["ShareGPT with two replies"].read(record) == {
        "prompt": [*ASKED, made, {"role": "tool", "content": "blue"}],
        "chosen": [SO[0] | {"weight": 1}],
    }
    assert record["tools"] == "[]"
    tools = [{"type": "function", "function": {"name": "look"}}]
    record = {
        "input": {"messages": ASKED, "tools": tools, "parallel_tool_calls": True},
        "preferred_output": SO,
        "non_preferred_output": NO,
    }
    assert by_name["OpenAI preferences"].read(record) == {
        **{"prompt": ASKED, "chosen": SO, "rejected": NO, "tools": tools},
        "input.parallel_tool_calls": True,
    }
    record["input"] = {"messages": ASKED, "parallel_tool_calls": True}
    record |= {"preferred_output": SO, "non_preferred_output": NO}
    assert mixture(record).notes[1] == (
        "note   a.jsonl train: columns not read: input.parallel_tool_calls"
    )
    assert error(
        {"conversations": [HUMAN, {"from": "function_call", "value": "look"}], "chosen": GPT}
        | {"rejected": "No."}
    )[0] == (
        "a.jsonl train record 1: conversations[1]: a function_call must be JSON with name and "
        "arguments"
    )


COMPARED = {"prompt": "Why?", "response_0": "So.", "response_1": "No."}


def test_a_tie_is_counted_and_makes_no_pair():
    rest = {"prompt": "Why?", "response1": "So.", "response2": "No."}
    signs = [-3, 0, -1, 0]
    loaded = mixture(*[rest | {"overall_preference": sign} for sign in signs], min_margin=1)
    assert [pair.responses for pair in loaded.train] == [(tuple(SO), tuple(NO))] * 2
    assert loaded.notes[:2] == [
        "note   a.jsonl train: read as two replies and which is better, 4 records",
        "note   a.jsonl train: 2 pairs not made: equal scores or a tie",
    ]
    assert (loaded.table[0].records, loaded.table[0].bad, loaded.table[0].taken) == (4, {}, 2)
    (pair,) = mixture(*[rest | {"overall_preference": sign} for sign in signs], min_margin=2).train
    assert pair.place == "a.jsonl train record 1"
    loaded = mixture(COMPARED | {"winner": "response_0"}, COMPARED | {"winner": "tie (bothbad)"})
    assert loaded.notes[1] == "note   a.jsonl train: 1 pairs not made: equal scores or a tie"


def test_of_two_verdicts_the_better_one_counts_and_the_other_is_told():
    loaded = mixture(COMPARED | {"safer_response_id": 1, "better_response_id": 0})
    assert loaded.train[0].responses == (tuple(SO), tuple(NO))
    assert loaded.notes[1] == "note   a.jsonl train: columns not read: safer_response_id"


def test_verdicts_that_name_no_reply():
    assert error(COMPARED | {"preference": "c"})[0] == (
        "a.jsonl train record 1: preference: must be 0, 1 or tie, got c"
    )
    # Read as names, the positive ones would be the wrong way round, so dropping is no remedy.
    lines = error(
        COMPARED | {"preference": 1},
        COMPARED | {"preference": -1},
        on_bad_record=OnBadRecord.drop,
    )
    assert lines == [
        "a.jsonl train record 2: preference: -1 names no reply (if below 0 means that response_0 "
        "is better, set columns: {preference: overall_preference})"
    ]
    (pair,) = mixture(
        COMPARED | {"preference": -1}, columns={"preference": "overall_preference"}
    ).train
    assert pair.responses == (tuple(SO), tuple(NO))


def scored(*scores):
    return {"prompt": "Why?", "responses": [f"r{s}" for s in scores], "scores": list(scores)}


def texts(pairs):
    return sorted(tuple(turns[0]["content"] for turns in pair.responses) for pair in pairs)


def test_best_and_worst():
    loaded = mixture(scored(2, 1, 4, 3), scored(5, 5), scored(1.0, 1.4), min_margin=0.5)
    assert texts(loaded.train) == [("r4", "r1")]
    assert loaded.notes == [
        "note   a.jsonl train: read as replies with scores, 3 records",
        "note   a.jsonl train: 1 pairs not made: equal scores or a tie",
        "note   a.jsonl train: 1 pairs not made: scores closer than min_margin 0.5",
        f"note   a.jsonl train: 1 of 3 records: best_worst {TWO_OF_MORE}",
    ]


def test_all_pairs():
    loaded = mixture(scored(2, 1, 4, 4), pairs=PairChoice.all, min_margin=2)
    assert texts(loaded.train) == [("r4", "r1")] * 2 + [("r4", "r2")] * 2
    assert sorted(pair.place for pair in loaded.train) == [
        f"a.jsonl train record 1 pair {number}" for number in (2, 3, 4, 5)
    ]
    assert loaded.notes[:3] == [
        "note   a.jsonl train: read as replies with scores, 1 record",
        "note   a.jsonl train: 1 pairs not made: equal scores or a tie",
        "note   a.jsonl train: 1 pairs not made: scores closer than min_margin 2",
    ]
    assert texts(mixture(scored(2, 1, 3), pairs=PairChoice.all).train) == [
        *(("r2", "r1"), ("r3", "r1"), ("r3", "r2"))
    ]


def test_the_best_and_a_random_one():
    many = [scored(9, 8, 1, 2, 3)] * 40
    settings = {"pairs": PairChoice.best_random, "min_margin": 2}
    drawn = texts(mixture(*many, **settings).train)
    assert {better for better, _ in drawn} == {"r9"}
    assert {worse for _, worse in drawn} == {"r1", "r2", "r3"}
    unused = f"note   a.jsonl train: 40 of 40 records: best_random {TWO_OF_MORE}"
    assert unused in mixture(*many, **settings).notes
    assert texts(mixture(*many, **settings).train) == drawn
    # Each record has a draw of its own, which records before it do not move.
    more = mixture(scored(5, 1), *many[1:], **settings).train
    other = mixture(*many, seed=7, **settings).train
    first = {pair.place: pair.responses for pair in mixture(*many, **settings).train}
    places = [pair.place for pair in more if pair.place != "a.jsonl train record 1"]
    assert all(first[pair.place] == pair.responses for pair in more if pair.place in places)
    assert any(first[pair.place] != pair.responses for pair in other)
    assert mixture(scored(2, 2), scored(1, 5), **settings).notes[1] == (
        "note   a.jsonl train: 1 pairs not made: equal scores or a tie"
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"responses": ["a"]}, "responses: must list two replies or more"),
        ({"scores": [1]}, "scores: must list a number for each of the 2 responses"),
        ({"scores": [1, True]}, "scores[1]: must be a number, got True"),
        ({"scores": [float("nan"), 1]}, "scores[0]: must be a number, got nan"),
        ({"scores": None}, "responses[0]: must be an object with a score (score, overall_score, "
         "rating, reward, rank)"),
        ({"responses": None}, "responses or completions or answers or generations or replies or "
         "output: missing (the record has prompt, scores)"),
        ({"responses": ["a", ""]}, "rejected: the response is empty"),
        ({"responses": ["a", {"mark": 1}]}, "rejected: must be text or a list of messages, got an "
         "object"),
    ],
)  # fmt: skip
def test_faults_of_scored_replies(change, fault):
    loaded = mixture(scored(2, 1), scored(2, 1) | change, on_bad_record=OnBadRecord.drop)
    assert loaded.table[0].bad == {fault: 1} and len(loaded.train) == 1


def test_scores_are_passed_on():
    record = {"question": "Why?", "chosen": "So.", "rejected": "No."}
    loaded = mixture(record | {"score_chosen": 1, "score_rejected": 2}, record)
    assert loaded.notes[1] == (
        "note   a.jsonl train: 1 of 2 records: score_chosen is below score_rejected"
    )


def test_replies_with_labels_and_single_ratings_are_refused():
    """Of the losses of pairs; `test_labelled.py` reads them for KTO."""
    kto = {"prompt": "Why?", "completion": "So.", "label": True}
    assert error(kto, kto) == [
        "a.jsonl train record 1: records have one reply and a label, and a pair needs two replies "
        "(loss=kto trains on them; or write one with label true and one with label false as chosen "
        "and rejected of their prompt)"
    ]
    rated = {"prompt": "Why?", "response": "So.", "helpfulness": 3, "correctness": 4}
    assert error(rated, on_bad_record=OnBadRecord.drop) == [
        "a.jsonl train record 1: records have one rated reply each, and a pair needs two (group "
        "them by prompt: one record with the lists responses and scores)"
    ]
    assert mixture(kto, read_record=to_prompt).train[0].prompt == tuple(ASKED)


def test_a_record_of_another_shape_is_at_fault():
    """The first record decides, and what it lacks is named."""
    orca = {"question": "Why?", "chosen": "So.", "rejected": "No."}
    openai = {"input": {"messages": ASKED}, "preferred_output": SO, "non_preferred_output": NO}
    assert error(orca, {"prompt": "Why?", "chosen": "So.", "rejected": "No."})[0] == (
        "a.jsonl train record 2: question or input: missing (the record has prompt, chosen, "
        "rejected)"
    )
    assert error(openai, openai | {"input": ASKED}, openai | {"preferred_output": None})[:2] == [
        "a.jsonl train record 2: input: must be an object with messages",
        "a.jsonl train record 3: preferred_output: missing (the record has input, "
        "non_preferred_output)",
    ]
    hh = {"chosen": f"{HH} So.", "rejected": f"{HH} No."}
    assert error(hh, hh | {"rejected": "No."})[0] == (
        "a.jsonl train record 2: rejected: must begin with Human: (HH-RLHF text)"
    )
    alpaca = {"instruction": "Why?", "output": ["So.", "No."]}
    assert error(alpaca, alpaca | {"output": ["a", "b", "c"]}, alpaca | {"history": "Hi."})[:2] == [
        "a.jsonl train record 2: output: must list two replies, the better first, got 3",
        "a.jsonl train record 3: history: must be a list of [instruction, reply] or of messages",
    ]


def test_records_before_the_first_that_fits_are_at_fault():
    good = {"question": "Why?", "chosen": "So.", "rejected": "No."}
    loaded = mixture({"question": "Why?"}, 3, good, on_bad_record=OnBadRecord.drop)
    assert loaded.table[0].bad == {
        "chosen: missing (the record has question)": 1,
        "must be an object with chosen and rejected, got a number": 1,
    }
    assert loaded.notes[0] == "note   a.jsonl train: read as Orca, 3 records"


def test_a_named_shape_stands_above_what_records_look_like():
    record = {"prompt": "Say.", "question": "Why?", "chosen": "So.", "rejected": "No."}
    assert mixture(record).train[0].prompt == (user("Say."),)
    loaded = mixture(record, format="orca")
    assert loaded.train[0].prompt == tuple(ASKED)
    assert error({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, format="orca") == [
        "a.jsonl train record 1: question or input: missing (the record has prompt, chosen, "
        "rejected)",
        "(no record is good: bring them into one of the forms of docs/data.md)",
    ]


def test_columns_under_other_names():
    record = {"question": "Why?", "good": "So.", "bad": "No.", "id": 1}
    columns = {"question": "prompt", "good": "chosen", "bad": "rejected"}
    loaded = mixture(record, columns=columns)
    assert loaded.train[0].responses == (tuple(SO), tuple(NO))
    assert loaded.notes == [
        "note   a.jsonl train: read as prompt and two texts, 1 record",
        "note   a.jsonl train: columns not read: id",
    ]
    nested = {"input": {"text": "Why?", "lang": "en"}, "out": {"chosen": "No."}, "rejected": "So."}
    columns = {"input.text": "prompt", "out.chosen": "rejected", "rejected": "chosen"}
    loaded = mixture(nested, columns=columns)
    assert loaded.train[0].prompt == tuple(ASKED)
    assert loaded.train[0].responses == (tuple(SO), tuple(NO))
    assert loaded.notes[1] == "note   a.jsonl train: columns not read: input"
    dotted = {"input.text": "Why?", "chosen": "So.", "rejected": "No."}
    assert len(mixture(dotted, columns={"input.text": "prompt"}).train) == 1


def test_columns_that_records_lack():
    record = {"question": "Why?", "chosen": "So.", "rejected": "No."}
    assert error(record, columns={"quesion": "prompt"})[0] == (
        "a.jsonl train record 1: columns: the record has no quesion (did you mean question?)"
    )
    assert error(record | {"in": {"text": "a"}}, columns={"in.txt": "prompt"})[0] == (
        "a.jsonl train record 1: columns: the record has no in.txt (did you mean in.text?)"
    )
    assert error(record, columns={"xyz": "prompt"})[0] == (
        "a.jsonl train record 1: columns: the record has no xyz (it has question, chosen, rejected)"
    )
    assert error(record, columns={"question": "promt"}) == [
        "data.sources.columns: question: promt is no column that is read (did you mean prompt?)"
    ]
    assert error(record, columns={"question": "xyz"}) == [
        "data.sources.columns: question: xyz is no column that is read (such as prompt, chosen or "
        "rejected)"
    ]


def test_columns_on_the_command_line():
    write("a.jsonl", [{"question": "Why?", "good": "So.", "bad": "No."}])
    columns = "{question: prompt, good: chosen, bad: rejected}"
    run = compose_run(["data=jsonl", f"data.sources=[{{path: a.jsonl, columns: {columns}}}]"])
    assert load_mixture(run.data).train[0].responses == (tuple(SO), tuple(NO))
    assert run.data.sources[0].pairs is PairChoice.best_worst


def test_messages_in_the_cells_of_a_csv_file():
    """As JSON, or as Python prints lists. Only columns of which the first record has some."""
    record = {"prompt": json.dumps(LONG), "chosen": str(SO), "rejected": json.dumps(NO)}
    (pair,) = mixture(record).train
    assert (list(pair.prompt), pair.responses) == (LONG, (tuple(SO), tuple(NO)))
    cells = {"instruction": "Why?", "generations": "['So.', 'No.']", "ratings": "[2, 1]"}
    assert mixture(cells).train[0].responses == (tuple(SO), tuple(NO))
    cells = {"instruction": "Why?", "output": '["So.", "No."]'}
    assert mixture(cells).train[0].responses == (tuple(SO), tuple(NO))
    cells = {"prompt": "Why?", "response_0": "So.", "response_1": "No.", "winner": "0"}
    assert mixture(cells).train[0].responses == (tuple(SO), tuple(NO))
    cells = {"input": json.dumps({"messages": ASKED}), "preferred_output": json.dumps(SO)}
    cells["non_preferred_output"] = json.dumps(NO)
    assert mixture(cells).train[0].responses == (tuple(SO), tuple(NO))
    texts = {"prompt": "A list?", "chosen": "[1]", "rejected": '{"a": 1}'}
    loaded = mixture(texts, texts | {"chosen": '["So."]', "rejected": '{"value": 1}'})
    assert sorted(pair.chosen[0]["content"] for pair in loaded.train) == ['["So."]', "[1]"]


@pytest.mark.parametrize(
    ("record", "lines"),
    [
        (
            {"query": "Why?", "good": "So. " * 30, "bad": "No.", "id": 7},
            [
                "a.jsonl train record 1: fits no shape of record that is read here "
                "(docs/data.md); it has",
                "  query: Why?",
                "  good: " + "So. " * 15 + "...",
                "  bad: No.",
                "  id: 7",
                "nearest shape: prompt and two texts (prompt, chosen, rejected); it lacks prompt, "
                "chosen, rejected",
                "(set for this source columns: {query: prompt, good: chosen, bad: rejected})",
            ],
        ),
        (
            {"data": {"question": "Why?"}, "chosen_response": "So.", "chosen_model": "m",
             "rejected_response": "No."},
            [
                "nearest shape: prompt and two texts (prompt, chosen, rejected); it lacks prompt, "
                "chosen, rejected",
                "(set for this source columns: {data.question: prompt, chosen_response: chosen, "
                "rejected_response: rejected})",
            ],
        ),
        (
            {"question": "Why?", "preferred": "So.", "dispreferred": "No."},
            [
                "nearest shape: Orca (question, chosen, rejected); it lacks chosen, rejected",
                "(set for this source columns: {preferred: chosen, dispreferred: rejected})",
            ],
        ),
        (
            {"question": "Why?", "answer": "So."},
            [
                "nearest shape: prompt and two texts (prompt, chosen, rejected); it lacks prompt, "
                "chosen, rejected",
                "(name its columns in the source: columns: {question: prompt, ...: chosen, ...: "
                "rejected}, or convert the records: format: module:function, docs/extending.md)",
            ],
        ),
        (
            {"chosen": "So.", "rejected": "No.", "user_query": "Why?"},
            [
                "nearest shape: prompt and two texts (prompt, chosen, rejected); it lacks prompt",
                "(set for this source columns: {user_query: prompt})",
            ],
        ),
        (
            {"prompt": "Why?", "candidates": ["So.", "No."], "scores": [2, 1]},
            [
                "nearest shape: replies with scores (prompt, responses); it lacks responses or "
                "completions or answers or generations or replies or output",
                "(set for this source columns: {candidates: responses})",
            ],
        ),
        (
            {"Prompt": "Why?", "Chosen": "So.", "Rejected": "No."},
            [
                "nearest shape: prompt and two texts (prompt, chosen, rejected); it lacks prompt, "
                "chosen, rejected",
                "(set for this source columns: {Prompt: prompt, Chosen: chosen, Rejected: "
                "rejected})",
            ],
        ),
        (
            {"ask": {"body": "Why?"}, "replies_to_it": {"best": {"text": "So."},
                                                        "worst": {"text": "No."}}},
            [
                "nearest shape: prompt and two texts (prompt, chosen, rejected); it lacks prompt, "
                "chosen, rejected",
                "(set for this source columns: {ask.body: prompt, replies_to_it.best.text: chosen, "
                "replies_to_it.worst.text: rejected})",
            ],
        ),
        (
            {"prompt": "Why?", "responses": [{"text": "So.", "vote": 2}, {"text": "No."}]},
            [
                "nearest shape: replies with scores (prompt, responses), with other kinds of "
                "values",
                "(or convert the records: format: module:function, docs/extending.md)",
            ],
        ),
    ],
)  # fmt: skip
def test_the_nearest_shape_is_told(record, lines):
    told = error(record, on_bad_record=OnBadRecord.drop)
    assert told[0].startswith("a.jsonl train record 1: fits no shape")
    assert told[-len(lines) :] == lines
    if lines[-1].startswith("(set for this source "):
        setting = lines[-1].removeprefix("(set for this source ").removesuffix(")")
        write("a.jsonl", [record])
        run = compose_run(["data=jsonl", f"data.sources=[{{path: a.jsonl, {setting}}}]"])
        (pair,) = load_mixture(run.data).train
        assert pair.chosen[0]["content"].startswith("So.") and pair.rejected == tuple(NO)


def test_what_is_already_named_stays_in_the_setting():
    record = {"query": "Why?", "winner_text": "So.", "loser_text": "No."}
    told = error(record, columns={"query": "prompt"})
    setting = "{query: prompt, winner_text: chosen, loser_text: rejected}"
    assert told[-1] == f"(set for this source columns: {setting})"


def test_own_functions_may_return_several_records(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    Path("two_readers.py").write_text(
        "def both(record):\n"
        "    return [{'prompt': q, 'chosen': 'So.', 'rejected': 'No.'} for q in record['qs']]\n"
    )
    loaded = mixture({"qs": ["a", "b"]}, {"qs": []}, format="two_readers:both")
    assert sorted((pair.prompt[0]["content"], pair.place) for pair in loaded.train) == [
        ("a", "a.jsonl train record 1 pair 1"),
        ("b", "a.jsonl train record 1 pair 2"),
    ]
    assert loaded.notes == ["note   a.jsonl train: read as two_readers:both, 2 records"]


SCALARS = st.sampled_from(
    [
        *(None, True, 0, -1, 2.5, 10**400, "", "a", "-1", "tie", "\ud83d", HH, f"{HH} So."),
        *("[1, 2]", '[{"role": "user", "content": "a"}]', "[{'from': 'gpt', 'value': 3}]"),
        *("{}", "[[["),
    ]
)
TURNS = st.one_of(
    st.fixed_dictionaries({"role": SCALARS, "content": SCALARS}),
    st.fixed_dictionaries(
        {"from": st.sampled_from(["human", "gpt", "function_call", None, 1]), "value": SCALARS}
    ),
    st.fixed_dictionaries({"text": SCALARS, "score": SCALARS}),
    st.fixed_dictionaries({"messages": st.lists(SCALARS, max_size=2)}),
)
VALUES = st.one_of(
    SCALARS, TURNS, st.lists(st.one_of(SCALARS, TURNS, st.lists(SCALARS)), max_size=3)
)


@st.composite
def near_a_shape(draw):
    """A record with the columns of a shape, and some of another."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2))
    names = [draw(st.sampled_from(names)) for shape in shapes for names in shape.needs]
    names += [name for shape in shapes for name in shape.optional if draw(st.booleans())]
    return {name: draw(VALUES) for name in names}


@fuzz(max_examples=400, deadline=None)
@given(
    st.lists(st.one_of(near_a_shape(), VALUES), min_size=1, max_size=3),
    st.sampled_from([to_pair, to_ranking, to_dialogue, to_labelled, to_prompt]),
    st.sampled_from([None, *FORMATS]),
    st.sampled_from(list(PairChoice)),
    st.sampled_from([{}, {"input.text": "prompt"}, {"prompt": "chosen", "chosen": "rejected"}]),
)
def test_any_record_is_read_or_at_fault(records, read_record, form, pairs, columns):
    """Nothing but a fault leaves a reader, and all that is told can be printed."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "a.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        source = SourceConfig(path=str(file), format=form, pairs=pairs, columns=columns)
        config = DataConfig(name="x", sources=[source], on_bad_record=OnBadRecord.drop)
        try:
            loaded = load_mixture(config, read_record)
        except DataError as error:
            str(error).encode()
        else:
            "".join([*loaded.notes, *loaded.table[0].bad]).encode()
