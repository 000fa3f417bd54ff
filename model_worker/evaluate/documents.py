"""Documents of a measurement: pieces of equal length in tokens, spread evenly over the texts that were given.

The same documents serve every method and every reader of a measurement, so differences between them are paired.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from model_worker.errors import InputError
from model_worker.user_text import encode_text, readable


def cut(ids: Sequence[int], length: int, count: int) -> Iterator[list[int]]:
    """Yield at most `count` pieces of `length` ids each, spread evenly over a text."""
    count = min(count, len(ids) // length)
    for index in range(count):
        at = (len(ids) - length) * index // max(count - 1, 1)
        yield list(ids[at : at + length])


def text_by_text(tokenizer: Any, texts: Sequence[str], length: int, count: int) -> list[list[int]]:
    """Return `count` pieces of `length` tokens (fewer where the texts are short), those of one text side by side."""
    shares = [count // len(texts) + (index < count % len(texts)) for index in range(len(texts))]
    encoded = (encode_text(tokenizer, readable(text)) for text in texts)
    return [piece for ids, share in zip(encoded, shares, strict=True) for piece in cut(ids, length, share)]


def in_turn(tokenizer: Any, texts: Sequence[str], length: int, count: int) -> list[list[int]]:
    """Return `count` pieces of `length` tokens, taken from the texts in turn: neighbours are of different texts.

    Raises InputError where the texts have fewer than two pieces.
    """
    each = -(-count // len(texts))
    cuts = [list(cut(encode_text(tokenizer, readable(text)), length, each)) for text in texts]
    turns = [own[index] for index in range(each) for own in cuts if index < len(own)]
    if len(turns) < 2:
        raise InputError(f"the text is too short for two pieces of {length} tokens")
    return turns[:count]
