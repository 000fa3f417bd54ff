"""Calls of the asyncio client travel by this file, as those of the blocking one do by `caller`.

What would block the event loop goes through `kvbank._transport.loop`.
"""

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, TypeVar

import grpc

from kvbank._calls import metadata, reading, search_messages
from kvbank._calls.answers import odd
from kvbank._calls.paging import turned
from kvbank._calls.session_window import Arriving, Sent
from kvbank._calls.steps import Run
from kvbank._calls.writing import WriteSession, takes_no_data, takes_no_file
from kvbank._exceptions import ClientClosed, ClientForked, LoopMismatch, ServiceError
from kvbank._models import NewChunk
from kvbank._transport import channel
from kvbank._transport.base import AsyncTransport
from kvbank._transport.base_caller import BaseCaller
from kvbank._transport.loop import SMALL_BYTES, Feed, apart, is_longer, to_its_end, wait
from kvbank._transport.over_grpc import AsyncGrpc, Grpc, answered_once
from kvbank._transport.retrying import Attempts
from kvbank._transport.same_host import SameHost
from kvbank._transport.socket_first import AsyncSocketFirst
from kvbank._transport.write_stream import WriteStream

T = TypeVar("T")


class AsyncCaller(BaseCaller):
    """The calls of an asyncio client. It belongs to the event loop of its first call, whose tasks may share it.

    Errors of all methods that call: ServiceError, ClientClosed, ClientForked, LoopMismatch.
    """

    def __init__(self, address: str, timeout: float, **options: Any) -> None:
        """Take the arguments of `BaseCaller`; nothing is sent before the first call."""
        super().__init__(address, timeout, **options)
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        # By the place of an address; made in the loop to which they then belong.
        self._transports: list[AsyncTransport] = []
        # Writes go over blocking channels, for the reason that `write_stream` states.
        self._writing: list[Grpc] = []

    async def close(self, then: Callable[[], None] | None) -> None:
        """Close the connection, so that calls under way fail, and call `then`; do nothing where it is closed.

        `then` is called in a thread, also where the task is cancelled meanwhile.
        """
        if self.pid != os.getpid() or self._closed:
            return
        self._closed = True
        try:
            for transport in self._transports:
                await transport.close()
        finally:
            # In one thread, so that a task that is cancelled meanwhile leaves out neither.
            await to_its_end(partial(self._end, then))

    def _end(self, then: Callable[[], None] | None) -> None:
        """Close the channels of writes, and call `then`. Blocks."""
        try:
            for transport in self._writing:
                transport.close()
        finally:
            if then is not None:
                then()

    async def call(self, method: str, request: Any, timeout: float | None) -> Any:
        """Make a call with one answer, and return it."""
        return await self.repeated(method, request, self.attempts(timeout))

    async def repeated(self, method: str, request: Any, attempts: Attempts) -> Any:
        """Make a call with one answer within these attempts, and return it."""
        request_id = channel.new_request_id()
        while True:
            try:
                with self._translated(request_id) as at:
                    return await self._transports[at].unary(method, request, attempts.remaining(), request_id)
            except ServiceError as error:
                await asyncio.sleep(attempts.pause(error))

    async def pages(self, method: str, request: Any, timeout: float | None) -> AsyncIterator[Any]:
        """Yield the pages of an answer, with `timeout` for each."""
        for _ in range(channel.MOST_PAGES[method]):
            page = await self.call(method, request, timeout)
            yield page
            if not turned(request, page):
                return
        raise odd(f"it has more than {channel.MOST_PAGES[method]} pages")

    async def check_kept(self, message: Any, attempts: Attempts) -> None:
        """Check that the server keeps all metadata of a message. Errors: FailedPrecondition."""
        if message.typed_metadata:
            await self._learn(attempts)
            metadata.check_kept(message, self.typed)

    async def check_alternatives(self, message: Any, attempts: Attempts) -> None:
        """Check that the server heeds the alternatives of the filter of a message. Errors: FailedPrecondition."""
        if search_messages.has_alternatives(message):
            await self._learn(attempts)
            search_messages.check_heeded(message, self.alternatives)

    async def read(
        self, begin: Callable[[SameHost | None], reading.Steps[T]], attempts: Attempts, request_id: str
    ) -> T:
        """Make the calls that steps ask for, and return what they return.

        begin: begins the steps, with the folder that the server shares, or None.
        """
        run = Run(begin(await self._shared(attempts)))
        call = run.begin()
        while call is not None:
            try:
                answer = await self._read(call, attempts, request_id)
            except ServiceError as error:
                self.sharing.failed(call, error)
                call = run.failed(error)
            else:
                if call.folder is not None:
                    await apart(any(answer.files), partial(call.folder.fill, answer))
                many = is_longer(answer.header.chunks)
                call = await apart(many, partial(run.answered, answer))
        return run.result

    async def write(
        self,
        begin: Callable[[int, bool, int], WriteSession],
        chunks: Iterable[NewChunk] | AsyncIterable[NewChunk],
        attempts: Attempts,
    ) -> WriteSession:
        """Write all chunks over a session, and return it.

        begin: makes the session, of the bytes that may be unacknowledged, whether all metadata are kept, and the bytes
        that a header may bring along.
        """
        await self._learn(attempts)
        folder = await self._shared(attempts)
        session = begin(self.bound, self.typed, self.inline)
        request_id = channel.new_request_id()
        async with aclosing(Feed(session, chunks)) as feed:
            while await feed.more() or session.pending:
                attempts.progressed(session.waiting_since())
                try:
                    await self._write_stream(session, feed, folder, attempts, request_id)
                except ServiceError as error:
                    if folder is not None and takes_no_file(error):
                        self.sharing.doubted()
                        folder = None  # the rest goes over the stream
                        continue
                    if session.inline and takes_no_data(error):
                        session.inline = self.inline = 0  # an older server, behind the same address or another one
                        continue
                    attempts.progressed(session.waiting_since())
                    await asyncio.sleep(attempts.pause(error))
        return session

    async def upload(self, method: str, sent: Sent, attempts: Attempts) -> None:
        """Make a call of many frames with one answer that says nothing."""
        request_id = channel.new_request_id()
        while True:
            try:
                with self._translated(request_id) as at:
                    # In a thread, for the reason that `write_stream` states.
                    call = self._for_writes(at).upload(method, sent.frames(), attempts.remaining(), request_id)
                    try:
                        await asyncio.to_thread(answered_once, call)
                    finally:
                        call.cancel()
                return
            except ServiceError as error:
                await asyncio.sleep(attempts.pause(error))

    async def download(self, method: str, request: Any, attempts: Attempts, made: Callable[[], Arriving[T]]) -> T:
        """Make a call whose answer is a window, and return what is made of its frames by what `made` returns."""
        request_id = channel.new_request_id()
        while True:
            try:
                with self._translated(request_id) as at:
                    received = made()
                    stream = self._transports[at].stream(method, request, attempts.remaining(), request_id)
                    async with aclosing(stream) as frames:
                        async for frame in frames:
                            received.feed(frame)
                            if received.whole:
                                break
                    return await apart(received.size > SMALL_BYTES, received.finish)
            except ServiceError as error:
                await asyncio.sleep(attempts.pause(error))

    async def _learn(self, attempts: Attempts) -> None:
        """Ask the server, once, how much of a write may be unacknowledged, and which metadata it keeps."""
        self._check()
        if not self.bound:
            asked = self.sharing.question()
            info = await self.repeated("GetServerInfo", asked, attempts)
            self.learned(info)
            if self.sharing.unknown():
                await asyncio.to_thread(self.sharing.learn, asked, info)

    async def _shared(self, attempts: Attempts) -> SameHost | None:
        """Return the data folder of the server, where it is on this machine and shared with this client; else None."""
        if self.sharing.unknown():
            asked = self.sharing.question()
            try:
                info = await self.repeated("GetServerInfo", asked, attempts)
                await asyncio.to_thread(self.sharing.learn, asked, info)
            except ServiceError:
                return None  # the call that follows will say it
        return self.sharing.folder

    async def _read(self, call: reading.Call, attempts: Attempts, request_id: str) -> reading.Answer:
        """Make a call, and read its answer to the end; where it breaks, make it again."""
        while True:
            try:
                return await self._read_once(call, attempts.remaining(), request_id)
            except ServiceError as error:
                await asyncio.sleep(attempts.pause(error))

    async def _read_once(self, call: reading.Call, timeout: float, request_id: str) -> reading.Answer:
        answer, received = reading.Answer(), 0
        with self._translated(request_id) as at:
            transport = self._transports[at]
            if call.folder is not None:
                answer.feed(await transport.unary(call.method, call.request, timeout, request_id))
            else:
                async with aclosing(transport.stream(call.method, call.request, timeout, request_id)) as frames:
                    async for frame in frames:
                        received += len(frame) if isinstance(frame, memoryview) else 0
                        await apart(received > SMALL_BYTES, partial(answer.feed, frame))
            answer.finish()
        return answer

    async def _write_stream(
        self, session: WriteSession, feed: Feed, folder: SameHost | None, attempts: Attempts, request_id: str
    ) -> None:
        """Write until the end of the chunks, or of the stream."""
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._translated(request_id) as at:
            begin = partial(self._for_writes(at).write, request_id=request_id)
            stream = WriteStream(begin, session, attempts, wake, folder)
            try:
                while await feed.more():
                    await wait(changed, stream.ready, stream.patience)
                    if stream.ended:
                        break
                    stream.send()
                stream.half_close()
                await wait(changed, stream.done, stream.patience)
                stream.check()
            finally:
                await to_its_end(stream.cancel)

    def _check(self) -> None:
        """Make the transports for calls. Errors, where none may be made: ClientForked, ClientClosed, LoopMismatch."""
        if self.pid != os.getpid():
            raise ClientForked("this client belongs to the parent process; call kvbank.connect_async() after the fork")
        if self._closed:
            raise ClientClosed("the client is closed")
        if not self._transports:
            self._loop = asyncio.get_running_loop()
            ways = (AsyncGrpc(address, self.route) for address in self.route.turn.addresses)
            self._transports = [AsyncSocketFirst(self.sharing, way) for way in ways]
        if self._loop is not asyncio.get_running_loop():
            raise LoopMismatch("this client belongs to another event loop; call kvbank.connect_async() in this one")

    def _for_writes(self, at: int) -> Grpc:
        if not self._writing:
            self._writing = [Grpc(address, self.route) for address in self.route.turn.addresses]
        return self._writing[at]

    @contextmanager
    def _translated(self, request_id: str) -> Iterator[int]:
        """Give the place of the address for a call, and turn errors of gRPC into errors of this package.

        gRPC cancels the calls of a channel that is closed, as if their task had been cancelled.
        """
        self._check()
        at = self.route.turn.take()
        try:
            yield at
            self.reached(at)
        except (grpc.RpcError, grpc.aio.UsageError, ValueError, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):
                raise ClientClosed("the client was closed during the call") from None
            if isinstance(error, grpc.RpcError):
                raise self.error(error, at, request_id) from None
            raise
        except ServiceError as error:
            error.request_id = error.request_id or request_id
            raise
