"""Times the checks of `data.filter` on made-up pairs, and compares near duplicates with all pairs.

    python benchmarks/filter.py [pairs]        60,000 by default, of about 60 + 150 + 150 words

Words are drawn from 50,000 as often as in English text (Zipf). One pair in a hundred is an earlier
one with some words of a reply replaced: by hand-worked numbers its Jaccard index is known.
"""

from __future__ import annotations

import importlib.util
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from simpo.data.cleaning.duplicates import near_duplicates, words
from simpo.data.cleaning.filter import CHECKS
from simpo.data.pairs import Pair

VOCABULARY = 50_000
PARTS_WORDS = (60, 150, 150)
THRESHOLD = 0.8
COMPARED = 2000


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 60_000
    pairs, planted = made_up(number)
    print(f"{number:,} pairs, {len(planted):,} planted near duplicates")
    time_checks(pairs)
    report_recall(pairs, planted)
    compare_all_pairs()
    if importlib.util.find_spec("datasketch"):
        time_datasketch(list(map(text, pairs)))


def made_up(number: int, edits: float = 0.01) -> tuple[list[Pair], list[int]]:
    """Pairs, and the indices of those that are edits of an earlier one."""
    rng, draw = np.random.default_rng(0), random.Random(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(rng.choice(letters, k)) for k in rng.integers(2, 10, VOCABULARY)]
    odds = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    parts: list[list[list[str]]] = []
    planted = []
    for index in range(number):
        if parts and draw.random() < edits:
            parts.append([list(part) for part in draw.choice(parts)])
            planted.append(index)
            rejected = parts[-1][2]
            # Up to 50 of about 360 words: Jaccard indices from 0.7 to 1.
            for place in range(draw.randrange(1, 50)):
                rejected[-1 - place] = f"new{draw.randrange(10**9)}"
        else:
            sizes = rng.poisson(PARTS_WORDS)
            ids = np.searchsorted(odds, rng.random(sizes.sum()) * odds[-1])
            drawn = [vocabulary[i] for i in ids]
            ends = np.cumsum(sizes)
            parts.append(
                [drawn[: ends[0]], drawn[ends[0] : ends[1]], drawn[ends[1] :]],
            )
    return [
        Pair(
            ({"role": "user", "content": " ".join(prompt)},),
            ({"role": "assistant", "content": " ".join(chosen) + "."},),
            ({"role": "assistant", "content": " ".join(rejected) + "."},),
            f"record {index}",
            score_margin=draw.random(),
        )
        for index, (prompt, chosen, rejected) in enumerate(parts)
    ], planted


def text(pair: Pair) -> str:
    return " ".join(turn["content"] for part in (pair.prompt, *pair.responses) for turn in part)


def time_checks(pairs: list[Pair]) -> None:
    """Run each check on all pairs, with 1,000 held-out prompts and 1,000 of a benchmark."""
    total_s = total_cpu_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.txt"
        file.write_text("\n".join(pair.prompt[0]["content"] for pair in pairs[:1000]))
        for check in CHECKS:
            setting = [str(file)] if check.suggested is None else check.suggested
            begin, begin_cpu = time.perf_counter(), time.process_time()
            reasons = check.find(pairs, setting, pairs[-1000:])
            took, took_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
            total_s, total_cpu_s = total_s + took, total_cpu_s + took_cpu
            found = sum(why is not None for why in reasons)
            print(f"  {check.key:26} {took:6.1f} s  {took_cpu:6.1f} CPU s  {found:6,} found")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  {'all':26} {total_s:6.1f} s  {total_cpu_s:6.1f} CPU s  {memory:.1f} GiB at most")


def ngrams(pair: Pair) -> set[tuple[str, ...]]:
    found = words(text(pair))
    return {tuple(found[i : i + 3]) for i in range(len(found) - 2)}


def jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other)


def report_recall(pairs: list[Pair], planted: list[int]) -> None:
    """How many planted pairs are found, by their Jaccard index with the nearest earlier planted or
    original pair, which shares the prompt."""
    found = near_duplicates(map(text, pairs), THRESHOLD)
    earlier: dict[str, list[int]] = {}
    hits = misses = wrong = 0
    for index, pair in enumerate(pairs):
        same_prompt = earlier.setdefault(pair.prompt[0]["content"], [])
        own = ngrams(pair) if same_prompt else set()
        kept = [other for other in same_prompt if found[other] is None]
        near = any(jaccard(own, ngrams(pairs[other])) >= THRESHOLD for other in kept)
        hits += near and found[index] is not None
        misses += near and found[index] is None
        wrong += not near and found[index] is not None
        same_prompt.append(index)
    print(
        f"  near duplicates at {THRESHOLD} or more: {hits} found, {misses} missed; "
        f"{wrong} found below; {len(planted) - hits} planted ones are below"
    )


def compare_all_pairs() -> None:
    """Against every earlier pair that stays, for a part of the size and many edits."""
    pairs, _ = made_up(COMPARED, edits=0.5)
    begin = time.process_time()
    found = near_duplicates(map(text, pairs), THRESHOLD)
    ours_s = time.process_time() - begin
    begin = time.process_time()
    sets = list(map(ngrams, pairs))
    kept: list[int] = []
    expected = []
    for index, own in enumerate(sets):
        near = any(jaccard(own, sets[other]) >= THRESHOLD for other in kept)
        expected.append(near)
        kept += [] if near else [index]
    all_pairs_s = time.process_time() - begin
    right = sum(near and repeat is not None for near, repeat in zip(expected, found, strict=True))
    print(
        f"  all pairs of {COMPARED:,}: {sum(expected)} near duplicates; found {right} of them, and "
        f"{sum(repeat is not None for repeat in found) - right} others; "
        f"{ours_s:.1f} CPU s, all pairs {all_pairs_s:.1f} CPU s"
    )


def time_datasketch(texts: list[str]) -> None:
    """MinHash with 128 permutations in 32 bands of 4, which misses 1 in 2e7 at 0.8."""
    from datasketch import MinHash, MinHashLSH

    begin = time.process_time()
    index = MinHashLSH(params=(32, 4), num_perm=128)
    split = [words(one) for one in texts]
    sets = [[" ".join(w[i : i + 3]).encode() for i in range(len(w) - 2)] for w in split]
    candidates = 0
    for number, sketch in enumerate(MinHash.generator(sets, num_perm=128)):
        if index.query(sketch):
            candidates += 1
        else:
            index.insert(number, sketch)
    took = time.process_time() - begin
    print(f"  datasketch: {took:.1f} CPU s, {candidates:,} candidates, not compared")


if __name__ == "__main__":
    main()
