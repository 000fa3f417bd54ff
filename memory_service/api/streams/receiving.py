"""The streams of WriteChunks: in each, chunks come in one after the other, are written side by side, and acknowledged
in order.

This file owns the bounds on what is taken and not acknowledged: a window for the stream, and a budget for all streams
together. While either is full, nothing more is read from the caller; nor is it while the caller's tenant has written as
many chunks as it may a second.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import Any, NamedTuple

from kvbank.v1 import service_pb2 as pb
from memory_service.api.calls import running
from memory_service.api.calls.budget import Budget
from memory_service.api.calls.rate_turns import RateTurns
from memory_service.api.messages import convert, naming
from memory_service.api.same_host import SameHost
from memory_service.api.streams.chunk_frames import FrameReader
from memory_service.api.streams.handover import Gathering, Mailbox
from memory_service.api.streams.incoming import Incoming
from memory_service.domain.access import Caller
from memory_service.domain.errors import ServiceError, invalid, staged_file
from memory_service.domain.fair_threads import FairThreads
from memory_service.domain.model import Bank
from memory_service.observe import request as requests
from memory_service.observe.metrics import Metrics
from memory_service.operations.banks import Banks
from memory_service.storage.base import Staged, Written

# The most bytes of a chunk without its tensors, so that every answer about single chunks fits in a message.
LARGEST_HEADER = 2 * 1024 * 1024
# The most acknowledgements in one message; each may name some hundred evicted chunks.
MOST_ACKS = 256


class Bounds(NamedTuple):
    """What a stream may bring: `window` bytes that are unacknowledged, and tensors of `inline` bytes with a header."""

    window: int
    inline: int


class Receiver:
    """Serves all write streams."""

    def __init__(
        self,
        banks: Banks,
        pool: FairThreads,
        budget: Budget,
        rate_turns: RateTurns,
        bounds: Bounds,
        same_host: SameHost | None,
        metrics: Metrics,
    ) -> None:
        """Write into `banks`, in threads of `pool`.

        budget: the bytes that all streams together may hold. rate_turns: where chunks wait for the rates of
        their tenants. same_host: where callers may stage payloads; None where they may not.
        """
        self.banks = banks
        self.pool = pool
        self.budget = budget
        self.rate_turns = rate_turns
        self.window, self.inline_bytes = bounds
        self.same_host = same_host
        self.received = {path: metrics.received_bytes.labels(path) for path in ("stream", "staged")}
        metrics.in_flight_bytes.set_function(lambda: budget.taken)

    async def acks(self, caller: Caller, frames: AsyncIterator[Any]) -> AsyncIterator[pb.WriteChunksResponse]:
        """Serve one stream of a caller, and yield its acknowledgements. The first chunk that is refused ends it with
        its error."""
        stream = _Stream(self, caller)
        reader = asyncio.create_task(stream.read(frames))
        try:
            async for ready in stream.written():
                acks = map(_ack, ready)
                if stream.together:
                    first = next(acks)
                    first.more.extend(acks)
                    yield first
                else:
                    for ack in acks:
                        yield ack
            await reader
        finally:
            # Writes that are under way after a refusal, or when the caller has gone, end before the call does.
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            await asyncio.shield(stream.rest())


class _Stream:
    """One stream while it is served; used in the event loop alone, but for `_write`, `_failed` and `_ended_write`."""

    def __init__(self, receiver: Receiver, caller: Caller) -> None:
        self._receiver = receiver
        self._caller = caller
        self._call = running.current()
        # Chunks that are being written and not acknowledged yet, in the order of the stream.
        self._writes: deque[Incoming] = deque()
        # The bytes of the window that are taken.
        self._taken = 0
        self._room = asyncio.Event()
        self._moved = asyncio.Event()
        self._ended = False
        # Whether the caller takes several acks in one message.
        self.together = False
        # By name: the banks of the frame that is being read, each of which is looked up once.
        self._banks: dict[str, Bank] = {}
        self._small = Gathering(receiver.pool, self._call.owner.tenant, self._write, self._failed)
        self._settled = Mailbox(self._look)

    # In

    async def read(self, frames: AsyncIterator[Any]) -> None:
        """Read the stream, and start to write each chunk as soon as its bytes are complete."""
        reader: FrameReader[Incoming] = FrameReader()
        try:
            async for frame in frames:
                if isinstance(frame, memoryview):
                    await self._read_data(reader, frame)
                    continue
                self._banks.clear()
                self.together |= frame.WhichOneof("frame") == "headers"
                for header in reader.headers(frame):
                    self._start(reader.feed(await self._admitted(header)))
            reader.end()
        finally:
            if reader.open is not None:
                reader.open.share.give()
            self._ended = True
            self._moved.set()

    async def _read_data(self, reader: FrameReader[Incoming], data: memoryview) -> None:
        """Read some bytes of a chunk. Room is taken as they come: a header alone holds none for those that it
        announces."""
        chunk = reader.expecting()
        await chunk.share.grow(min(len(data), chunk.bytes.missing))
        complete = reader.feed(data)
        chunk.share.progress(len(data))
        self._start(complete)

    async def _admitted(self, header: pb.ChunkHeader) -> Incoming:
        """Check a chunk, and wait until there is room for its header. Errors: those of `Banks.admit`, TOO_LARGE,
        STAGED_FILE, PERMISSION_DENIED; NOT_SERVING during a stop."""
        receiver = self._receiver
        if not receiver.rate_turns.chunk_passes(self._call.owner.tenant):
            await receiver.rate_turns.chunk(self._call.owner.tenant)  # with nothing of the chunk in the budget
        brought = header.data
        if (size := header.ByteSize() - len(brought)) > LARGEST_HEADER:
            text = f"a chunk with {size} bytes of text, token ids and the like; at most {LARGEST_HEADER} are taken"
            raise ServiceError("TOO_LARGE", text, limit=LARGEST_HEADER, size=size)
        bank = self._banks.get(header.bank) or await self._looked_up(header)
        new = convert.chunk(header.chunk, if_absent=header.if_absent)
        admitted = receiver.banks.admit(bank, header.reader_digest, header.embedder_digest, new)
        staged = self._staged(header.staged) if header.HasField("staged") else None
        length = new.payload.length if new.payload else 0
        self._check_brought(brought, length, staged)
        for waited in admitted.waits():
            # The wait is here, where the chunk holds neither a thread nor bytes that others wait for.
            await asyncio.shield(asyncio.wrap_future(waited))
        # The header counts too, because chunks without K-V are all header.
        all_bytes = size + length
        if self._taken and self._taken + all_bytes > receiver.window:
            await self._window_for(all_bytes)
        whole = size if staged else all_bytes
        call = self._call
        share = await receiver.budget.take(size + len(brought), call.end_stalled, whole=whole, owner=call.owner)
        self._taken += all_bytes
        incoming = Incoming(admitted, staged, share, all_bytes)
        if brought:
            incoming.bytes.add(memoryview(brought))
        return incoming

    def _check_brought(self, brought: bytes, length: int, staged: Staged | None) -> None:
        """Check the bytes that a header has brought along, if it has any: they are all `length` bytes of the chunk's
        tensors. Errors: INVALID_FIELD."""
        if brought and (staged or len(brought) != length or length > self._receiver.inline_bytes):
            text = f"a header with {len(brought)} bytes, for {length} of tensors{' in a file' if staged else ''}"
            raise invalid("data", f"{text}; at most {self._receiver.inline_bytes} are taken so, and all at once")

    async def _looked_up(self, header: pb.ChunkHeader) -> Bank:
        """Return the bank of a chunk, as it was when this frame had come, or later. Errors: PERMISSION_DENIED,
        BANK_NOT_FOUND, STORAGE_ERROR."""
        if request := requests.current():
            request.of(header)
        self._caller.check_may_use(naming.banks(header))
        found = self._receiver.banks.named_soon(self._caller.tenant, header.bank)
        # Where the storage is asked, that is not in the event loop: it may not answer for long.
        bank = found if isinstance(found, Bank) else await asyncio.shield(asyncio.wrap_future(found))
        self._banks[header.bank] = bank
        return bank

    def _staged(self, message: pb.StagedPayload) -> Staged:
        if self._receiver.same_host is None or not self._caller.is_owner:
            raise staged_file(message.name, "comes to a server that takes none of this caller")
        return self._receiver.same_host.staged(message)

    async def _window_for(self, size: int) -> None:
        """Wait until the window has room for `size` bytes; a chunk alone may be larger than the window."""
        while self._taken and self._taken + size > self._receiver.window:
            self._room.clear()
            await self._room.wait()

    # To the disk

    def _start(self, chunk: Incoming | None) -> None:
        """Start to write a chunk, if one is complete. Chunks that wait for no storage share a thread: several threads
        would spend more on turns at the interpreter than on the chunks."""
        if chunk is None:
            return
        chunk.share.ours()
        self._writes.append(chunk)
        if chunk.length and (chunk.staged or self._receiver.banks.waits(chunk.object_bytes)):
            self._receiver.pool.submit(self._call.owner.tenant, partial(copy_context().run, self._write, [chunk]))
        else:
            chunk.gathered = True
            self._small.add(chunk)

    def _write(self, chunks: list[Incoming]) -> None:
        """Begin to write chunks; this runs in a storage thread."""
        try:
            writes = self._receiver.banks.write([(chunk.admitted, chunk.body()) for chunk in chunks])
        except BaseException as error:
            self._failed(chunks, error)
        else:
            for chunk, write in zip(chunks, writes, strict=True):
                write.add_done_callback(partial(self._ended_write, chunk))

    def _failed(self, chunks: list[Incoming], error: BaseException) -> None:
        for chunk in chunks:
            chunk.error = error
            self._settled.post(chunk)

    def _ended_write(self, chunk: Incoming, write: "Future[Written]") -> None:
        """Take the result of a write; this runs in the thread that has ended it."""
        chunk.settle(write)
        self._settled.post(chunk)

    def _look(self, settled: list[Incoming]) -> None:
        """Let go of chunks whose writes have ended: their bytes are on the disk, whether or not the caller takes its
        acks."""
        for chunk in settled:
            chunk.share.give()
        self._moved.set()
        self._small.ended(sum(chunk.gathered for chunk in settled))

    # Out

    async def written(self) -> AsyncIterator[list[Written]]:
        """Yield the writes in order, each once it is durable, together with those that are durable by then. Errors:
        that of the first chunk that is refused."""
        while await self._next_has_settled():
            ready: list[Written] = []
            while self._writes and len(ready) < MOST_ACKS and self._writes[0].written:
                ready.append(self._acknowledged())
            yield ready or [self._acknowledged()]  # the first one was refused

    async def _next_has_settled(self) -> bool:
        """Wait for the write that is acknowledged next, and return True; False where the stream has ended and all are
        acknowledged."""
        while not (self._writes and self._writes[0].settled):
            if self._ended and not self._writes:
                return False
            # A chunk that settles from here on wakes the loop after this, and so after the clearing.
            self._moved.clear()
            await self._moved.wait()
        return True

    def _acknowledged(self) -> Written:
        """Take the first write out of the window, and return it. Errors: that of the write."""
        chunk = self._writes.popleft()
        self._taken -= chunk.size
        self._room.set()
        if chunk.error is not None:
            raise chunk.error
        assert chunk.written is not None
        if chunk.length:
            self._receiver.received["staged" if chunk.staged else "stream"].inc(chunk.length)
        return chunk.written

    async def rest(self) -> None:
        """Wait for the writes that are under way, whether or not they succeed."""
        self._ended = True
        while await self._next_has_settled():
            self._writes.popleft()


def _ack(written: Written) -> pb.WriteChunksResponse:
    return pb.WriteChunksResponse(
        idempotency_key=written.key,
        chunk_id=written.chunk_id,
        replayed=written.replayed,
        gone=written.gone,
        evicted_chunk_ids=written.evicted,
    )
