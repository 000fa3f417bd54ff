"""A request of the event loop takes the answer of a job of the engine here: pieces of text as they come, and the end.

This file owns that a reader never holds up the model: pieces wait here, and no thread waits for a reader. A job ends
once its caller has left.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from starlette.requests import Request

from model_worker.http.metrics import Metrics
from model_worker.serve.answering import Reply
from model_worker.serve.engine import Engine, Job, Left

T = TypeVar("T")


class Answer:
    """An answer that is being written.

    begin: submits the job, with the function that takes its pieces. engine: by which it is ended early. metrics: where
    its tokens are counted.
    """

    def __init__(self, engine: Engine, metrics: Metrics, begin: Callable[[Callable[[str], None]], Job[Reply]]) -> None:
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._held: list[str | None] = []
        self._ended = asyncio.Event()
        self._job = begin(self._take)
        self._job.result.add_done_callback(lambda _: self._end())
        self._metrics = metrics

    def _take(self, piece: str) -> None:
        """Take a piece from the thread of the job."""
        with suppress(RuntimeError):  # the loop has ended, and the caller with it
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def _end(self) -> None:
        """Note in the event loop, behind all pieces, that the job has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, None)
            self._loop.call_soon_threadsafe(self._ended.set)

    async def begun(self, request: Request) -> None:
        """Wait for the first piece, which may be empty, or for the end.

        Raises the error of a job that has failed until then, and Left.
        """
        try:
            self._held.append(await unless_left(request, self._pieces.get()))
            if self._held == [None]:
                self._job.result.result()  # its error
        except BaseException:
            self.leave()
            raise

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the pieces of text."""
        while (piece := self._held.pop() if self._held else await self._pieces.get()) is not None:
            if piece:
                yield piece

    async def reply(self) -> Reply:
        """Return the whole answer, once it is durable. Raises the error of the job."""
        await self._ended.wait()
        reply = self._job.result.result()
        self._metrics.used(reply.usage)
        return reply

    async def whole(self, request: Request) -> Reply:
        """Return the whole answer of a caller who waits for it. Raises the error of the job, and Left."""
        try:
            await unless_left(request, self._ended.wait())
            return await self.reply()
        finally:
            self.leave()

    def leave(self) -> None:
        """End the job at its next token, where it has not ended."""
        if not self._job.result.done():
            self._engine.forget(self._job)


async def unless_left(request: Request, wanted: Awaitable[T]) -> T:
    """Return what is waited for. Raises Left where the caller leaves before it is there."""
    gone = asyncio.ensure_future(_until_left(request))
    coming = asyncio.ensure_future(wanted)
    try:
        await asyncio.wait((gone, coming), return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            raise Left("the caller has left")
        return coming.result()
    finally:
        for task in (gone, coming):
            task.cancel()


async def _until_left(request: Request) -> None:
    """Return when the caller has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
