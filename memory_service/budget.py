"""Bytes that the streams of all callers hold in memory. Owns the bound on them, whose turn it is, and that a caller who
is too slow does not keep others waiting.

Used in the event loop alone.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

# Seconds that a caller may be behind LEAST_RATE while others wait.
STALLED_S = 20.0
# Bytes per second.
LEAST_RATE = 256 * 1024
# What is not larger has a part of the budget to itself, an eighth, so that it does not wait for what is.
SMALL = 1024 * 1024


class Share:
    """What one chunk or answer holds of a budget."""

    def __init__(self, lane: "_Lane", end: Callable[[], object], owner: str) -> None:
        self._lane = lane
        self.end = end
        self.owner = owner
        self.size = 0
        # Until when (time.monotonic()) the caller has kept pace with LEAST_RATE.
        self.moved = time.monotonic()

    async def grow(self, size: int) -> None:
        """Wait until so many more bytes fit."""
        await self._lane.take(self, size)

    def give(self) -> None:
        """Hold nothing any more; a second call does nothing."""
        self._lane.give(self)

    def progress(self, count: int) -> None:
        """The caller has sent or taken so many bytes."""
        self.moved = min(time.monotonic(), self.moved + count / LEAST_RATE)

    def touch(self) -> None:
        """From here on it is the caller who delays."""
        self.moved = time.monotonic()

    def ours(self) -> None:
        """From here on the caller delays nothing."""
        self.moved = math.inf


class Budget:
    """A bound that is waited for. One share at a time may go beyond it, so that what is larger than all of it passes,
    and shares that grow do not wait for each other."""

    def __init__(self, limit: int, stalled: float | None = None) -> None:
        """limit: bytes. stalled: see STALLED_S."""
        stalled = STALLED_S if stalled is None else stalled
        self._small = _Lane(limit // 8, stalled)
        self._large = _Lane(limit - limit // 8, stalled)

    @property
    def taken(self) -> int:
        """Bytes that are held now."""
        return self._small.taken + self._large.taken

    async def take(self, size: int, end: Callable[[], object], *, whole: int = 0, owner: str = "") -> Share:
        """Wait until `size` fits.

        whole: what the share may grow to, where that is more.
        owner: the connection, which holds no more than half while others wait, and comes after those that hold less; ""
            where it is not known.
        end: called, once, when the caller delays others: while somebody waits, and is behind by STALLED_S.
        """
        lane = self._small if max(size, whole) <= SMALL else self._large
        share = Share(lane, end, owner)
        await share.grow(size)
        return share


@dataclass(slots=True, eq=False)
class _Turn:
    """Of a share that waits for `size` more bytes."""

    share: Share
    size: int
    come: "asyncio.Future[None]"


class _Lane:
    """A bound, and those who wait for it."""

    def __init__(self, limit: int, stalled: float) -> None:
        self._limit = limit
        self._stalled = stalled
        self._shares: set[Share] = set()
        self._held: Counter[str] = Counter()
        self._waiting: list[_Turn] = []
        # The one share that may go beyond the limit, to its end.
        self._beyond: Share | None = None
        self.taken = 0

    async def take(self, share: Share, size: int) -> None:
        if (share is self._beyond or not self._waiting) and self._fits(share, size):
            self._enter(share, size)
            return
        turn = _Turn(share, size, asyncio.get_running_loop().create_future())
        self._waiting.append(turn)
        moved, since = share.moved, time.monotonic()
        share.ours()
        try:
            await self._come(turn)
        except BaseException:
            if turn in self._waiting:
                self._waiting.remove(turn)
            self.give(share)
            raise
        share.moved = moved + time.monotonic() - since

    def give(self, share: Share) -> None:
        if share in self._shares:
            self._shares.remove(share)
            self._held[share.owner] -= share.size
            if not self._held[share.owner]:
                del self._held[share.owner]
            self.taken -= share.size
            share.size = 0
        if self._beyond is share:
            self._beyond = None
        self._admit()

    async def _come(self, turn: _Turn) -> None:
        while not turn.come.done():
            await asyncio.wait([turn.come], timeout=self._stalled / 4)
            if not turn.come.done() and turn is self._waiting[0]:
                self._end_stalled()

    def _end_stalled(self) -> None:
        since = time.monotonic() - self._stalled
        for share in [share for share in self._shares if share.moved < since]:
            share.ours()  # once
            share.end()

    def _admit(self) -> None:
        while self._waiting:
            # Of equals the first that came.
            turn = min(self._waiting, key=lambda turn: self._held[turn.share.owner] if turn.share.owner else 0)
            if not self._fits(turn.share, turn.size):
                return
            self._waiting.remove(turn)
            if not turn.come.done():
                self._enter(turn.share, turn.size)
                turn.come.set_result(None)

    def _fits(self, share: Share, size: int) -> bool:
        return self._beyond in (None, share) or self._within(share, size)

    def _within(self, share: Share, size: int) -> bool:
        held = self._held[share.owner] if share.owner else 0
        return self.taken + size <= self._limit and (not held or held + size <= self._limit // 2)

    def _enter(self, share: Share, size: int) -> None:
        if self._beyond is None and not self._within(share, size):
            self._beyond = share
        self._shares.add(share)
        self._held[share.owner] += size
        self.taken += size
        share.size += size
