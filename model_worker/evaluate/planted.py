"""Facts are planted in pieces of a text here, to be asked for from a memory: several wordings, names and values drawn.

The module is pure but for the tokenizer, and seeded: the same seed plants the same facts at the same places.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model_worker.errors import InputError
from model_worker.evaluate.facts import make_facts

_TOWNS = (
    "Oxford Geneva Madrid Boston Vienna Lisbon Dublin Naples Warsaw Athens Prague Munich Havana Quebec Kyoto Sydney"
).split()


@dataclass(frozen=True, slots=True)
class Wording:
    """How a fact is stated and asked for: templates with {name}, {number} and {town}.

    answer: what the model should write behind the question, with the space before it.
    """

    statement: str
    question: str
    answer: str


WORDINGS: Mapping[str, Wording] = {
    "number": Wording("The number of {name} is {number}.", "The number of {name} is", " {number}"),
    "code": Wording(
        "Remember that the secret code of {name} is {number}.", "The secret code of {name} is", " {number}"
    ),
    "room": Wording(
        "{name} stays in room {number}.",
        "Question: In which room does {name} stay?\nAnswer: {name} stays in room",
        " {number}",
    ),
    "town": Wording("{name} was born in the town of {town}.", "{name} was born in the town of", " {town}"),
}


@dataclass(frozen=True, slots=True)
class Planted:
    """One fact, in token ids.

    wording: its key in `WORDINGS`. chunk: text with the statement in it. local: text that stands before the question,
    or nothing. question, answer: as the wording has them.
    """

    wording: str
    chunk: list[int]
    local: list[int]
    question: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Planting:
    """Where facts are planted, in tokens.

    chunk: of a piece of text with one fact. local: of the text before every second question; 0 for none. wordings: keys
    of `WORDINGS`, taken in turn.
    """

    chunk: int
    local: int = 0
    wordings: tuple[str, ...] = tuple(WORDINGS)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.wordings if name not in WORDINGS]:
            raise InputError(f"there is no wording {unknown[0]!r}; there are {', '.join(WORDINGS)}")
        if not self.wordings:
            raise InputError(f"name a wording; there are {', '.join(WORDINGS)}")


def plant(tokenizer: Any, text: Sequence[int], plan: Planting, count: int, seed: int) -> list[Planted]:
    """Plant `count` facts in pieces of `text` (token ids) that begin at random places.

    Raises InputError for a chunk without room for a statement, and for a text shorter than a chunk.
    """
    draw = random.Random(f"planted:{seed}")

    def encode(written: str) -> list[int]:
        return list(tokenizer.encode(written, add_special_tokens=False))

    def piece(length: int) -> list[int]:
        if len(text) <= length:
            raise InputError(f"the text has {len(text)} tokens, too few for a piece of {length}")
        begin = draw.randrange(len(text) - length)
        return list(text[begin : begin + length])

    planted = []
    for index, fact in enumerate(make_facts(seed, count)):
        name = plan.wordings[index % len(plan.wordings)]
        wording, about = WORDINGS[name], {"name": fact.name, "number": fact.number, "town": draw.choice(_TOWNS)}
        statement = encode(" " + wording.statement.format(**about))
        if len(statement) >= plan.chunk:
            raise InputError(f"a chunk of {plan.chunk} tokens has no room for a statement of {len(statement)}")
        around = piece(plan.chunk - len(statement))
        at = draw.randrange(len(around) + 1)
        behind = plan.local if (index // len(plan.wordings)) % 2 else 0
        planted.append(
            Planted(
                name,
                around[:at] + statement + around[at:],
                piece(behind) if behind else [],
                encode(wording.question.format(**about)),
                encode(wording.answer.format(**about)),
            )
        )
    return planted
