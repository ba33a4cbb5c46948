"""The shapes of record that people have, and how each becomes one that `records` reads.

A shape takes a raw record and gives the columns that `simpo.data.reading.records` reads (prompt,
chosen, rejected, messages, completion, label, system, tools), or all replies to a prompt with their
scores. Columns that a shape does not use stay in the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from simpo.data.reading.messages import RecordFault
from simpo.data.reading.printed import refuse_messages_as_text
from simpo.data.reading.scored import (
    NAMED,
    REPLIES,
    SCORES,
    SIGNED,
    TWO_REPLIES,
    Scored,
    WrongShape,
    chosen_names_a_reply,
    comparison,
    has_scores,
    lists_scores,
    replies,
    two_replies,
)
from simpo.data.reading.turns import (
    HH_TEXT,
    PROMPTS,
    asked_of,
    hh_prompt,
    hh_turns,
    is_hh_prompt,
    is_message,
    turns,
    with_history,
    with_input,
)

Record = dict[str, Any]


class Gives(Enum):
    """What the records of a shape are good for."""

    pair = "pair"
    dialogue = "dialogue"
    prompt = "prompt"
    labelled = "labelled"
    nothing = "nothing"


@dataclass(frozen=True)
class Shape:
    """One shape of record.

    `needs` are the columns that it must have, each as alternatives of which one is enough, and
    `optional` those that it uses if they are there. `when` looks at the values of a record that
    has them. `read` takes the columns that it uses out of a copy of the record. A shape that gives
    nothing says in `why_not` why, and what to do.
    """

    name: str
    title: str
    gives: Gives
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Record], Record | Scored]
    when: Callable[[Mapping[str, Any]], bool] = lambda record: True
    optional: tuple[str, ...] = ()
    why_not: str = ""

    def lacks(self, record: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """The needs that no column with a value meets."""
        return [names for names in self.needs if all(record.get(n) is None for n in names)]

    def fits(self, record: Mapping[str, Any]) -> bool:
        return not self.lacks(record) and self.when(record)


def as_they_are(rest: Record) -> Record:
    """Pairs, dialogues and prompts as `records` reads them; ShareGPT's messages become OpenAI's."""
    if chosen_names_a_reply(rest):
        raise WrongShape("chosen names a reply, and is not read as such (set format: comparison)")
    columns = ("prompt", "chosen", "rejected", "messages")
    made = {
        key: turns(rest[key], key) for key in columns if isinstance(rest.get(key), (list, dict))
    }
    if "history" in rest and "prompt" in rest and not _starts_with_the_user(rest):
        made["prompt"] = with_history(rest["prompt"], rest)
    return made


def _is_hh(record: Mapping[str, Any]) -> bool:
    replies = [record["chosen"], record["rejected"]]
    if not all(isinstance(reply, str) for reply in replies):
        return False
    return all(map(HH_TEXT.match, replies)) or is_hh_prompt(record.get("prompt"))


def _hh_rlhf(rest: Record) -> Record:
    if not is_hh_prompt(rest.get("prompt")):
        return {key: hh_turns(rest[key], key) for key in ("chosen", "rejected")}
    made: Record = {"prompt": hh_prompt(rest["prompt"])}
    for key in ("chosen", "rejected"):
        reply = rest[key]
        if isinstance(reply, str):
            made[key] = hh_turns(reply, key) if HH_TEXT.match(reply) else reply.strip()
    return made


def _orca(rest: Record) -> Record:
    name = "question" if rest.get("question") is not None else "input"
    return {"prompt": with_history(rest.pop(name), rest), **as_they_are(rest)}


def _alpaca(rest: Record) -> Record:
    """`output` is the reply to imitate, or both replies with the better one first."""
    asked = with_history(with_input(rest.pop("instruction"), rest.pop("input", None)), rest)
    if rest.get("chosen") is not None or rest.get("rejected") is not None:
        return {"prompt": asked, **as_they_are(rest)}
    output = rest.pop("output", None)
    if isinstance(output, list) and lists_scores(rest):
        raise WrongShape("output has scores, which are not read (set format: replies)")
    if isinstance(output, list):
        if len(output) != 2:
            raise RecordFault(f"output: must list two replies, the better first, got {len(output)}")
        return {"prompt": asked, "chosen": output[0], "rejected": output[1]}
    if isinstance(output, str):
        refuse_messages_as_text(output, "output")
    before = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    return {"messages": [*before, {"role": "assistant", "content": output}]}


def _sharegpt(rest: Record) -> Record:
    name = "conversations" if rest.get("conversations") is not None else "conversation"
    said = turns(rest.pop(name), name)
    if rest.get("chosen") is None and rest.get("rejected") is None:
        return {"messages": said}
    return {"prompt": said, **as_they_are(rest)}


def _openai(rest: Record) -> Record:
    asked = rest.pop("input")
    if not isinstance(asked, Mapping) or asked.get("messages") is None:
        raise RecordFault("input: must be an object with messages")
    named = {f"input.{k}": v for k, v in asked.items() if k not in ("messages", "tools")}
    tools = {"tools": asked["tools"]} if asked.get("tools") else {}
    return {
        **named, **tools,
        "prompt": asked["messages"],
        "chosen": turns(rest.pop("preferred_output"), "preferred_output"),
        "rejected": turns(rest.pop("non_preferred_output"), "non_preferred_output"),
    }  # fmt: skip


def _labelled(rest: Record) -> Record:
    name = "completion" if rest.get("completion") is not None else "response"
    said = turns(rest.pop(name), name)
    return {"prompt": asked_of(rest), "completion": said}


def _starts_with_the_user(record: Mapping[str, Any]) -> bool:
    chosen = record.get("chosen")
    if not isinstance(chosen, list) or not chosen or not is_message(chosen[0]):
        return False
    return chosen[0].get("role", chosen[0].get("from")) in ("system", "developer", "user", "human")


def _is_list(*columns: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda record: any(isinstance(record.get(name), (list, dict)) for name in columns)


_RATINGS = ("score", "rating", "reward", "overall_score", "helpfulness")
_PAIR = (("prompt",), ("chosen",), ("rejected",))
_DIALOGUES = (("chosen",), ("rejected",))
_COMPARED = (
    PROMPTS,
    tuple(dict.fromkeys(first for first, _ in TWO_REPLIES)),
    tuple(dict.fromkeys(second for _, second in TWO_REPLIES)),
    (*SIGNED, *NAMED),
)
SHAPES = (
    Shape(
        "comparison", "two replies and which is better", Gives.pair, _COMPARED, comparison,
        chosen_names_a_reply, ("input",),
    ),
    Shape(
        "openai", "OpenAI preferences", Gives.pair,
        (("input",), ("preferred_output",), ("non_preferred_output",)), _openai,
    ),
    Shape(
        "sharegpt", "ShareGPT with two replies", Gives.pair,
        (("conversations", "conversation"), ("chosen",), ("rejected",)), _sharegpt,
        lambda record: record.get("prompt") is None, ("tools",),
    ),
    Shape("hh_rlhf", "HH-RLHF text", Gives.pair, _DIALOGUES, _hh_rlhf, _is_hh),
    Shape(
        "ultrafeedback", "UltraFeedback binarized", Gives.pair, _PAIR, as_they_are,
        lambda record: isinstance(record["prompt"], str) and _starts_with_the_user(record),
    ),
    Shape(
        "dialogues", "whole dialogues", Gives.pair, _DIALOGUES, as_they_are, _starts_with_the_user,
    ),
    Shape(
        "pair", "prompt and replies as messages", Gives.pair, _PAIR, as_they_are,
        _is_list("prompt", "chosen", "rejected"),
    ),
    Shape("pair", "prompt and two texts", Gives.pair, _PAIR, as_they_are),
    Shape(
        "alpaca", "Alpaca with chosen and rejected", Gives.pair,
        (("instruction",), ("chosen",), ("rejected",)), _alpaca, optional=("input", "history"),
    ),
    Shape(
        "alpaca", "Alpaca with two outputs", Gives.pair, (("instruction",), ("output",)), _alpaca,
        lambda record: isinstance(record["output"], list) and not lists_scores(record),
        ("input", "history"),
    ),
    Shape(
        "orca", "Orca", Gives.pair, (("question", "input"), ("chosen",), ("rejected",)), _orca,
        lambda record: isinstance(record.get("question") or record.get("input"), str),
    ),
    Shape(
        "comparison", "two replies and which is better", Gives.pair, _COMPARED, comparison,
        lambda record: two_replies(record) is not None,
        ("input",),
    ),
    Shape(
        "replies", "replies with scores", Gives.pair, (PROMPTS, REPLIES), replies, has_scores,
        ("input", *SCORES),
    ),
    Shape("messages", "messages", Gives.dialogue, (("messages",),), as_they_are),
    Shape(
        "sharegpt", "ShareGPT", Gives.dialogue, (("conversations", "conversation"),), _sharegpt,
        lambda record: record.get("chosen") is None, ("tools",),
    ),
    Shape(
        "alpaca", "Alpaca", Gives.dialogue, (("instruction",), ("output",)), _alpaca,
        lambda record: isinstance(record["output"], str), ("input", "history"),
    ),
    Shape(
        "prompt", "prompts", Gives.prompt, (PROMPTS,), lambda rest: {"prompt": asked_of(rest)},
        optional=("input",),
    ),
    Shape(
        "kto", "replies with labels", Gives.labelled,
        (("prompt",), ("completion", "response"), ("label",)), _labelled,
        why_not="records have one reply and a label, and a pair needs two replies (loss=kto trains "
        "on them; or write one with label true and one with label false as chosen and rejected of "
        "their prompt)",
    ),
    Shape(
        "ratings", "rated replies", Gives.nothing,
        (PROMPTS, ("response", "completion", "answer", "output"), _RATINGS), dict,
        why_not="records have one rated reply each, and a pair needs two (group them by prompt: "
        "one record with the lists responses and scores)",
    ),
)  # fmt: skip
"""All shapes; the first that fits is taken."""
