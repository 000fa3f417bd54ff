"""The index of one bank: segments, the last of which grows. This file owns exactness: rough scores, whose error is
bounded, only choose candidates; what is answered is scored from the true vectors (`domain.scoring`), so that the order
is right also at the border of the top k."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memory_service.domain import cancellation
from memory_service.domain.limits import INDEX, IndexLimits
from memory_service.domain.scoring import NOTHING, Best, best_of
from memory_service.search.faiss_gpu import faiss
from memory_service.search.segments import Bits, Flat, Ids, Segment, bits_of

Vectors = NDArray[np.float32]
# Reads the true vectors [m, d] of those of the ids (ascending) that still exist; returns these ids [m] with them.
Read = Callable[[Ids], tuple[Ids, Vectors]]

_TAIL_BYTES = 16 * 1024 * 1024
# More candidates than hits that are asked for, so that most searches need one round.
_SPARE = 56
_WIDER = 4
# Candidates of one pass, all queries and segments together.
_MOST_CANDIDATES = 1 << 20
# Products of numbers in one pass; some tenths of a second.
_MOST_PRODUCTS = 1 << 31
_NO_IDS: Ids = np.empty(0, np.int64)
_LARGEST_SCORE = float(np.finfo(np.float32).max)


class Selection(NamedTuple):
    """Says which chunks may be found: those that are `allowed` (all, for None) and not `excluded`. Ids ascend."""

    allowed: Ids | None = None
    excluded: Ids = _NO_IDS


ALL = Selection()


def tail_rows(dimension: int, limits: IndexLimits) -> int:
    """Return the rows to which a tail grows."""
    return min(limits.tail_rows, _TAIL_BYTES // (4 * dimension))


class BankIndex:
    """The index of a bank. Any number of threads may search; `add` and `remove` are for one thread, `replace` and
    `seal_tail` for one other."""

    def __init__(
        self, dimension: int, segments: Sequence[Segment] = (), tail: Flat | None = None, limits: IndexLimits = INDEX
    ) -> None:
        """Make an index of sealed segments and of a tail, which is the one that grows."""
        self.dimension = dimension
        self.limits = limits
        self._segments: tuple[Segment, ...] = (*segments, tail or Flat(dimension, tail_rows(dimension, limits)))
        # Held by changes; a search takes the tuple of segments as it is.
        self._lock = threading.Lock()

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Return the segments as they are now; the last one grows."""
        return self._segments

    def __len__(self) -> int:
        return sum(segment.live for segment in self._segments)

    # Changes

    def add(self, ids: Ids, vectors: Vectors) -> bool:
        """Add chunks, ids [n] and vectors [n, d]; return whether a segment became full."""
        full = False
        with self._lock:
            while len(ids):
                tail = self._tail
                if not tail.room:
                    tail, full = self._begin_tail(), True
                some = min(tail.room, len(ids))
                tail.append(ids[:some], vectors[:some])
                ids, vectors = ids[some:], vectors[some:]
        return full

    def remove(self, ids: Ids) -> bool:
        """Take out chunks that are gone, where they are there; return whether a segment has decayed."""
        ids = np.sort(ids)
        with self._lock:
            for segment in self._segments:
                segment.kill(ids)
            return any(segment.decayed for segment in self._segments[:-1])

    def seal_tail(self) -> None:
        """Let the tail grow no more, and begin a new one."""
        with self._lock:
            if self._tail.rows:
                self._begin_tail()

    def replace(self, old: Sequence[Segment], new: Sequence[Segment]) -> None:
        """Put segments that were made of the living rows of `old` in their place. Errors: RuntimeError where rows are
        missing."""
        with self._lock:
            gone = np.sort(np.concatenate([segment.dead_ids() for segment in old]))
            for segment in new:
                segment.kill(gone)
                segment.check()
            before, after = sum(segment.live for segment in old), sum(segment.live for segment in new)
            if before != after:
                raise RuntimeError(f"{after} vectors were made of {before}")
            self._segments = (*new, *(segment for segment in self._segments if segment not in old))

    @property
    def _tail(self) -> Flat:
        tail = self._segments[-1]
        assert isinstance(tail, Flat)
        return tail

    def _begin_tail(self) -> Flat:
        tail = Flat(self.dimension, tail_rows(self.dimension, self.limits))
        self._segments = (*self._segments, tail)
        return tail

    # Search

    def search(self, queries: Vectors, top_k: int, read: Read, selection: Selection = ALL) -> list[Best]:
        """Find the best `top_k` chunks, or all where there are fewer, for each of `queries` [n, d].

        read: reads true vectors. selection: the chunks that may be found. Errors: Cancelled, between two passes.
        """
        faiss.omp_set_num_threads(1)  # per thread; our own threads are the parallel ones
        while True:
            best, gone = self._search(queries, top_k, read, selection)
            if not len(gone):
                return best
            # Removed from the records, and not yet from here.
            selection = selection._replace(excluded=np.union1d(selection.excluded, gone))

    def _search(self, queries: Vectors, top_k: int, read: Read, selection: Selection) -> tuple[list[Best], Ids]:
        """Return the best for each query, and the ids of candidates that are gone; where there are such, the former is
        no answer."""
        segments = [segment for segment in self._segments if segment.live]
        rows = sum(segment.rows for segment in segments)
        if selection.allowed is not None and self.limits.read_one_of * len(selection.allowed) <= rows:
            ids, vectors = read(np.setdiff1d(selection.allowed, selection.excluded))
            if not len(ids):
                return [NOTHING] * len(queries), _NO_IDS
            return [best_of(query, ids, vectors, top_k) for query in queries], _NO_IDS
        views = _views(segments, selection)
        if not views:
            return [NOTHING] * len(queries), _NO_IDS
        step = _MOST_CANDIDATES // (len(views) * (top_k + _SPARE))
        step = max(1, min(step, _MOST_PRODUCTS // (rows * self.dimension)))
        best: list[Best] = []
        for begin in range(0, len(queries), step):
            some = queries[begin : begin + step]
            pool = _Pool(views, _candidates(views, some, top_k), read)
            if len(pool.gone):
                return [], pool.gone
            best += [best_of(query, *pool.members(i), top_k) for i, query in enumerate(some)]
        return best, _NO_IDS


class _View(NamedTuple):
    """A segment with the rows that count: those whose bit is set, `number` of them (all, where `bits` is None). Over
    all views, its rows are numbered from `begin` on."""

    segment: Segment
    bits: Bits | None
    number: int
    begin: int


def _views(segments: Sequence[Segment], selection: Selection) -> list[_View]:
    """Return the views of the segments of which any row counts."""
    views, begin = [], 0
    for segment in segments:
        # First, because a tail may grow meanwhile.
        rows = segment.rows
        if (view := _view(segment, rows, selection, begin)) is not None:
            views.append(view)
            begin += rows
    return views


def _view(segment: Segment, rows: int, selection: Selection, begin: int) -> _View | None:
    bits = segment.bits if segment.dead else None
    excluded = segment.rows_of(selection.excluded) if len(selection.excluded) else selection.excluded
    if selection.allowed is None and not len(excluded):
        return _View(segment, bits, rows - segment.dead, begin)
    chosen = np.ones(rows, bool)
    if selection.allowed is not None:
        chosen[:] = False
        chosen[_below(rows, segment.rows_of(selection.allowed))] = True
    chosen[_below(rows, excluded)] = False
    packed = bits_of(chosen)
    if bits is not None:
        packed &= bits[: len(packed)]
    count = int(np.bitwise_count(packed).sum())
    return _View(segment, packed, count, begin) if count else None


def _below(rows: int, some: Ids) -> Ids:
    return some[some < rows]


def _candidates(views: Sequence[_View], queries: Vectors, top_k: int) -> list[Ids]:
    """Choose, for each query, the numbers of all rows that can be among its best, and of few others."""
    chosen: list[Ids] = [_NO_IDS] * len(queries)
    norms = np.sqrt(np.einsum("nd,nd->n", queries, queries, dtype=np.float64))[:, None]
    pending, width = np.arange(len(queries)), top_k + _SPARE
    while len(pending):
        cancellation.check()
        rough = [_rough(view, queries[pending], norms[pending], width) for view in views]
        lower, upper, rows = (np.concatenate(parts, axis=1) for parts in zip(*rough, strict=True))
        border = _border(lower, top_k)
        # A segment is done when it has no more rows, or none that reaches the border.
        done = np.ones(len(pending), bool)
        for _, its_upper, its_rows in rough:
            done &= (its_rows[:, -1] < 0) | (its_upper[:, -1] < border)
        keep = (upper >= border[:, None]) & (rows >= 0)
        for i in np.flatnonzero(done).tolist():
            chosen[pending[i]] = rows[i, keep[i]]
        pending, width = pending[~done], width * _WIDER
    return chosen


def _rough(
    view: _View, queries: Vectors, norms: NDArray[np.float64], width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], Ids]:
    """Bound the scores of the best rows of a view, for queries [n, d] of these norms.

    Returns lower and upper bounds, and numbers of rows, [n, w] each and descending; -inf and -1 where there are no more
    rows.
    """
    segment = view.segment
    scaled, factors = _scaled(queries, norms, segment.largest)
    # One more than there are now (a tail may have grown), so that -1 at the end says that these are all.
    found, rows = segment.search(scaled, min(width, segment.rows + 1), view.bits, view.number / segment.rows)
    none = rows < 0
    scores = found.astype(np.float64)
    if factors is not None:
        scores /= factors
    scores[none] = -np.inf
    doubt = segment.doubt
    rounding = segment.dimension * 2.0**-23 * (segment.largest + doubt)
    # The last term is for scores that are too small for float32.
    margins = norms * (doubt + rounding) + 2.0**-148
    rows = rows + view.begin
    rows[none] = -1
    return scores - margins, scores + margins, rows


def _scaled(queries: Vectors, norms: NDArray[np.float64], largest: float) -> tuple[Vectors, NDArray[np.float64] | None]:
    """Multiply queries by powers of two with which no product leaves float32. Returns the queries and the factors; None
    where they are as they were."""
    if float(norms.min()) * largest > 1e-20 and float(norms.max()) * largest < 1e30:
        return queries, None
    exponent = -np.frexp(norms)[1] + np.clip(-np.frexp(largest)[1], -120, 120)
    factors = np.ldexp(1.0, exponent)
    return (queries * factors).astype(np.float32), factors


def _border(lower: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """Return what a score must reach, at least, to be among the best [n]. lower: lower bounds of scores [n, w]."""
    if lower.shape[1] < top_k:
        return np.full(len(lower), -np.inf)
    border = np.partition(lower, -top_k, axis=1)[:, -top_k]
    # Beyond float32 all scores are equal.
    border = np.minimum(border, _LARGEST_SCORE * (1 - 2.0**-20))
    return np.where(border < -_LARGEST_SCORE * (1 - 2.0**-20), -np.inf, border)


class _Pool:
    """Holds the true vectors of all candidates of some queries, each once. They come from memory where it has them; the
    others are read together."""

    def __init__(self, views: Sequence[_View], chosen: Sequence[Ids], read: Read) -> None:
        self._chosen = chosen
        self._numbers = np.unique(np.concatenate(chosen)) if len(chosen) > 1 else np.sort(chosen[0])
        self.ids = np.empty(len(self._numbers), np.int64)
        self.vectors = np.empty((len(self._numbers), views[0].segment.dimension), np.float32)
        cuts = [*np.searchsorted(self._numbers, [view.begin for view in views]).tolist(), len(self._numbers)]
        missing = np.ones(len(self._numbers), bool)
        for view, low, high in zip(views, cuts, cuts[1:], strict=False):
            rows = self._numbers[low:high] - view.begin
            self.ids[low:high] = view.segment.ids[rows]
            if isinstance(view.segment, Flat):
                self.vectors[low:high] = view.segment.vectors[rows]
                missing[low:high] = False
        # Candidates that do not exist any more.
        self.gone = self._read(np.flatnonzero(missing), read) if missing.any() else _NO_IDS

    def _read(self, places: Ids, read: Read) -> Ids:
        places = places[np.argsort(self.ids[places])]
        wanted = self.ids[places]
        ids, vectors = read(wanted)
        if len(ids) < len(wanted):
            return np.setdiff1d(wanted, ids)
        self.vectors[places] = vectors
        return _NO_IDS

    def members(self, query: int) -> tuple[Ids, Vectors]:
        """Return ids [m] and true vectors [m, d] of the candidates of a query."""
        places = np.searchsorted(self._numbers, self._chosen[query])
        return self.ids[places], self.vectors[places]
