"""A collection is what one search goes through, and the questions whose evidence is known in it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the places of the passages that hold its answer.

    kind: questions of one kind are counted together.
    """

    text: str
    evidence: frozenset[int]
    kind: str


@dataclass(frozen=True, slots=True)
class Collection:
    """Passages in their order, and questions about them."""

    name: str
    passages: Sequence[str]
    questions: Sequence[Question]
