"""Training finds here which earlier chunks of a book share most rare token pairs with a query.

The worker itself retrieves by embeddings; this lookup is cheap enough for every row of a batch.
"""

from __future__ import annotations

import numpy as np

BUCKETS = 1 << 16


class ChunkLookup:
    """An inverted index from token pairs to the chunks of one book."""

    def __init__(self, chunks: np.ndarray) -> None:
        """Index `chunks` [N, S], in text order; pads behind a shorter chunk do no harm."""
        self.chunks = chunks.astype(np.int64)
        keys = np.unique(_pairs(self.chunks) + (np.arange(len(self.chunks)) * BUCKETS)[:, None])
        order = np.argsort(keys % BUCKETS, kind="stable")
        self.owners = (keys // BUCKETS)[order].astype(np.int32)
        self.starts = np.searchsorted((keys % BUCKETS)[order], np.arange(BUCKETS + 1))

    def best(self, query: np.ndarray, before: int, count: int) -> np.ndarray:
        """Return the `count` best `[count, S]` of the first `before` chunks, in text order."""
        scores = np.zeros(len(self.chunks))
        for pair in np.unique(_pairs(query[None].astype(np.int64))):
            owners = self.owners[self.starts[pair] : self.starts[pair + 1]]
            if len(owners):
                scores[owners] += np.log(len(self.chunks) / len(owners)) ** 2
        found: np.ndarray = self.chunks[np.sort(np.argsort(-scores[:before], kind="stable")[:count])]
        return found


def _pairs(tokens: np.ndarray) -> np.ndarray:
    """Return the hashed pairs of neighbours `[rows, size - 1]` of tokens `[rows, size]`."""
    pairs: np.ndarray = (tokens[:, :-1] * 40503 + tokens[:, 1:] * 2654435) % BUCKETS
    return pairs
