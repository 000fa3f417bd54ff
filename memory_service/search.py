"""Exact search, derived from the records; the only file that knows FAISS. Owns the id map: row i of the index is the
embedding of ids[i], and the tie rule: score descending, then lower id, also at the border of the top k."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import faiss
import numpy as np
from numpy.typing import NDArray

# More than the rounding of a float32 product sum of some thousand terms, relative to the norms.
_ROUNDING = 4e-6


class BankIndex:
    """Inner-product index of one bank. Any number of threads may search while none changes it."""

    def __init__(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """`ids` [n], `vectors` [n, d]."""
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)
        self._ids = ids.copy()
        self._largest_norm = _largest_norm(vectors)
        self._lock = _SharedLock()

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, chunk_id: int, vector: NDArray[np.float32]) -> None:
        """One embedding [d]."""
        with self._lock.alone():
            total = len(self)
            if total == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty(max(total, 64), np.int64)])
            self._index.add(vector[None])
            self._ids[total] = chunk_id
            self._largest_norm = max(self._largest_norm, _largest_norm(vector[None]))

    def remove(self, chunk_ids: Sequence[int]) -> None:
        """Ids that are not there are fine."""
        with self._lock.alone():
            ids = self._ids[: len(self)]
            gone = np.isin(ids, np.asarray(chunk_ids, np.int64))
            rows = np.flatnonzero(gone)
            self._index.remove_ids(faiss.IDSelectorBatch(rows))
            self._ids = ids[~gone]
            if len(self._ids) != len(self):
                raise RuntimeError(f"index has {len(self)} rows for {len(self._ids)} ids")

    def search(self, query: NDArray[np.float32], top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and scores of the best `top_k` (or all, if fewer) for `query` [d]."""
        with self._lock.shared():
            width = min(top_k + 8, len(self))
            while True:
                ids, scores, complete = self._best(query, top_k, width)
                if complete:
                    return ids, scores
                width = min(2 * width, len(self))

    def _best(
        self, query: NDArray[np.float32], top_k: int, width: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], bool]:
        """The best of `width` candidates; whether no chunk outside them can belong to the best."""
        total = len(self)
        if width == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32), True
        faiss.omp_set_num_threads(1)  # per thread; our own threads are the parallel ones
        rough, rows = self._index.search(query[None], width)
        rows = rows[0]
        stored = faiss.rev_swig_ptr(self._index.get_xb(), total * query.size).reshape(total, query.size)
        scores = np.multiply(stored[rows], query, dtype=np.float64).sum(axis=1).astype(np.float32)
        ids = self._ids[rows]
        order = np.lexsort((ids, -scores))[:top_k]
        margin = _ROUNDING * float(np.linalg.norm(query.astype(np.float64))) * self._largest_norm
        complete = width == total or float(rough[0, -1]) + margin < float(scores[order[-1]])
        return ids[order], scores[order], complete


class SearchIndexes:
    """The indexes that are loaded, by bank. Loaded and changed by the writer's thread only, in commit order."""

    def __init__(self) -> None:
        self._indexes: dict[int, BankIndex] = {}

    def get(self, bank_id: int) -> BankIndex | None:
        """The index, if it is loaded."""
        return self._indexes.get(bank_id)

    def load(self, bank_id: int, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> BankIndex:
        """Build the index from the records."""
        return self._indexes.setdefault(bank_id, BankIndex(ids, vectors))

    def add(self, bank_id: int, chunk_id: int, embedding: bytes) -> None:
        """A chunk was committed."""
        if (index := self._indexes.get(bank_id)) is not None:
            with self._dropped_on_failure(bank_id):
                index.add(chunk_id, np.frombuffer(embedding, "<f4"))

    def remove(self, bank_id: int, chunk_ids: Sequence[int]) -> None:
        """Chunks are gone."""
        if (index := self._indexes.get(bank_id)) is not None and chunk_ids:
            with self._dropped_on_failure(bank_id):
                index.remove(chunk_ids)

    def drop(self, bank_id: int) -> None:
        """The bank is gone."""
        self._indexes.pop(bank_id, None)

    @contextmanager
    def _dropped_on_failure(self, bank_id: int) -> Iterator[None]:
        """An index that missed a change would be wrong for good; the next search loads it anew."""
        try:
            yield
        except Exception:
            self.drop(bank_id)
            raise


class _SharedLock:
    """Many readers or one writer; a waiting writer goes before new readers."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._writers = 0
        self._writing = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: self._writers == 0)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._writers += 1
            self._condition.wait_for(lambda: self._readers == 0 and not self._writing)
            self._writing = True
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._writers -= 1
                self._condition.notify_all()


def _largest_norm(vectors: NDArray[np.float32]) -> float:
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    return float(np.sqrt(squares.max(initial=0.0)))
