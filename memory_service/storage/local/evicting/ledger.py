"""What eviction looks at, in memory: sizes, counts and times of a bank's chunks, oldest first. This file owns the
invariant that a ledger equals the rows as the writer's transaction sees them, so that no eviction scans the table."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memory_service.domain.eviction import NOBODY, Candidates, Victims

# The lines of a ledger's table.
_ID, _SIZE, _RETRIEVALS, _USED, _PINNED, _LIVE = range(6)

# Columns that are moved at once, and by one removal of chunks: a million take as long as a plan.
_BLOCK = 8192
_MOVED = 16 * _BLOCK


# An id that is lower than that of any chunk.
_BELOW_ALL = -1


class Copied(NamedTuple):
    """A ledger as it was at a moment, for another thread than the writer's. lines: int64 [4, n]. chosen: which of the
    columns [n] an eviction may choose from; None for all."""

    lines: NDArray[np.int64]
    chosen: NDArray[np.bool_] | None

    def candidates(self) -> Candidates:
        """Return what an eviction may choose from."""
        return Candidates(*(line if self.chosen is None else line[self.chosen] for line in self.lines))


class Ledger:
    """The ledger of one bank, with sizes in the unit of its capacity. Only the writer's thread uses it, except for
    `room`."""

    def __init__(self, rows: Iterable[Iterable[int]], doomed: Victims = NOBODY, moved: int = _MOVED) -> None:
        """Enter the chunks of a bank.

        rows: (id, size, retrievals, last use in microseconds, pinned), ascending by id. doomed: what is left of an
        eviction that goes on in the background. moved: columns that are moved by one removal, at most.
        """
        self._moved = moved
        columns = np.fromiter(chain.from_iterable(rows), np.int64).reshape(-1, 5).T
        self._count = columns.shape[1]
        self._dead = 0
        # While places are given up: those that are kept lie before `_end`, and what was not looked at from `_next` on.
        # Between them all are dead, with the id before them (or a lower one than all), so that the ids ascend.
        self._end = self._next = 0
        # int64 [6, n and room to grow]. The room is not touched, so it takes no memory until it is used; to move a
        # million chunks later would stop the writer for a quarter of a second.
        self._table = np.empty((6, 2 * self._count + 1024), np.int64)
        self._table[:_LIVE, : self._count] = columns
        self._table[_LIVE, : self._count] = True
        self.doomed = doomed

    def __len__(self) -> int:
        """Return how many chunks there are."""
        return self._count - self._dead

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
        if place < self._next:
            self._end, self._next = self._end + 1, self._next + 1

    def remove(self, chunk_ids: Sequence[int]) -> None:
        """Take out chunks that are gone; unknown ids are fine."""
        places = self._places(np.asarray(chunk_ids, np.int64))[0]
        self._dead += int(self._table[_LIVE, places].sum())
        self._table[_LIVE, places] = False
        if self._next or 2 * self._dead > self._count:
            self._give_up(self._moved)

    def compact(self) -> None:
        """Give up the places of all chunks that are gone. This takes half as long as a plan."""
        if self._dead:
            self._end = self._next = 0
            self._give_up(self._count)

    def _give_up(self, most: int) -> None:
        """Look at the next columns, at most so many, and give up the places of those of chunks that are gone."""
        end, stop = self._end, min(self._next + most, self._count)
        # In place and by blocks: fresh memory for a million chunks takes longer than the plan.
        for begin in range(self._next, stop, _BLOCK):
            block = self._table[:, begin : min(begin + _BLOCK, stop)]
            kept = np.compress(block[_LIVE], block, axis=1)
            self._table[:, end : end + kept.shape[1]] = kept
            end += kept.shape[1]
        if stop == self._count:
            self._dead -= self._count - end
            self._count, self._end, self._next = end, 0, 0
        else:
            self._table[_ID, end:stop] = self._table[_ID, end - 1] if end else _BELOW_ALL
            self._table[_LIVE, end:stop] = False
            self._end, self._next = end, stop

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

    def room(self) -> NDArray[np.int64]:
        """Take memory for a copy, with room for chunks that come meanwhile. Any thread may call this. The memory is
        touched here, some at a time: the first touch of fresh pages takes several times as long as a copy."""
        room = np.empty((_USED + 1, self._count + _BLOCK), np.int64)
        for begin in range(0, room.shape[1], _BLOCK):
            room[:, begin : begin + _BLOCK] = 0
        return room

    def copied(self, room: NDArray[np.int64]) -> Copied:
        """Copy what an eviction looks at into the memory that was taken for it. Of a million chunks this takes a few
        milliseconds."""
        if room.shape[1] < self._count:
            room = np.empty((_USED + 1, self._count), np.int64)
        live, pinned = self._table[_LIVE, : self._count], self._table[_PINNED, : self._count]
        chosen = (live == 1) & (pinned == 0) if self._dead or pinned.any() else None
        lines = room[:, : self._count]
        lines[:] = self._table[: _USED + 1, : self._count]
        return Copied(lines, chosen)

    def has(self, chunk_id: int) -> bool:
        """Tell whether a chunk is there."""
        return bool(self._table[_LIVE, self._places(np.array([chunk_id]))[0]].any())

    def _places(self, chunk_ids: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Return the places of those ids that are there, and which of the ids those are."""
        ids = self._table[_ID, : self._count]
        places = np.searchsorted(ids, chunk_ids)
        found = places < self._count
        found[found] = ids[places[found]] == chunk_ids[found]
        return places[found], found
