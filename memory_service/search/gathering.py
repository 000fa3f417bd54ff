"""Segments that are made of the living rows of others. This file owns that no row is lost and none is there twice: the
ids of the new segment are those of its sources, ascending."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memory_service.search.segments import Flat, Half, Ids, Segment, encode, fits


class Piece(NamedTuple):
    """Some vectors [n, d] of a source, float32 or fp16, with their rows [n] in the new segment. `number` counts the
    pieces of the source."""

    source: Segment
    number: int
    rows: Ids
    vectors: NDArray[Any]


class Gathering:
    """Puts the living rows of other segments into the order of one new segment."""

    def __init__(self, sources: Sequence[Segment]) -> None:
        """Take the rows that live at this moment."""
        alive = [source.alive() for source in sources]
        ids = np.concatenate([source.ids[rows] for source, rows in zip(sources, alive, strict=True)])
        order = np.argsort(ids)
        self.ids: Ids = ids[order]
        self.dimension = sources[0].dimension
        self.largest = max(source.largest for source in sources)
        rank = np.empty(len(ids), np.int64)
        rank[order] = np.arange(len(ids))
        self._places: list[tuple[Segment, Ids]] = []
        begin = 0
        for source, rows in zip(sources, alive, strict=True):
            place = np.full(source.rows, -1, np.int64)
            place[rows] = rank[begin : begin + len(rows)]
            begin += len(rows)
            self._places.append((source, place))

    def pieces(self) -> Iterator[Piece]:
        """Yield all rows, in the order of the sources."""
        for source, place in self._places:
            for number, (rows, vectors) in enumerate(source.pieces()):
                into = place[rows]
                alive = into >= 0
                yield Piece(source, number, into[alive], vectors if alive.all() else vectors[alive])

    def sample(self, count: int) -> NDArray[np.float32]:
        """Return so many of the vectors [count, d], chosen evenly at random."""
        chosen = np.zeros(len(self.ids), bool)
        chosen[np.random.default_rng(1).choice(len(self.ids), count, replace=False)] = True
        sample = np.empty((count, self.dimension), np.float32)
        begin = 0
        for piece in self.pieces():
            some = piece.vectors[chosen[piece.rows]]
            sample[begin : begin + len(some)] = some
            begin += len(some)
        return sample


def as_fp16(piece: Piece) -> tuple[NDArray[np.float16], float]:
    """Return the vectors of a piece as fp16, and how far they may be from the true ones."""
    if piece.vectors.dtype == np.float16:
        return piece.vectors, piece.source.error
    codes = np.empty(piece.vectors.shape, np.float16)
    return codes, encode(piece.vectors, codes)


def half(sources: Sequence[Segment]) -> Half | None:
    """Make one fp16 segment of the living rows of others; None where their vectors do not fit into fp16."""
    gathering = Gathering(sources)
    made = Half(gathering.dimension, gathering.ids)
    for piece in gathering.pieces():
        codes, error = as_fp16(piece)
        if not fits(error, gathering.largest):
            return None
        made.codes[piece.rows] = codes
        made.error = max(made.error, error)
    made.largest = gathering.largest
    return made


def flat(sources: Sequence[Flat]) -> Flat:
    """Make one float32 segment of the living rows of others."""
    gathering = Gathering(sources)
    made = Flat(gathering.dimension, len(gathering.ids))
    made.fill(len(gathering.ids))
    made.ids[:] = gathering.ids
    for piece in gathering.pieces():
        made.vectors[piece.rows] = piece.vectors
    made.largest = gathering.largest
    return made
