"""Finds texts that nearly repeat an earlier one: all whose word 3-grams have a given Jaccard index.

A text is the set of its 3-grams of words. If two sets have a Jaccard index of t or more, both have
at least t of the larger one's elements in common. So if each set is sorted in the same order, they
share an element among the first `size - ceil(t * size) + 1` of each. With the rarest 3-grams first,
few texts share one of these (prefix filtering, Bayardo et al. 2007). What follows the first shared
element in both sets is all that they can have in common; only if that is enough are they compared
(positional filtering, Xiao et al. 2008). Nothing is estimated: every such text is found, and no
other.
"""

from __future__ import annotations

import math
import re
import sys
from array import array
from collections import defaultdict
from collections.abc import Iterable
from itertools import count, pairwise
from typing import Any, NamedTuple

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
    sizes = np.array([len(own) for own in sets], dtype=np.int64)
    kept_with: defaultdict[int, _Kept] = defaultdict(_Kept)
    for index, own in enumerate(sets):
        # Less a little, because 0.56 * 25 is above 14 as a float.
        prefix = own[: len(own) - math.ceil(threshold * len(own) - 1e-9) + 1]
        shared = [(int(at), int(prefix[at])) for at in np.flatnonzero(num_texts_with[prefix] > 1)]
        candidates: set[int] = set()
        for at, ngram in shared:
            if ngram in kept_with:
                candidates |= kept_with[ngram].similar(len(own), len(own) - at, sizes, threshold)
        best = max(
            (Repeat(other, _jaccard(own, sets[other])) for other in candidates),
            key=lambda repeat: (repeat.jaccard, -repeat.earlier),
            default=None,
        )
        if best and best.jaccard >= threshold:
            found[index] = best
        else:
            for at, ngram in shared:
                kept_with[ngram].add(index, len(own) - at, len(own))
    return found


class _Kept:
    """The kept texts whose prefix has a certain 3-gram, and the size of each from there on."""

    def __init__(self) -> None:
        self._texts, self._rests = array("q"), array("q")
        self._longest_rest, self._least_size = 0, sys.maxsize

    def add(self, text: int, rest: int, size: int) -> None:
        self._texts.append(text)
        self._rests.append(rest)
        self._longest_rest = max(self._longest_rest, rest)
        self._least_size = min(self._least_size, size)

    def similar(self, size: int, rest: int, sizes: np.ndarray, threshold: float) -> set[int]:
        """Those that may have a Jaccard index of `threshold` with a set.

        Args:
            size: elements of the set.
            rest: its elements from the 3-gram on.
            sizes: elements of the set of each text.
        """
        # Spares a look at all texts that share a template.
        if min(rest, self._longest_rest) < _needed(size, self._least_size, threshold):
            return set()
        texts = np.frombuffer(self._texts, dtype=np.int64)
        rests = np.frombuffer(self._rests, dtype=np.int64)
        needed = _needed(size, sizes[texts], threshold)
        return set(texts[np.minimum(rest, rests) >= needed].tolist())


def _needed(size: int, other_size: Any, threshold: float) -> Any:
    """Elements in common that give two sets a Jaccard index of `threshold`; a little less."""
    return threshold / (1 + threshold) * (size + other_size) - 1e-9


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
