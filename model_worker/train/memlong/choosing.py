"""Which chunks a block attends to in training: recent ones and found ones, as in use, and sometimes others or none.

A chunk may be attended to by a block once it has left the block's window, as in use. Of the blocks a share has no
memory, so that it is not leant on; a share has what is found in another stream's, so that a wrong one does no harm; a
share is searched by its own text, so that reading the memory is worth it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_worker.train.memlong.block_memory import NOTHING
from model_worker.train.memlong.pool import Numbers

Vector = NDArray[np.float32]
KINDS = ("found", "recent", "nothing", "other", "itself")


@dataclass(frozen=True, slots=True)
class Search:
    """How chunks are chosen, as in use: the last `recent` ones always, and the `top_k` best of the others.

    order: `time` or `score` (the best match last), of the found ones. min_share: the least share of the best score.
    min_score: the least score.
    """

    recent: int
    top_k: int
    order: str = "time"
    min_share: float | None = None
    min_score: float | None = None

    @property
    def most(self) -> int:
        """Return how many chunks a block attends to at most."""
        return self.recent + self.top_k

    def chosen(self, numbers: Numbers, vectors: Vector, query: Vector, recent: int, top_k: int) -> Numbers:
        """Return chunks in the order of attention: those found, and behind them the recent ones.

        numbers: of the chunks that may be attended to, oldest first. vectors: theirs, `[n, dimension]`. query:
        `[dimension]`; one of zeros finds nothing. recent, top_k: how many of each.
        """
        last = numbers[max(0, len(numbers) - recent) :]
        return np.concatenate([self._found(numbers, vectors, query, len(last), top_k), last])

    def _found(self, numbers: Numbers, vectors: Vector, query: Vector, last: int, top_k: int) -> Numbers:
        """Return the best chunks without the `last` ones, which the search sees, as a bank does."""
        if not top_k or not len(numbers) or not query.any():
            return numbers[:0]
        scores = vectors @ query
        best = np.argsort(-scores, kind="stable")[: top_k + last]  # of equal scores the older chunk, as in a bank
        if self.min_share is not None:
            best = best[scores[best] >= self.min_share * scores[best[0]]]
        if self.min_score is not None:
            best = best[scores[best] >= self.min_score]
        best = best[best < len(numbers) - last][:top_k]
        return numbers[best[::-1]] if self.order == "score" else numbers[np.sort(best)]


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of blocks by what they attend to; what is left over attends to found and recent chunks."""

    recent: float
    nothing: float
    other: float
    itself: float

    def draw(self, rng: np.random.Generator) -> str:
        """Draw what a block attends to, one of `KINDS`."""
        at = rng.random()
        for kind in KINDS[1:]:
            at -= getattr(self, kind)
            if at < 0:
                return kind
        return KINDS[0]


def choose(
    kind: str, search: Search, numbers: Numbers, vectors: Vector, past: Callable[[], Vector], own: Vector
) -> Numbers:
    """Return the chunks that a block attends to, of its own stream.

    numbers, vectors: see `Search.chosen`. past: gives the vector of the text before the block. own: the vector of the
    block.
    """
    if kind == "recent":
        return search.chosen(numbers, vectors, own, search.most, 0)
    if kind == "found":
        return search.chosen(numbers, vectors, past(), search.recent, search.top_k)
    if kind == "itself":
        return search.chosen(numbers, vectors, own, search.recent, search.top_k)
    return numbers[:0]


def padded(rows: list[Numbers], most: int) -> Numbers:
    """Return rows of places as one array `[n, most]`, filled up with `NOTHING` in front."""
    table = np.full((len(rows), most), NOTHING, dtype=np.int64)
    for row, own in zip(table, rows, strict=True):
        if len(own):
            row[-len(own) :] = own
    return table
