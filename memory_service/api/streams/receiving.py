"""One WriteChunks stream: chunks come in one after the other, are written side by side, and acknowledged in order.

This file owns the bounds on what is taken and not acknowledged: a window for the stream, and a budget for all streams
together. While either is full, nothing more is read from the caller.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import numpy as np

from kvbank.v1 import service_pb2 as pb
from memory_service.api.calls import running
from memory_service.api.calls.budget import Budget, Share
from memory_service.api.messages import convert
from memory_service.api.same_host import SameHost
from memory_service.domain.errors import ServiceError, invalid
from memory_service.observe import request as requests
from memory_service.observe.metrics import Metrics
from memory_service.operations.banks import Banks
from memory_service.operations.writing import Admitted
from memory_service.storage.base import Written
from memory_service.storage.local.files.staging import StagedFile, refusal

# Bytes of a chunk without its tensors, so that every answer about single chunks fits in a message.
LARGEST_HEADER = 2 * 1024 * 1024
# How large a chunk's buffer is while no more has come.
_FIRST_BYTES = 1024 * 1024
# Acknowledgements in one message; each may name some hundred evicted chunks.
MOST_ACKS = 256


class Receiver:
    """Serves all write streams."""

    def __init__(
        self,
        banks: Banks,
        pool: ThreadPoolExecutor,
        budget: Budget,
        window: int,
        same_host: SameHost | None,
        metrics: Metrics,
    ) -> None:
        """window: the bytes of one stream that may be unacknowledged."""
        self.banks = banks
        self.pool = pool
        self.budget = budget
        self.window = window
        self.same_host = same_host
        self.received = {path: metrics.received_bytes.labels(path) for path in ("stream", "staged")}
        metrics.in_flight_bytes.set_function(lambda: budget.taken)
        # Set at the start of a shutdown: open streams may finish what they began, and begin nothing.
        self.draining = False

    async def acks(self, requests: AsyncIterator[Any]) -> AsyncIterator[pb.WriteChunksResponse]:
        """Serve one stream, and yield its acknowledgements. The first chunk that is refused ends it with its error."""
        stream = _Stream(self)
        reader = asyncio.create_task(stream.read(requests))
        try:
            async for ready in stream.written():
                if stream.together:
                    yield _ack(ready[0], *ready[1:])
                else:
                    for written in ready:
                        yield _ack(written)
            await reader
        finally:
            # After a refusal or a lost caller: writes under way end before the call does.
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            await asyncio.shield(stream.rest())


class _Incoming:
    """A chunk that is coming in, or on its way to the disk."""

    def __init__(self, admitted: Admitted, staged: StagedFile | None, share: Share, size: int) -> None:
        """size: the bytes that the chunk takes of the stream's window."""
        self.size = size
        self.admitted = admitted
        self.staged = staged
        payload = admitted.chunk.payload
        self.length = payload.length if payload else 0
        self._whole = self.missing = 0 if staged else self.length
        self.share = share
        self.written: Written | None = None
        self.error: BaseException | None = None
        # One buffer: frames of a byte each, kept as they come, would take fifty times their size. A large one is made
        # when as much as a small one has come, because its first bytes may cost a page of megabytes.
        self._data = np.empty(min(self.missing, _FIRST_BYTES), np.uint8).data

    def add(self, data: memoryview) -> None:
        """Add bytes that have come. Errors: INVALID_FIELD where they are more than the descriptor says."""
        if len(data) > self.missing:
            raise invalid("data", f"{len(data) - self.missing} bytes more than the tensors have")
        begin = self._whole - self.missing
        if begin + len(data) > len(self._data):
            first, self._data = self._data[:begin], np.empty(self._whole, np.uint8).data
            self._data[:begin] = first
        self._data[begin : begin + len(data)] = data
        self.missing -= len(data)

    def body(self) -> "memoryview | StagedFile":
        """Give away the bytes of the chunk, or the file that has them; a second call gives none."""
        data, self._data = self._data, memoryview(b"")
        return self.staged or data


class _Stream:
    """One stream while it is served. `_small`, `_writing_small` and `_settled` are shared with other threads, under
    `_lock`; the event loop alone uses the rest."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._pending: deque[_Incoming] = deque()
        self._taken = 0
        self._moved = asyncio.Event()
        self._room = asyncio.Event()
        self._ended = False
        # Whether the caller takes several acks in one message.
        self.together = False
        self._call = running.current()
        # Chunks without bytes, which one storage thread begins to write one after the other.
        self._small: list[_Incoming] = []
        self._writing_small = False
        self._settled: list[_Incoming] = []
        self._lock = threading.Lock()

    # In

    async def read(self, requests: AsyncIterator[Any]) -> None:
        """Read the stream, and start to write each chunk as soon as its bytes are complete."""
        chunk: _Incoming | None = None
        try:
            async for request in requests:
                if isinstance(request, memoryview):
                    if chunk is None:
                        raise invalid("data", "bytes without a header")
                    # Room is taken as the bytes come: a header alone holds none for those that it announces.
                    await chunk.share.grow(min(len(request), chunk.missing))
                    chunk.add(request)
                    chunk.share.progress(len(request))
                elif chunk is not None:
                    raise invalid("data", f"{chunk.missing} bytes of the chunk before are missing")
                elif request.WhichOneof("frame") == "headers":
                    self.together = True
                    for header in request.headers.headers:
                        chunk = await self._begin(header)
                        if chunk.missing:
                            raise invalid("headers", "a chunk with bytes to come has a frame of its own")
                        self._start(chunk)
                        chunk = None
                else:
                    chunk = await self._begin(request.header)
                if chunk is not None and not chunk.missing:
                    self._start(chunk)
                    chunk = None
            if chunk is not None:
                raise invalid("data", f"the stream ended {chunk.missing} bytes early")
        finally:
            if chunk is not None:
                chunk.share.give()
            self._ended = True
            self._moved.set()

    async def _begin(self, header: pb.ChunkHeader) -> _Incoming:
        receiver = self._receiver
        if receiver.draining:
            raise ServiceError("NOT_SERVING", "the service is shutting down")
        if (size := header.ByteSize()) > LARGEST_HEADER:
            text = f"a chunk with {size} bytes of text, token ids and the like; at most {LARGEST_HEADER} are taken"
            raise ServiceError("TOO_LARGE", text, limit=LARGEST_HEADER, size=size)
        if request := requests.current():
            request.of(header)
        new = convert.chunk(header.chunk)
        admitted = receiver.banks.admit(header.bank, header.reader_digest, header.embedder_digest, new)
        staged = self._staged(header.staged) if header.HasField("staged") else None
        for waited in admitted.waits():
            # This is waited for here, where the chunk holds neither a thread nor bytes that others wait for.
            await asyncio.shield(asyncio.wrap_future(waited))
        # The header counts too, because chunks without K-V are all header.
        length = new.payload.length if new.payload else 0
        while self._taken and self._taken + size + length > receiver.window:
            self._room.clear()
            await self._room.wait()
        whole = size if staged else size + length
        call = self._call
        share = await receiver.budget.take(size, call.end_stalled, whole=whole, owner=call.connection)
        self._taken += size + length
        return _Incoming(admitted, staged, share, size + length)

    def _staged(self, message: pb.StagedPayload) -> StagedFile:
        if self._receiver.same_host is None:
            raise refusal(message.name, "comes to a server that takes none")
        return self._receiver.same_host.staged(message)

    # To the disk

    def _start(self, chunk: _Incoming) -> None:
        chunk.share.ours()
        self._pending.append(chunk)
        if chunk.length:
            self._receiver.pool.submit(copy_context().run, self._write, chunk)
            return
        with self._lock:
            self._small.append(chunk)
            writing, self._writing_small = self._writing_small, True
        if not writing:
            self._receiver.pool.submit(copy_context().run, self._write_small)

    def _write_small(self) -> None:
        while True:
            with self._lock:
                batch, self._small = self._small, []
                self._writing_small = bool(batch)
            if not batch:
                return
            for chunk in batch:
                self._write(chunk)

    def _write(self, chunk: _Incoming) -> None:
        """Begin to write a chunk; this runs in a storage thread."""
        try:
            future = self._receiver.banks.write(chunk.admitted, chunk.body())
        except BaseException as error:
            chunk.error = error
            self._wake(chunk)
        else:
            future.add_done_callback(lambda done: self._committed(chunk, done))

    def _committed(self, chunk: _Incoming, done: "Future[Written]") -> None:
        """Take the result of a write; this runs in the writer's thread."""
        chunk.error = done.exception()
        if chunk.error is None:
            chunk.written = done.result()
        self._wake(chunk)

    def _wake(self, chunk: _Incoming) -> None:
        """Have the event loop look at a settled chunk; it is woken once for all that settle before it looks."""
        with self._lock:
            self._settled.append(chunk)
            waking = len(self._settled) > 1
        if not waking:
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        with self._lock:
            settled, self._settled = self._settled, []
        # Their bytes are on the disk, whether or not the caller takes its acks.
        for chunk in settled:
            chunk.share.give()
        self._moved.set()

    # Out

    async def written(self) -> AsyncIterator[list[Written]]:
        """Yield the writes in order, each once it is durable, together with those that are durable by then. Errors:
        that of the first chunk that is refused."""
        while True:
            ready, error = self._ready()
            if ready:
                yield ready
            if error is not None:
                raise error
            if ready:
                continue
            if self._ended and not self._pending:
                return
            # A chunk that settles from here on wakes the loop after this, and so after the clearing.
            self._moved.clear()
            await self._moved.wait()

    def _ready(self) -> tuple[list[Written], BaseException | None]:
        """Return the writes that can be acknowledged now, and the error of the chunk behind them, if that was
        refused."""
        ready: list[Written] = []
        while self._pending and _settled(self._pending[0]) and len(ready) < MOST_ACKS:
            chunk = self._pending.popleft()
            self._taken -= chunk.size
            self._room.set()
            if chunk.error is not None:
                return ready, chunk.error
            assert chunk.written is not None
            self._receiver.received["staged" if chunk.staged else "stream"].inc(chunk.length)
            ready.append(chunk.written)
        return ready, None

    async def rest(self) -> None:
        """Wait for the writes that are under way, whether or not they succeed."""
        while self._pending:
            self._moved.clear()
            if not _settled(self._pending[0]):
                await self._moved.wait()
                continue
            self._pending.popleft()


def _settled(chunk: _Incoming) -> bool:
    return chunk.written is not None or chunk.error is not None


def _ack(written: Written, *more: Written) -> pb.WriteChunksResponse:
    return pb.WriteChunksResponse(
        idempotency_key=written.key,
        chunk_id=written.chunk_id,
        replayed=written.replayed,
        gone=written.gone,
        evicted_chunk_ids=written.evicted,
        more=map(_ack, more),
    )
