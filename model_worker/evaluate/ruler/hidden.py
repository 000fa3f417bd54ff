"""Lines are hidden in filler here, each behind a sentence: what RULER calls needles in a haystack, and its variables.

Keys are made-up names, values are numbers, and neither stands in the filler. So nothing but a hidden line tells a
value.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice, pairwise

from model_worker.errors import InputError
from model_worker.evaluate.facts import DIGITS, made_up_name
from model_worker.evaluate.ruler.prompt import Prompt, Source

KEYS = 4  # hidden keys, or values of a key, or keys that are asked for, where a task has several
HOPS = 4  # variables behind the first of a chain
_ONE, _SEVERAL, _NAMES = 24, 64, 64  # new tokens
_LEAST = 16  # tokens of filler for each line
_ABOUT_NUMBERS = "Remember the numbers of the people below; they stand in lines of the text.\n"
_ABOUT_VARIABLES = "Remember the variables below and their values; they are set in lines of the text.\n"


def single(source: Source, tokens: int, draw: random.Random) -> Prompt:
    """Hide one number, and ask for it."""
    return _one_of(source, tokens, draw, 1)


def multi_key(source: Source, tokens: int, draw: random.Random) -> Prompt:
    """Hide the numbers of four people, and ask for that of one."""
    return _one_of(source, tokens, draw, KEYS)


def _one_of(source: Source, tokens: int, draw: random.Random, keys: int) -> Prompt:
    lines = dict(zip(_names(source, draw, keys), _numbers(source, draw, keys), strict=True))
    asked = draw.choice(list(lines))
    hidden = [f"The number of {name} is {number}." for name, number in lines.items()]
    return _prompt(source, tokens, draw, (_ABOUT_NUMBERS, hidden, f"The number of {asked} is", [lines[asked]], _ONE))


def multi_value(source: Source, tokens: int, draw: random.Random) -> Prompt:
    """Hide four numbers of one person, and ask for all."""
    [name], numbers = _names(source, draw, 1), _numbers(source, draw, KEYS)
    hidden = [f"One of the numbers of {name} is {number}." for number in numbers]
    asked = f"All {KEYS} numbers of {name} are"
    return _prompt(source, tokens, draw, (_ABOUT_NUMBERS, hidden, asked, numbers, _SEVERAL))


def multi_query(source: Source, tokens: int, draw: random.Random) -> Prompt:
    """Hide the numbers of four people, and ask for all four at once."""
    names, numbers = _names(source, draw, KEYS), _numbers(source, draw, KEYS)
    hidden = [f"The number of {name} is {number}." for name, number in zip(names, numbers, strict=True)]
    asked = f"The numbers of {', '.join(names[:-1])} and {names[-1]} are, in this order,"
    return _prompt(source, tokens, draw, (_ABOUT_NUMBERS, hidden, asked, numbers, _SEVERAL))


def tracking(source: Source, tokens: int, draw: random.Random) -> Prompt:
    """Hide a chain of variables, each of which has the value of the one before, and ask for all with that value."""
    [value], names = _numbers(source, draw, 1), _variables(source, draw, HOPS + 1)
    hidden = [f"VAR {names[0]} = {value}"]
    hidden += [f"VAR {name} = VAR {before}" for before, name in pairwise(names)]
    asked = f"All variables that have the value {value}, by themselves or by way of another, are:"
    return _prompt(source, tokens, draw, (_ABOUT_VARIABLES, hidden, asked, names, _NAMES))


def _prompt(
    source: Source, tokens: int, draw: random.Random, parts: tuple[str, Sequence[str], str, Sequence[str], int]
) -> Prompt:
    """Return a prompt of exactly `tokens` tokens, its answer included.

    parts: the first line, the lines that are hidden in their order, the question, the expected strings, and the budget.
    Raises InputError where the lines do not fit.
    """
    about, lines, question, expected, budget = parts
    head, hidden = source.encode(about), [source.encode(f"\n{line}\n") for line in lines]
    room = source.room(tokens, question, budget) - len(head) - sum(map(len, hidden))
    if room < _LEAST * len(hidden):
        raise InputError(f"{tokens} tokens are too few for {len(hidden)} hidden lines, the question and its answer")
    begin = draw.randrange(len(source.ids))
    filler = list(islice(cycle(source.ids), begin, begin + room))
    text, taken = head, 0
    for line, place in zip(hidden, _places(source, filler, len(hidden), draw), strict=True):
        text = text + filler[taken:place] + line
        taken = place
    return Prompt(text + filler[taken:], question, tuple(expected), budget)


def _places(source: Source, filler: Sequence[int], count: int, draw: random.Random) -> list[int]:
    """Draw different places in the filler, ascending: behind sentences, and anywhere where there are too few."""
    places = [at + 1 for at, token in enumerate(filler) if token in source.ends]
    return sorted(draw.sample(places if len(places) >= count else range(1, len(filler)), count))


def _names(source: Source, draw: random.Random, count: int) -> list[str]:
    return list(islice(_new(source, lambda: made_up_name(draw)), count))


def _numbers(source: Source, draw: random.Random, count: int) -> list[str]:
    return list(islice(_new(source, lambda: str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))), count))


def _variables(source: Source, draw: random.Random, count: int) -> list[str]:
    """Return names of variables: five capital letters, as RULER has them."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return list(islice(_new(source, lambda: "".join(draw.choices(letters, k=5))), count))


def _new(source: Source, make: Callable[[], str]) -> Iterator[str]:
    """Yield what `make` draws, but nothing twice and nothing that stands in the filler."""
    seen = set()
    while True:
        drawn = make()
        if drawn not in seen and not source.holds(drawn):
            seen.add(drawn)
            yield drawn
