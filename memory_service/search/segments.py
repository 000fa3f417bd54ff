"""Segments, the parts of an index, each kind with its own way to keep vectors; `ivf` has one more. This file owns the
map of ids (row i is the vector of ids[i]), the tombstones (a cleared bit takes a row out before the top k), and a bound
of the error of rough scores."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_service.search.faiss_gpu import GpuCopy, faiss, selector
from memory_service.search.half_codes import half_index

Ids = NDArray[np.int64]
Bits = NDArray[np.uint8]

# Scores float32 [n, w] and rows int64 [n, w].
Hits = tuple[Any, Any]

# Rows that are read, or handed on, at a time.
PIECE = 4096
# Rows for which a segment that grows makes room first.
_FIRST_ROWS = 64
# The largest number of fp16.
_LARGEST_HALF = 65504.0
# The distance between two neighbours of fp16, relative to them.
HALF_STEP = 2.0**-10
# An fp16 copy that is worse than this, relative to the norms, would leave too many candidates.
_WORST_HALF = 2.0**-8


class Segment:
    """Vectors [rows, dimension] with their ids. Any number of threads may search; rows are never taken out."""

    kind = ""

    def __init__(self, dimension: int, ids: Ids) -> None:
        self.dimension = dimension
        self.ids = ids
        self.bits: Bits = np.full(_bytes(len(ids)), 0xFF, np.uint8)
        self.dead = 0
        # Bounds: of the norms, and of the distance between a vector and what is kept of it.
        self.largest = 0.0
        self.error = 0.0
        # The file of its snapshot, and how many rows that has.
        self.file: Path | None = None
        self.saved = 0

    @property
    def rows(self) -> int:
        """Return how many rows there are, the dead ones included."""
        return len(self.ids)

    @property
    def live(self) -> int:
        """Return how many rows live."""
        return self.rows - self.dead

    @property
    def decayed(self) -> bool:
        """Tell whether so many rows are dead that the segment is worth making anew."""
        return 4 * self.dead > self.rows

    @property
    def doubt(self) -> float:
        """Return a bound of the distance between a vector and what is searched of it. Times the norm of a query it
        bounds the error of a score."""
        return self.error

    def rows_of(self, ids: Ids) -> Ids:
        """Return the rows, dead or alive, of those of the ids (ascending) that are here."""
        mine = self.ids
        low, high = np.searchsorted(ids, (mine[0], mine[-1] + 1)) if len(mine) else (0, 0)
        wanted = ids[low:high]
        rows = np.searchsorted(mine, wanted)
        found: Ids = rows[mine[rows] == wanted]
        return found

    def kill(self, ids: Ids) -> None:
        """Take ids (ascending) out of every search from now on, as far as they are here."""
        rows = self.rows_of(ids)
        rows = rows[_is_set(self.bits, rows)]
        np.bitwise_and.at(self.bits, rows >> 3, ~(np.uint8(1) << (rows & 7).astype(np.uint8)))
        self.dead += len(rows)

    def alive(self) -> Ids:
        """Return the rows that are not dead."""
        return np.flatnonzero(np.unpackbits(self.bits, count=self.rows, bitorder="little"))

    def dead_ids(self) -> Ids:
        """Return the ids of the dead rows."""
        return self.ids[np.flatnonzero(np.unpackbits(self.bits, count=self.rows, bitorder="little") == 0)]

    def search(self, queries: NDArray[np.float32], width: int, bits: Bits | None, share: float) -> Hits:
        """Return rough scores and rows [n, width] of the best, descending; a row of -1 where there are no more.

        bits: the rows that count, None for all. share: about which part of the rows that is.
        """
        raise NotImplementedError

    def pieces(self) -> Iterator[tuple[Ids, NDArray[Any]]]:
        """Yield all rows with what is kept of their vectors, some at a time and in no order."""
        raise NotImplementedError

    def parts(self) -> Iterator[memoryview]:
        """Yield all memory that a snapshot holds, in its order, to be written to a file or filled from one."""
        raise NotImplementedError

    @property
    def memory(self) -> int:
        """Return the bytes of memory that are in use."""
        return sum(part.nbytes for part in self.parts()) + self.bits.nbytes

    def header(self) -> dict[str, Any]:
        """Return what a snapshot says beside the memory that `parts` yields."""
        return {"kind": self.kind, "rows": self.rows, "largest": self.largest, "error": self.error}

    def check(self) -> None:
        """Check that there is a vector for each id. Errors: RuntimeError."""


class Flat(Segment):
    """Keeps vectors as float32, and is the one kind that grows. A row is written before the count that makes it
    visible, so that no search ever waits for an addition; `ids` and `vectors` are longer than `rows`."""

    kind = "flat"

    def __init__(self, dimension: int, limit: int) -> None:
        super().__init__(dimension, np.empty(0, np.int64))
        self._limit = limit
        self._rows = 0
        self.vectors = np.empty((0, dimension), np.float32)

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def room(self) -> int:
        """Return how many rows still fit."""
        return self._limit - self._rows

    def append(self, ids: Ids, vectors: NDArray[np.float32]) -> None:
        """Add rows, at most `room`. One thread at a time may call this."""
        begin, end = self._rows, self._rows + len(ids)
        self.reserve(end)
        self.ids[begin:end] = ids
        self.vectors[begin:end] = vectors
        self.largest = max(self.largest, largest_norm(vectors))
        self._rows = end

    def reserve(self, rows: int) -> None:
        """Make memory for so many rows; while that grows, a search goes on with the memory before."""
        if rows <= len(self.ids):
            return
        size = min(self._limit, max(rows, 2 * len(self.ids), _FIRST_ROWS))
        ids, vectors = np.empty(size, np.int64), np.empty((size, self.dimension), np.float32)
        bits = np.full(_bytes(size), 0xFF, np.uint8)
        ids[: self._rows], vectors[: self._rows] = self.ids[: self._rows], self.vectors[: self._rows]
        bits[: len(self.bits)] = self.bits
        self.ids, self.vectors, self.bits = ids, vectors, bits

    def fill(self, rows: int) -> None:
        """Make so many rows count, whose content the caller puts into `parts` or the arrays."""
        self.reserve(rows)
        self._rows = rows

    def rows_of(self, ids: Ids) -> Ids:
        # The ids are in the order of commits, which is not quite that of ids.
        return np.flatnonzero(np.isin(self.ids[: self._rows], ids))

    def search(self, queries: NDArray[np.float32], width: int, bits: Bits | None, share: float) -> Hits:
        rows = self._rows  # before the vectors, which may grow meanwhile
        vectors = self.vectors
        scores = np.empty((len(queries), width), np.float32)
        found = np.empty((len(queries), width), np.int64)
        pointers = map(faiss.swig_ptr, (queries, vectors, scores, found))
        query, stored, score, row = pointers
        faiss.knn_inner_product(query, stored, self.dimension, len(queries), rows, width, score, row, selector(bits))
        return scores, found

    def pieces(self) -> Iterator[tuple[Ids, NDArray[Any]]]:
        for begin in range(0, self._rows, PIECE):
            rows = np.arange(begin, min(begin + PIECE, self._rows))
            yield rows, self.vectors[rows[0] : rows[-1] + 1]

    def parts(self) -> Iterator[memoryview]:
        yield as_bytes(self.ids[: self._rows])
        yield as_bytes(self.vectors[: self._rows])


class Half(Segment):
    """Keeps vectors as fp16. Ids ascend, and it does not grow."""

    kind = "half"

    def __init__(self, dimension: int, ids: Ids) -> None:
        """Make a segment whose vectors the caller then puts into `codes` [rows, dimension]."""
        super().__init__(dimension, ids)
        self._index, self.codes = half_index(dimension, len(ids))
        self._gpu = GpuCopy(self._index)

    def search(self, queries: NDArray[np.float32], width: int, bits: Bits | None, share: float) -> Hits:
        if bits is None:
            found: Hits = self._gpu.search(queries, width) or self._index.search(queries, width)
        else:
            found = self._index.search(queries, width, params=faiss.SearchParameters(sel=selector(bits)))
        return found

    @property
    def doubt(self) -> float:
        return self.error + (self.largest * HALF_STEP if self._gpu.in_use else 0)

    def pieces(self) -> Iterator[tuple[Ids, NDArray[Any]]]:
        for begin in range(0, self.rows, PIECE):
            rows = np.arange(begin, min(begin + PIECE, self.rows))
            yield rows, self.codes[rows[0] : rows[-1] + 1]

    def parts(self) -> Iterator[memoryview]:
        yield as_bytes(self.ids)
        yield as_bytes(self.codes)

    def check(self) -> None:
        check_total(self._index.ntotal, self.rows)


def encode(vectors: NDArray[np.float32], out: NDArray[np.float16]) -> float:
    """Put vectors [n, d] as fp16 into `out`. Returns the largest distance of a vector to its copy, inf where one does
    not fit into fp16."""
    with np.errstate(over="ignore", under="ignore"):
        out[:] = vectors
    if not float(np.abs(vectors).max(initial=0.0)) <= _LARGEST_HALF:
        return float("inf")
    return largest_norm(vectors - out)


def fits(error: float, largest: float) -> bool:
    """Tell whether fp16 copies with this error are of use. largest: the largest norm of the vectors."""
    return error <= largest * _WORST_HALF


def largest_norm(vectors: NDArray[np.float32]) -> float:
    """Return the largest norm of vectors [n, d]."""
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    return float(np.sqrt(squares.max(initial=0.0)))


def check_total(total: int, rows: int) -> None:
    """Check that FAISS has as many vectors as there are ids. Errors: RuntimeError."""
    if total != rows:
        raise RuntimeError(f"FAISS has {total} vectors for {rows} ids")


def bits_of(chosen: NDArray[np.bool_]) -> Bits:
    """Return a bit for each row, in the order in which FAISS counts bits."""
    return np.packbits(chosen, bitorder="little")


def _bytes(rows: int) -> int:
    return (rows + 7) // 8


def _is_set(bits: Bits, rows: Ids) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1
    return found


def as_bytes(array: NDArray[Any]) -> memoryview:
    """Return the memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data
