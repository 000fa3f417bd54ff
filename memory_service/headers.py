"""What an answer says before its bytes: hits, texts, token ids, metadata and descriptors, all in one message. Owns the
bound on the memory that these take, of one answer and of all together, however slowly callers read.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any, TypeVar

from memory_service import calls
from memory_service.budget import Budget, Share
from memory_service.domain import Chunk, metadata_bytes
from memory_service.errors import RESOURCE_EXHAUSTED, ServiceError
from memory_service.threads import StorageThreads

T = TypeVar("T")
# Nearly every header is shorter. A longer one is made when the budget has room for it.
ORDINARY_BYTES = 64 * 1024
# A longer one is made when no other such is being made.
LARGE_BYTES = 2 * 1024 * 1024
# The least that they take in a message, and the most.
_HIT, _TENSOR = 4, 24
_MOST_HIT = 20


class HeaderTooLarge(ServiceError):
    """TOO_LARGE: what a header has to say was not loaded. It takes `size` bytes, or more, and at most `most`."""

    def __init__(self, limit: int, size: int, most: int = 0) -> None:
        text = f"what the answer says of its chunks would have {size} bytes or more; ask for fewer at once"
        super().__init__(RESOURCE_EXHAUSTED, "TOO_LARGE", text, limit=limit, size=size)
        self.size, self.most = size, max(size, most)


class HeaderSize:
    """How many bytes a header will have, at least, while what belongs to it is loaded."""

    def __init__(self, limit: int, hits: int = 0) -> None:
        self._limit = limit
        self._hits = hits
        self._size = _HIT * hits

    def add(self, chunk: Chunk, times: int = 1) -> None:
        """Errors: HeaderTooLarge."""
        # Characters and not bytes: to count the latter takes as long as to send them.
        size = len(chunk.text) + len(chunk.token_ids) // 4 + metadata_bytes(chunk.metadata)
        if chunk.payload is not None:
            size += _TENSOR * len(chunk.payload.tensors)
        self._size += size * times
        if self._size > self._limit:
            raise HeaderTooLarge(self._limit, self._size)

    def too_large(self, least: int, most: int) -> HeaderTooLarge:
        """The refusal of a header whose chunks take together so many bytes."""
        return HeaderTooLarge(self._limit, _HIT * self._hits + least, _MOST_HIT * self._hits + most)


def most_bytes(chunk: Chunk) -> int:
    """What a chunk takes in a message, about, and rather too much."""
    words = len(chunk.text) + metadata_bytes(chunk.metadata)
    tensors = len(chunk.payload.tensors) if chunk.payload else 0
    return 4 * words + 2 * len(chunk.token_ids) + len(chunk.embedding) + 80 * tensors + 2000


class Headers:
    """Has headers made in storage threads: ordinary ones at once, larger ones when the budget has room for them until
    they are sent, and of the largest one at a time."""

    def __init__(self, threads: StorageThreads, budget: Budget, limit: int) -> None:
        """limit: bytes of a message. In the event loop."""
        self._loop = asyncio.get_running_loop()
        self._threads = threads
        self._budget = budget
        self._limit = limit
        self._building = asyncio.Lock()

    @asynccontextmanager
    async def made(self, kind: str, make: Callable[[int], T]) -> AsyncIterator[T]:
        """What `make` makes; in the block it is sent. `make` blocks and is told how large it may become; where it
        raises HeaderTooLarge it is called a second time, and told more. kind: of call, for its turn."""
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
        """As `made`, for a caller who has a thread of his own, which this blocks; up to LARGE_BYTES are ordinary."""
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
        """How much room the header needs. Errors: HeaderTooLarge for one that is no message any more."""
        if refusal.size > self._limit:
            raise HeaderTooLarge(self._limit, refusal.size) from None
        return min(refusal.most, self._limit)

    def _in_loop(self, awaited: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(awaited, self._loop).result()

    @asynccontextmanager
    async def share(self, size: int) -> AsyncIterator[Share]:
        """Wait for room, and hold it in the block."""
        call = calls.current()
        share = await self._budget.take(size, call.end_stalled, owner=call.connection)
        try:
            yield share
        finally:
            share.give()


def _nothing() -> None:
    """To end a caller who is silent: his thread waits for him no longer than the direct call allows."""
