"""Turns among callers that wait for the same thing. This file owns their order: the next turn goes to the caller that
holds the fewest, and of equals to the one that came first.

Everything here is used in the event loop alone.
"""

import asyncio
from collections import Counter
from typing import NamedTuple


class FairTurns:
    """Gives at most `most` turns at a time, and one less to a single owner, so that another owner finds room."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()
        self._waiting: list[_Waiting] = []

    async def take(self, owner: str) -> None:
        """Wait for a turn. owner: the connection of the caller, or "" where that is not known: such callers may hold
        all turns."""
        if not self._waiting and self._fits(owner):
            self._held[owner] += 1
            return
        waiting = _Waiting(owner, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._admit()
        try:
            await waiting.come
        except BaseException:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            elif not waiting.come.cancelled():  # the turn came, and the caller has gone before it was used
                self.give(owner)
            raise

    def give(self, owner: str) -> None:
        """Give back a turn that the owner holds."""
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        self._admit()

    def _admit(self) -> None:
        while fitting := [each for each in self._waiting if self._fits(each.owner)]:
            admitted = min(fitting, key=lambda each: self._held[each.owner])
            self._waiting.remove(admitted)
            if not admitted.come.done():  # else its caller has gone just now
                self._held[admitted.owner] += 1
                admitted.come.set_result(None)

    def _fits(self, owner: str) -> bool:
        most = max(1, self._most - 1) if owner else self._most
        return self._held.total() < self._most and self._held[owner] < most


class _Waiting(NamedTuple):
    owner: str
    come: "asyncio.Future[None]"
