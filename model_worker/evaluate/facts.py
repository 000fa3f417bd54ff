"""Facts are made up here: a random name and a random number, the statement to remember, the question to ask later.

The module is pure and seeded. Training draws its facts from seeds at or above `TRAINING_SEEDS`; an evaluation takes a
seed below it, so that the two never meet (names come from a space of about 10^11, numbers from 90,000).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

TRAINING_SEEDS = 1 << 32
DIGITS = 5

ONSETS = "b br d dr f g gr h j k kr l m n p pr r s sk st t tr v w z".split()
VOWELS = "a e i o u".split()
CODAS = "l m n r s t k".split()


@dataclass(frozen=True)
class Fact:
    """A name and its number, which nothing but the statement tells.

    Greedy decoding after `question` must start with `answer`; `question + answer` begins `statement`.
    """

    name: str
    number: str
    statement: str
    question: str
    answer: str


def make_facts(seed: int, n: int) -> list[Fact]:
    """Make `n` facts with different names and different numbers; the same seed gives the same facts."""
    rng = random.Random(f"kvbank-facts:{seed}")
    facts: dict[str, Fact] = {}
    numbers: set[str] = set()
    while len(facts) < n:
        name, number = made_up_name(rng), str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))
        if name not in facts and number not in numbers:
            numbers.add(number)
            facts[name] = _fact(name, number)
    return list(facts.values())


def made_up_name(rng: random.Random) -> str:
    """Draw a name of two words, such as Torvel Makin."""
    return f"{_word(rng)} {_word(rng)}"


def _word(rng: random.Random) -> str:
    """Draw a word of two syllables, open or closed, such as Torvel or Makin."""
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(["", *CODAS]) for _ in range(2)]
    return "".join(syllables).capitalize()


def _fact(name: str, number: str) -> Fact:
    question = f"The number of {name} is"
    return Fact(name, number, f"{question} {number}.", question, f" {number}")
