"""From a seed and a split to demo preference records, written by code from the table of topics.

Each record tells some facts, asks for them and gives an instruction. Both replies repeat the facts;
the chosen one obeys the instruction, and the rejected one answers as if it were not there. A model
that can copy therefore has nothing to learn but the instruction:

    prompt    Owls are birds of prey that hunt at night. They live in woods and barns all over the
              world. Tell me about owls. Reply with exactly two bullet points and nothing else.
    chosen    - Owls are birds of prey that hunt at night.
              - They live in woods and barns all over the world.
    rejected  Owls are birds of prey that hunt at night, and they live in woods and barns all over
              the world.
    rule      {"name": "bullets", "count": 2}

Length must not give the chosen reply away: both sides are worded in several ways, and the pair is
picked so that the chosen reply is a little longer in every other record and a little shorter else.
"""

import json
import random
from collections.abc import Callable
from functools import partial
from itertools import combinations, product
from typing import Any, NamedTuple

from simpo.data.demo.topics import HELD_OUT, TOPICS, Topic
from simpo.data.rules import obeys

_ASKS = (
    "Tell me about {name}.",
    "Describe {name} to me.",
    "What should I know about {name}?",
    "I want to learn about {name}.",
    "Write something short about {name}.",
)
_ITEM_ASKS = ("Name {number} {label}.", "Think of {number} {label}.", "List {number} {label}.")
_EARLIER_ASKS = (
    "Do you know anything about {name}?",
    "Please introduce {name} to me.",
    "What comes to mind when you hear about {name}?",
)
_PERSONAS = (
    "You are a helpful assistant.",
    "You are a friendly teacher.",
    "You are a patient museum guide.",
    "You are a cheerful tutor who likes simple words.",
)
# Each one also works as a system message, which then holds for the question that follows.
_INSTRUCTIONS = {
    "one_sentence": (
        "Answer in exactly one sentence.",
        "Use one sentence only.",
        "Keep your reply to a single sentence.",
    ),
    "bullets": (
        "Reply with exactly {number} bullet points and nothing else.",
        "Answer as a bulleted list of {number} lines, each starting with a dash.",
        "Use {number} bullets, one on each line, and no other text.",
    ),
    "numbered": (
        "Reply with a numbered list of exactly {number} lines and nothing else.",
        "Answer as a list numbered from 1 to {count}, without an introduction.",
        "Number your {number} points, one on each line, and add no other text.",
    ),
    "json_keys": (
        "Reply only with a JSON object that has the keys {keys}.",
        "Answer in plain JSON with exactly these keys: {keys}.",
        "Give a single JSON object with the keys {keys} and no other text.",
    ),
    "yes_no_first": (
        'Begin your answer with "Yes," or "No,".',
        "Say yes or no first and then explain.",
        "The first word of your reply must be Yes or No.",
    ),
    "upper_case": (
        "Write everything in capital letters.",
        "Answer in upper case only.",
        "Use only capital letters in your reply.",
    ),
    "comma_list": (
        "Put the answer on one line, separated by commas, with no other text.",
        "Reply only with a comma-separated list.",
        "Use commas between the items and write nothing else.",
    ),
    "quoted": (
        "Put your whole reply in double quotes.",
        "Begin and end your reply with a double quotation mark.",
        "Wrap the entire answer in double quotation marks.",
    ),
    "starts_with": (
        'Start your reply with "{phrase}"',
        'The first words of your reply must be "{phrase}"',
        'Open with exactly these words: "{phrase}"',
    ),
}
_OPENINGS = ("In short:", "Good question!", "Here is my answer:", "Quick facts:", "Let me explain.")
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
_KEY_SETS = (
    ("kind", "place"),
    ("kind", "feature"),
    ("place", "feature"),
    ("name", "kind", "feature"),
)
_KEY_FACTS = {"kind": 0, "place": 1, "feature": 2}
_EARLIER_SHARE = 0.22
_RULE_IN_SYSTEM_SHARE = 0.1
_PERSONA_SHARE = 0.12


class _Task(NamedTuple):
    """Facts, a question, the rule for its reply, ways to word one with and without that rule."""

    facts_text: str
    ask: str
    rule: dict[str, Any]
    chosen: list[str]
    rejected: list[str]


_Build = Callable[[random.Random, Topic, list[str]], _Task]


def demo_records(seed: int, split: str) -> list[dict[str, Any]]:
    """Make the records of the split "train" or "test": OpenAI messages and a rule.

    No topic occurs in both splits, whatever their seeds. Each topic gives fourteen records: one or
    two for every kind of instruction.

    Raises:
        ValueError: the split has another name.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", not {split!r}')
    rng = random.Random(f"{seed} {split}")
    topics = [topic for topic in TOPICS if (topic.name in HELD_OUT) == (split == "test")]
    records = [
        _record(rng, topic, build, chosen_longer=(number + column) % 2 == 0)
        for number, topic in enumerate(topics)
        for column, build in enumerate(_builds(rng))
    ]
    rng.shuffle(records)
    return records


def _builds(rng: random.Random) -> list[_Build]:
    """Draw the rules for one topic."""
    return [
        *(partial(_list_task, "bullets", count) for count in rng.sample((2, 3, 4), 2)),
        *(partial(_list_task, "numbered", count) for count in rng.sample((2, 3, 4), 2)),
        *(partial(_json_task, keys) for keys in rng.sample(_KEY_SETS, 2)),
        partial(_yes_no_task, "Yes"),
        partial(_yes_no_task, "No"),
        _items_task,
        partial(_prose_task, {"name": "one_sentence"}, str),
        partial(_prose_task, {"name": "upper_case"}, str.upper),
        partial(_prose_task, {"name": "quoted"}, '"{}"'.format),
        *(partial(_phrase_task, phrase) for phrase in rng.sample(_OPENINGS, 2)),
    ]


def _record(
    rng: random.Random, topic: Topic, build: _Build, *, chosen_longer: bool
) -> dict[str, Any]:
    facts = topic.predicates()
    system, earlier = "", []
    draw = rng.random()
    rule_in_system = draw < _RULE_IN_SYSTEM_SHARE
    if not rule_in_system and draw < _RULE_IN_SYSTEM_SHARE + _PERSONA_SHARE:
        system = rng.choice(_PERSONAS)
    # An earlier answer in plain prose would break a rule that the system message carries.
    if not rule_in_system and rng.random() < _EARLIER_SHARE:
        earlier = [
            _message("user", rng.choice(_EARLIER_ASKS).format(name=topic.name)),
            _message("assistant", f"{_capital(topic.name)} {facts.pop(0)}."),
        ]
    task = build(rng, topic, facts)
    instruction = _instruction(rng, task.rule)
    if rule_in_system:
        system, question = instruction, f"{task.facts_text}\n{task.ask}"
    elif rng.random() < 0.3:
        question = f"{instruction}\n{task.facts_text}\n{task.ask}"
    else:
        question = f"{task.facts_text}\n{task.ask} {instruction}"
    prompt = [*([_message("system", system)] if system else []), *earlier]
    chosen, rejected = _matched_pair(rng, task, chosen_longer)
    return {
        "prompt": [*prompt, _message("user", question)],
        "chosen": [_message("assistant", chosen)],
        "rejected": [_message("assistant", rejected)],
        "rule": task.rule,
    }


def _matched_pair(rng: random.Random, task: _Task, chosen_longer: bool) -> tuple[str, str]:
    """Draw a chosen and a rejected reply, one longer than the other by an eighth at most."""
    chosen = [text for text in task.chosen if obeys(task.rule, text)]
    rejected = [text for text in task.rejected if not obeys(task.rule, text)]
    sign = 1 if chosen_longer else -1
    gaps = {pair: sign * (len(pair[0]) - len(pair[1])) for pair in product(chosen, rejected)}
    close = [pair for pair, gap in gaps.items() if 0 < gap <= len(pair[0]) / 8]
    return rng.choice(close) if close else min(gaps, key=lambda pair: abs(gaps[pair]))


def _instruction(rng: random.Random, rule: dict[str, Any]) -> str:
    count = rule.get("count", 0)
    return rng.choice(_INSTRUCTIONS[rule["name"]]).format(
        number=_NUMBERS.get(count, ""),
        count=count,
        keys=_series([f'"{key}"' for key in rule.get("keys", [])]),
        phrase=rule.get("phrase", ""),
    )


def _prose_task(
    rule: dict[str, Any],
    shape: Callable[[str], str],
    rng: random.Random,
    topic: Topic,
    facts: list[str],
) -> _Task:
    selections = _selections(rng, facts, 2)
    chosen = [shape(text) for text in _prose(topic, selections[:1])]
    rejected = _prose(topic, selections)
    return _Task(_facts_text(topic, selections), _ask(rng, topic), rule, chosen, rejected)


def _phrase_task(phrase: str, rng: random.Random, topic: Topic, facts: list[str]) -> _Task:
    rule = {"name": "starts_with", "phrase": phrase}
    other = rng.choice([opening for opening in _OPENINGS if opening != phrase])
    selections = _selections(rng, facts, 2)[:1]
    texts = _prose(topic, selections)
    # A phrase of its own choice makes a rejected reply as long as the chosen one.
    rejected = texts + [f"{other} {text}" for text in texts]
    chosen = [f"{phrase} {text}" for text in texts]
    return _Task(_facts_text(topic, selections), _ask(rng, topic), rule, chosen, rejected)


def _list_task(name: str, count: int, rng: random.Random, topic: Topic, facts: list[str]) -> _Task:
    selections = _selections(rng, facts, count)
    marks = ["-"] * count if name == "bullets" else [f"{number}." for number in range(1, count + 1)]
    lines = map(" ".join, zip(marks, _clauses(topic, selections[0]), strict=True))
    rule = {"name": name, "count": count}
    rejected = _opened(rng, _prose(topic, selections))
    return _Task(
        _facts_text(topic, selections), _ask(rng, topic), rule, ["\n".join(lines)], rejected
    )


def _json_task(keys: tuple[str, ...], rng: random.Random, topic: Topic, facts: list[str]) -> _Task:
    values = {key: topic.facts[place].split("|")[1] for key, place in _KEY_FACTS.items()}
    values["name"] = topic.name
    reply = {key: values[key] for key in keys}
    chosen = [json.dumps(reply), json.dumps(reply, indent=2)]
    some = [topic.predicates()[_KEY_FACTS[key]] for key in keys if key != "name"]
    rule = {"name": "json_keys", "keys": list(keys)}
    rejected = _opened(rng, _prose(topic, [some]))
    return _Task(_facts_text(topic, [some]), _ask(rng, topic), rule, chosen, rejected)


def _yes_no_task(answer: str, rng: random.Random, topic: Topic, facts: list[str]) -> _Task:
    question, clause = topic.yes if answer == "Yes" else topic.no
    chosen, rejected = [], []
    first_facts = topic.predicates()[:2]
    for fact in first_facts:
        # "They" can stand for the topic only where the answer has the topic as its subject.
        if clause.startswith(topic.name):
            more = [f". {_capital(topic.pronoun)} {fact}.", f", and {topic.pronoun} {fact}."]
        else:
            more = [f". {_capital(topic.name)} {fact}."]
        chosen += [f"{answer}, {clause}{ending}" for ending in more]
        rejected += [f"{_capital(clause)}{ending}" for ending in more]
    facts_text = f"{_capital(clause)}. {_facts_text(topic, [first_facts])}"
    rule = {"name": "yes_no_first", "answer": answer}
    return _Task(facts_text, question, rule, chosen, rejected)


def _items_task(rng: random.Random, topic: Topic, facts: list[str]) -> _Task:
    count = rng.choice((4, 5))
    ask = rng.choice(_ITEM_ASKS).format(number=_NUMBERS[count], label=topic.items_label)
    chosen: list[str] = []
    rejected: list[str] = []
    for some in combinations(rng.sample(topic.items, 5), count):
        capitals = [_capital(item) for item in some]
        chosen.append(", ".join(some))
        rejected += ["\n".join(capitals), f"{_capital(_series(list(some)))}."]
    facts_text = f"Some {topic.items_label} are {_series(rng.sample(topic.items, 5))}."
    return _Task(facts_text, ask, {"name": "comma_list", "count": count}, chosen, rejected)


def _ask(rng: random.Random, topic: Topic) -> str:
    return rng.choice(_ASKS).format(name=topic.name)


def _facts_text(topic: Topic, selections: list[list[str]]) -> str:
    """Tell every fact of the selections, a sentence each."""
    facts = dict.fromkeys(fact for selection in selections for fact in selection)
    return " ".join(_clauses(topic, list(facts)))


def _selections(rng: random.Random, facts: list[str], count: int) -> list[list[str]]:
    """Draw facts to repeat; then list the same with one, not the first, exchanged for a spare."""
    first, *others = facts
    rng.shuffle(others)
    stated, spare = [first, *others[: count - 1]], others[count - 1 : count]
    exchanged = [
        [*stated[:place], other, *stated[place + 1 :]]
        for place in range(1, count)
        for other in spare
    ]
    return [stated, *exchanged]


def _clauses(topic: Topic, facts: list[str]) -> list[str]:
    """Make one sentence of each fact."""
    first, *others = facts
    pronoun = _capital(topic.pronoun)
    return [f"{_capital(topic.name)} {first}.", *(f"{pronoun} {fact}." for fact in others)]


def _sentence(topic: Topic, facts: list[str]) -> list[str]:
    """List the ways to put one to four facts into one sentence."""
    name, pronoun = _capital(topic.name), topic.pronoun
    first, *others = facts
    if not others:
        return [f"{name} {first}."]
    *middle, last = others
    if not middle:
        return [
            f"{name} {first}, and {pronoun} {last}.",
            f"{name} {first}; {pronoun} {last}.",
            f"{name}, which {last}, {first}.",
        ]
    ways = [f"{name} {first}, {', '.join(middle)}, and {last}."]
    if len(middle) == 1:
        ways.append(f"{name} {first}; {pronoun} {middle[0]}, and {pronoun} {last}.")
        ways.append(f"{name}, which {last}, {first}, and {pronoun} {middle[0]}.")
    return ways


def _sentences(topic: Topic, facts: list[str]) -> list[str]:
    """List the ways to put two to four facts into two sentences or more."""
    clauses = _clauses(topic, facts)
    return [
        " ".join([start, *clauses[size:]])
        for size in range(1, len(facts))
        for start in _sentence(topic, facts[:size])
    ]


def _prose(topic: Topic, selections: list[list[str]]) -> list[str]:
    return [
        text for facts in selections for text in _sentence(topic, facts) + _sentences(topic, facts)
    ]


def _opened(rng: random.Random, texts: list[str]) -> list[str]:
    """Add to the texts each one after an opening: structure makes lists and JSON long."""
    opening = rng.choice(_OPENINGS)
    return [*texts, *(f"{opening} {text}" for text in texts)]


def _series(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
