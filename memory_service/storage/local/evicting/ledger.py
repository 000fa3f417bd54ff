"""What eviction looks at, in memory: sizes, counts and times of a bank's chunks, oldest first. Owns the invariant that
a ledger equals the rows as the writer's transaction sees them, so that no eviction scans the table.

A change is entered as the last step of the operation that makes it. An operation that fails has entered nothing then;
when a whole transaction fails, all ledgers are dropped and loaded anew.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from memory_service.domain.eviction import NOBODY, Candidates, Victims
from memory_service.storage.base import Retrievals

# Lines of a ledger's table.
_ID, _SIZE, _RETRIEVALS, _USED, _PINNED, _LIVE = range(6)

_BLOCK = 8192


class Ledger:
    """The ledger of one bank, with sizes in the unit of its capacity. Only the writer's thread uses it."""

    def __init__(self, rows: Iterable[Iterable[int]], doomed: Victims = NOBODY) -> None:
        """`rows`: (id, size, retrievals, last use, pinned), ascending by id.

        `doomed`: what is left of an eviction that goes on in the background.
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


@dataclass
class Loading:
    """A ledger that is being read, with the changes that were made since its snapshot."""

    bank_id: int
    changes: list[Callable[[Ledger], None]] = field(default_factory=list)
    # The snapshot is no longer a state from which the changes lead to the present.
    broken: bool = False


class Ledgers:
    """Ledgers by bank. Used by the writer's thread only, except `ready`."""

    def __init__(self) -> None:
        self._ready: dict[int, Ledger] = {}
        self._loading: dict[int, Loading] = {}

    def ready(self, bank_id: int) -> bool:
        """Tell whether the bank's ledger is at hand."""
        return bank_id in self._ready

    def get(self, bank_id: int) -> Ledger | None:
        """Return the ledger of a bank, if it is at hand."""
        return self._ready.get(bank_id)

    def put(self, bank_id: int, ledger: Ledger) -> None:
        """Keep a ledger that equals the rows."""
        self._ready[bank_id] = ledger

    def begin(self, bank_id: int) -> Loading:
        """Begin to keep the changes that a ledger lacks, which is read from a snapshot that is being opened."""
        loading = self._loading[bank_id] = Loading(bank_id)
        return loading

    def finish(self, loading: Loading, ledger: Ledger) -> bool:
        """Bring a ledger that was read from the snapshot up to date; False when it must be read again."""
        if self._loading.get(loading.bank_id) is loading:
            del self._loading[loading.bank_id]
        if loading.broken:
            return False
        if not self.ready(loading.bank_id):
            for change in loading.changes:
                change(ledger)
            self.put(loading.bank_id, ledger)
        return True

    def change(self, bank_id: int, change: Callable[[Ledger], None]) -> None:
        """Enter a change in the ledger of a bank; this is the last step of the operation that made it."""
        if (ledger := self._ready.get(bank_id)) is not None:
            change(ledger)
        if (loading := self._loading.get(bank_id)) is not None:
            loading.changes.append(change)

    def counted(self, counts: Mapping[int, Retrievals]) -> None:
        """Enter retrievals by chunk id, of any banks."""
        if not self._ready and not self._loading:
            return
        ids = np.fromiter(counts, np.int64, len(counts))
        retrievals, _, used = np.array(list(counts.values()), np.int64).T
        for bank_id in {*self._ready, *self._loading}:
            self.change(bank_id, lambda ledger: ledger.count(ids, retrievals, used))

    def drop(self, bank_id: int) -> None:
        """Drop the ledger of a bank that is gone, or is measured in another unit."""
        self._forget([bank_id])

    def forget_all(self) -> None:
        """Drop all ledgers, because a transaction failed whose changes they may have."""
        self._forget(list({*self._ready, *self._loading}))

    def _forget(self, bank_ids: Iterable[int]) -> None:
        for bank_id in bank_ids:
            self._ready.pop(bank_id, None)
            if bank_id in self._loading:
                self._loading[bank_id].broken = True
