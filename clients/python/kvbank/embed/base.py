"""The protocol of embedders, which turn texts into the unit vectors by which chunks are found.

This file owns the rule that vectors are checked where they come from: whatever an embedder returns is an array of
finite numbers of the shape that it announced, or an InvalidArgument.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvbank._arrays import to_numpy
from kvbank._exceptions import InvalidArgument

Vectors = NDArray[np.float32]


class Embedder(Protocol):
    """Maps texts to `[n, dimension]` float32 rows of unit length, or of zeros for a text in which there is nothing.

    The score of a chunk is the inner product of its row and the row of the query. `digest` names the function that is
    computed: a bank keeps the digest of the embedder that wrote it, and is searched by no other, so a changed function
    needs another digest. Three members are optional. `name` is shown in messages. `embed_queries(texts)` embeds what is
    searched for, where queries and passages are not embedded alike; without it `embed` does both. `earlier()` returns
    the embedders of other digests whose banks this one can still serve.
    """

    dimension: int
    digest: str

    def embed(self, texts: list[str]) -> Vectors:
        """Return a row for each of `texts`, in their order."""


def name_of(embedder: Embedder) -> str:
    """Return the name of an embedder, or of its class where it has none."""
    return str(getattr(embedder, "name", None) or type(embedder).__name__)


def of_bank(embedder: Embedder, digest: str) -> Embedder:
    """Return the form of `embedder` that has `digest`, the embedder digest of a bank; `embedder` where none has it."""
    if embedder.digest == digest:
        return embedder
    return next((form for form in earlier_forms(embedder) if form.digest == digest), embedder)


def earlier_forms(embedder: Embedder) -> list[Embedder]:
    """Return the earlier forms of an embedder, of which most have none."""
    earlier: Callable[[], Iterable[Embedder]] = getattr(embedder, "earlier", tuple)
    return list(earlier())


def embedded(embedder: Embedder, texts: list[str]) -> Vectors:
    """Return the vectors of `texts` that are stored, `[n, dimension]` float32.

    Errors: InvalidArgument for an embedder that gives anything else than finite numbers of that shape.
    """
    return checked(embedder.embed(texts), len(texts), embedder.dimension)


def embedded_queries(embedder: Embedder, texts: list[str]) -> Vectors:
    """Return the vectors of the queries `texts`, `[n, dimension]` float32. Errors: InvalidArgument as `embedded`."""
    embed: Callable[[list[str]], object] = getattr(embedder, "embed_queries", embedder.embed)
    return checked(embed(texts), len(texts), embedder.dimension)


def checked(found: Any, count: int, dimension: int) -> Vectors:
    """Return what an embedder gave as a float32 array `[count, dimension]`. Errors: InvalidArgument."""
    try:
        with np.errstate(over="ignore"):  # what is beyond float32 is refused below
            vectors: Vectors = np.asarray(to_numpy(found), np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refused(f"the embedder returned what is no array of numbers: {error}") from None
    if vectors.shape != (count, dimension) or not np.isfinite(vectors).all():
        raise refused(
            f"the embedder returned an array of shape {vectors.shape}; finite numbers of shape "
            f"({count}, {dimension}) are expected"
        )
    return vectors


def refused(text: str) -> InvalidArgument:
    """Return the error for an embedder that is none, or does not do what it says; the caller raises it."""
    return InvalidArgument(text, reason="INVALID_FIELD", metadata={"field": "embed"})


def unit(vectors: NDArray[Any]) -> Vectors:
    """Return rows `[n, d]` at unit length; rows of zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: Vectors = (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)
    return found
