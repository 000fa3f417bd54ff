"""Work that an event loop must not wait for is done in threads here, and waiting is done without a thread.

This file owns the rule that the asyncio client never blocks its loop: what may take longer than about a millisecond
(sums of tensors, files, threads that are joined, iterators of the caller) goes through a function of this file.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sized
from contextlib import suppress
from typing import TypeVar

from kvbank import _arguments
from kvbank._calls.writing import WriteSession
from kvbank._models import NewChunk

T = TypeVar("T")

# What is smaller is done at once: a thread costs some 0.1 ms, in which so many bytes are copied and summed.
SMALL_BYTES = 128 << 10
SMALL_COUNT = 64
_SMALL_ITEMS = 1000
# What comes after the last chunk; None could be one that a caller gives by mistake.
_END = object()


async def apart(large: bool, function: Callable[[], T]) -> T:
    """Return what `function` returns; it is called in a thread where it has much to do."""
    return await asyncio.to_thread(function) if large else function()


async def to_its_end(call: Callable[[], None]) -> None:
    """Make a call that blocks in a thread, and wait for its end also where the task is cancelled meanwhile."""
    running = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


async def wait(changed: asyncio.Event, until: Callable[[], bool], patience: Callable[[], float]) -> None:
    """Wait until a condition is true, which is looked at after each change.

    patience: returns the seconds in which something must change, or raises what ends the wait.
    """
    while not until():
        changed.clear()
        if not until():  # it may have come true before the clearing
            left = patience()  # which may raise, and a coroutine that was made before would never be awaited
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), left)


class Feed:
    """Chunks of a caller's iterable of either kind, taken into a session one at a time, when it is asked for more."""

    def __init__(self, session: WriteSession, chunks: Iterable[NewChunk] | AsyncIterable[NewChunk]) -> None:
        self._session = session
        self._source = _each(chunks)

    async def aclose(self) -> None:
        """Take no more chunks. An iterator of the caller is left as it is, for the caller to go on with or to close."""
        await self._source.aclose()

    async def more(self) -> bool:
        """Tell whether the session has an upload that goes next; take a chunk into it where it has none.

        What the iterable raises, and the error for a chunk that is refused, become the session's `failure`.
        """
        session = self._session
        if session.peek() is None and session.failure is None:
            try:
                if (found := await anext(self._source, _END)) is not _END:
                    chunk = _arguments.instance("chunk", found, NewChunk)
                    await apart(_is_large(chunk), lambda: session.put(chunk))
            except Exception as error:
                session.failure = error
        return session.peek() is not None


async def _each(chunks: Iterable[NewChunk] | AsyncIterable[NewChunk]) -> AsyncGenerator[object]:
    """Yield the chunks of an iterable of either kind; a generator's work between two chunks is done in a thread."""
    if isinstance(chunks, AsyncIterable):
        async for chunk in chunks:
            yield chunk
    elif isinstance(chunks, list | tuple):
        for chunk in chunks:
            yield chunk
    else:
        iterator = iter(_arguments.iterable("chunks", chunks))
        while (found := await asyncio.to_thread(lambda: next(iterator, _END))) is not _END:
            yield found


def _is_large(chunk: NewChunk) -> bool:
    """Tell whether it takes long to check a chunk and to sum its bytes."""
    return bool(chunk.tensors) or is_longer(chunk.token_ids, _SMALL_ITEMS) or is_longer(chunk.text, SMALL_BYTES)


def are_many(vectors: object, most: int = SMALL_COUNT) -> bool:
    """Tell whether a caller gave more than `most` vectors; an array of one dimension is one vector, however long."""
    try:
        return getattr(vectors, "ndim", 2) > 1 and is_longer(vectors, most)
    except Exception:  # something strange, which is refused where it is checked
        return False


def is_longer(value: object, most: int = SMALL_COUNT) -> bool:
    """Tell whether a value that a caller gave has more than `most` items; False for one that has no length."""
    try:
        return isinstance(value, Sized) and len(value) > most
    except Exception:  # an array without dimensions, or something stranger, which is refused where it is checked
        return False
