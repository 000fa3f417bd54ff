"""Facts in several wordings are made up here, each with what is asked for, so that a pretrained model can answer it.

A fact says something of a made-up name: a number, or a word out of a list. It is asked for in one of three forms: by
the beginning of the statement, which the model completes; by a question and the beginning of its reply; or by the
question alone, in the form of a chat. The module is pure and seeded.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model_worker.errors import InputError
from model_worker.evaluate.facts import DIGITS, made_up_name

_COLOURS = tuple("red blue green yellow black white purple orange silver golden pink brown grey".split())
_CITIES = tuple(
    "Paris London Rome Madrid Vienna Berlin Cairo Dublin Athens Lisbon Prague Tokyo Moscow Boston Oslo".split()
)
_ANIMALS = tuple("dog cat horse wolf lion tiger bear rabbit fox snake eagle goat mouse sheep".split())
_TRADES = tuple("baker tailor doctor teacher sailor painter farmer lawyer miller hunter singer writer guard".split())
_DRINKS = tuple("water milk tea coffee wine beer cider juice cocoa rum".split())


@dataclass(frozen=True, slots=True)
class Wording:
    """A way to say a fact: the statement up to the answer, what a chat asks, and the words that are answers.

    words: the answers; without any, the answer is a number. reply: how a reply to the question begins, up to the
    answer. held_out: whether no training states a fact in this way (`model_worker.train` draws from the others).
    """

    name: str
    statement: str
    question: str
    words: tuple[str, ...] = ()
    reply: str = "It is"
    held_out: bool = False

    def fact(self, name: str, answer: str) -> "WordedFact":
        """Return the fact about a name in this wording."""
        beginning, question = self.statement.format(name=name), self.question.format(name=name)
        return WordedFact(self.name, name, f"{beginning} {answer}.", beginning, question, answer, self.reply)


_ALL = (
    Wording("number", "The number of {name} is", "What is the number of {name}?"),
    Wording("room", "The room of {name} is", "What is the room of {name}?", held_out=True),
    Wording("code", "The secret code of {name} is", "What is the secret code of {name}?"),
    Wording("colour", "The favourite colour of {name} is", "What is the favourite colour of {name}?", _COLOURS),
    Wording("city", "{name} lives in the city of", "In which city does {name} live?", _CITIES, held_out=True),
    Wording(
        "animal",
        "The animal that {name} keeps at home is a",
        "Which animal does {name} keep at home?",
        _ANIMALS,
        "It is a",
        held_out=True,
    ),
    Wording("ticket", "{name} has the ticket", "Which ticket does {name} have?", held_out=True),
    Wording("house", "{name} lives at number", "At which number does {name} live?"),
    Wording("password", "The password for {name} is", "What is the password for {name}?"),
    Wording("call", "Call {name} at", "At which number can one call {name}?"),
    Wording("list", "{name}:", "What stands behind {name} in the list?"),
    Wording("mine", "My number for {name} is", "What is my number for {name}?"),
    Wording("key", "The key of {name} has the number", "Which number has the key of {name}?"),
    Wording("born", "{name} was born in the year", "In which year was {name} born?"),
    Wording("remember", "Remember: {name}'s code is", "What is {name}'s code?"),
    Wording("account", "{name} has an account with the number", "Which number has the account of {name}?"),
    Wording("owes", "{name} owes me", "How much does {name} owe me?"),
    Wording("trade", "{name} works as a", "As what does {name} work?", _TRADES, "As a"),
    Wording("drink", "{name} likes to drink", "What does {name} like to drink?", _DRINKS),
    Wording("horse", "The horse of {name} is", "Of which colour is the horse of {name}?", _COLOURS),
)
WORDINGS = {own.name: own for own in _ALL}
# Names of several wordings at once.
GROUPS = {
    "trained": tuple(own.name for own in _ALL if not own.held_out),
    "held-out": tuple(own.name for own in _ALL if own.held_out),
}
FORMS = ("complete", "question", "chat")


@dataclass(frozen=True, slots=True)
class WordedFact:
    """A fact in a wording: its statement, the beginning of it that a model completes, its question, its answer.

    reply: how a reply to the question begins, up to the answer.
    """

    wording: str
    name: str
    statement: str
    beginning: str
    question: str
    answer: str
    reply: str = "It is"

    def asked(self, form: str) -> str:
        """Return what the model goes on from in this form; in a chat, what the user says."""
        if form == "complete":
            return self.beginning
        return f"{self.question} {self.reply}" if form == "question" else self.question

    def answered(self, text: str, form: str) -> bool:
        """Return whether a text gives the answer: anywhere in a chat, at once in the other forms."""
        answer = re.escape(self.answer)
        if form == "chat":
            return re.search(rf"(?<!\w){answer}(?!\w)", text, re.IGNORECASE) is not None
        return re.match(rf"\W*{answer}(?!\w)", text, re.IGNORECASE) is not None


def worded_facts(seed: int, names: Sequence[str], each: int) -> list[WordedFact]:
    """Return `each` facts of every wording of `names`, all about different people, in turn by wording.

    names: of wordings. Raises InputError for a wording that is not there.
    """
    unknown = [name for name in names if name not in WORDINGS]
    if unknown:
        raise InputError(f"there is no wording {unknown[0]!r}; there are {', '.join((*WORDINGS, *GROUPS))}")
    draw = random.Random(f"kvbank-wordings:{seed}")
    people = _names(draw)
    return [_made(draw, WORDINGS[name], next(people)) for _ in range(each) for name in names]


def wordings_named(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of wordings, each once, with those of a group in the place of its name."""
    return tuple(dict.fromkeys(wording for name in names for wording in GROUPS.get(name, (name,))))


def _names(draw: random.Random) -> Iterator[str]:
    """Yield made-up names, each once."""
    used = set()
    while True:
        name = made_up_name(draw)
        if name not in used:
            used.add(name)
            yield name


def _made(draw: random.Random, wording: Wording, name: str) -> WordedFact:
    number = str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))
    return wording.fact(name, draw.choice(wording.words) if wording.words else number)
