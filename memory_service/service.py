"""The RPCs: messages in, calls of the domain in storage threads, messages out. Owns streaming and back-pressure."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any, TypeVar

from kvbank.v1 import service_pb2 as pb
from kvbank.v1 import service_pb2_grpc
from memory_service import __version__, convert
from memory_service.bank import Banks, Written
from memory_service.domain import Bank, Chunk
from memory_service.errors import (
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    ServiceError,
    invalid,
    to_service_error,
)
from memory_service.recall import Found, Query, Recall
from memory_service.settings import Settings
from memory_service.validate import LARGEST_INT64

FRAME_BYTES = 1024 * 1024
# Of a chunk without its tensors, so that every answer about single chunks fits in a message.
LARGEST_HEADER = 2 * 1024 * 1024
T = TypeVar("T")
Context = Any
_DETAILS = "grpc-status-details-bin"


def unary(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """End the call with a status that carries the reason, whatever is raised."""

    @wraps(method)
    async def call(self: Any, request: Any, context: Context) -> T:
        try:
            return _sized(await method(self, request), self._settings.max_message_bytes)
        except Exception as error:
            await _abort(context, error)
            raise

    return call


def streaming(method: Callable[..., AsyncIterator[T]]) -> Callable[..., AsyncIterator[T]]:
    """As `unary`, for a stream of answers."""

    @wraps(method)
    async def call(self: Any, request: Any, context: Context) -> AsyncIterator[T]:
        try:
            async for message in method(self, request):
                yield message
        except Exception as error:
            await _abort(context, error)

    return call


async def _abort(context: Context, error: Exception) -> None:
    """Raises, as gRPC's abort does."""
    refusal = to_service_error(error)
    details = ((_DETAILS, refusal.status().SerializeToString()),)
    await context.abort(refusal.code, refusal.message, details)


class MemoryService(service_pb2_grpc.MemoryServiceServicer):
    """kvbank.v1.MemoryService."""

    def __init__(self, banks: Banks, settings: Settings, pool: ThreadPoolExecutor) -> None:
        self._banks = banks
        self._recall = Recall(banks, settings.max_answer_bytes)
        self._settings = settings
        self._pool = pool
        # Set at the start of a shutdown: open streams may finish what they began, and begin nothing.
        self.draining = False

    async def _run(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)

    # Server and banks

    @unary
    async def GetServerInfo(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:  # noqa: N802
        """Version, identity, limits."""
        return pb.GetServerInfoResponse(
            version=__version__,
            store_id=self._banks.records.store_id,
            durability=self._settings.durability,
            max_message_bytes=self._settings.max_message_bytes,
            max_chunk_bytes=self._settings.max_chunk_bytes,
            max_unacknowledged_bytes=self._settings.max_unacknowledged_bytes,
        )

    @unary
    async def CreateBank(self, request: pb.CreateBankRequest) -> pb.CreateBankResponse:  # noqa: N802
        """An existing bank of the same name and specs is returned as it is."""
        bank, created = await self._run(self._banks.create, convert.bank(request.bank))
        return pb.CreateBankResponse(bank=convert.bank_message(bank), created=created)

    @unary
    async def GetBank(self, request: pb.GetBankRequest) -> pb.GetBankResponse:  # noqa: N802
        """One bank."""
        return pb.GetBankResponse(bank=convert.bank_message(await self._run(self._banks.get, request.name)))

    @unary
    async def ListBanks(self, request: pb.ListBanksRequest) -> pb.ListBanksResponse:  # noqa: N802
        """By name; the token is the last name of the page before."""
        size = _page_size(request.page_size)
        banks = await self._run(self._banks.after, request.page_token, size + 1)
        token = banks[size - 1].name if len(banks) > size else ""
        return pb.ListBanksResponse(banks=map(convert.bank_message, banks[:size]), next_page_token=token)

    @unary
    async def UpdateBank(self, request: pb.UpdateBankRequest) -> pb.UpdateBankResponse:  # noqa: N802
        """Capacity, policy, metadata; those that the mask names."""
        new = convert.bank(request.bank)
        changes = {path: getattr(new, path) for path in request.update_mask.paths if path in _UPDATABLE}
        if not changes or len(changes) != len(request.update_mask.paths):
            raise invalid("update_mask", f"must name some of {', '.join(_UPDATABLE)}, each once")
        bank = await self._run(self._banks.update, new.name, changes)
        return pb.UpdateBankResponse(bank=convert.bank_message(bank))

    @unary
    async def DeleteBank(self, request: pb.DeleteBankRequest) -> pb.DeleteBankResponse:  # noqa: N802
        """The bank with all its chunks."""
        await self._run(self._banks.delete, request.name)
        return pb.DeleteBankResponse()

    # Writing

    @streaming
    async def WriteChunks(  # noqa: N802
        self, requests: AsyncIterator[pb.WriteChunksRequest]
    ) -> AsyncIterator[pb.WriteChunksResponse]:
        """Chunks are written side by side; acks come in order."""
        acks: asyncio.Queue[asyncio.Task[pb.WriteChunksResponse] | None] = asyncio.Queue()
        window = _Window(self._settings.max_unacknowledged_bytes)
        reader = asyncio.create_task(self._read_chunks(requests, window, acks))
        try:
            while (task := await acks.get()) is not None:
                yield await task
            await reader
        finally:
            # After a refusal or a lost caller: writes under way end before the call does.
            reader.cancel()
            waiting = [acks.get_nowait() for _ in range(acks.qsize())]
            await asyncio.gather(reader, *(task for task in waiting if task), return_exceptions=True)

    async def _read_chunks(
        self,
        requests: AsyncIterator[pb.WriteChunksRequest],
        window: "_Window",
        acks: "asyncio.Queue[asyncio.Task[pb.WriteChunksResponse] | None]",
    ) -> None:
        """Start a write a chunk as soon as its bytes are complete; None at the end, whatever the end is."""
        try:
            assembly: _Assembly | None = None
            async for request in requests:
                if request.WhichOneof("frame") == "header":
                    if assembly is not None:
                        raise invalid("data", f"{assembly.missing} bytes of the chunk before are missing")
                    assembly = await self._begin(request.header)
                elif assembly is None:
                    raise invalid("data", "bytes without a header")
                else:
                    assembly.add(request.data)
                if assembly.missing == 0:
                    await window.take(assembly.size)
                    acks.put_nowait(asyncio.create_task(self._write(assembly, window)))
                    assembly = None
            if assembly is not None:
                raise invalid("data", f"the stream ended {assembly.missing} bytes early")
        finally:
            acks.put_nowait(None)

    async def _begin(self, header: pb.ChunkHeader) -> "_Assembly":
        if self.draining:
            raise ServiceError(UNAVAILABLE, "NOT_SERVING", "the service is shutting down")
        if (size := header.ByteSize()) > LARGEST_HEADER:
            text = f"a chunk with {size} bytes of text, token ids and the like; at most {LARGEST_HEADER} are taken"
            raise ServiceError(RESOURCE_EXHAUSTED, "TOO_LARGE", text, limit=LARGEST_HEADER, size=size)
        chunk = convert.chunk(header.chunk)
        bank = self._banks.admit(header.bank, header.reader_digest, header.embedder_digest, chunk)
        ids = self._banks.records.ids
        while (chunk_id := ids.take()) is None:
            await asyncio.shield(asyncio.wrap_future(ids.refill()))
        return _Assembly(bank, chunk_id, chunk, size)

    async def _write(self, assembly: "_Assembly", window: "_Window") -> pb.WriteChunksResponse:
        try:
            committed = await self._run(assembly.write, self._banks)
            # Shielded: what is submitted is committed, also when the caller went away.
            written = await asyncio.shield(asyncio.wrap_future(committed))
        finally:
            window.give(assembly.size)
        return _ack(written)

    # Reading

    @streaming
    async def Retrieve(self, request: pb.RetrieveRequest) -> AsyncIterator[pb.RetrieveResponse]:  # noqa: N802
        """All hits and descriptors, then verified bytes."""
        answer = await self._run(self._recall.retrieve, _query(request))
        header = pb.RetrieveHeader(
            store_id=self._banks.records.store_id,
            queries=[
                pb.QueryHits(hits=[pb.Hit(chunk_id=hit.chunk_id, score=hit.score) for hit in row])
                for row in answer.hits
            ],
            chunks=[convert.chunk_message(item.chunk) for item in answer.found],
            sent=[item.parts is not None for item in answer.found],
        )
        yield _sized(pb.RetrieveResponse(header=header), self._settings.max_message_bytes)
        for data in _frames(answer.found):
            yield pb.RetrieveResponse(data=data)

    @streaming
    async def FetchChunks(self, request: pb.FetchChunksRequest) -> AsyncIterator[pb.FetchChunksResponse]:  # noqa: N802
        """Chunks by id, in the order asked for."""
        ids, layers = list(request.chunk_ids), list(request.layers)
        found = await self._run(self._recall.fetch, request.bank, request.reader_digest, ids, layers)
        header = pb.FetchChunksHeader(
            store_id=self._banks.records.store_id, chunks=[convert.chunk_message(item.chunk) for item in found]
        )
        yield _sized(pb.FetchChunksResponse(header=header), self._settings.max_message_bytes)
        for data in _frames(found):
            yield pb.FetchChunksResponse(data=data)

    # Chunks

    @unary
    async def GetChunk(self, request: pb.GetChunkRequest) -> pb.GetChunkResponse:  # noqa: N802
        """Metadata of one chunk."""
        chunk = await self._run(
            lambda: self._banks.get_chunk(request.bank, request.chunk_id, embedding=request.with_embedding)
        )
        return pb.GetChunkResponse(chunk=convert.chunk_message(chunk))

    @unary
    async def ListChunks(self, request: pb.ListChunksRequest) -> pb.ListChunksResponse:  # noqa: N802
        """By id; the token is the last id of the page before. A page of large chunks is shorter than asked for."""
        size, after, budget = _page_size(request.page_size), _token(request.page_token, 0), FRAME_BYTES * 2
        chunks, more = await self._run(
            lambda: self._banks.list_chunks(request.bank, after, size, embedding=request.with_embedding, budget=budget)
        )
        token = str(chunks[-1].chunk_id) if more else ""
        return pb.ListChunksResponse(chunks=map(convert.chunk_message, chunks), next_page_token=token)

    @unary
    async def UpdateChunk(self, request: pb.UpdateChunkRequest) -> pb.UpdateChunkResponse:  # noqa: N802
        """Replace the metadata."""
        chunk = await self._run(self._banks.update_chunk, request.bank, request.chunk_id, dict(request.metadata))
        return pb.UpdateChunkResponse(chunk=convert.chunk_message(chunk))

    @unary
    async def DeleteChunks(self, request: pb.DeleteChunksRequest) -> pb.DeleteChunksResponse:  # noqa: N802
        """By id; unknown ids are fine."""
        deleted = await self._run(self._banks.delete_chunks, request.bank, list(request.chunk_ids))
        return pb.DeleteChunksResponse(deleted=deleted)

    # Evictions

    @unary
    async def ExplainEviction(self, request: pb.ExplainEvictionRequest) -> pb.ExplainEvictionResponse:  # noqa: N802
        """What would go next, and why."""
        if request.need < 0:
            raise invalid("need", "must not be negative")
        victims, text = await self._run(self._banks.explain_eviction, request.bank, request.need or 1)
        return pb.ExplainEvictionResponse(victims=map(convert.eviction_message, victims), explanation=text)

    @unary
    async def ListEvictions(self, request: pb.ListEvictionsRequest) -> pb.ListEvictionsResponse:  # noqa: N802
        """Newest first."""
        size, before = _page_size(request.page_size), _token(request.page_token, LARGEST_INT64)
        log = await self._run(self._banks.list_evictions, request.bank, before, size + 1)
        token = str(log[size - 1][0]) if len(log) > size else ""
        evictions = [convert.eviction_message(eviction) for _, eviction in log[:size]]
        return pb.ListEvictionsResponse(evictions=evictions, next_page_token=token)


_UPDATABLE = ("capacity", "policy", "metadata")


class _Assembly:
    """A chunk whose bytes are arriving."""

    def __init__(self, bank: Bank, chunk_id: int, chunk: Chunk, header_size: int) -> None:
        self._bank = bank
        self._chunk_id = chunk_id
        self._chunk = chunk
        # One buffer: frames of a byte each, kept as they come, would take fifty times their size.
        self._data = bytearray()
        self.missing = chunk.payload.length if chunk.payload else 0
        # What it takes of the window; with the header, because chunks without K-V are all header.
        self.size = header_size + self.missing

    def add(self, data: bytes) -> None:
        """Errors: INVALID_FIELD when it is more than the descriptor says."""
        if len(data) > self.missing:
            raise invalid("data", f"{len(data) - self.missing} bytes more than the tensors have")
        self._data += data
        self.missing -= len(data)

    def write(self, banks: Banks) -> Any:
        """In a storage thread."""
        data, self._data = self._data, bytearray()
        return banks.write(self._bank, self._chunk_id, self._chunk, data)


class _Window:
    """Bytes of a stream that are taken and not acknowledged; one chunk always passes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._freed = asyncio.Event()

    async def take(self, size: int) -> None:
        """Wait until `size` fits; the stream is not read meanwhile."""
        while self._taken and self._taken + size > self._limit:
            self._freed.clear()
            await self._freed.wait()
        self._taken += size

    def give(self, size: int) -> None:
        """They are acknowledged or refused."""
        self._taken -= size
        self._freed.set()


def _sized(message: T, limit: int) -> T:
    """Errors: TOO_LARGE for an answer that gRPC would refuse to send, without a reason."""
    if (size := message.ByteSize()) > limit:  # type: ignore[attr-defined]
        text = f"the answer, or its header, would have {size} bytes; ask for less at once"
        raise ServiceError(RESOURCE_EXHAUSTED, "TOO_LARGE", text, limit=limit, size=size)
    return message


def _ack(written: Written) -> pb.WriteChunksResponse:
    return pb.WriteChunksResponse(
        idempotency_key=written.key,
        chunk_id=written.chunk_id,
        replayed=written.replayed,
        gone=written.gone,
        evicted_chunk_ids=written.evicted,
    )


def _query(request: pb.RetrieveRequest) -> Query:
    return Query(
        banks=list(request.banks),
        reader_digest=request.reader_digest,
        embedder_digest=request.embedder_digest,
        vectors=request.queries,
        top_k=request.top_k or 8,
        min_score=request.min_score if request.HasField("min_score") else None,
        layers=list(request.layers),
        store_id=request.store_id,
        held={held.chunk_id: held.checksum for held in request.held},
        omit_payload=request.omit_payload,
        skip_count=request.skip_count,
        request_id=request.request_id,
    )


def _frames(found: Sequence[Found]) -> Iterator[bytes]:
    """Bytes of all chunks in order; no frame has bytes of two chunks."""
    for part in _parts(found):
        for begin in range(0, len(part), FRAME_BYTES):
            yield part[begin : begin + FRAME_BYTES]


def _parts(found: Iterable[Found]) -> Iterator[bytes]:
    for item in found:
        yield from item.parts or ()


def _page_size(size: int) -> int:
    if not 0 <= size <= 1000:
        raise invalid("page_size", "must be from 1 to 1000, or 0 for 100")
    return size or 100


def _token(token: str, first: int) -> int:
    if not token:
        return first
    # The length first: Python refuses to read a number of thousands of digits.
    if not (len(token) < 20 and token.isascii() and token.isdecimal() and int(token) <= LARGEST_INT64):
        raise invalid("page_token", "is not one that this service gave")
    return int(token)
