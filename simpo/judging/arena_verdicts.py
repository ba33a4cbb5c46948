"""Verdicts of Arena-Hard: their labels, what they are worth, and files of model_judgment/."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo.judging.arena_files import NAMES, read_judged
from simpo.judging.games import Game
from simpo.judging.jsonl import ONE_LINE, SPLIT, fault
from simpo.judging.shapes import JudgedAnswers, Judgement, Query, Said

BASELINE_FIRST, MODEL_FIRST = 1, 0
"""Orders of a query; the answer shown first is A."""
GAMES = (BASELINE_FIRST, MODEL_FIRST)
"""Orders of the first and the second game of a question in the files."""
LABELS = {
    "A>B": 1.0,
    "A>>B": 1.0,
    "A=B": 0.5,
    "A<B": 0.0,
    "A<<B": 0.0,
    "B>A": 0.0,
    "B>>A": 0.0,
    "B=A": 0.5,
    "B<A": 1.0,
    "B<<A": 1.0,
}
"""Verdicts, and the preference for answer A of each."""
MADE_LABELS = {1.0: "A>B", 0.5: "A=B", 0.0: "B>A"}
"""Verdicts for preferences that no judge put into words, such as those of a reward."""
COPIES = 3
"""How often a verdict with >> or << counts."""


@dataclass(frozen=True)
class Verdicts:
    """Reads verdicts out of what a judge says.

    Attributes:
        patterns: of labels; the last match of the first one that matches is the label.
    """

    patterns: Sequence[str]

    def label(self, text: str) -> str:
        """The label, as gen_judgment.py finds it; empty without one."""
        for pattern in self.patterns:
            if matches := [match for match in re.findall(pattern, text.upper()) if match]:
                return str(matches[-1]).strip("\n")
        return ""

    def value(self, query: Query, said: Said) -> float | None:
        """The preference for the model, 0, 0.5 or 1; None without one of `LABELS`."""
        for_a = LABELS.get(self.label(said.text))
        return for_a if for_a is None or query.order == MODEL_FIRST else 1 - for_a

    def label_of(self, judgement: Judgement) -> str | None:
        """The label of a game; of a preference without words, such as a reward's, made up."""
        value, order = judgement.value, judgement.query.order
        if value is None:
            return None
        label = self.label(judgement.said.text)
        return label or MADE_LABELS[value if order == MODEL_FIRST else 1 - value]

    def games(self, judgements: Sequence[Judgement]) -> list[Game]:
        """The games that count: of questions whose verdicts can all be read, of the same number.
        Only first askings do.
        """
        first: dict[str, dict[int, Judgement]] = defaultdict(dict)
        for judgement in judgements:
            if not judgement.query.repeat:
                first[judgement.query.question][judgement.query.order] = judgement
        wanted = max(map(len, first.values()), default=0)
        games = []
        for question, orders in first.items():
            readable = [
                Game(question, one.value, self._copies(one))
                for one in orders.values()
                if one.value is not None
            ]
            games += readable if len(readable) == wanted else []
        return games

    def _copies(self, judgement: Judgement) -> int:
        label = self.label(judgement.said.text)
        return COPIES if label in LABELS and (">>" in label or "<<" in label) else 1

    def read(self, path: Path, known: Collection[str]) -> tuple[JudgedAnswers, set[str]]:
        """Read a file of model_judgment/. A null game was not asked.

        Args:
            known: ids of the questions; others are left out.

        Returns:
            Judgements of answers that are not in the file, and names of the baselines.

        Raises:
            DataError: it is not of that format, holds several models or judges, or a question of
                one twice.
        """
        names: dict[str, set[str]] = {name: set() for name in NAMES}
        judgements: list[Judgement] = []
        seen = set()
        for line, record in read_judged(path):
            key = record["uid"]
            if key not in known:
                continue
            for kind, found in names.items():
                found |= {record[kind]} if record.get(kind) else set()
                if len(found) > 1 and kind != "baseline":
                    both = " and ".join(sorted(found))
                    raise fault(path, line, f"a file has one {kind}, got {both}", SPLIT)
            if key in seen:
                raise fault(path, line, f"uid {key} comes twice", ONE_LINE)
            seen.add(key)
            for order, game in zip(GAMES, record["games"], strict=True):
                if game is not None:
                    query = Query(key, 0, order, (), max_tokens=0, temperature=0.0)
                    said = self._said(game)
                    if said is None:
                        raise fault(path, line, "has a game without score or judgment")
                    judgements.append(Judgement(query, said, self.value(query, said)))
        model = next(iter(names["model"]), path.stem)
        judge = next(iter(names["judge"]), path.absolute().parent.name)
        return JudgedAnswers(model, judge, {}, judgements), names["baseline"]

    def _said(self, game: Mapping[str, Any]) -> Said | None:
        """What was said in a game of a file; its score is what counts."""
        match game:
            case {"score": str() | None as score, "judgment": {"answer": str(text)} | str(text)}:
                same = self.label(text) == (score or "")
                return Said(text if same else f"[[{score}]]" if score else "")
        return None
