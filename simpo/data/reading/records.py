"""Parses a raw record into a `Pair`, or says what is wrong with the record.

A record is one of
    prompt + chosen + rejected   text, or OpenAI messages; a response may repeat the prompt's turns
    chosen + rejected            whole dialogues that start from the same turns
    messages                     a dialogue to imitate, for supervised fine-tuning only
    prompt + completion + label  one reply that is desirable or not, for KTO only
All turns that chosen and rejected start with are their prompt. A string `prompt` is ignored if they
are whole dialogues, which contain it.
Optional columns: `system` (or `system_prompt`) is the text of a system turn before the prompt;
`tools` (or `functions`) are the JSON schemas of the tools that the assistant may call; `rule` is a
check that a program can run on a reply (see `simpo.data.rules`). What a message may hold:
`simpo.data.reading.messages`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

from simpo.data.pairs import Message, Pair, response_names
from simpo.data.reading.messages import RecordFault as RecordFault
from simpo.data.reading.messages import (
    check_reasoning_ends,
    check_text,
    has_value,
    kind,
    read_messages,
    read_tools,
    refuse_not_text,
    unread_keys,
    without_reasoning,
)
from simpo.data.reading.responses import given_turns, last, missing, parts, text_reply
from simpo.data.reading.scored import above
from simpo.data.rules import rule_fault

SYSTEM_COLUMNS = ("system", "system_prompt")
REFERENCE_ANSWER = "reference_answer"
RANKED = ("responses", "scores")
"""Columns of all responses to a prompt and of their scores, of records for losses that rank."""
LARGEST_SCORE = 1e38
"""A larger one is none in float32."""
SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
LABELS = {"true": True, "1": True, "false": False, "0": False}
"""Whether a reply is desirable, by its label."""
MESSAGE_KEYS = ("tool_calls", "function_call", "tool_call_id")
"""Keys of messages that say something else than meant as columns of a record."""

_TURNS_IN_TEXT = re.compile(r"(?:\A|\n\n)(?:### ?)?Human:")


def to_pair(record: Any, place: str) -> Pair:
    """Read one record.

    Args:
        record: the record as its source gave it.
        place: source, split and record, for messages.

    Raises:
        RecordFault: the record has none of the forms above, or chosen and rejected are the same.
    """
    if not isinstance(record, Mapping):
        raise RecordFault(f"must be an object with chosen and rejected, got {kind(record)}")
    _refuse(record)
    for key in ("chosen", "rejected"):
        if record.get(key) is None:
            raise missing(record, key)
    pair = _compared(record, (record["chosen"], record["rejected"]), place)
    scores = known_scores(record)
    return replace(pair, score_margin=None if scores is None else scores[0] - scores[1])


def to_ranking(record: Any, place: str) -> Pair:
    """Read one record for a loss that compares all responses: `RANKED` columns without `chosen`, or
    a pair, whose scores are 1 and 0 if it has none that put chosen above rejected.

    `responses` are chosen, rejected and those between, best first; `scores` theirs.

    Args and Raises: as `to_pair`.
    """
    if not isinstance(record, Mapping) or not is_ranked(record):
        pair = to_pair(record, place)
        found = known_scores(record)
        scores = found if found and above(*found) else (1.0, 0.0)
    else:
        _refuse(record)
        pair = _compared(record, record["responses"], place)
        scores = tuple(record["scores"])
        pair = replace(pair, score_margin=scores[0] - scores[1])
    check_sizes(scores)
    return replace(pair, scores=scores)


def check_sizes(scores: Sequence[float]) -> None:
    """
    Raises:
        RecordFault: a score is too large for the numbers of a loss.
    """
    if largest := next((score for score in scores if abs(score) > LARGEST_SCORE), None):
        raise RecordFault(f"scores: must be at most {LARGEST_SCORE:g} in size, got {largest:g}")


def is_ranked(record: Mapping[str, Any]) -> bool:
    """Whether a record has responses with scores, as `scored.ranked_record` gives them, instead of
    chosen and rejected."""
    responses, scores = record.get("responses"), record.get("scores")
    if not isinstance(responses, list) or not isinstance(scores, list):
        return False
    known = len(scores) == len(responses) > 1 and all(isinstance(one, float) for one in scores)
    return known and record.get("chosen") is None


def _compared(record: Mapping[str, Any], given: Sequence[Any], place: str) -> Pair:
    """A pair of the responses given: chosen, rejected and those between."""
    turns_before, responses = parts(record, given)
    said = {name: [_said(turn) for turn in turns] for name, turns in responses.items()}
    for (one, first), (other, second) in combinations(said.items(), 2):
        if first == second:
            raise RecordFault(f"{one} and {other} are the same")
    prompt = _prompt(record, turns_before)
    chosen, rejected, *others = (_response(turns, name) for name, turns in responses.items())
    return Pair(
        prompt, chosen, rejected, place, _rule(record), tools=read_tools(record),
        others=tuple(others),
    )  # fmt: skip


def to_dialogue(record: Any, place: str) -> Pair:
    """Read one record for supervised fine-tuning: `messages`, or a pair without its rejected reply.

    Args and Raises: as `to_pair`.
    """
    if not isinstance(record, Mapping) or record.get("messages") is None:
        pair = replace(to_pair(record, place), rejected=None)
        if next(turn["role"] for turn in pair.prompt if not _is_system(turn)) != "user":
            raise RecordFault("prompt: begins with the assistant, whose reply answers nothing")
        return pair
    _refuse(record)
    messages = read_messages(record["messages"], "messages")
    first = next((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), 0)
    if messages[first]["role"] == "assistant" and first == 0:
        raise RecordFault("messages: begins with the assistant, whose reply answers nothing")
    chosen = _response(messages[first:], "messages", first)
    return Pair(
        _prompt(record, messages[:first]), chosen, None, place, _rule(record),
        tools=read_tools(record),
    )  # fmt: skip


def to_labelled(record: Any, place: str) -> Pair:
    """Read a pair, or `prompt`, `completion` and `label`: a chosen reply alone, or a rejected one.

    Args and Raises: as `to_pair`.
    """
    is_pair = not isinstance(record, Mapping) or record.get("chosen") is not None
    if is_pair or record.get("completion") is None:
        return to_pair(record, place)
    _refuse(record)
    label = str(record.get("label")).lower()
    if label not in LABELS:
        # 1.0 may be a rating that happens to be the highest one.
        remedy = " (decimals may be scores: write true for a good reply, false for a bad one)"
        raise RecordFault(
            f"label: must be true or false, got {record.get('label')}{remedy * ('.' in label)}"
        )
    key = "completion"
    said = record[key]
    turns = [text_reply(said, key)] if isinstance(said, str) else read_messages(said, key)
    if turns[0]["role"] != "assistant":
        raise RecordFault(f"{key}: the first turn must be the assistant's, got {turns[0]['role']}")
    reply = _response(turns, key)
    chosen, rejected = (reply, None) if LABELS[label] else ((), reply)
    if record.get("prompt") is None:
        raise missing(record, "prompt")
    return Pair(
        _prompt(record, given_turns(record["prompt"])), chosen, rejected, place, _rule(record),
        tools=read_tools(record),
    )  # fmt: skip


def to_prompt(record: Any, place: str) -> Pair:
    """Read the prompt of one record: `prompt` alone, a pair, or `messages` up to the first reply.

    Its `reference_answer` is kept.

    Args and Raises: as `to_pair`.
    """
    if not isinstance(record, Mapping) or record.get("chosen") is not None:
        pair = to_pair(record, place)
    elif record.get("prompt") is None and record.get("messages") is not None:
        pair = to_dialogue(record, place)
    else:
        _refuse(record)
        if record.get("prompt") is None:
            raise missing(record, "prompt")
        prompt = _prompt(record, given_turns(record["prompt"]))
        pair = Pair(prompt, (), None, place, _rule(record), tools=read_tools(record))
    answer = _reference_answer(record)
    return replace(pair, chosen=(), rejected=None, reference_answer=answer)


def _reference_answer(record: Mapping[str, Any]) -> str | None:
    text = record.get(REFERENCE_ANSWER)
    if text is None:
        return None
    if not isinstance(text, str):
        raise RecordFault(f"{REFERENCE_ANSWER}: must be text, got {kind(text)}")
    check_text(text, REFERENCE_ANSWER)
    return text.strip() or None


def drop_reasoning(pair: Pair) -> Pair:
    """A pair without the reasoning of all its turns.

    Raises:
        RecordFault: a turn of a response is nothing but reasoning, or reasoning does not end.
    """
    for turn in pair.turns:
        check_reasoning_ends(turn)
    prompt = tuple(map(without_reasoning, pair.prompt))
    names = response_names(2 + len(pair.others))
    given = (pair.chosen, pair.rejected or (), *pair.others)
    chosen, rejected, *others = (
        _response(list(map(without_reasoning, response)), name) if response else ()
        for name, response in zip(names, given, strict=True)
    )
    return replace(
        pair,
        prompt=prompt,
        chosen=chosen,
        rejected=None if pair.rejected is None else rejected,
        others=tuple(others),
    )


COLUMNS: dict[Callable[[Any, str], Pair], frozenset[str]] = {
    reader: frozenset(
        [
            *(*columns, "rule", "tools", "functions", *SYSTEM_COLUMNS),
            *(name for names in SCORE_COLUMNS for name in names),
        ]
    )
    for reader, columns in (
        (to_pair, ("prompt", "chosen", "rejected")),
        (to_ranking, ("prompt", "chosen", "rejected", *RANKED)),
        (to_dialogue, ("prompt", "chosen", "rejected", "messages")),
        (to_labelled, ("prompt", "chosen", "rejected", "completion", "label")),
        (to_prompt, ("prompt", "chosen", "rejected", "messages", REFERENCE_ANSWER)),
    )
}
"""The columns that each reader uses."""


def unread_columns(record: Mapping[str, Any], read: frozenset[str]) -> Iterator[str]:
    """Names of unused columns that have a value, and unused keys of messages (`chosen[].name`)."""
    if not is_ranked(record):
        read = read.difference(RANKED)
    for column, value in record.items():
        if column not in read:
            # `simpo annotate` writes the scores of all replies beside those of the two.
            if value is not None and not (column == "scores" and "chosen_score" in record):
                yield str(column)
        elif isinstance(value, list):
            nested = (item if isinstance(item, list) else [item] for item in value)
            for message in chain.from_iterable(nested):
                if isinstance(message, Mapping) and len(message) > 2:
                    yield from (f"{column}[].{key}" for key in unread_keys(message))


def remarks(record: Mapping[str, Any], pair: Pair) -> Iterator[str]:
    """Yield what looks wrong in a record that is still used."""
    if pair.score_margin is not None and pair.score_margin <= 0:
        chosen, rejected = next(keys for keys in SCORE_COLUMNS if _scores(record, keys))
        yield f"{chosen} {'is below' if pair.score_margin else 'equals'} {rejected}"
    texts = [turn["content"] or "" for turn in pair.turns]
    prompt = record.get("prompt")
    if isinstance(prompt, str) and prompt.strip() not in map(str.strip, texts):
        yield "prompt is not in the dialogue (prompt is ignored)"
    # The plain search is much faster than the pattern, and few texts get past it.
    if any("Human:" in text and _TURNS_IN_TEXT.search(text) for text in texts):
        yield "a text contains turns (Human: ...), which are read as one"
    calls = [call["function"] for turn in pair.turns for call in turn.get("tool_calls", ())]
    if any(value is None for call in calls for value in call["arguments"].values()):
        remedy = "columnar files add them: store arguments as JSON text"
        yield f"a tool call has null arguments ({remedy})"


def known_scores(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """Scores of chosen and rejected; None if the record has none."""
    return next(filter(None, (_scores(record, keys) for keys in SCORE_COLUMNS)), None)


def _scores(record: Mapping[str, Any], keys: tuple[str, str]) -> tuple[float, float] | None:
    """The numbers in two columns, which are texts in a CSV file; None if one is no number."""
    try:
        chosen, rejected = (float(record[key]) for key in keys)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (chosen, rejected) if math.isfinite(chosen - rejected) else None


def _refuse(record: Mapping[str, Any]) -> None:
    refuse_not_text(record)
    for key in MESSAGE_KEYS:
        if has_value(record.get(key)):
            raise RecordFault(f"{key}: has a value outside of messages (put it into a message)")


def _is_system(turn: Message) -> bool:
    return turn["role"] in ("system", "developer")


def _rule(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    rule = record.get("rule")
    if rule is None:
        return None
    # In a columnar file each rule has the arguments of all other rules, as None.
    rule = {k: v for k, v in rule.items() if v is not None} if hasattr(rule, "items") else rule
    if fault := rule_fault(rule):
        raise RecordFault(f"rule: {fault}")
    check_text(json.dumps(rule, ensure_ascii=False), "rule")
    return rule


def _response(turns: list[Message], key: str, first: int | None = None) -> tuple[Message, ...]:
    """The turns of a response, checked; `first` is the index of the first one in column `key`."""
    if turns[-1]["role"] != "assistant":
        raise RecordFault(f"{key}: the last turn must be the assistant's, got {last(turns)}")
    for index, turn in enumerate(turns, start=first or 0):
        if _is_system(turn):
            raise RecordFault(f"{key}: a {turn['role']} message may only come first")
        if turn["role"] == "assistant" and not ("tool_calls" in turn or turn["content"].strip()):
            place = key if first is None else f"{key}[{index}]"
            raise RecordFault(f"{place}: the response is empty")
    return tuple(turns)


def _said(turn: Message) -> Message:
    return turn | {"content": turn["content"] and turn["content"].strip()}


def _prompt(record: Mapping[str, Any], turns: list[Message]) -> tuple[Message, ...]:
    """The turns of a prompt, checked, with the text of a column `system` before them."""
    for turn in filter(_is_system, turns[1:]):
        raise RecordFault(f"prompt: a {turn['role']} message may only come first")
    if turns[-1]["role"] not in ("user", "tool"):
        raise RecordFault(f"prompt: the last turn must be the user's, got {last(turns)}")
    if turns[-1]["role"] == "user" and not turns[-1]["content"].strip():
        raise RecordFault("prompt: the last turn is empty")
    return tuple(_with_system(record, turns))


def _with_system(record: Mapping[str, Any], prompt: list[Message]) -> list[Message]:
    for column in SYSTEM_COLUMNS:
        text = record.get(column)
        if text is None:
            continue
        if not isinstance(text, str):
            raise RecordFault(f"{column}: must be text, got {kind(text)}")
        if not text.strip():
            continue
        check_text(text, column)
        if not _is_system(prompt[0]):
            prompt = [{"role": "system", "content": text}, *prompt]
        elif prompt[0]["content"] != text:
            raise RecordFault(f"{column}: the prompt has another system message of its own")
    return prompt
