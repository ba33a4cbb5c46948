"""Records that could be read the wrong way round or as other text, by pairs written by hand."""

import json

import pytest

from simpo.config.choices import OnBadRecord
from simpo.data.reading.records import to_dialogue, to_prompt
from tests.data.test_shapes import ASKED, LONG, NO, SO, error, folder, mixture, user

__all__ = ["folder"]
DROP = {"on_bad_record": OnBadRecord.drop}
TWO = {"prompt": "Why?", "response_a": "So.", "response_b": "No."}
FROM_0 = {"prompt": "Why?", "response_0": "So.", "response_1": "No."}
FROM_1 = {"prompt": "Why?", "response_1": "So.", "response_2": "No."}
SIGNED = {"prompt": "Why?", "response1": "No.", "response2": "So."}
TIE = "note   a.jsonl train: 1 pairs not made: equal scores or a tie"


def replies(loaded):
    return [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in loaded.train]


@pytest.mark.parametrize("strength", [2, -2, "2", "slightly"])
@pytest.mark.parametrize("column", ["preference_strength", "overall_preference"])
def test_a_named_winner_stands_above_a_strength(column, strength):
    loaded = mixture(TWO | {"preference": "A", column: strength})
    assert replies(loaded) == [("So.", "No.")]
    assert loaded.notes[1] == f"note   a.jsonl train: columns not read: {column}"


def test_a_winner_that_only_later_records_name():
    assert error(
        SIGNED | {"preference": None, "overall_preference": 2},
        SIGNED | {"preference": 1, "overall_preference": 2},
        **DROP,
    ) == [
        "a.jsonl train record 2: preference names the better reply, but an earlier record has "
        "overall_preference alone (leave such records out)"
    ]


@pytest.mark.parametrize(
    ("rest", "value", "told"),
    [
        (
            FROM_1,
            0,
            "preference: 0 is neither response_1 nor response_2, so other records may be the wrong "
            "way round (set columns: {response_1: response_0, response_2: response_1} if it counts "
            "from 0)",
        ),
        (
            FROM_0,
            "2.0",
            "preference: 2.0 is neither response_0 nor response_1, so other records may be the "
            "wrong way round (set columns: {response_0: response_1, response_1: response_2} if it "
            "counts from 1)",
        ),
        (
            TWO,
            1,
            "preference: 1 is neither response_a nor response_b, so other records may be the wrong "
            "way round (set columns: {response_a: response_0, response_b: response_1} if it counts "
            "from 0, or columns: {response_a: response_1, response_b: response_2} if it counts "
            "from 1)",
        ),
        (
            FROM_0,
            "response_7",
            "preference: response_7 is neither response_0 nor response_1, so other records may be "
            "the wrong way round (must be 0 or 1)",
        ),
    ],
)
def test_indices_that_count_from_another_number(rest, value, told):
    records = [rest | {"preference": value}, rest | {"preference": "tie"}]
    assert error(*records, **DROP) == [f"a.jsonl train record 1: {told}"]


def test_the_remedies_for_indices():
    columns = {"response_1": "response_0", "response_2": "response_1"}
    records = [FROM_1 | {"preference": value} for value in (0, 1)]
    assert sorted(replies(mixture(*records, columns=columns))) == [("No.", "So."), ("So.", "No.")]
    columns = {"response_0": "response_1", "response_1": "response_2"}
    (pair,) = replies(mixture(FROM_0 | {"preference": 2}, columns=columns))
    assert pair == ("No.", "So.")


@pytest.mark.parametrize("column", ["preference_strength", "overall_preference"])
def test_preferences_of_one_sign_only_are_sizes(column):
    records = [SIGNED | {column: 1 + index % 5} for index in range(10)]
    assert error(*records, **DROP) == [
        f"a.jsonl train: {column} is never below 0, so it does not tell which reply is better "
        "(name the column that does, such as columns: {label: preference})"
    ]
    assert len(mixture(*records[:9]).train) == 9
    assert len(mixture(*records[:9], SIGNED | {column: -1}).train) == 10
    assert len(mixture(*records, read_record=to_prompt).train) == 10


PRINTED = "[{'role': 'assistant', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]"


@pytest.mark.parametrize(
    "text", [PRINTED, f"array({PRINTED})", json.dumps(SO), ' {"from": "gpt", "value": "So."}']
)
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_messages_that_are_left_as_text(column, text):
    good = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    assert error(good, good | {column: text})[0] == (
        f"a.jsonl train record 2: {column}: is the text of messages, and the column was not read "
        "as such (write messages as JSON in every record; a reply that is such a text goes into a "
        "message)"
    )
    said = [{"role": "assistant", "content": PRINTED}]
    (pair,) = mixture({"prompt": "Why?", "chosen": said, "rejected": "No."}).train
    assert pair.chosen[0]["content"] == PRINTED


def test_messages_that_are_left_as_text_of_one_reply():
    record = {"instruction": "Why?", "output": "So."}
    for column, name in (("instruction", "prompt"), ("output", "output")):
        (line, _) = error(record, record | {column: PRINTED}, read_record=to_dialogue)
        assert line == (
            f"a.jsonl train record 2: {name}: is the text of messages, and the column was not read "
            "as such (write messages as JSON in every record; a reply that is such a text goes "
            "into a message)"
        )


def test_the_hint_for_lists_that_are_no_json():
    assert error({"chosen": PRINTED, "rejected": PRINTED, "scores": "[1 2]"})[4:] == [
        "(chosen, rejected, scores: lists as text that is not JSON; write JSON)"
    ]


def test_lists_of_texts_are_no_prompt():
    record = {"prompt": '["Why?", "And now?"]', "response_a": '["So."]', "response_b": '["No."]'}
    assert error(record | {"winner": "model_a"})[0] == (
        "a.jsonl train record 1: prompt: is a JSON list of texts (make messages of its turns, "
        "format: module:function)"
    )
    assert len(mixture({"prompt": '["Why?" is a text', "chosen": "So.", "rejected": "No."}).train)


@pytest.mark.parametrize("scores", ["ratings", "scores", "rating", "score"])
def test_outputs_with_scores(scores):
    for outputs, numbers in ((["No.", "So."], [1, 5]), (["No.", "So.", "Hm."], [1, 5, 2])):
        loaded = mixture({"instruction": "Why?", "output": outputs, scores: numbers})
        assert replies(loaded) == [("So.", "No.")]
        assert loaded.notes[0] == "note   a.jsonl train: read as replies with scores, 1 record"
        assert len(loaded.notes) == len(outputs) - 1  # of three replies, one is not used


def test_outputs_with_scores_in_later_records_only():
    record = {"instruction": "Why?", "output": ["No.", "So."]}
    told = "output has scores, which are not read (set format: replies)"
    assert error(record, record | {"ratings": [1, 5]}, **DROP) == [
        f"a.jsonl train record 2: {told}"
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("response_b", "response_a"), ("B", "A"), ("model_b", "model_a")]
)
@pytest.mark.parametrize("prompt", ["prompt", "question", "instruction"])
def test_chosen_may_name_a_reply(prompt, chosen, rejected):
    record = {prompt: "Why?", "response_a": "No.", "response_b": "So."}
    named = record | {"chosen": chosen, "rejected": rejected}
    tie = record | {"chosen": "tie", "rejected": "tie"}
    loaded = mixture(tie, named)
    assert replies(loaded) == [("So.", "No.")]
    assert loaded.notes[1] == TIE
    (pair,) = replies(mixture(record | {"chosen": "So.", "rejected": "No."}))
    assert pair == ("So.", "No.")
    assert error(record | {"chosen": "So.", "rejected": "No."}, named, **DROP) == [
        "a.jsonl train record 2: chosen names a reply, and is not read as such (set format: "
        "comparison)"
    ]
    letters = {prompt: "Why?", "response_a": "B", "response_b": "A", "chosen": "A", "rejected": "B"}
    assert replies(mixture(letters)) == [("A", "B")]


def test_chosen_may_be_an_index():
    assert replies(mixture(FROM_0 | {"chosen": 0, "rejected": 1})) == [("So.", "No.")]
    assert error(FROM_0 | {"chosen": 2, "rejected": 1})[0].startswith(
        "a.jsonl train record 1: chosen: 2 is neither response_0 nor response_1"
    )


def test_one_column_judges_a_whole_split():
    loaded = mixture(
        FROM_0 | {"better_response_id": 0, "safer_response_id": 1},
        FROM_0 | {"better_response_id": None, "safer_response_id": 1},
        **DROP,
    )
    assert replies(loaded) == [("So.", "No.")]
    assert loaded.faults == [
        (
            "a.jsonl train record 2",
            "better_response_id: missing (it says which reply is better in other records)",
        )
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": "Why?", "chosen": SO, "rejected": NO},
        {"question": "Why?", "chosen": "So.", "rejected": "No."},
        {"instruction": "Why?", "output": ["So.", "No."]},
        {"question": "Why?", "responses": ["So.", "No."], "scores": [2, 1]},
        FROM_0 | {"winner": 0},
    ],
)
def test_earlier_turns_go_before_any_prompt_of_one_text(record):
    for history in ([["Hi.", "Hello."]], LONG[:2], json.dumps(LONG[:2])):
        (pair,) = mixture(record | {"history": history}).train
        assert list(pair.prompt) == LONG
        (asked,) = mixture(record | {"history": history}, read_record=to_prompt).train
        assert list(asked.prompt) == LONG
    # The first row of a table often has none.
    first, second = mixture(record | {"history": None}, record | {"history": str(LONG[:2])}).train
    assert sorted([list(first.prompt), list(second.prompt)], key=len) == [ASKED, LONG]
    wrong = {"Hi.": "history: must be a list of [instruction, reply] or of messages"}
    wrong[json.dumps([user("Hi.")])] = "history: must end with a reply"
    for history, fault in wrong.items():
        assert error(record | {"history": history})[0] == f"a.jsonl train record 1: {fault}"


def test_replies_without_a_score_are_left_out():
    beside = {"prompt": "Why?", "responses": ["Hm.", "No.", "So."], "scores": [None, 1, 3]}
    inside = {
        "prompt": "Why?",
        "responses": [
            {"text": "Hm.", "score": None},
            {"text": "No.", "score": 1},
            {"text": "So.", "score": 3},
        ],
    }
    for record in (beside, inside):
        assert replies(mixture(record)) == [("So.", "No.")]
    loaded = mixture(beside, beside | {"scores": [None, None, 3]})
    assert loaded.notes[1] == (
        "note   a.jsonl train: 1 pairs not made: fewer than two replies have a score"
    )


def test_equal_texts_make_no_pair():
    good = {"prompt": "Why?", "responses": ["No.", "So."], "scores": [1, 2]}
    loaded = mixture(good, good | {"responses": ["So.", " So.\n"]})
    assert replies(loaded) == [("So.", "No.")]
    assert loaded.notes[1] == (
        "note   a.jsonl train: 1 pairs not made: two replies of the same text"
    )


def test_optional_columns_may_be_absent():
    record = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    loaded = mixture(record, record | {"sys": "Be brief."}, columns={"sys": "system"})
    assert sorted(len(pair.prompt) for pair in loaded.train) == [1, 2]
    assert error(record, record, columns={"sys": "system"}) == [
        "a.jsonl train: columns: no record has sys"
    ]


@pytest.mark.parametrize(
    "word",
    [
        "tie",
        "Tie (bothbad)",
        "both_bad",
        "draw",
        "equal",
        "Equally good",
        "both are bad",
        "neither",
    ],
)
def test_words_for_ties(word):
    assert mixture(TWO | {"winner": "a"}, TWO | {"winner": word}).notes[1] == TIE


@pytest.mark.parametrize("word", ["drawing-model-7b", "tie-7b", "samey", "bothell"])
def test_names_that_begin_like_ties(word):
    assert error(TWO | {"winner": word})[0] == (
        f"a.jsonl train record 1: winner: must be a, b or tie, got {word}"
    )


def test_alpaca_farm():
    record = {"instruction": "Why?", "input": "Sky.", "output_1": "No.", "output_2": "So."}
    loaded = mixture(record | {"preference": 2}, record | {"preference": 2.0})
    assert replies(loaded) == [("So.", "No.")] * 2
    assert list(loaded.train[0].prompt) == [user("Why?\nSky.")]


@pytest.mark.parametrize(
    ("record", "setting"),
    [
        ({"question": "Why?", "answer": "So."}, "{question: instruction, answer: output}"),
        ({"prompt": "Why?", "completion": "So."}, "{prompt: instruction, completion: output}"),
        (
            {"prompt": "Why?", "response": "So.", "score": 3},
            "{prompt: instruction, response: output}",
        ),
    ],
)
def test_hints_for_one_reply(record, setting):
    assert error(record, read_record=to_dialogue)[-2:] == [
        "nearest shape: Alpaca (instruction, output); it lacks instruction, output",
        f"(set for this source columns: {setting})",
    ]
    columns = dict(part.split(": ") for part in setting.strip("{}").split(", "))
    (pair,) = mixture(record, read_record=to_dialogue, columns=columns).train
    assert [*pair.prompt, *pair.chosen] == ASKED + SO


def test_the_hint_for_stack_exchange():
    record = {"question": "Why?", "response_j": "So.", "response_k": "No."}
    assert error(record)[-1] == (
        "(set for this source columns: {response_j: chosen, response_k: rejected})"
    )
    columns = {"response_j": "chosen", "response_k": "rejected"}
    assert replies(mixture(record, columns=columns)) == [("So.", "No.")]


def test_why_no_record_is_left():
    ties = [TWO | {"winner": "tie"}] * 2
    assert error(*ties) == [
        "data.sources: no record left to train on (a.jsonl train: 2 records, 0 bad, 2 pairs not "
        "made: equal scores or a tie)"
    ]
    empty = {"prompt": "Why?", "chosen": "", "rejected": "No."}
    assert error(empty | {"chosen": "No."}, empty, empty, **DROP) == [
        "data.sources: no record left to train on (a.jsonl train: 3 records, 3 bad (most often: "
        "chosen: the response is empty))"
    ]
