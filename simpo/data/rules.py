"""Checks whether a reply obeys a rule.

A rule is a dict with the name of a check and its arguments. Records carry it in the optional column
`rule`:

    {"name": "bullets", "count": 2}             "- Owls hunt mice.\\n- They fly at night."
    {"name": "json_keys", "keys": ["a", "b"]}   '{"a": 1, "b": 2}'
    {"name": "yes_no_first", "answer": "Yes"}   "Yes, owls hunt at night."

White space around a reply is ignored, and an empty reply obeys no rule.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin

# A full stop never ends a sentence after words of the first group; after those of the second group
# it does if the next word is capitalised.
_NEVER_LAST = re.compile(r"(e\.g|i\.e|u\.[sk]|mrs?|ms|dr|prof|st|mt|vs|cf|ca|approx)\.", re.I)
_SELDOM_LAST = re.compile(r"(etc|[ap]\.m)\.", re.I)
_SENTENCE_ENDS = (".", "!", "?")
_QUOTES_AND_BRACKETS = "\"'()[]“”\u2018\u2019"
_MAX_ITEM_WORDS = 3


def one_sentence(reply: str) -> bool:
    for word, following in pairwise(reply.split()):
        word, following = word.strip(_QUOTES_AND_BRACKETS), following.strip(_QUOTES_AND_BRACKETS)
        seldom_last = _SELDOM_LAST.fullmatch(word) and not following[:1].isupper()
        if word.endswith(_SENTENCE_ENDS) and not (_NEVER_LAST.fullmatch(word) or seldom_last):
            return False
    ended = reply.rstrip(_QUOTES_AND_BRACKETS).endswith(_SENTENCE_ENDS)
    return ended and "\n" not in reply and any(letter.isalpha() for letter in reply)


def bullets(reply: str, *, count: int) -> bool:
    lines = _lines(reply)
    return len(lines) == count and all(re.match(r"[-*] +\S", line) for line in lines)


def numbered(reply: str, *, count: int) -> bool:
    lines = _lines(reply)
    return len(lines) == count and all(
        re.match(rf"{number}\. +\S", line) for number, line in enumerate(lines, start=1)
    )


def json_keys(reply: str, *, keys: list[str]) -> bool:
    try:
        value = json.loads(reply)
    # RecursionError: a policy that repeats "[" hits the parser's depth limit.
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(value) == set(keys)


def yes_no_first(reply: str, *, answer: Literal["Yes", "No"]) -> bool:
    # The punctuation distinguishes "No, owls ..." from "No owls ..." and from "Nobody ...".
    return re.match(rf"{answer}(?:[,.;:!]|\s*[-\u2013\u2014]|$)", reply) is not None


def upper_case(reply: str) -> bool:
    return reply.isupper()


def lower_case(reply: str) -> bool:
    return reply.islower()


def comma_list(reply: str, *, count: int) -> bool:
    if re.search(r"[\n:;!?]|\.(?!$)", reply):
        return False
    items = [item.split() for item in reply.rstrip(".").split(",")]
    # Longer items, or "and" before the last one, would make it a sentence.
    return len(items) == count and all(
        1 <= len(words) <= _MAX_ITEM_WORDS and not {"and", "or"} & {word.lower() for word in words}
        for words in items
    )


def quoted(reply: str) -> bool:
    return re.fullmatch(r'"[^"“”]+"|“[^"“”]+”', reply) is not None


def starts_with(reply: str, *, phrase: str) -> bool:
    return reply.startswith(phrase) and len(reply) > len(phrase)


def ends_with(reply: str, *, phrase: str) -> bool:
    return reply.endswith(phrase) and len(reply) > len(phrase)


def no_commas(reply: str) -> bool:
    return "," not in reply


RULES: dict[str, Callable[..., bool]] = {
    check.__name__: check
    for check in (
        one_sentence,
        bullets,
        numbered,
        json_keys,
        yes_no_first,
        upper_case,
        lower_case,
        comma_list,
        quoted,
        starts_with,
        ends_with,
        no_commas,
    )
}


WORDS = {
    "one_sentence": "one sentence",
    "bullets": "{count} bullet points",
    "numbered": "{count} numbered lines",
    "json_keys": "a JSON object with the keys {keys}",
    "yes_no_first": "{answer} first",
    "upper_case": "capital letters only",
    "lower_case": "small letters only",
    "comma_list": "{count} items separated by commas",
    "quoted": "in double quotation marks",
    "starts_with": 'starts with "{phrase}"',
    "ends_with": 'ends with "{phrase}"',
    "no_commas": "no commas",
}
"""What a reply must be, by name of the rule."""


def in_words(rule: Mapping[str, Any]) -> str:
    """What a valid rule asks of a reply, such as `a JSON object with the keys a, b`."""
    arguments = {
        key: ", ".join(value) if isinstance(value, list) else value
        for key, value in _arguments(rule).items()
    }
    return WORDS[rule["name"]].format(**arguments)


def obeys(rule: Mapping[str, Any], reply: str) -> bool:
    """Whether a reply obeys a rule.

    Raises:
        ValueError: the rule is not valid, see `rule_fault`.
    """
    fault = rule_fault(rule)
    if fault is not None:
        raise ValueError(fault)
    reply = reply.strip()
    return reply != "" and RULES[rule["name"]](reply, **_arguments(rule))


def rule_fault(rule: object) -> str | None:
    """What is wrong with a rule, in one line; None if it is valid."""
    if not isinstance(rule, Mapping):
        return f"a rule must be a mapping, not {type(rule).__name__}"
    name = rule.get("name")
    if not isinstance(name, str) or name not in RULES:
        return f"unknown rule name {name!r}; known: {', '.join(RULES)}"
    expected = _parameters(name)
    arguments = _arguments(rule)
    for argument, annotation in expected.items():
        if argument not in arguments:
            return f"rule {name!r} lacks the argument {argument!r}"
        wanted = _wanted(annotation, arguments[argument])
        if wanted is not None:
            return f"rule {name!r}: {argument!r} must be {wanted}, not {arguments[argument]!r}"
    extra = [str(argument) for argument in arguments if argument not in expected]
    return f"rule {name!r} takes no argument {extra[0]!r}" if extra else None


@cache
def _parameters(name: str) -> dict[str, Any]:
    """Annotations of the arguments of a rule, by argument."""
    parameters = list(inspect.signature(RULES[name]).parameters.values())[1:]
    return {parameter.name: parameter.annotation for parameter in parameters}


def _arguments(rule: Mapping[str, Any]) -> dict[str, Any]:
    # Arrow stores a column of rules as one struct, so a rule has None for every argument of the
    # other rules.
    return {key: value for key, value in rule.items() if key != "name" and value is not None}


def _wanted(annotation: Any, value: Any) -> str | None:
    """What a value of this annotation must be, in words; None if the given value is valid."""
    if annotation is int:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        return None if fits else "a whole number from 1 up"
    if annotation is str:
        return None if _is_text(value) else "a text without white space at its ends"
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return None if value in choices else f"one of {', '.join(choices)}"
    fits = isinstance(value, list) and value != [] and all(map(_is_text, value))
    return None if fits and len(set(value)) == len(value) else "a list of different texts"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != "" and value == value.strip()


def _lines(reply: str) -> list[str]:
    return [line for line in reply.splitlines() if line.strip()]
