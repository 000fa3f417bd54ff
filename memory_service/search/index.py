"""The index of one bank: segments, the last of which grows. This file owns that what is answered is scored from the
true vectors (`domain.scoring`), and that changes and searches go on side by side."""

import threading
from collections.abc import Sequence

import numpy as np

from memory_service.domain.limits import INDEX, IndexLimits
from memory_service.domain.scoring import NOTHING, Best, best_of
from memory_service.search.candidates import (
    ALL,
    NO_IDS,
    SPARE,
    Pool,
    Read,
    Selection,
    Vectors,
    candidates_of,
    portions_of,
)
from memory_service.search.faiss_gpu import faiss
from memory_service.search.segments import Flat, Ids, Segment

_TAIL_BYTES = 16 * 1024 * 1024
# Candidates of one pass, all queries and segments together.
_MOST_CANDIDATES = 1 << 20
# Products of numbers in one pass; some tenths of a second.
_MOST_PRODUCTS = 1 << 31


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
                return [NOTHING] * len(queries), NO_IDS
            return [best_of(query, ids, vectors, top_k) for query in queries], NO_IDS
        portions = portions_of(segments, selection)
        if not portions:
            return [NOTHING] * len(queries), NO_IDS
        step = _MOST_CANDIDATES // (len(portions) * (top_k + SPARE))
        step = max(1, min(step, _MOST_PRODUCTS // (rows * self.dimension)))
        best: list[Best] = []
        for begin in range(0, len(queries), step):
            some = queries[begin : begin + step]
            pool = Pool(portions, candidates_of(portions, some, top_k), read)
            if len(pool.gone):
                return [], pool.gone
            best += [best_of(query, *pool.members(i), top_k) for i, query in enumerate(some)]
        return best, NO_IDS
