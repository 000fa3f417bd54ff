"""Facts in several wordings are made up here, each with what is asked for, so that a pretrained model can answer it.

A fact says something of a made-up name: a number, or a word out of a list. Its question is either the beginning of the
statement, which the model completes, or a question in the form of a chat. The module is pure and seeded.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model_worker.errors import InputError
from model_worker.evaluate.facts import DIGITS, made_up_name

_COLOURS = "red blue green yellow black white purple orange silver golden pink brown grey".split()
_CITIES = "Paris London Rome Madrid Vienna Berlin Cairo Dublin Athens Lisbon Prague Tokyo Moscow Boston Oslo".split()
_ANIMALS = "dog cat horse wolf lion tiger bear rabbit fox snake eagle goat mouse sheep".split()


@dataclass(frozen=True, slots=True)
class Wording:
    """A way to say a fact: the statement up to the answer, what a chat asks, and the words that are answers.

    words: the answers; without any, the answer is a number.
    """

    name: str
    statement: str
    question: str
    words: tuple[str, ...] = ()


WORDINGS = {
    own.name: own
    for own in (
        Wording("number", "The number of {name} is", "What is the number of {name}?"),
        Wording("room", "The room of {name} is", "What is the room of {name}?"),
        Wording("code", "The secret code of {name} is", "What is the secret code of {name}?"),
        Wording(
            "colour",
            "The favourite colour of {name} is",
            "What is the favourite colour of {name}?",
            tuple(_COLOURS),
        ),
        Wording("city", "{name} lives in the city of", "In which city does {name} live?", tuple(_CITIES)),
        Wording(
            "animal",
            "The animal that {name} keeps at home is a",
            "Which animal does {name} keep at home?",
            tuple(_ANIMALS),
        ),
    )
}
FORMS = ("complete", "chat")


@dataclass(frozen=True, slots=True)
class WordedFact:
    """A fact in a wording: its statement, the beginning of it that a model completes, its question, its answer."""

    wording: str
    name: str
    statement: str
    beginning: str
    question: str
    answer: str

    def answered(self, text: str, form: str) -> bool:
        """Return whether a text gives the answer: at once where the statement is completed, anywhere in a chat."""
        answer = re.escape(self.answer)
        if form == "complete":
            return re.match(rf"\W*{answer}(?!\w)", text, re.IGNORECASE) is not None
        return re.search(rf"(?<!\w){answer}(?!\w)", text, re.IGNORECASE) is not None


def worded_facts(seed: int, names: Sequence[str], each: int) -> list[WordedFact]:
    """Return `each` facts of every wording of `names`, all about different people, in turn by wording.

    Raises InputError for a wording that is not there.
    """
    unknown = [name for name in names if name not in WORDINGS]
    if unknown:
        raise InputError(f"there is no wording {unknown[0]!r}; there are {', '.join(WORDINGS)}")
    draw = random.Random(f"kvbank-wordings:{seed}")
    people = _names(draw)
    return [_made(draw, WORDINGS[name], next(people)) for _ in range(each) for name in names]


def _names(draw: random.Random) -> Iterator[str]:
    """Yield made-up names, each once."""
    used = set()
    while True:
        name = made_up_name(draw)
        if name not in used:
            used.add(name)
            yield name


def _made(draw: random.Random, wording: Wording, name: str) -> WordedFact:
    beginning = wording.statement.format(name=name)
    number = str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))
    answer = draw.choice(wording.words) if wording.words else number
    question = wording.question.format(name=name)
    return WordedFact(wording.name, name, f"{beginning} {answer}.", beginning, question, answer)
