"""Turns in which answers are made. An answer has a header (hits, texts, token ids, metadata and descriptors, in one
message) before the bytes of K-V; this file owns the bound on the memory of headers, of one and of all together, however
slowly callers read.

What an answer is made of is found first, which takes little memory. An ordinary header is loaded at once. A larger one
is loaded when it has its turn: there is room for it until its caller has taken it, and, where it is very large, no
other such is being loaded.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from memory_service.api.calls import running
from memory_service.api.calls.budget import Budget, Share
from memory_service.api.calls.fairness import NOBODY, FairTurns
from memory_service.api.calls.storage_threads import StorageThreads
from memory_service.domain.answer_size import HeaderTooLarge
from memory_service.domain.limits import Pauses

T = TypeVar("T")
# A call that loads a header of at most so many bytes. Errors: HeaderTooLarge, before all of it is loaded.
Load = Callable[[int], T]
# The bytes of an ordinary header; nearly every header is shorter.
ORDINARY_BYTES = 64 * 1024
# Headers that are longer than this are loaded one at a time.
LARGE_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Begun(Generic[T]):
    """An answer of which all is found: it is made already, or `load` makes it, with a header of `least` to `most`
    bytes."""

    load: Load[T]
    made: T | None
    least: int = 0
    most: int = 0


def _begin(find: Callable[[], Load[T]], ordinary: int, pauses: Pauses) -> _Begun[T]:
    """Find what an answer is made of, and load it where its header has at most `ordinary` bytes. This blocks."""
    load = find()
    pauses.reach("answer")
    try:
        return _Begun(load, load(ordinary))
    except HeaderTooLarge as refusal:
        return _Begun(load, None, refusal.size, refusal.most)


class AnswerTurns:
    """Gives answers their turns. It is made and used in the event loop, but for `made_here`."""

    def __init__(self, threads: StorageThreads, budget: Budget, most_bytes: int, pauses: Pauses) -> None:
        """Let headers hold the bytes of `budget` together. most_bytes: of one message. pauses: those that a test waits
        at."""
        self._loop = asyncio.get_running_loop()
        self._threads = threads
        self._budget = budget
        self._most_bytes = most_bytes
        self._pauses = pauses
        self._loading = FairTurns(1)

    @asynccontextmanager
    async def made(self, kind: str, find: Callable[[], Load[T]]) -> AsyncIterator[T]:
        """Make an answer, whose header is sent in the block.

        kind: the kind of call, whose turn is waited for. find: finds what the answer is made of, in a storage thread,
        and returns what loads it. Errors: those of both; HeaderTooLarge for a header that fits in no message.
        """
        async with self._threads.turn(kind) as turn:
            begun = await turn.run(_begin, find, ORDINARY_BYTES, self._pauses)
        if begun.made is not None:
            yield begun.made
            return
        most = self._room(begun)
        async with self.share(most) as share:
            share.ours()
            loading = self._loading.held(share.owner) if most > LARGE_BYTES else nullcontext()
            async with loading, self._threads.turn(kind) as turn:
                made = await turn.run_to_its_end(begun.load, self._most_bytes)
            share.touch()
            yield made

    @contextmanager
    def made_here(self, find: Callable[[], Load[T]]) -> Iterator[T]:
        """Make an answer as `made` does, in a thread of the caller, which is blocked. A header of up to LARGE_BYTES is
        ordinary here."""
        begun = _begin(find, LARGE_BYTES, self._pauses)
        if begun.made is not None:
            yield begun.made
            return
        share = self._in_loop(self._budget.take(self._room(begun), _end_nothing))
        try:
            self._in_loop(self._loading.take(NOBODY))
            try:
                made = begun.load(self._most_bytes)
            finally:
                self._loop.call_soon_threadsafe(self._loading.give, NOBODY)
            yield made
        finally:
            self._loop.call_soon_threadsafe(share.give)

    def _room(self, begun: _Begun[T]) -> int:
        """Return the bytes of room that a header needs. Errors: HeaderTooLarge where they fit in no message."""
        if begun.least > self._most_bytes:
            raise HeaderTooLarge(self._most_bytes, begun.least)
        return min(begun.most, self._most_bytes)

    def _in_loop(self, awaited: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(awaited, self._loop).result()

    @asynccontextmanager
    async def share(self, size: int) -> AsyncIterator[Share]:
        """Wait for room for `size` bytes, and hold it in the block."""
        call = running.current()
        share = await self._budget.take(size, call.end_stalled, owner=call.owner)
        try:
            yield share
        finally:
            share.give()


def _end_nothing() -> None:
    """Do nothing where a share has stalled: a thread of a direct call waits only some seconds for its caller anyway."""
