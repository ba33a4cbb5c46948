"""Finds texts that nearly repeat an earlier one: all whose word 3-grams have a given Jaccard index.

A text is the set of its 3-grams of words. If two sets have a Jaccard index of t or more, both have
at least t of the larger one's elements in common. So if each set is sorted in the same order, they
share an element among the first `size - ceil(t * size) + 1` of each. With the rarest 3-grams first,
few texts share one of these, and only those are compared (prefix filtering, Bayardo et al. 2007).
Nothing is estimated: every such text is found, and no other.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np

NGRAM_WORDS = 3
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
"""Characters of scripts without spaces between words (Thai, Lao, Burmese, Khmer, Japanese,
Chinese); each counts as a word."""
_WORD = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+|[^\w\s]")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Repeat(NamedTuple):
    """The earlier text that a text nearly repeats, and their Jaccard index."""

    earlier: int
    jaccard: float


def words(text: str) -> list[str]:
    """The words of a text in lower case; a punctuation mark is a word of its own."""
    return _WORD.findall(text.lower())


def near_duplicates(texts: Iterable[str], threshold: float) -> list[Repeat | None]:
    """Find the texts that nearly repeat an earlier one.

    A text is compared with earlier ones that are no repeats themselves. So no two of the texts
    without a `Repeat` have a Jaccard index of `threshold` or more.

    Args:
        threshold: least Jaccard index, above 0.

    Returns:
        For each text None, or the most similar earlier one; of several, the first.
    """
    sets, num_texts_with = _ngram_sets(texts)
    found: list[Repeat | None] = [None] * len(sets)
    kept_with: defaultdict[int, list[int]] = defaultdict(list)
    for index, own in enumerate(sets):
        # Less a little, because 0.56 * 25 is above 14 as a float.
        prefix = own[: len(own) - math.ceil(threshold * len(own) - 1e-9) + 1]
        shared = prefix[num_texts_with[prefix] > 1].tolist()
        candidates = {other for ngram in shared for other in kept_with[ngram]}
        best = max(
            (Repeat(other, _jaccard(own, sets[other])) for other in candidates),
            key=lambda repeat: (repeat.jaccard, -repeat.earlier),
            default=None,
        )
        if best and best.jaccard >= threshold:
            found[index] = best
        else:
            for ngram in shared:
                kept_with[ngram].append(index)
    return found


def _ngram_sets(texts: Iterable[str]) -> tuple[list[np.ndarray], np.ndarray]:
    """The 3-grams of each text as numbers, and how often each number occurs.

    Returns:
        For each text, its different 3-grams in ascending order, int64; a rarer one has a lower
        number. And the occurrences of each number in all texts.
    """
    numbers: defaultdict[str, int] = defaultdict(count(1).__next__)
    flat = array("Q")
    ends = [0]
    for text in texts:
        found = words(text)
        # A text without a whole 3-gram gets one, padded with 0, which is no word's number.
        flat.extend(map(numbers.__getitem__, found))
        flat.extend([0] * (NGRAM_WORDS - len(found)))
        ends.append(len(flat))
    if len(ends) == 1:
        return [], np.zeros(0, dtype=np.int64)
    ids = np.frombuffer(flat, dtype=np.uint64)
    # 64-bit hashes: two of 20 million different 3-grams get the same one with probability 1e-5.
    keys = (ids[:-2] * _MULTIPLIER + ids[1:-1]) * _MULTIPLIER + ids[2:]
    _, inverse, occurrences = np.unique(keys, return_inverse=True, return_counts=True)
    order = np.argsort(occurrences, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    ranked = rank[inverse]
    # The last two 3-grams that begin in a text reach into the next one.
    sets = [np.unique(ranked[start : end - NGRAM_WORDS + 1]) for start, end in pairwise(ends)]
    return sets, occurrences[order]


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard index of two sets, given as arrays without repetitions."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
