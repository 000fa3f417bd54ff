"""The RPCs: messages in, calls of the domain, messages out. All of it in storage threads, the making of the answer's
bytes too, so that the event loop, which everybody waits for, only passes bytes on."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager, nullcontext
from functools import cache, partial, wraps
from inspect import isasyncgenfunction
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from kvbank.v1 import service_pb2 as pb
from kvbank.v1 import service_pb2_grpc
from kvbank.wire import frames as _frames
from memory_service import __version__
from memory_service.api import calls, convert, scalars
from memory_service.api.answer_header import ORDINARY_BYTES, Headers
from memory_service.api.budget import Budget
from memory_service.api.decoding import LARGEST_REQUEST, SHORT, HeldRequests, Received, frames, receiver
from memory_service.api.receiving import Receiver
from memory_service.api.same_host import SameHost
from memory_service.api.sending import Sender
from memory_service.api.stats import Stats
from memory_service.api.status import check_size, serialized, to_service_error, without_frames
from memory_service.api.threads import StorageThreads
from memory_service.domain.errors import ServiceError, invalid
from memory_service.domain.validate import LARGEST_INT64
from memory_service.observe import request as requests
from memory_service.observe.metrics import Metrics
from memory_service.operations.banks import Banks
from memory_service.operations.reading import Answer, Found, Opened, Query, Recall, Retrieval, close, opened
from memory_service.settings import Settings
from memory_service.storage.local.files import objects

T = TypeVar("T")
Context = Any


def unary(method: Callable[[Any, Any], Message]) -> Callable[..., Awaitable[bytes]]:
    """Make a method that is short and blocks a call that runs it in a storage thread, and answers in bytes."""

    def answer(self: Any, received: Received) -> bytes:
        return serialized(method(self, _message(received)), self._settings.max_message_bytes)

    @wraps(method)
    async def call(self: Any, received: Received) -> bytes:
        async with self._threads.turn(method.__name__, short=True) as turn:
            answered: bytes = await turn.run(answer, self, received)
        return answered

    return refusing(call)


def wide(method: Callable[[Any, Any], Message]) -> Callable[..., AsyncIterator[bytes]]:
    """Make a method that looks at many chunks or banks, or whose answer may be long, a call with one answer. A long
    answer holds a share of the budget until it is sent; while it waits for that it keeps its turn, so that few of a
    kind wait.
    """

    def answer(self: Any, received: Received) -> bytes:
        return serialized(method(self, _message(received)), self._settings.max_message_bytes)

    @wraps(method)
    async def call(self: Any, received: Received) -> AsyncIterator[bytes]:
        async with AsyncExitStack() as held:
            async with self._threads.turn(method.__name__) as turn:
                answered = await turn.run(answer, self, received)
                if len(answered) > ORDINARY_BYTES:
                    await held.enter_async_context(self._headers.share(len(answered)))
            yield answered

    return streaming(call)


def refusing(method: Callable[[Any, Received], Awaitable[bytes]]) -> Callable[..., Awaitable[bytes]]:
    """End the call with a status that carries the reason, whatever is raised."""

    @wraps(method)
    async def call(self: Any, received: Received, context: Context) -> bytes:
        try:
            with self._held.of(received):
                return await method(self, received)
        except Exception as error:
            _refuse(context, error)
        return b""  # not sent

    return call


def streaming(method: Callable[..., AsyncIterator[T]]) -> Callable[..., AsyncIterator[T]]:
    """Do as `refusing` for a method that answers a request, or a stream of them, with a stream."""

    @wraps(method)
    async def call(self: Any, received: Any, context: Context) -> AsyncIterator[T]:
        try:
            with self._held.of(received) if isinstance(received, Received) else nullcontext():
                async for message in method(self, received):
                    yield message
        except Exception as error:
            _refuse(context, error)

    return call


def _refuse(context: Context, error: Exception) -> None:
    """Say how a call ends that has raised an error."""
    calls.refuse(context, to_service_error(error))
    without_frames(error)


def _message(received: Received) -> Any:
    """Make the message of a request. Errors: TOO_LARGE, INVALID_FIELD."""
    message = received.message()
    if request := requests.current():
        request.of(message)
    return message


class MemoryService(service_pb2_grpc.MemoryServiceServicer):
    """kvbank.v1.MemoryService."""

    def __init__(
        self,
        banks: Banks,
        settings: Settings,
        threads: StorageThreads,
        stats: Stats,
        metrics: Metrics,
        same_host: SameHost | None,
    ) -> None:
        """same_host: where clients may read payload files and stage their own; None where they may not."""
        limit = settings.max_inflight_bytes
        self._banks = banks
        self._stats = stats
        self._recall = Recall(banks, settings.max_answer_bytes)
        self._settings = settings
        self._threads = threads
        self._same_host = same_host
        window = settings.max_unacknowledged_bytes
        self._receiver = Receiver(banks, threads.pool, Budget(limit), window, same_host, metrics)
        # A budget of their own: bytes of ordinary answers do not queue behind large headers.
        self._headers = Headers(threads, Budget(limit), settings.max_message_bytes)
        self._sender = Sender(self._recall, threads.pool, Budget(limit), metrics)
        self._held = HeldRequests(limit)
        self._sent_as_files = metrics.sent_bytes.labels("file")

    def drain(self) -> None:
        """Let open streams finish the chunks that they began, and begin no other."""
        self._receiver.draining = True

    # Server and banks

    @refusing
    async def GetServerInfo(self, received: Received) -> bytes:  # noqa: N802
        """Version, identity, limits; also when all storage threads are busy."""
        asked: pb.GetServerInfoRequest = received.message()
        info = pb.GetServerInfoResponse(
            version=__version__,
            store_id=self._banks.records.store_id,
            durability=self._settings.durability,
            max_message_bytes=self._settings.max_message_bytes,
            max_chunk_bytes=self._settings.max_chunk_bytes,
            max_unacknowledged_bytes=self._settings.max_unacknowledged_bytes,
            typed_metadata=True,
            same_host=None if self._same_host is None else self._same_host.message(asked.challenge),
        )
        return info.SerializeToString()

    @unary
    def CreateBank(self, request: pb.CreateBankRequest) -> pb.CreateBankResponse:  # noqa: N802
        """An existing bank of the same name and specs is returned as it is."""
        bank, created = self._banks.create(convert.bank(request.bank))
        return pb.CreateBankResponse(bank=convert.bank_message(bank), created=created)

    @unary
    def GetBank(self, request: pb.GetBankRequest) -> pb.GetBankResponse:  # noqa: N802
        """One bank."""
        return pb.GetBankResponse(bank=convert.bank_message(self._banks.get(request.name)))

    @wide
    def ListBanks(self, request: pb.ListBanksRequest) -> pb.ListBanksResponse:  # noqa: N802
        """By name; the token is the last name of the page before. A page of large banks is shorter than asked for."""
        banks, more = self._banks.after(request.page_token, _page_size(request.page_size))
        token = banks[-1].name if more else ""
        return pb.ListBanksResponse(banks=map(convert.bank_message, banks), next_page_token=token)

    @unary
    def UpdateBank(self, request: pb.UpdateBankRequest) -> pb.UpdateBankResponse:  # noqa: N802
        """Capacity, policy, metadata; those that the mask names."""
        new = convert.bank(request.bank)
        changes = {path: getattr(new, path) for path in request.update_mask.paths if path in _UPDATABLE}
        if not changes or len(changes) != len(request.update_mask.paths):
            raise invalid("update_mask", f"must name some of {', '.join(_UPDATABLE)}, each once")
        bank = self._banks.update(new.name, changes)
        return pb.UpdateBankResponse(bank=convert.bank_message(bank))

    @unary
    def DeleteBank(self, request: pb.DeleteBankRequest) -> pb.DeleteBankResponse:  # noqa: N802
        """The bank with all its chunks."""
        self._banks.delete(request.name)
        return pb.DeleteBankResponse()

    # Writing

    @streaming
    async def WriteChunks(self, requests: AsyncIterator[Received]) -> AsyncIterator[pb.WriteChunksResponse]:  # noqa: N802
        """Chunks are written side by side; acks come in order."""
        async for ack in self._receiver.acks(frames(requests, self._threads.run)):
            yield ack

    # Reading

    @streaming
    async def Retrieve(self, received: Received) -> AsyncIterator[bytes]:  # noqa: N802
        """All hits and descriptors, then verified bytes."""
        async for message in self._answer("Retrieve", self._retrieved(received)):
            yield message

    @streaming
    async def FetchChunks(self, received: Received) -> AsyncIterator[bytes]:  # noqa: N802
        """Chunks by id, in the order asked for."""
        async for message in self._answer("FetchChunks", partial(self._fetched, received)):
            yield message

    async def _answer(self, kind: str, make: Callable[[int], tuple[bytes, list[Opened]]]) -> AsyncIterator[bytes]:
        """Yield the header, then the bytes of K-V, and close their files.

        kind, make: see `Headers.made`; `make` also returns the files.
        """
        found: list[Opened] = []
        try:
            async with self._headers.made(kind, make) as (header, found):
                yield header
            del header  # what follows may take long
            # Closed first, also where the caller goes: a thread may still be reading the files.
            async with aclosing(self._sender.frames(found)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            close(found)

    def _retrieved(self, received: Received) -> Callable[[int], tuple[bytes, list[Opened]]]:
        begun = cache(lambda: self._recall.retrieval(_query(_message(received))))

        def make(most_header: int) -> tuple[bytes, list[Opened]]:
            answer = self._recall.answer(begun(), most_header)
            try:
                header = self._hits(answer)
                self._recall.count(begun().query, answer)
                return header, opened(answer.found)
            except BaseException:
                close(answer.found)
                raise

        return make

    def _fetched(self, received: Received, most_header: int) -> tuple[bytes, list[Opened]]:
        found = self._fetch(_message(received), most_header)
        try:
            return self._chunks(found), opened(found)
        except BaseException:
            close(found)
            raise

    @streaming
    async def RetrieveFiles(self, received: Received) -> AsyncIterator[bytes]:  # noqa: N802
        """As Retrieve, with the names of the files, in one message."""
        async with self._headers.made("Retrieve", self._retrieved_files(partial(_message, received))) as answer:
            yield answer

    @streaming
    async def FetchFiles(self, received: Received) -> AsyncIterator[bytes]:  # noqa: N802
        """As FetchChunks, with the names of the files, in one message."""
        make = partial(self._fetched_files, partial(_message, received))
        async with self._headers.made("FetchChunks", make) as answer:
            yield answer

    @contextmanager
    def retrieve_files(self, request: pb.RetrieveFilesRequest) -> Iterator[bytes]:
        """As RetrieveFiles, for a caller who has a thread of his own; the answer is sent in the block."""
        with self._headers.made_here(self._retrieved_files(lambda: request)) as answer:
            yield answer

    @contextmanager
    def fetch_files(self, request: pb.FetchFilesRequest) -> Iterator[bytes]:
        """As FetchFiles, for a caller who has a thread of his own; the answer is sent in the block."""
        with self._headers.made_here(partial(self._fetched_files, lambda: request)) as answer:
            yield answer

    def _retrieved_files(self, message: Callable[[], pb.RetrieveFilesRequest]) -> Callable[[int], bytes]:
        def begin() -> Retrieval:
            asked = message()
            self._check_shares(asked.proof)
            return self._recall.retrieval(_query(asked.retrieve))

        begun = cache(begin)

        def make(most_header: int) -> bytes:
            answer = self._recall.answer(begun(), most_header, opened=False)
            made = self._hits(answer, pb.RetrieveFilesResponse(files=_files(answer.found)))
            self._recall.count(begun().query, answer)
            self._sent_as_files.inc(sum(item.length for item in answer.found))
            return made

        return make

    def _fetched_files(self, message: Callable[[], pb.FetchFilesRequest], most_header: int) -> bytes:
        asked = message()
        self._check_shares(asked.proof)
        found = self._fetch(asked.fetch, most_header, opened=False)
        made = self._chunks(found, pb.FetchFilesResponse(files=_files(found)))
        self._sent_as_files.inc(sum(item.length for item in found))
        return made

    def _check_shares(self, proof: bytes) -> None:
        """Refuse a caller who may not read the files himself. Errors: NOT_SAME_HOST."""
        if self._same_host is None or not self._same_host.proven(proof):
            text = "this server shares its files with nobody who has not read its nonce"
            raise ServiceError("NOT_SAME_HOST", text)

    def _fetch(self, request: pb.FetchChunksRequest, most_header: int, *, opened: bool = True) -> list[Found]:
        ids, layers = list(request.chunk_ids), list(request.layers)
        return self._recall.fetch(request.bank, request.reader_digest, ids, layers, most_header, opened=opened)

    def _hits(self, answer: Answer, files: Message | None = None) -> bytes:
        head = pb.RetrieveHeader(
            store_id=self._banks.records.store_id,
            queries=[
                pb.QueryHits(hits=[pb.Hit(chunk_id=hit.chunk_id, score=hit.score) for hit in row])
                for row in answer.hits
            ],
            sent=[item.sent for item in answer.found],
        )
        return header_bytes(head, answer.found, files, self._settings.max_message_bytes)

    def _chunks(self, found: Sequence[Found], files: Message | None = None) -> bytes:
        head = pb.FetchChunksHeader(store_id=self._banks.records.store_id)
        return header_bytes(head, found, files, self._settings.max_message_bytes)

    # Chunks

    @wide
    def GetChunk(self, request: pb.GetChunkRequest) -> pb.GetChunkResponse:  # noqa: N802
        """Metadata of one chunk."""
        chunk = self._banks.get_chunk(request.bank, request.chunk_id, embedding=request.with_embedding)
        return pb.GetChunkResponse(chunk=convert.chunk_message(chunk))

    @wide
    def ListChunks(self, request: pb.ListChunksRequest) -> pb.ListChunksResponse:  # noqa: N802
        """By id; the token is the last id of the page before. A page of large chunks is shorter than asked for."""
        size, after = _page_size(request.page_size), _token(request.page_token, 0)
        where = convert.filter_(request.filter)
        chunks, more = self._banks.list_chunks(request.bank, after, size, where, embedding=request.with_embedding)
        token = str(chunks[-1].chunk_id) if more else ""
        return pb.ListChunksResponse(chunks=map(convert.chunk_message, chunks), next_page_token=token)

    @wide
    def UpdateChunk(self, request: pb.UpdateChunkRequest) -> pb.UpdateChunkResponse:  # noqa: N802
        """Replace the metadata."""
        chunk = self._banks.update_chunk(request.bank, request.chunk_id, scalars.metadata("metadata", request))
        return pb.UpdateChunkResponse(chunk=convert.chunk_message(chunk))

    @unary
    def DeleteChunks(self, request: pb.DeleteChunksRequest) -> pb.DeleteChunksResponse:  # noqa: N802
        """By id; unknown ids are fine."""
        deleted = self._banks.delete_chunks(request.bank, list(request.chunk_ids))
        return pb.DeleteChunksResponse(deleted=deleted)

    @unary
    def PinChunks(self, request: pb.PinChunksRequest) -> pb.PinChunksResponse:  # noqa: N802
        """By id; unknown ids are fine."""
        found = self._banks.pin_chunks(request.bank, list(request.chunk_ids), request.pinned)
        return pb.PinChunksResponse(found=found)

    # Evictions

    @wide
    def ExplainEviction(self, request: pb.ExplainEvictionRequest) -> pb.ExplainEvictionResponse:  # noqa: N802
        """What would go next, and why."""
        if request.need < 0:
            raise invalid("need", "must not be negative")
        victims, text = self._banks.explain_eviction(request.bank, request.need or 1)
        return pb.ExplainEvictionResponse(victims=map(convert.eviction_message, victims), explanation=text)

    @wide
    def ListEvictions(self, request: pb.ListEvictionsRequest) -> pb.ListEvictionsResponse:  # noqa: N802
        """Newest first; a page is as those of ListChunks."""
        size, before = _page_size(request.page_size), _token(request.page_token, LARGEST_INT64)
        log, more = self._banks.list_evictions(request.bank, before, size)
        token = str(log[-1][0]) if more else ""
        evictions = [convert.eviction_message(eviction) for _, eviction in log]
        return pb.ListEvictionsResponse(evictions=evictions, next_page_token=token)

    # The service itself

    @wide
    def GetStats(self, request: pb.GetStatsRequest) -> pb.GetStatsResponse:  # noqa: N802
        """As of now, of some banks or all."""
        if request.banks:
            return self._stats.of_banks(list(request.banks))
        return self._stats.page(request.page_token, _page_size(request.page_size, 1000))

    @wide
    def Compact(self, _: pb.CompactRequest) -> pb.CompactResponse:  # noqa: N802
        """Give back what is free in the database."""
        before = self._banks.vacuum.sizes().taken
        self._banks.vacuum.give_back()
        return pb.CompactResponse(database_bytes_before=before, database_bytes=self._banks.vacuum.sizes().taken)


def header_bytes(head: Message, found: Sequence[Found], files: Message | None, limit: int) -> bytes:
    """Serialize an answer whose `header` is `head` with the chunks, and which has the `files` too. It is made a chunk
    at a time: a message of all chunks would be copied several times, and each time nobody else could run. Errors:
    TOO_LARGE."""
    field = head.DESCRIPTOR.fields_by_name["chunks"].number
    parts = [head.SerializeToString()]
    for item in found:
        chunk = convert.chunk_message(item.chunk).SerializeToString()
        parts += (_frames.prefix(field, len(chunk)), chunk)
    end = b"" if files is None else files.SerializeToString()
    size = sum(map(len, parts))
    check_size(size + len(end), limit)
    return b"".join((_frames.prefix(_HEADER, size), *parts, end))


# The number of this field in every answer that has a header.
_HEADER = pb.RetrieveResponse.HEADER_FIELD_NUMBER
_UPDATABLE = ("capacity", "policy", "metadata", "quota", "expiry", "index")


def handlers(service: MemoryService, most_bytes: int) -> dict[str, Any]:
    """Make gRPC's handlers, which get requests and give answers as bytes.

    most_bytes: the bytes of a message with vectors or tensors.

    A method whose one answer waits to be sent is a stream of one, which is the same on the wire.
    """
    made = {}
    # A header of WriteChunks has one vector, and its tensors come as frames of data, which are not decoded.
    largest = {"Retrieve": most_bytes, "RetrieveFiles": most_bytes, "GetServerInfo": SHORT}
    for method in pb.DESCRIPTOR.services_by_name["MemoryService"].methods:
        call = getattr(service, method.name)
        handler = _HANDLERS[method.client_streaming, isasyncgenfunction(call)]
        reads = receiver(method.input_type, largest.get(method.name, LARGEST_REQUEST))
        made[method.name] = handler(call, reads, _frames.serializer)
    return made


_HANDLERS: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _files(found: Sequence[Found]) -> list[str]:
    return [objects.name(item.bank.uid, item.chunk.chunk_id) if item.sent else "" for item in found]


def _query(request: pb.RetrieveRequest) -> Query:
    return Query(
        banks=list(request.banks),
        reader_digest=request.reader_digest,
        embedder_digest=request.embedder_digest,
        vectors=request.queries,
        dimension=request.dimension,
        top_k=request.top_k or 8,
        min_score=request.min_score if request.HasField("min_score") else None,
        layers=list(request.layers),
        store_id=request.store_id,
        held={held.chunk_id: held.checksum for held in request.held},
        omit_payload=request.omit_payload,
        skip_count=request.skip_count,
        request_id=request.request_id,
        filter=convert.filter_(request.filter) if request.HasField("filter") else None,
    )


def _page_size(size: int, default: int = 100) -> int:
    if not 0 <= size <= 1000:
        raise invalid("page_size", f"must be from 1 to 1000, or 0 for {default}")
    return size or default


def _token(token: str, first: int) -> int:
    if not token:
        return first
    # The length first: Python refuses to read a number of thousands of digits.
    if not (len(token) < 20 and token.isascii() and token.isdecimal() and int(token) <= LARGEST_INT64):
        raise invalid("page_token", "is not one that this service gave")
    return int(token)
