"""The rules judge hand-written replies as a reader would, and the demo records obey their rules."""

import json
import re
from collections import defaultdict
from statistics import mean, median
from typing import Any

import pytest

from simpo.data.demo.records import demo_records
from simpo.data.demo.topics import HELD_OUT, TOPICS
from simpo.data.rules import RULES, WORDS, in_words, obeys, rule_fault

ONE_SENTENCE = {"name": "one_sentence"}
TWO_BULLETS = {"name": "bullets", "count": 2}
TWO_NUMBERED = {"name": "numbered", "count": 2}
NAME_AND_HOME = {"name": "json_keys", "keys": ["name", "home"]}
YES = {"name": "yes_no_first", "answer": "Yes"}
NO = {"name": "yes_no_first", "answer": "No"}
UPPER = {"name": "upper_case"}
LOWER = {"name": "lower_case"}
THREE_ITEMS = {"name": "comma_list", "count": 3}
QUOTED = {"name": "quoted"}
IN_SHORT = {"name": "starts_with", "phrase": "In short:"}
THAT_IS_ALL = {"name": "ends_with", "phrase": "That is all."}
NO_COMMAS = {"name": "no_commas"}

SAID: list[tuple[dict[str, Any], str]] = [
    (ONE_SENTENCE, "one sentence"),
    (TWO_BULLETS, "2 bullet points"),
    (TWO_NUMBERED, "2 numbered lines"),
    (NAME_AND_HOME, "a JSON object with the keys name, home"),
    (YES, "Yes first"),
    (UPPER, "capital letters only"),
    (LOWER, "small letters only"),
    (THREE_ITEMS, "3 items separated by commas"),
    (QUOTED, "in double quotation marks"),
    (IN_SHORT, 'starts with "In short:"'),
    (THAT_IS_ALL, 'ends with "That is all."'),
    (NO_COMMAS, "no commas"),
]

ACCEPTED: list[tuple[dict[str, Any], str]] = [
    (ONE_SENTENCE, "Owls hunt at night."),
    (ONE_SENTENCE, "  Owls eat small animals, e.g. mice, and weigh approx. 1.5 kg.\n"),
    (ONE_SENTENCE, "Owls eat mice, voles etc. and live with Mr. Brown in the U.S. Army barn!"),
    (ONE_SENTENCE, '"Owls hunt at night, don\'t they?"'),
    (TWO_BULLETS, "- Owls hunt mice.\n- They fly at night."),
    (TWO_BULLETS, "* Owls hunt mice.\n\n* They fly at night.\n"),
    (TWO_BULLETS, "\n- Mice. And voles.\n- **Night** flight"),
    (TWO_NUMBERED, "1. Owls hunt mice.\n2. They fly at night."),
    (TWO_NUMBERED, "1. Mice\n\n2. Voles"),
    (TWO_NUMBERED, " 1. About 3. or 4. mice\n2.  Voles "),
    (NAME_AND_HOME, '{"name": "owl", "home": "woods"}'),
    (NAME_AND_HOME, '\n{\n  "home": ["woods", "barns"],\n  "name": "owl"\n}\n'),
    (NAME_AND_HOME, '{"name": null, "home": {"place": "woods"}}'),
    (YES, "Yes, owls hunt at night."),
    (YES, "Yes. They do."),
    (YES, "Yes - owls do."),
    (YES, "Yes\u2014owls do."),
    (NO, "No"),
    (NO, "No, owls do not eat grass."),
    (NO, "No; they hunt."),
    (UPPER, "OWLS HUNT AT NIGHT."),
    (UPPER, "ABOUT 20 OWLS!"),
    (UPPER, "- OWLS\n- MICE"),
    (LOWER, "owls hunt at night."),
    (LOWER, "about 20 owls!"),
    (LOWER, "- owls\n- mice"),
    (THREE_ITEMS, "mice, voles, frogs"),
    (THREE_ITEMS, "House mice, Bank voles, Common tree frogs."),
    (THREE_ITEMS, " mice,voles,frogs\n"),
    (QUOTED, '"Owls hunt at night."'),
    (QUOTED, '"Owls hunt.\nThey don\'t graze."\n'),
    (QUOTED, "“Owls hunt at night.”"),
    (IN_SHORT, "In short: owls hunt at night."),
    (IN_SHORT, "\nIn short:\n- Owls hunt."),
    (IN_SHORT, "In short:owls"),
    (THAT_IS_ALL, "Owls hunt at night. That is all."),
    (THAT_IS_ALL, "- Owls hunt.\n\nThat is all.\n"),
    (THAT_IS_ALL, "Owls. That is all. That is all."),
    (NO_COMMAS, "Owls hunt at night."),
    (NO_COMMAS, "Owls hunt; they fly."),
    (NO_COMMAS, "Owls\nand mice"),
]

REFUSED: list[tuple[dict[str, Any], str]] = [
    (ONE_SENTENCE, "Owls hunt at night. They eat mice."),
    (ONE_SENTENCE, "Owls hunt at night. they eat mice."),
    (ONE_SENTENCE, 'Owls say "hoo!" They eat mice.'),
    (ONE_SENTENCE, "Owls eat mice, voles etc. They hunt at night."),
    (ONE_SENTENCE, "Lemons hold vitamin C. They are sour."),
    (ONE_SENTENCE, "Owls hunt at night"),
    (ONE_SENTENCE, "Owls hunt\nat night."),
    (ONE_SENTENCE, "..."),
    (TWO_BULLETS, "- Mice\n- Voles\n- Frogs"),
    (TWO_BULLETS, "Owls eat:\n- Mice\n- Voles"),
    (TWO_BULLETS, "- Mice\n- Voles\nThat is all."),
    (TWO_BULLETS, "- Mice"),
    (TWO_BULLETS, "-Mice\n-Voles"),
    (TWO_BULLETS, "**Mice**\n**Voles**"),
    (TWO_BULLETS, "- Mice\n  - Voles"),
    (TWO_BULLETS, "1. Mice\n2. Voles"),
    (TWO_NUMBERED, "1. Mice\n2. Voles\n3. Frogs"),
    (TWO_NUMBERED, "1. Mice\n3. Voles"),
    (TWO_NUMBERED, "Here they are:\n1. Mice\n2. Voles"),
    (TWO_NUMBERED, "1) Mice\n2) Voles"),
    (TWO_NUMBERED, "1. Mice 2. Voles"),
    (NAME_AND_HOME, '{"name": "owl", "home": "woods", "food": "mice"}'),
    (NAME_AND_HOME, '{"name": "owl"}'),
    (NAME_AND_HOME, '```json\n{"name": "owl", "home": "woods"}\n```'),
    (NAME_AND_HOME, 'Sure: {"name": "owl", "home": "woods"}'),
    (NAME_AND_HOME, "{'name': 'owl', 'home': 'woods'}"),
    (NAME_AND_HOME, '["name", "home"]'),
    (NAME_AND_HOME, "[" * 100_000),
    (YES, "No, they do not."),
    (YES, "Owls hunt at night, yes."),
    (YES, "Yesterday, owls hunted."),
    (YES, "yes, they do."),
    (NO, "No owls eat grass."),
    (NO, "Nobody knows."),
    (NO, "Not at all."),
    (UPPER, "OWLS HUNT AT NIGHt."),
    (UPPER, "Owls hunt at night."),
    (UPPER, "123!"),
    (LOWER, "owls hunt at nighT."),
    (LOWER, "Owls hunt at night."),
    (LOWER, "123!"),
    (THREE_ITEMS, "mice, voles"),
    (THREE_ITEMS, "mice, voles and frogs"),
    (THREE_ITEMS, "mice, voles, and frogs"),
    (THREE_ITEMS, "mice, voles, frogs, bats"),
    (THREE_ITEMS, "mice, voles, frogs,"),
    (THREE_ITEMS, "mice,\nvoles,\nfrogs"),
    (THREE_ITEMS, "Food: mice, voles, frogs"),
    (THREE_ITEMS, "Most owls like mice, voles, frogs"),
    (THREE_ITEMS, "mice, voles, frogs. Enjoy"),
    (QUOTED, "Owls hunt at night."),
    (QUOTED, '"Owls hunt at night.'),
    (QUOTED, '"Owls" hunt at "night"'),
    (QUOTED, "'Owls hunt at night.'"),
    (QUOTED, '""'),
    (IN_SHORT, "Owls hunt, in short: they are hunters."),
    (IN_SHORT, "in short: owls hunt."),
    (IN_SHORT, "In short, owls hunt."),
    (IN_SHORT, "In short:"),
    (THAT_IS_ALL, "Owls hunt at night. That is all"),
    (THAT_IS_ALL, "That is all. Owls hunt at night."),
    (THAT_IS_ALL, "Owls hunt at night. That is all. Bye!"),
    (THAT_IS_ALL, "That is all."),
    (NO_COMMAS, "Owls, which hunt at night"),
    (NO_COMMAS, "Owls hunt,"),
    (NO_COMMAS, "Mice,voles"),
]

FAULTS = [
    (None, "a rule must be a mapping, not NoneType"),
    ("bullets", "a rule must be a mapping, not str"),
    ({}, "unknown rule name None; known: one_sentence, bullets"),
    ({"name": ["bullets"]}, "unknown rule name ['bullets']"),
    ({"name": "haiku"}, "unknown rule name 'haiku'; known: one_sentence, bullets"),
    ({"name": "bullets"}, "rule 'bullets' lacks the argument 'count'"),
    ({"name": "bullets", "count": "3"}, "'count' must be a whole number from 1 up, not '3'"),
    ({"name": "bullets", "count": True}, "'count' must be a whole number"),
    ({"name": "numbered", "count": 0}, "'count' must be a whole number from 1 up, not 0"),
    ({"name": "upper_case", "count": 3}, "rule 'upper_case' takes no argument 'count'"),
    ({"name": "json_keys", "keys": "name"}, "'keys' must be a list of different texts"),
    ({"name": "json_keys", "keys": []}, "'keys' must be a list of different texts"),
    ({"name": "json_keys", "keys": ["name", 1]}, "'keys' must be a list of different texts"),
    ({"name": "json_keys", "keys": ["name", "name"]}, "'keys' must be a list of different texts"),
    ({"name": "yes_no_first", "answer": "Maybe"}, "'answer' must be one of Yes, No, not 'Maybe'"),
    ({"name": "yes_no_first", "answer": ["Yes"]}, "'answer' must be one of Yes, No"),
    ({"name": "starts_with", "phrase": ""}, "'phrase' must be a text without white space"),
    ({"name": "ends_with", "phrase": "Bye! "}, "'phrase' must be a text without white space"),
]


def test_a_rule_in_words() -> None:
    """Each; also one of a column, where the arguments of the other rules are None."""
    assert [in_words(rule) for rule, _ in SAID] == [words for _, words in SAID]
    assert [rule["name"] for rule, _ in SAID] == list(RULES) == list(WORDS)
    assert in_words({**TWO_BULLETS, "keys": None}) == "2 bullet points"


@pytest.mark.parametrize(("rule", "reply"), ACCEPTED)
def test_reply_obeys(rule, reply):
    assert obeys(rule, reply)


@pytest.mark.parametrize(("rule", "reply"), REFUSED)
def test_reply_does_not_obey(rule, reply):
    assert not obeys(rule, reply)


def test_every_rule_has_three_examples_of_each():
    for examples in (ACCEPTED, REFUSED):
        names = [rule["name"] for rule, _ in examples]
        assert all(names.count(name) >= 3 for name in RULES)


def test_an_empty_reply_obeys_no_rule():
    assert not any(obeys(rule, " \n") for rule, _ in ACCEPTED)


@pytest.mark.parametrize(("rule", "fault"), FAULTS)
def test_a_faulty_rule_is_named_in_one_line(rule, fault):
    said = rule_fault(rule)
    assert said is not None
    assert fault in said
    assert "\n" not in said


def test_a_rule_without_fault():
    assert all(rule_fault(rule) is None for rule, _ in ACCEPTED)


def test_arguments_of_other_rules_may_be_none():
    rule = {"name": "bullets", "count": 1, "keys": None, "answer": None, "phrase": None}
    assert rule_fault(rule) is None
    assert obeys(rule, "- Mice")


def test_obeys_refuses_a_faulty_rule():
    with pytest.raises(ValueError, match="lacks the argument 'count'"):
        obeys({"name": "bullets"}, "- Mice")


SEED = 0
ROWS = {split: demo_records(SEED, split) for split in ("train", "test")}
ALL_ROWS = ROWS["train"] + ROWS["test"]


def reply(row, side):
    (message,) = row[side]
    assert message["role"] == "assistant"
    return message["content"]


def text_of(row):
    return " ".join(
        message["content"] for side in ("prompt", "chosen", "rejected") for message in row[side]
    )


def test_number_of_rows():
    assert len(ROWS["train"]) >= 600
    assert len(ROWS["test"]) >= 100


def test_every_split_has_many_kinds_of_rule():
    for rows in ROWS.values():
        kinds = {row["rule"]["name"] for row in rows}
        assert kinds <= set(RULES)
        assert len(kinds) >= 8


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_chosen_obeys_and_rejected_does_not(seed):
    for row in demo_records(seed, "train") + demo_records(seed, "test"):
        assert rule_fault(row["rule"]) is None
        assert obeys(row["rule"], reply(row, "chosen"))
        assert not obeys(row["rule"], reply(row, "rejected"))


def test_rows_have_the_columns_of_the_format():
    for row in ALL_ROWS:
        assert list(row) == ["prompt", "chosen", "rejected", "rule"]
        roles = [message["role"] for message in row["prompt"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns in (["user"], ["user", "assistant", "user"])


def test_no_held_out_topic_occurs_in_train():
    assert len(HELD_OUT) == len([topic for topic in TOPICS if topic.name in HELD_OUT]) == 8
    words = [re.escape(name if name.endswith("nis") else name.rstrip("s")) for name in HELD_OUT]
    held_out = re.compile("|".join(words), re.IGNORECASE)
    train = [text_of(row) for seed in range(3) for row in demo_records(seed, "train")]
    assert [text for text in train if held_out.search(text)] == []
    assert all(held_out.search(text_of(row)) for row in ROWS["test"])


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_prompt_occurs_twice(seed):
    rows = demo_records(seed, "train") + demo_records(seed, "test")
    assert len({json.dumps(row["prompt"]) for row in rows}) == len(rows)


def test_the_seed_alone_decides():
    assert demo_records(SEED, "test") == ROWS["test"]
    assert demo_records(SEED + 1, "test") != ROWS["test"]
    ignoring_order = [sorted(map(json.dumps, demo_records(seed, "test"))) for seed in (0, 1)]
    assert ignoring_order[0] != ignoring_order[1]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="not 'dev'"):
        demo_records(SEED, "dev")


def test_shares_of_earlier_turns_and_system_messages():
    for rows in ROWS.values():
        assert 0.1 < mean(len(row["prompt"]) > 2 for row in rows) < 0.3
        assert 0.1 < mean(row["prompt"][0]["role"] == "system" for row in rows) < 0.3


def test_rows_are_short():
    words = [sum(len(m["content"].split()) for m in row["prompt"]) for row in ALL_ROWS]
    assert median(words) <= 45
    lengths = [len(reply(row, side).split()) for row in ALL_ROWS for side in ("chosen", "rejected")]
    assert mean(12 <= length <= 35 for length in lengths) > 0.75


@pytest.mark.parametrize("split", ROWS)
def test_length_does_not_give_the_chosen_reply_away(split):
    by_kind = defaultdict(list)
    for row in ROWS[split]:
        pair = reply(row, "chosen"), reply(row, "rejected")
        by_kind["all"].append(pair)
        by_kind[row["rule"]["name"]].append(pair)
    for kind, pairs in by_kind.items():
        chars = [median(len(pair[side]) for pair in pairs) for side in (0, 1)]
        words = [median(len(pair[side].split()) for pair in pairs) for side in (0, 1)]
        longer = mean(len(chosen) > len(rejected) for chosen, rejected in pairs)
        print(f"{split} {kind}: {len(pairs)} rows, {chars} chars, {words} words, {longer:.2f}")
        # A kind has as few as eight test rows: too few for a tight bound on its medians.
        tolerance = 0.1 if kind == "all" else {"train": 0.15, "test": 0.25}[split]
        assert chars[0] == pytest.approx(chars[1], rel=tolerance)
        # Of replies of four or five words, the words of a kind say little.
        if kind == "all":
            assert words[0] == pytest.approx(words[1], rel=tolerance)
    assert 0.4 < mean(len(chosen) > len(rejected) for chosen, rejected in by_kind["all"]) < 0.6
