"""What eviction looks at, in memory: sizes, counts and times of a bank's chunks, oldest first. This file owns the
invariant that a ledger equals the rows as the writer's transaction sees them, so that no eviction scans the table."""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from memory_service.domain.eviction import NOBODY, Candidates, Victims

# The lines of a ledger's table.
_ID, _SIZE, _RETRIEVALS, _USED, _PINNED, _LIVE = range(6)

# Columns that are moved at once.
_BLOCK = 8192


class Ledger:
    """The ledger of one bank, with sizes in the unit of its capacity. Only the writer's thread uses it."""

    def __init__(self, rows: Iterable[Iterable[int]], doomed: Victims = NOBODY) -> None:
        """Enter the chunks of a bank.

        rows: (id, size, retrievals, last use in microseconds, pinned), ascending by id. doomed: what is left of an
        eviction that goes on in the background.
        """
        columns = np.fromiter(chain.from_iterable(rows), np.int64).reshape(-1, 5).T
        self._count = columns.shape[1]
        self._dead = 0
        # int64 [6, n and room to grow]. The room is not touched, so it takes no memory until it is used; to move a
        # million chunks later would stop the writer for a quarter of a second.
        self._table = np.empty((6, 2 * self._count + 1024), np.int64)
        self._table[:_LIVE, : self._count] = columns
        self._table[_LIVE, : self._count] = True
        self.doomed = doomed

    def add(self, chunk_id: int, size: int, created: int, pinned: bool) -> None:
        """Enter a new chunk."""
        if self._count == self._table.shape[1]:
            self._table = np.concatenate([self._table, np.empty((6, self._count), np.int64)], axis=1)
        # Writers overtake each other, so an id is near the end, and not always the last.
        place = end = self._count
        while place and self._table[_ID, place - 1] > chunk_id:
            place -= 1
        self._table[:, place + 1 : end + 1] = self._table[:, place:end]
        self._table[:, place] = (chunk_id, size, 0, created, pinned, True)
        self._count += 1

    def remove(self, chunk_ids: Sequence[int]) -> None:
        """Take out chunks that are gone; unknown ids are fine."""
        places = self._places(np.asarray(chunk_ids, np.int64))[0]
        self._dead += int(self._table[_LIVE, places].sum())
        self._table[_LIVE, places] = False
        if 2 * self._dead > self._count:
            self.compact()

    def compact(self) -> None:
        """Give up the places of chunks that are gone. This takes half as long as a plan."""
        if not self._dead:
            return
        end = 0
        # In place and by blocks: fresh memory for a million chunks takes longer than the plan.
        for begin in range(0, self._count, _BLOCK):
            block = self._table[:, begin : min(begin + _BLOCK, self._count)]
            kept = np.compress(block[_LIVE], block, axis=1)
            self._table[:, end : end + kept.shape[1]] = kept
            end += kept.shape[1]
        self._count, self._dead = end, 0

    def count(self, chunk_ids: NDArray[np.int64], retrievals: NDArray[np.int64], used: NDArray[np.int64]) -> None:
        """Add retrievals [n] of chunks, with the last time [n] of each; chunks of other banks are passed over."""
        places, found = self._places(chunk_ids)
        self._table[_RETRIEVALS, places] += retrievals[found]
        self._table[_USED, places] = np.maximum(self._table[_USED, places], used[found])

    def resize(self, chunk_id: int, by: int) -> None:
        """Add to the size of a chunk."""
        self._table[_SIZE, self._places(np.array([chunk_id]))[0]] += by

    def pin(self, chunk_ids: Sequence[int], pinned: bool) -> None:
        """Note that chunks are pinned, or no longer."""
        self._table[_PINNED, self._places(np.asarray(chunk_ids, np.int64))[0]] = pinned

    def candidates(self) -> Candidates:
        """Return what an eviction may choose from; it is valid until the next change."""
        self.compact()
        lines = [self._table[line, : self._count] for line in (_ID, _SIZE, _RETRIEVALS, _USED)]
        pinned = self._table[_PINNED, : self._count] == 1
        return Candidates(*(line[~pinned] if pinned.any() else line for line in lines))

    def _places(self, chunk_ids: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Return the places of those ids that are there, and which of the ids those are."""
        ids = self._table[_ID, : self._count]
        places = np.searchsorted(ids, chunk_ids)
        found = places < self._count
        found[found] = ids[places[found]] == chunk_ids[found]
        return places[found], found
