"""Parts of an index, each with its own way to keep vectors; `ivf` has one more. Owns the id map (row i is the vector of
ids[i]), the tombstones (a cleared bit takes a row out before the top k) and a bound of the error of rough scores."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_service.search.engine import GpuCopy, faiss, selector

Ids = NDArray[np.int64]
Bits = NDArray[np.uint8]

# Scores float32 [n, w] and rows int64 [n, w].
Hits = tuple[Any, Any]

PIECE = 4096
_FIRST_ROWS = 64
_LARGEST_HALF = 65504.0
# Between two neighbours of fp16, relative.
HALF_STEP = 2.0**-10
# An fp16 copy that is worse than this, relative to the norms, would leave too many candidates.
_WORST_HALF = 2.0**-8


class Segment:
    """Vectors [rows, dimension] under their ids. Searched by any number of threads; rows are never taken out."""

    kind = ""

    def __init__(self, dimension: int, ids: Ids) -> None:
        self.dimension = dimension
        self.ids = ids
        self.bits: Bits = np.full(_bytes(len(ids)), 0xFF, np.uint8)
        self.dead = 0
        # Bounds: of the norms, and of the distance between a vector and what is kept of it.
        self.largest = 0.0
        self.error = 0.0
        # Its snapshot, and how many rows that has.
        self.file: Path | None = None
        self.saved = 0

    @property
    def rows(self) -> int:
        """With the dead ones."""
        return len(self.ids)

    @property
    def live(self) -> int:
        """Without the dead ones."""
        return self.rows - self.dead

    @property
    def decayed(self) -> bool:
        """Whether it is worth making anew."""
        return 4 * self.dead > self.rows

    @property
    def doubt(self) -> float:
        """Bound of the distance of a vector to what is searched; times the norm of a query, that of a score's error."""
        return self.error

    def rows_of(self, ids: Ids) -> Ids:
        """Rows of those of `ids` (ascending) that are here, dead or alive."""
        mine = self.ids
        low, high = np.searchsorted(ids, (mine[0], mine[-1] + 1)) if len(mine) else (0, 0)
        wanted = ids[low:high]
        rows = np.searchsorted(mine, wanted)
        found: Ids = rows[mine[rows] == wanted]
        return found

    def kill(self, ids: Ids) -> None:
        """Take `ids` (ascending) out of every search from now on. Those that are not there are fine."""
        rows = self.rows_of(ids)
        rows = rows[_is_set(self.bits, rows)]
        np.bitwise_and.at(self.bits, rows >> 3, ~(np.uint8(1) << (rows & 7).astype(np.uint8)))
        self.dead += len(rows)

    def alive(self) -> Ids:
        """Rows that are not dead."""
        return np.flatnonzero(np.unpackbits(self.bits, count=self.rows, bitorder="little"))

    def dead_ids(self) -> Ids:
        """Ids of the others."""
        return self.ids[np.flatnonzero(np.unpackbits(self.bits, count=self.rows, bitorder="little") == 0)]

    def search(self, queries: NDArray[np.float32], width: int, bits: Bits | None, share: float) -> Hits:
        """Rough scores and rows [n, width] of the best, descending; row -1 where there are no more.

        `bits`: the rows that count, None for all; `share`: about which part of the rows that is.
        """
        raise NotImplementedError

    def pieces(self) -> Iterator[tuple[Ids, NDArray[Any]]]:
        """All rows with what is kept of their vectors, some at a time, in no order."""
        raise NotImplementedError

    def parts(self) -> Iterator[memoryview]:
        """All memory that a snapshot holds, in its order; to be written to a file, or filled from one."""
        raise NotImplementedError

    @property
    def memory(self) -> int:
        """Bytes in use."""
        return sum(part.nbytes for part in self.parts()) + self.bits.nbytes

    def header(self) -> dict[str, Any]:
        """What `parts` leaves out."""
        return {"kind": self.kind, "rows": self.rows, "largest": self.largest, "error": self.error}

    def check(self) -> None:
        """Errors: RuntimeError when ids and vectors do not go together."""


class Flat(Segment):
    """float32. The one kind that grows: a row is written before the count that makes it visible, so that no search
    ever waits for an addition; `ids` and `vectors` are longer than `rows`."""

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
        """Rows that still fit."""
        return self._limit - self._rows

    def append(self, ids: Ids, vectors: NDArray[np.float32]) -> None:
        """At most `room` of them. By one thread at a time."""
        begin, end = self._rows, self._rows + len(ids)
        self.reserve(end)
        self.ids[begin:end] = ids
        self.vectors[begin:end] = vectors
        self.largest = max(self.largest, largest_norm(vectors))
        self._rows = end

    def reserve(self, rows: int) -> None:
        """Memory for so many rows; while it grows, a search goes on with the one before."""
        if rows <= len(self.ids):
            return
        size = min(self._limit, max(rows, 2 * len(self.ids), _FIRST_ROWS))
        ids, vectors = np.empty(size, np.int64), np.empty((size, self.dimension), np.float32)
        bits = np.full(_bytes(size), 0xFF, np.uint8)
        ids[: self._rows], vectors[: self._rows] = self.ids[: self._rows], self.vectors[: self._rows]
        bits[: len(self.bits)] = self.bits
        self.ids, self.vectors, self.bits = ids, vectors, bits

    def fill(self, rows: int) -> None:
        """Make `rows` rows count whose content is put in through `parts` or the arrays."""
        self.reserve(rows)
        self._rows = rows

    def rows_of(self, ids: Ids) -> Ids:
        # In the order of commits, which is not quite that of ids.
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
    """fp16, ids ascending; sealed."""

    kind = "half"

    def __init__(self, dimension: int, ids: Ids) -> None:
        """Its vectors are then put into `codes` [rows, dimension]."""
        super().__init__(dimension, ids)
        self._index = faiss.IndexScalarQuantizer(dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        self._gpu = GpuCopy(self._index)
        size = len(ids) * dimension * 2
        self._index.codes.resize(size)
        self._index.ntotal = len(ids)
        self.codes = np.empty((0, dimension), np.float16)
        if size:
            self.codes = faiss.rev_swig_ptr(self._index.codes.data(), size).view(np.float16).reshape(-1, dimension)

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
    """Put `vectors` [n, d] as fp16 into `out`; the largest distance of a vector to its copy, inf where one does not
    fit into fp16."""
    with np.errstate(over="ignore", under="ignore"):
        out[:] = vectors
    if not float(np.abs(vectors).max(initial=0.0)) <= _LARGEST_HALF:
        return float("inf")
    return largest_norm(vectors - out)


def fits(error: float, largest: float) -> bool:
    """Whether fp16 copies with this error are of use."""
    return error <= largest * _WORST_HALF


def largest_norm(vectors: NDArray[np.float32]) -> float:
    """Of [n, d]."""
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    return float(np.sqrt(squares.max(initial=0.0)))


def check_total(total: int, rows: int) -> None:
    """Errors: RuntimeError."""
    if total != rows:
        raise RuntimeError(f"FAISS has {total} vectors for {rows} ids")


def bits_of(chosen: NDArray[np.bool_]) -> Bits:
    """A bit for each row, as FAISS counts them."""
    return np.packbits(chosen, bitorder="little")


def _bytes(rows: int) -> int:
    return (rows + 7) // 8


def _is_set(bits: Bits, rows: Ids) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1
    return found


def as_bytes(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data
