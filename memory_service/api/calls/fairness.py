"""Turns among callers that wait for the same thing. This file owns their order: the next turn goes to the tenant that
holds the fewest, within a tenant to the connection that holds the fewest, and of equals to the one that came first.

Everything here is used in the event loop alone.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple


class Owner(NamedTuple):
    """Says whose a turn or some bytes are: of which connection, and of which tenant. Each is "" where it is not
    known."""

    connection: str = ""
    tenant: str = ""


NOBODY = Owner()


class Holdings:
    """Counts what owners hold, in turns or in bytes."""

    def __init__(self) -> None:
        self._connections: Counter[str] = Counter()
        self._tenants: Counter[str] = Counter()
        self.total = 0

    def add(self, owner: Owner, count: int) -> None:
        """Count that an owner holds so much more, or less where the count is negative."""
        self.total += count
        for held, name in ((self._connections, owner.connection), (self._tenants, owner.tenant)):
            if name:
                held[name] += count
                if not held[name]:
                    del held[name]

    def of_connection(self, owner: Owner) -> int:
        """Return what the owner's connection holds; 0 where it is not known."""
        return self._connections[owner.connection]

    def of_tenant(self, owner: Owner) -> int:
        """Return what the owner's tenant holds; 0 where it is not known."""
        return self._tenants[owner.tenant]

    def rank(self, owner: Owner) -> tuple[int, int]:
        """Return what decides who is next: the least comes first."""
        return self.of_tenant(owner), self.of_connection(owner)


class FairTurns:
    """Gives at most `most` turns at a time, and one less to a single connection and to a single tenant, so that another
    one finds room."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = Holdings()
        self._waiting: list[_Waiting] = []

    async def take(self, owner: Owner) -> None:
        """Wait for a turn. Owners of which nothing is known may hold all turns."""
        if not self._waiting and self._fits(owner):
            self._held.add(owner, 1)
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

    def give(self, owner: Owner) -> None:
        """Give back a turn that the owner holds."""
        self._held.add(owner, -1)
        self._admit()

    @asynccontextmanager
    async def held(self, owner: Owner) -> AsyncIterator[None]:
        """Wait for a turn, and hold it in the block."""
        await self.take(owner)
        try:
            yield
        finally:
            self.give(owner)

    def _admit(self) -> None:
        while fitting := [each for each in self._waiting if self._fits(each.owner)]:
            admitted = min(fitting, key=lambda each: self._held.rank(each.owner))
            self._waiting.remove(admitted)
            if not admitted.come.done():  # else its caller has gone just now
                self._held.add(admitted.owner, 1)
                admitted.come.set_result(None)

    def _fits(self, owner: Owner) -> bool:
        return self._held.total < self._most and max(self._held.rank(owner)) < max(1, self._most - 1)


class _Waiting(NamedTuple):
    owner: Owner
    come: "asyncio.Future[None]"
