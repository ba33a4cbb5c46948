"""The tokens of a run's pairs in flat arrays that lie in files and are mapped into memory.

All processes that read the same files share their pages, and nothing is held for each pair:

    bounds.npy         int64 [(1 + K) * pairs + 1], where the parts of the pairs end in ids: the
                       prompt, then K responses; of two, pair i has its prompt in
                       ids[bounds[3i]:bounds[3i + 1]], then chosen, then rejected
    ids.npy            int32 [tokens]
    scored.npy         bool [tokens], only where some token of a response is not scored
    scores.npy         float32 [pairs, K], only of ranked responses; NaN for one that a pair lacks
    places.npy         uint8 [bytes], the place of each pair as text
    places-bounds.npy  int64 [pairs + 1], where they end
    held_out...        the same for held-out pairs as JSON, without replies; empty for train pairs
    report.json        what is known of the whole set
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

import numpy as np

from simpo.data.flat_tokens import NOTHING, Tokens
from simpo.data.pairs import Pair
from simpo.data.texts import Lines

T = TypeVar("T")

SCORED, SCORES = "scored.npy", "scores.npy"
LINES = ("places", "held_out")
"""Names of the files that hold a text for each pair."""


@dataclass(frozen=True)
class TokenReport:
    """How many pairs were tokenized, cut or left out.

    Attributes:
        pairs: pairs that were tokenized.
        merged_prompts: pairs in which one token spans the end of the prompt and the start of the
            response; their prompt ends at the longest common token prefix.
        cut_prompts, cut_chosen, cut_rejected: pairs in which this part was cut to its budget.
        bad: number of pairs left out, by fault.
        unreasoned: pairs in which a reply is scored without its reasoning, which the chat template
            strips because another reply follows.
    """

    pairs: int
    merged_prompts: int
    cut_prompts: int
    cut_chosen: int
    cut_rejected: int
    bad: dict[str, int]
    unreasoned: int = 0


@dataclass(frozen=True)
class TokenizedSet:
    """The tokens of pairs, and what else a run needs of them.

    Attributes:
        tokens: token ids of the pairs, in order.
        places: source, split and record of each pair, for messages.
        held_out: of held-out pairs, each without its replies; empty for train pairs.
        report: what tokenization changed.
        text_fingerprint: hash of the texts of the pairs in order, stored with the run.
        fingerprint: hash of their token ids.
        largest_id: the largest token id; -1 without pairs.
        kept_by_paper: pairs that only compat=paper accepts, by the fault they have without it.
        faults: why pairs have no tokens, by their index among all that were given.
        notes: lines for the user about the cache.
        name: of the cache entry; empty if it is not cached.
    """

    tokens: Tokens
    places: Sequence[str]
    held_out: Sequence[Pair]
    report: TokenReport
    text_fingerprint: str
    fingerprint: str
    largest_id: int
    kept_by_paper: dict[str, int]
    faults: dict[int, str]
    notes: tuple[str, ...] = ()
    name: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


def pair_json(pair: Pair) -> bytes:
    """The text of a pair as JSON, without where it comes from: what fingerprints are made of."""
    fields: dict[str, Any] = {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "place": "",
        "rule": pair.rule,
        "held_out_set": "",
        "score_margin": None,
        "tools": pair.tools,
    }
    if pair.scores:
        fields |= {"others": pair.others, "scores": pair.scores}
    return json.dumps(fields, sort_keys=True).encode()


def pairs_fingerprint(pairs: Iterable[Pair]) -> str:
    """Hash of the text of pairs in order, 16 hex digits, stored with the run."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(pair_json(pair))
    return digest.hexdigest()[:16]


def held_out_json(pair: Pair) -> str:
    """A held-out pair as JSON, without its replies."""
    return json.dumps((pair.prompt, pair.place, pair.rule, pair.held_out_set, pair.tools))


def _held_out(line: bytes) -> Pair:
    prompt, place, rule, name, tools = json.loads(line)
    return Pair(tuple(prompt), (), None, place, rule, name, tools=tools and tuple(tools))


def _place(line: bytes) -> str:
    return line.decode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Block:
    """The tokens of some pairs that follow one another in their set.

    Attributes:
        tokens: of those pairs that have tokens.
        given: number of all the pairs.
        counts: of pairs that tokenization changed, in the order of `Tokenized`.
        faults: of the pairs without tokens, by their index in the block.
        kept_by_paper: as that of `TokenizedSet`.
        places: of the pairs that have tokens.
        held_out: those of them that are held out, from `held_out_json`.
    """

    tokens: Tokens
    given: int
    counts: list[int]
    faults: dict[int, str]
    kept_by_paper: dict[str, int]
    places: list[str]
    held_out: list[str]

    def lines(self, name: str) -> list[bytes]:
        """Its lines for one of the files `LINES`."""
        texts: list[str] = getattr(self, name)
        return [text.encode("utf-8", "surrogatepass") for text in texts]

    def save(self, path: Path) -> None:
        """Write the block, whole or not at all."""
        tokens, about = self.tokens, {k: v for k, v in vars(self).items() if k != "tokens"}
        letters = np.frombuffer(json.dumps(about).encode(), np.uint8)
        arrays = {"bounds": tokens.bounds, "ids": tokens.ids, "about": letters}
        arrays["num_responses"] = np.array(tokens.num_responses)
        optional = {"scored": tokens.scored, "scores": tokens.scores}
        arrays |= {name: array for name, array in optional.items() if array is not None}
        # Without locks, several processes may write the same block at once.
        part = path.with_name(f"{path.stem}-{uuid4().hex}.part")
        with part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(part, path)

    @staticmethod
    def load(path: Path) -> Block:
        """Read what `save` wrote.

        Raises:
            OSError, ValueError, KeyError, EOFError, BadZipFile: it is missing or damaged.
        """
        with np.load(path) as file:
            about = json.loads(file["about"].tobytes())
            tokens = Tokens(
                file["bounds"], file["ids"], file.get("scored"), None,
                int(file["num_responses"]), file.get("scores"),
            )  # fmt: skip
        about["faults"] = {int(index): fault for index, fault in about["faults"].items()}
        return Block(tokens, **about)


def _scores(tokens: Tokens) -> np.ndarray:
    """Scores of the responses, float32 [pairs, K]; NaN for pairs without."""
    if tokens.scores is not None:
        return tokens.scores
    return np.full((len(tokens), tokens.num_responses), np.nan, np.float32)


def write_set(
    folder: Path, read: Callable[[], Iterator[Block]], pairs: Sequence[Pair], text_fingerprint: str
) -> None:
    """Write the files of a set into an empty folder; one block is in memory at a time.

    Args:
        read: gives the blocks of the set in order, each time that it is called.
        pairs: the pairs of all blocks.
        text_fingerprint: `pairs_fingerprint` of these pairs.
    """
    counts, kept_by_paper = [0] * 5, Counter[str]()
    faults: dict[int, str] = {}
    given, total, masked, parts = 0, 0, False, list[Tokens]()
    lines = {name: array("q", [0]) for name in LINES}
    for block in read():
        faults |= {given + index: fault for index, fault in block.faults.items()}
        given += block.given
        counts = [sum(both) for both in zip(counts, block.counts, strict=True)]
        kept_by_paper.update(block.kept_by_paper)
        tokens = block.tokens
        parts.append(replace(tokens, bounds=tokens.bounds + total, ids=NOTHING, scored=None))
        total += len(tokens.ids)
        masked |= block.tokens.scored is not None
        for name, sizes in lines.items():
            sizes.extend(map(len, block.lines(name)))
    most = max([2, *(part.num_responses for part in parts)])
    parts = [part.with_responses(most) for part in parts]
    first = np.zeros(1, np.int64)
    np.save(folder / "bounds.npy", np.concatenate([first, *(part.bounds[1:] for part in parts)]))
    if any(part.scores is not None for part in parts):
        np.save(folder / SCORES, np.concatenate([_scores(part) for part in parts]))
    letters = {}
    for name, sizes in lines.items():
        bounds = np.cumsum(sizes)
        np.save(folder / f"{name}-bounds.npy", bounds)
        letters[name] = int(bounds[-1])
    fingerprint, largest_id = _write_arrays(folder, read(), total, masked, letters)
    if faults:
        good = (pair for index, pair in enumerate(pairs) if index not in faults)
        text_fingerprint = pairs_fingerprint(good)
    bad = dict(Counter(faults.values()))
    merged, prompts, chosen, rejected, unreasoned = counts
    report = TokenReport(given - len(faults), merged, prompts, chosen, rejected, bad, unreasoned)
    about = {
        "report": asdict(report),
        "faults": faults,
        "text_fingerprint": text_fingerprint,
        "fingerprint": fingerprint,
        "largest_id": largest_id,
        "kept_by_paper": dict(kept_by_paper),
        "num_responses": most,
    }
    (folder / "report.json").write_text(json.dumps(about))


def _write_arrays(
    folder: Path, blocks: Iterator[Block], total: int, masked: bool, letters: Mapping[str, int]
) -> tuple[str, int]:
    """Write the arrays of blocks one after the other.

    Args:
        total: tokens of all blocks.
        masked: some of them are not scored.
        letters: bytes of all lines of each of `LINES`.

    Returns:
        The fingerprint of the token ids, and the largest of them.
    """
    digest, largest_id = hashlib.sha256(), -1
    with ExitStack() as files:

        def opened(name: str, dtype: type[np.generic], size: int) -> BinaryIO:
            return files.enter_context(_array_file(folder / name, dtype, size))

        ids = opened("ids.npy", np.int32, total)
        masks = masked and opened(SCORED, np.bool_, total)
        lines = {name: opened(f"{name}.npy", np.uint8, size) for name, size in letters.items()}
        for block in blocks:
            tokens, scored = block.tokens, block.tokens.scored
            ids.write(tokens.ids.tobytes())
            if masks:
                mask = np.ones(len(tokens.ids), bool) if scored is None else scored
                masks.write(mask.tobytes())
            for name, file in lines.items():
                file.writelines(block.lines(name))
            largest_id = max(largest_id, int(tokens.ids.max(initial=-1)))
            tokens.add_to(digest)
    return digest.hexdigest()[:16], largest_id


def open_set(folder: Path) -> TokenizedSet:
    """Map the files of a set into memory; they may be removed afterwards."""

    def mapped(name: str) -> np.ndarray:
        return np.asarray(np.load(folder / name, mmap_mode="r"))

    def lines(name: str, read: Callable[[bytes], T]) -> Lines[T]:
        return Lines(mapped(f"{name}.npy"), mapped(f"{name}-bounds.npy"), read)

    about = json.loads((folder / "report.json").read_text())
    scored, scores = (mapped(n) if (folder / n).exists() else None for n in (SCORED, SCORES))
    most = about.pop("num_responses")
    tokens = Tokens(mapped("bounds.npy"), mapped("ids.npy"), scored, None, most, scores)
    about["faults"] = {int(index): fault for index, fault in about["faults"].items()}
    about["report"] = TokenReport(**about["report"])
    return TokenizedSet(tokens, lines("places", _place), lines("held_out", _held_out), **about)


@contextmanager
def _array_file(path: Path, dtype: type[np.generic], size: int) -> Iterator[BinaryIO]:
    """A file of an array of one dimension, opened behind its header."""
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(file, header)
        yield file
