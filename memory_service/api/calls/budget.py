"""The bytes that the streams of all callers hold in memory. This file owns the bound on these bytes, the order in which
callers that wait for room get it, and the rule that a caller that is too slow does not keep others waiting.

Everything here is used in the event loop alone.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from memory_service.api.calls.fairness import NOBODY, Holdings, Owner
from memory_service.domain.limits import STANDARD

# Bytes per second that a caller must send or take while others wait.
LEAST_RATE = 256 * 1024
# Shares up to this size have an eighth of the budget to themselves, so that they do not wait for larger ones.
SMALL = 1024 * 1024


class Share:
    """The bytes that one chunk or answer holds of a budget."""

    def __init__(self, lane: "_Lane", end: Callable[[], object], owner: Owner) -> None:
        self._lane = lane
        self.end = end
        self.owner = owner
        self.size = 0
        # The time (monotonic) until which the caller has kept pace with LEAST_RATE.
        self.moved = time.monotonic()

    async def grow(self, size: int) -> None:
        """Wait until `size` more bytes fit, and hold them too."""
        await self._lane.take(self, size)

    def give(self) -> None:
        """Hold no bytes any more; a second call does nothing."""
        self._lane.give(self)

    def progress(self, count: int) -> None:
        """Note that the caller has sent or taken `count` bytes."""
        self.moved = min(time.monotonic(), self.moved + count / LEAST_RATE)

    def touch(self) -> None:
        """Note that the service waits for the caller from now on, so that the caller must keep pace."""
        self.moved = time.monotonic()

    def ours(self) -> None:
        """Note that the service itself is at work from now on, so that the caller is not counted as slow."""
        self.moved = math.inf


class Budget:
    """Bounds the bytes that shares hold together; a share that needs more waits until they fit.

    One share at a time may go beyond the bound, so that a share that is larger than the whole bound passes, and shares
    that grow do not wait for each other.
    """

    def __init__(self, limit: int, stalled: float = STANDARD.stalled_s) -> None:
        """Bound the shares to `limit` bytes together. stalled: the seconds that a caller may be behind LEAST_RATE while
        others wait."""
        self._small = _Lane(limit // 8, stalled)
        self._large = _Lane(limit - limit // 8, stalled)

    @property
    def taken(self) -> int:
        """Count the bytes that are held now."""
        return self._small.taken + self._large.taken

    async def take(self, size: int, end: Callable[[], object], *, whole: int = 0, owner: Owner = NOBODY) -> Share:
        """Wait until `size` bytes fit, and return the share that holds them.

        whole: the bytes that the share may grow to, where these are more.
        owner: whose the share is. The shares of a connection hold at most half of the bound, and those of a tenant
            three quarters, but for the one that may go beyond it, and come after those of tenants and connections that
            hold less.
        end: what is called, once, when the caller is behind LEAST_RATE by `stalled` while others wait for room.
        """
        lane = self._small if max(size, whole) <= SMALL else self._large
        share = Share(lane, end, owner)
        if not lane.let_in(share, size):
            await lane.take(share, size)
        return share


@dataclass(slots=True, eq=False)
class _Waiting:
    """A share that waits for `size` more bytes, and the future that ends its wait."""

    share: Share
    size: int
    come: "asyncio.Future[None]"


class _Lane:
    """Bounds the bytes of shares of one kind, and keeps the shares that hold some and those that wait for room."""

    def __init__(self, limit: int, stalled: float) -> None:
        self._limit = limit
        self._stalled = stalled
        self._shares: set[Share] = set()
        self._held = Holdings()
        self._waiting: list[_Waiting] = []
        # The one share that may go beyond the limit, until it holds nothing any more.
        self._beyond: Share | None = None

    @property
    def taken(self) -> int:
        """Count the bytes that are held now."""
        return self._held.total

    def let_in(self, share: Share, size: int) -> bool:
        """Let a share hold `size` more bytes, and return True, where it need not wait for them."""
        if (self._waiting and share is not self._beyond) or not self._fits(share, size):
            return False
        self._enter(share, size)
        return True

    async def take(self, share: Share, size: int) -> None:
        """Wait until a share may hold `size` more bytes; a share whose wait is broken off holds nothing."""
        if self.let_in(share, size):
            return
        waiting = _Waiting(share, size, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._admit()
        moved, since = share.moved, time.monotonic()
        share.ours()
        try:
            await self._come(waiting)
        except BaseException:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            self.give(share)
            raise
        share.moved = moved + time.monotonic() - since

    def give(self, share: Share) -> None:
        """Take all bytes from a share, and let others have them."""
        if share in self._shares:
            self._shares.remove(share)
            self._held.add(share.owner, -share.size)
            share.size = 0
        if self._beyond is share:
            self._beyond = None
        self._admit()

    async def _come(self, waiting: _Waiting) -> None:
        """Wait until the share has its bytes; the share that waits longest ends the callers that have stalled."""
        while not waiting.come.done():
            await asyncio.wait([waiting.come], timeout=self._stalled / 4)
            if not waiting.come.done() and waiting is self._waiting[0]:
                self._end_stalled()

    def _end_stalled(self) -> None:
        since = time.monotonic() - self._stalled
        for share in [share for share in self._shares if share.moved < since]:
            share.ours()  # so that it is ended once
            share.end()

    def _admit(self) -> None:
        """Let shares that wait have their bytes, as long as the next one fits."""
        while self._waiting:
            # Of those whose owners hold equally much, the first that came.
            first = min(self._waiting, key=lambda waiting: self._held.rank(waiting.share.owner))
            if not self._fits(first.share, first.size):
                return
            self._waiting.remove(first)
            if not first.come.done():
                self._enter(first.share, first.size)
                first.come.set_result(None)

    def _fits(self, share: Share, size: int) -> bool:
        return self._beyond is None or self._beyond is share or self._within(share, size)

    def _within(self, share: Share, size: int) -> bool:
        tenant, connection = self._held.rank(share.owner)
        return (
            self.taken + size <= self._limit
            and (not tenant or tenant + size <= self._limit * 3 // 4)
            and (not connection or connection + size <= self._limit // 2)
        )

    def _enter(self, share: Share, size: int) -> None:
        if self._beyond is None and not self._within(share, size):
            self._beyond = share
        self._shares.add(share)
        self._held.add(share.owner, size)
        share.size += size
