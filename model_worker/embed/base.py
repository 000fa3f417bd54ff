"""The embedders' protocol is the SDK's (kvbank.embed.base). Here its checks raise the error of the worker.

This file owns the rule that vectors are checked where they come from: whatever an embedder returns is an array of
finite numbers of the shape that it announced, or an InputError.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import kvbank
from kvbank.embed import base
from kvbank.embed.base import Embedder, Vectors, earlier_forms, name_of, of_bank, unit
from model_worker.errors import InputError

__all__ = [
    "Embedder",
    "Vectors",
    "earlier_forms",
    "embedded",
    "embedded_queries",
    "input_errors",
    "name_of",
    "of_bank",
    "unit",
]


@contextmanager
def input_errors() -> Iterator[None]:
    """Raise as InputError what the SDK refuses in the block."""
    try:
        yield
    except kvbank.InvalidArgument as error:
        raise InputError(str(error)) from error


def embedded(embedder: Embedder, texts: list[str]) -> Vectors:
    """Return the vectors of `texts` that are stored, `[n, dimension]` float32.

    Raises InputError for an embedder that gives anything else than finite numbers of that shape.
    """
    with input_errors():
        return base.embedded(embedder, texts)


def embedded_queries(embedder: Embedder, texts: list[str]) -> Vectors:
    """Return the vectors of the queries `texts`, `[n, dimension]` float32. Raises InputError as `embedded`."""
    with input_errors():
        return base.embedded_queries(embedder, texts)
