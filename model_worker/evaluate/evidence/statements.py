"""Sixty statements of daily life, planted among passages of other texts and asked for in two ways.

One question of each statement has its words; the other has none of them but words such as `the` and `what`. The
statements ship with the package. A statement stands alone, as a passage of its own, or inside one: in the middle of a
passage of the other text, where a chunk of a long text has it.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from model_worker.errors import InputError
from model_worker.evaluate.evidence.collection import Collection, Question

_FILE = Path(__file__).parents[2] / "assets" / "evidence" / "statements.json"
Half = Literal["all", "even", "odd"]


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement, a question in its words, and a question in other words."""

    statement: str
    same: str
    other: str


@cache
def statements() -> tuple[Statement, ...]:
    """Return the statements that ship with the package."""
    return tuple(Statement(**each) for each in json.loads(_FILE.read_text(encoding="utf-8")))


def planted(passages: Sequence[str], count: int, *, half: Half = "all", seed: int = 0) -> list[Collection]:
    """Plant all statements among `count` passages, which are spread evenly over those given.

    half: the statements that are asked for, `even` or `odd` ones by their place in the file. seed: decides which
    passages have a statement, or make room for one. Returns two collections: statements alone, statements inside.
    Raises InputError where there are too few passages to plant the statements in.
    """
    own = statements()
    count = min(count, len(passages))
    if count <= len(own):
        raise InputError(f"{count} passages are too few to plant {len(own)} statements in")
    spread = [passages[len(passages) * place // count] for place in range(count)]
    places = random.Random(f"statements:{seed}").sample(range(count), len(own))
    asked = range({"all": 0, "even": 0, "odd": 1}[half], len(own), 1 if half == "all" else 2)
    found = []
    for how in ("alone", "inside"):
        made = list(spread)
        for place, each in zip(places, own, strict=True):
            made[place] = each.statement if how == "alone" else _amid(spread[place], each.statement)
        questions = [
            Question(text, frozenset([places[index]]), f"{words} words, {how}")
            for words in ("same", "other")
            for index in asked
            for text in (getattr(own[index], words),)
        ]
        found.append(Collection(f"statements {how}", made, questions))
    return found


def _amid(passage: str, statement: str) -> str:
    """Return a passage with a statement in its middle."""
    words = passage.split(" ")
    middle = len(words) // 2
    return " ".join([*words[:middle], statement, *words[middle:]])
