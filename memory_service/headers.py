"""What an answer says before its bytes: hits, texts, token ids, metadata and descriptors, all in one message. Owns the
bound on the memory that these take, of one answer and of all together, however slowly callers read.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import TypeVar

from memory_service.budget import Budget
from memory_service.domain import Chunk
from memory_service.errors import RESOURCE_EXHAUSTED, ServiceError

T = TypeVar("T")
# Nearly every header is shorter. A longer one waits for its turn.
ORDINARY_BYTES = 2 * 1024 * 1024
# The least that they take in a message.
_HIT, _TENSOR = 4, 24


class HeaderTooLarge(ServiceError):
    """TOO_LARGE: no more than so much of a header was loaded."""

    def __init__(self, limit: int, size: int) -> None:
        text = f"what the answer says of its chunks would have more than {limit} bytes; ask for fewer at once"
        super().__init__(RESOURCE_EXHAUSTED, "TOO_LARGE", text, limit=limit, size=size)


class HeaderSize:
    """How many bytes a header will have, at least, while what belongs to it is loaded."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0

    def add_hits(self, count: int) -> None:
        """Errors: HeaderTooLarge."""
        self._add(_HIT * count)

    def add(self, chunk: Chunk, times: int = 1) -> None:
        """Errors: HeaderTooLarge."""
        # Characters and not bytes: to count the latter takes as long as to send them.
        size = len(chunk.text) + len(chunk.token_ids) // 4 + _characters(chunk.metadata)
        if chunk.payload is not None:
            size += _TENSOR * len(chunk.payload.tensors)
        self._add(size * times)

    def _add(self, size: int) -> None:
        self._size += size
        if self._size > self._limit:
            raise HeaderTooLarge(self._limit, self._size)


def most_bytes(chunk: Chunk) -> int:
    """What a chunk takes in a message, about, and rather too much."""
    words = len(chunk.text) + _characters(chunk.metadata)
    tensors = len(chunk.payload.tensors) if chunk.payload else 0
    return 4 * words + 2 * len(chunk.token_ids) + len(chunk.embedding) + 80 * tensors + 2000


def _characters(pairs: Mapping[str, str]) -> int:
    return sum(map(len, pairs)) + sum(map(len, pairs.values()))


class Headers:
    """Has headers made in storage threads: ordinary ones at once, larger ones one at a time, and of these no more than
    the budget has room for until they are sent."""

    def __init__(self, pool: ThreadPoolExecutor, budget: Budget, limit: int) -> None:
        """limit: bytes of a message. In the event loop."""
        self._loop = asyncio.get_running_loop()
        self._pool = pool
        self._budget = budget
        self._limit = limit
        self._building = asyncio.Lock()

    @asynccontextmanager
    async def made(self, make: Callable[[int], T]) -> AsyncIterator[T]:
        """What `make` makes; in the block it is sent. `make` is told how large it may become, blocks, and may be called
        twice: when it raises HeaderTooLarge it has done nothing."""
        try:
            ordinary = [await self._run(make, ORDINARY_BYTES)]
        except HeaderTooLarge:
            ordinary = []
        if ordinary:
            yield ordinary.pop()
        else:
            async with self._large(make) as made:
                yield made

    @asynccontextmanager
    async def _large(self, make: Callable[[int], T]) -> AsyncIterator[T]:
        task = asyncio.current_task()
        assert task is not None
        share = await self._budget.take(self._limit, task.cancel)
        try:
            share.ours()
            async with self._building:
                made = await self._to_its_end(make)
            share.touch()
            yield made
        finally:
            self._budget.give(share)

    async def _to_its_end(self, make: Callable[[int], T]) -> T:
        """Also where the caller goes: nobody's turn comes before the memory of this one is free."""
        running = self._run(make, self._limit)
        try:
            return await asyncio.shield(running)
        finally:
            await asyncio.wait([running])
            running.cancelled() or running.exception()

    def _run(self, make: Callable[[int], T], limit: int) -> "asyncio.Future[T]":
        # With the context, so that what a storage thread logs carries the request.
        return self._loop.run_in_executor(self._pool, copy_context().run, make, limit)
