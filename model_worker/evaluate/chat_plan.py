"""What is said in a conversation of the evaluation `chat`: facts first, then sentences of a text, then questions.

The module is pure and seeded: the same seed gives the same conversation.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from model_worker.errors import InputError
from model_worker.evaluate.wordings import FORMS, WordedFact, worded_facts, wordings_named

# Words of a sentence that is said in a turn.
_LEAST, _MOST = 4, 40
# White space behind the end of a sentence, and empty lines.
_BETWEEN = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’)])\s+|\n\s*\n")


@dataclass(frozen=True, slots=True)
class Plan:
    """How long the conversations are, and what is told and asked in them.

    turns: of other text, after which all facts are asked for. facts: of each wording. wording: names of wordings, or of
    groups. ask: form of the questions. answer: tokens of the longest answer. conversations: with the seeds from `seed`
    on. Raises InputError for what is none of these.
    """

    turns: tuple[int, ...]
    facts: int
    wording: tuple[str, ...]
    ask: str
    answer: int
    conversations: int
    seed: int

    def __post_init__(self) -> None:
        if self.ask not in FORMS:
            raise InputError(f"ask {self.ask!r} is not one of {', '.join(FORMS)}")
        if len(set(self.wording)) < len(self.wording):
            raise InputError(f"wording {max(self.wording, key=self.wording.count)!r} is given twice")
        worded_facts(self.seed, wordings_named(self.wording), 1)  # refuses a name that is not there

    @property
    def seeds(self) -> range:
        """Return the seeds of the conversations."""
        return range(self.seed, self.seed + self.conversations)

    @property
    def places(self) -> list[int]:
        """Return after how many turns the facts are asked for, ascending."""
        return sorted(set(self.turns))


@dataclass(frozen=True, slots=True)
class Script:
    """What is said in one conversation.

    facts: in the order in which they are told, each in a turn. others: what is said in the turns behind them. asked:
    the facts in the order of the questions. form: of the questions.
    """

    facts: Sequence[WordedFact]
    others: Sequence[str]
    asked: Sequence[WordedFact]
    form: str

    @property
    def questions(self) -> list[str]:
        """Return what is said to ask for the facts."""
        return [asked_by(fact, self.form) for fact in self.asked]


def asked_by(fact: WordedFact, form: str) -> str:
    """Return what is said to ask for a fact: the beginning of its statement, or its question."""
    return fact.beginning if form == "complete" else fact.question


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text that can be said in a turn. Raises InputError where there is none."""
    words = (sentence.split() for sentence in _BETWEEN.split(text))
    found = [" ".join(own) for own in words if _LEAST <= len(own) <= _MOST]
    if not found:
        raise InputError(f"the text has no sentence of {_LEAST} to {_MOST} words, which would be a turn")
    return found


def script(sentences: Sequence[str], plan: Plan, seed: int) -> Script:
    """Return the conversation of a seed. sentences: of a text, from a drawn one on, and again where they end."""
    facts = worded_facts(seed, wordings_named(plan.wording), plan.facts)
    draw = random.Random(f"kvbank-chat:{seed}")
    begin = draw.randrange(len(sentences))
    said = list(islice(cycle(sentences), begin, begin + plan.places[-1]))
    return Script(facts, said, draw.sample(facts, len(facts)), plan.ask)
