"""Any function from texts to vectors is an embedder, once it has a name."""

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import xxhash

from kvbank.embed.base import Vectors, checked, refused

Function = Callable[[list[str]], Any]
T = TypeVar("T")


class CallableEmbedder:
    """Embeds texts by a function of yours, from a list of texts to an array or tensor `[n, d]`.

    name: what a bank remembers the function by: a bank is searched by the function of the name that it was written
    with, so give another name, such as the model's name and version, when what the function computes changes.
    dimension: d; None: the function is tried. queries: the function for what is searched for, where that is another.
    digest: in the place of one that is made of name and dimension. Rows should have unit length, or be zeros for texts
    in which there is nothing. Errors: InvalidArgument for what is no function, a name that is empty, and a function
    that gives no vectors.
    """

    def __init__(
        self,
        function: Function,
        *,
        name: str,
        dimension: int | None = None,
        queries: Function | None = None,
        digest: str | None = None,
    ):
        for argument, value in (("function", function), ("queries", queries or function)):
            if not callable(value):
                raise refused(f"{argument} is a function of texts, not a {type(value).__name__}")
        self.name = _of_kind("name", name, str)
        if not name.strip():
            raise refused("name is empty: a bank remembers the function by it")
        self._function, self._queries = function, queries or function
        self.dimension = _tried(function) if dimension is None else length("dimension", dimension)
        made = xxhash.xxh3_128_hexdigest(f"callable-1 {self.dimension} {name}".encode())
        self.digest = made if digest is None else _of_kind("digest", digest, str)

    def embed(self, texts: list[str]) -> Vectors:
        """Return a row for each of `texts`. Errors: InvalidArgument where the function gives something else."""
        return checked(self._function(texts), len(texts), self.dimension)

    def embed_queries(self, texts: list[str]) -> Vectors:
        """Return a row for each of `texts`, which are searched for. Errors: InvalidArgument as `embed`."""
        return checked(self._queries(texts), len(texts), self.dimension)


def length(name: str, value: Any) -> int:
    """Return a whole number of at least 1. Errors: InvalidArgument, which names it by `name`."""
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise refused(f"{name} is a whole number, not a {type(value).__name__}")
    if number < 1:
        raise refused(f"{name} is at least 1, not {number}")
    return number


def _of_kind(name: str, value: T, kind: type) -> T:
    if not isinstance(value, kind):
        raise refused(f"{name} is a {kind.__name__}, not a {type(value).__name__}")
    return value


def _tried(function: Function) -> int:
    """Return the dimension of what a function gives for one text. Errors: InvalidArgument."""
    shape = tuple(np.shape(function(["A probe."])))
    if len(shape) != 2 or shape[0] != 1:
        raise refused(f"an embedding function gives an array [n, d]; for one text this gave the shape {shape}")
    return int(shape[1])
