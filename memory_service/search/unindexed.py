"""Searches by the store itself, exact and without an index, for a bank whose index is not in memory yet."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from memory_service.domain import cancellation
from memory_service.domain.model import Bank
from memory_service.domain.scoring import NOTHING, Best, best_of
from memory_service.search.candidates import SPARE, Selection, Vectors
from memory_service.storage.base import View

# So few chunks that a filter lets pass are read and scored without a search.
_FEW = 1000


class Unindexed:
    """A bank that is searched in a view of its store. It answers what the index of the bank would answer, whose scores
    are those of the same true vectors; the store only chooses the candidates."""

    # The store looks at all chunks of a bank for each query: for more of them the index is waited for.
    MOST_QUERIES = 4

    def __init__(self, bank: Bank, view: View) -> None:
        self._view = view
        self._bank = bank

    def search(self, queries: Vectors, top_k: int, selection: Selection) -> list[Best] | None:
        """Find the best `top_k` chunks for each of `queries` [n, d]; see `BankIndex.search`. None is returned where the
        products of a query leave float32, so that the store cannot tell which are the best. Errors: Cancelled."""
        allowed, excluded = selection
        if allowed is not None and len(allowed) <= _FEW:
            ids, vectors = self._view.vectors(self._bank, np.setdiff1d(allowed, excluded))
            return [best_of(query, ids, vectors, top_k) if len(ids) else NOTHING for query in queries]
        best = []
        for query in queries:
            cancellation.check()
            found = self._view.nearest(self._bank, query, top_k + SPARE, allowed, excluded)
            if found is None:
                return None
            best.append(best_of(query, *found, top_k) if len(found[0]) else NOTHING)
        return best


class AtOnce:
    """The searches of each bank that the store makes at a time: each looks at all chunks of the bank, so that a burst
    of them would keep the store from all else. Threads share it."""

    # Who comes when so many are under way waits for the index.
    MOST = 4

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: Counter[int] = Counter()

    @contextmanager
    def one_of(self, bank: Bank) -> Iterator[bool]:
        """Tell whether the store may search a bank once more, which counts to the end of the block."""
        with self._lock:
            if admitted := self._under_way[bank.bank_id] < self.MOST:
                self._under_way[bank.bank_id] += 1
        try:
            yield admitted
        finally:
            if admitted:
                with self._lock:
                    self._under_way -= Counter([bank.bank_id])  # which drops what is 0
