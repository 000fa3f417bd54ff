"""Bytes that the streams of all callers hold in memory. Owns the bound on them, and that a caller who has gone silent
does not keep others waiting.

Used in the event loop alone.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

STALLED_S = 20.0


class Share:
    """What one chunk or answer holds of a budget."""

    def __init__(self, size: int, end: Callable[[], object]) -> None:
        self.size = size
        self.end = end
        self.moved = time.monotonic()

    def touch(self) -> None:
        """The caller has sent or taken something."""
        self.moved = time.monotonic()

    def ours(self) -> None:
        """From here on the caller delays nothing."""
        self.moved = math.inf


class Budget:
    """A bound that is waited for, first come, first served; whatever is larger than all of it passes alone."""

    def __init__(self, limit: int, stalled: float = STALLED_S) -> None:
        """stalled: seconds of silence after which a caller that others wait for is ended."""
        self._limit = limit
        self._stalled = stalled
        self._shares: set[Share] = set()
        self._waiting: deque[tuple[Share, asyncio.Future[None]]] = deque()
        self.taken = 0

    async def take(self, size: int, end: Callable[[], object]) -> Share:
        """Wait until `size` fits. `end` is called when the holder stalls and somebody waits."""
        share = Share(size, end)
        if not self._waiting and self._fits(share):
            self._enter(share)
            return share
        entry = (share, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        try:
            await self._turn(entry[1])
        except BaseException:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                self.give(share)
            self._admit()
            raise
        return share

    def give(self, share: Share) -> None:
        """It holds nothing any more; a second call does nothing."""
        if share in self._shares:
            self._shares.remove(share)
            self.taken -= share.size
            self._admit()

    async def _turn(self, turn: "asyncio.Future[None]") -> None:
        while not turn.done():
            await asyncio.wait([turn], timeout=self._stalled / 4)
            oldest = min(self._shares, key=lambda share: share.moved, default=None)
            if not turn.done() and oldest is not None and oldest.moved < time.monotonic() - self._stalled:
                oldest.ours()  # once
                oldest.end()

    def _fits(self, share: Share) -> bool:
        return not self.taken or self.taken + share.size <= self._limit

    def _enter(self, share: Share) -> None:
        share.touch()
        self._shares.add(share)
        self.taken += share.size

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            share, turn = self._waiting.popleft()
            if not turn.done():
                self._enter(share)
                turn.set_result(None)
