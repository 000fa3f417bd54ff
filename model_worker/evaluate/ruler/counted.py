"""Lists of words are made here whose most frequent ones are asked for: RULER's common words and frequent words.

Words are made up, so that no list of words is needed, and no expected word is a part of another word.
"""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice

from model_worker.errors import InputError
from model_worker.evaluate.facts import made_up_name
from model_worker.evaluate.ruler.prompt import Prompt, Source

COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3
FREQUENT, VOCABULARY = 3, 2000
_ZETA = 1.6449340668  # of 2: the sum of 1 / k ** 2
_TEN, _THREE = 96, 32  # new tokens


def common(source: Source, tokens: int, draw: random.Random) -> Prompt:
    """Make a numbered list of words, ten of them 30 times, the others 3 times, and ask for the ten.

    The list ends before the word with which the prompt would have more than `tokens` tokens. Raises InputError where
    the ten words and another one are too much.
    """
    question = f"The {COMMON} words that stand in the list most often are:"
    head = source.encode("Below is a numbered list of words. Remember the words that stand in it most often.\n")
    room = source.room(tokens, question, _TEN) - len(head)
    most = max(0, room) // 2  # entries, of a number and a word
    numbers = source.encode_each([f"\n{at}." for at in range(1, most + 1)]) if most else []
    expected = _expected(draw, COMMON)
    words = [*expected, *islice(_others(draw, expected), most // RARE_TIMES)]
    listed: list[list[int]] = []
    for index, word in enumerate(_entries(source, words)):
        times = COMMON_TIMES if index < COMMON else RARE_TIMES
        room -= times * len(word) + sum(map(len, numbers[len(listed) : len(listed) + times]))
        if room < 0 or len(listed) + times > most:
            break
        listed += [word] * times
    if len(listed) <= COMMON * COMMON_TIMES:
        raise InputError(f"{tokens} tokens are too few for a list of {COMMON * COMMON_TIMES} common words and others")
    draw.shuffle(listed)
    text = [token for number, word in zip(numbers, listed, strict=False) for token in (*number, *word)]
    return Prompt(head + text, question, tuple(expected), _TEN)


def frequent(source: Source, tokens: int, draw: random.Random) -> Prompt:
    """Make a text of words whose numbers fall with the square of their rank, and ask for the ranks two to four.

    The first rank are dots, as in RULER. The text ends before the word with which the prompt would have more than
    `tokens` tokens. Raises InputError where the asked words would not differ in number.
    """
    question = f"The {FREQUENT} words that stand in the text most often, the dots left out, are:"
    head = source.encode("Below is a text of coded words. Remember the words that stand in it most often.\n")
    expected = _expected(draw, FREQUENT)
    words = ["...", *expected, *islice(_others(draw, expected), VOCABULARY - FREQUENT - 1)]
    entries = _entries(source, words)

    def size(length: int) -> int:
        return sum(times * len(entry) for times, entry in zip(_numbers(length), entries, strict=True))

    room = source.room(tokens, question, _THREE) - len(head)
    numbers = _numbers(bisect_right(range(max(room, 0) + 1), room, key=size) - 1)
    if len(set(numbers[: FREQUENT + 2])) < FREQUENT + 2:
        raise InputError(f"{tokens} tokens are too few for words that differ in their number")
    listed = [entry for entry, times in zip(entries, numbers, strict=True) for _ in range(times)]
    draw.shuffle(listed)
    text = [token for entry in listed for token in entry]
    return Prompt(head + text, question, tuple(expected), _THREE)


def _numbers(length: int) -> list[int]:
    """Return how often each word stands in a text of about `length` words, by rank."""
    return [round(length / (_ZETA * rank**2)) for rank in range(1, VOCABULARY + 1)]


def _entries(source: Source, words: Sequence[str]) -> list[list[int]]:
    return source.encode_each([f" {word}" for word in words])


def _expected(draw: random.Random, number: int) -> list[str]:
    """Draw words none of which is a part of another one."""
    words: list[str] = []
    while len(words) < number:
        word = _word(draw)
        if not any(word in own or own in word for own in words):
            words.append(word)
    return words


def _others(draw: random.Random, expected: Sequence[str]) -> Iterator[str]:
    """Yield words, each once, that hold none of the `expected` ones."""
    seen = set()
    while True:
        word = _word(draw)
        if word not in seen and not any(own in word or word in own for own in expected):
            seen.add(word)
            yield word


def _word(draw: random.Random) -> str:
    return made_up_name(draw).partition(" ")[0].lower()
