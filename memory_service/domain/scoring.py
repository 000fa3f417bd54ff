"""Scores and their order. This file owns what "best" means, whatever index has found the candidates: a score is the
inner product of the true float32 vectors, summed in float64 and rounded to float32; the highest comes first, and of
equal ones that of the lower id.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memory_service.domain import cancellation


class Best(NamedTuple):
    """The answer to a query: ids int64 [k] and scores float32 [k], the best first."""

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]


NOTHING = Best(np.empty(0, np.int64), np.empty(0, np.float32))


def best_of(query: NDArray[np.float32], ids: NDArray[np.int64], vectors: NDArray[np.float32], top_k: int) -> Best:
    """Return the best `top_k` of candidates, or all where there are fewer.

    query: [d]. ids, vectors: those of the candidates, [m] and [m, d], in any order. Errors: Cancelled.
    """
    cancellation.check()
    with np.errstate(over="ignore"):
        scores = np.multiply(vectors, query, dtype=np.float64).sum(axis=1).astype(np.float32)
    order = np.lexsort((ids, -scores))[:top_k]
    return Best(ids[order], scores[order])
