"""The header of an answer: hits, texts, token ids, metadata and descriptors, in one message before the bytes of K-V.
This file owns the bound on the memory of headers, of one and of all together, however slowly callers read.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any, TypeVar

from memory_service.api import calls
from memory_service.api.budget import Budget, Share
from memory_service.api.threads import StorageThreads
from memory_service.domain.answer_size import HeaderTooLarge

T = TypeVar("T")
# Nearly every header is shorter. A longer one is made when the budget has room for it.
ORDINARY_BYTES = 64 * 1024
# Headers that are longer than this are made one at a time.
LARGE_BYTES = 2 * 1024 * 1024


class Headers:
    """Makes headers in storage threads: ordinary ones at once, larger ones when the budget has room to hold them until
    they are sent, and the largest one at a time."""

    def __init__(self, threads: StorageThreads, budget: Budget, limit: int) -> None:
        """limit: the bytes that a message may have. This must be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._threads = threads
        self._budget = budget
        self._limit = limit
        self._building = asyncio.Lock()

    @asynccontextmanager
    async def made(self, kind: str, make: Callable[[int], T]) -> AsyncIterator[T]:
        """Make a header, which is sent in the block.

        kind: the kind of call, which says whose turn is waited for.
        make: makes the header and blocks; it is told how many bytes the header may have. Where it raises HeaderTooLarge
            it is called again when there is room, and told a higher bound.
        """
        most = 0
        try:
            async with self._threads.turn(kind) as turn:
                ordinary = [await turn.run(make, ORDINARY_BYTES)]
        except HeaderTooLarge as refusal:
            ordinary, most = [], self._most(refusal)
        if ordinary:
            yield ordinary.pop()
        else:
            async with self._large(kind, make, most) as made:
                yield made

    @asynccontextmanager
    async def _large(self, kind: str, make: Callable[[int], T], most: int) -> AsyncIterator[T]:
        async with self.share(most) as share:
            share.ours()
            async with self._building if most > LARGE_BYTES else nullcontext(), self._threads.turn(kind) as turn:
                made = await turn.run_to_its_end(make, self._limit)
            share.touch()
            yield made

    @contextmanager
    def made_here(self, make: Callable[[int], T]) -> Iterator[T]:
        """Make a header as `made` does, for a caller who has a thread of his own, which this blocks. Headers of up to
        LARGE_BYTES are ordinary here."""
        try:
            ordinary = [make(LARGE_BYTES)]
        except HeaderTooLarge as refusal:
            ordinary, most = [], self._most(refusal)
        if ordinary:
            yield ordinary.pop()
            return
        share = self._in_loop(self._budget.take(most, _nothing))
        try:
            self._in_loop(self._building.acquire())
            try:
                made = make(self._limit)
            finally:
                self._loop.call_soon_threadsafe(self._building.release)
            yield made
        finally:
            self._loop.call_soon_threadsafe(share.give)

    def _most(self, refusal: HeaderTooLarge) -> int:
        """Return the bytes of room that a header needs. Errors: HeaderTooLarge where they fit in no message."""
        if refusal.size > self._limit:
            raise HeaderTooLarge(self._limit, refusal.size) from None
        return min(refusal.most, self._limit)

    def _in_loop(self, awaited: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(awaited, self._loop).result()

    @asynccontextmanager
    async def share(self, size: int) -> AsyncIterator[Share]:
        """Wait for room for `size` bytes, and hold it in the block."""
        call = calls.current()
        share = await self._budget.take(size, call.end_stalled, owner=call.connection)
        try:
            yield share
        finally:
            share.give()


def _nothing() -> None:
    """End nobody: the thread of a direct call waits for a silent caller only so long anyway."""
