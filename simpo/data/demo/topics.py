"""The knowledge behind the demo pairs: `TOPICS`, and the names of those held out for testing.

topics.txt has one block a topic, fields separated by " / " or a line end, in this order: name,
pronoun, what its items are, five items, five facts (kind, place, feature, known for, one more), a
question whose answer is yes with its answer, a question whose answer is no with its answer. A fact
is a verb and a phrase with "|" between: joined they are a predicate, the phrase alone is a JSON
value.
"""

from pathlib import Path
from typing import NamedTuple


class Topic(NamedTuple):
    """What is known about one thing; every text lacks its capital letter and its full stop."""

    name: str
    pronoun: str
    items_label: str
    items: list[str]
    facts: list[str]
    yes: tuple[str, str]
    no: tuple[str, str]

    def predicates(self) -> list[str]:
        """The facts as they follow a name: verb and phrase."""
        return [fact.replace("|", " ") for fact in self.facts]


HELD_OUT = frozenset(
    {
        "penguins",
        "violins",
        "chocolate",
        "hammers",
        "Saturn",
        "sunflowers",
        "lighthouses",
        "tennis",
    }
)


def _topic(block: str) -> Topic:
    name, pronoun, label, *rest = block.strip().replace("\n", " / ").split(" / ")
    yes, no = (rest[10], rest[11]), (rest[12], rest[13])
    return Topic(name, pronoun, label, rest[:5], rest[5:10], yes, no)


TOPICS = [
    _topic(block)
    for block in Path(__file__)
    .with_name("topics.txt")
    .read_text(encoding="utf-8")
    .strip()
    .split("\n\n")
]
