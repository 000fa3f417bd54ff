"""The asyncio client, with the names and signatures of `Client`; each method has the docstring of that one.

What would block the event loop goes through `kvbank._transport.loop`.
"""

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from types import EllipsisType, TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import numpy.typing as npt

from kvbank import _arguments
from kvbank import _models as m
from kvbank._calls import bank_messages, chunk_messages, reading, search_messages, state_messages
from kvbank._calls import metadata as _metadata
from kvbank._calls import tensors as _tensors
from kvbank._calls.answers import odd
from kvbank._calls.messages import build
from kvbank._calls.writing import WriteSession, takes_no_file
from kvbank._client import Client
from kvbank._exceptions import BankNotFound, ClientClosed, ClientForked, LoopMismatch, ServiceError
from kvbank._options import BankSettings, RetrieveOptions
from kvbank._targets import checked_address
from kvbank._transport import channel as _channel
from kvbank._transport import status
from kvbank._transport.base import AsyncTransport
from kvbank._transport.loop import SMALL_BYTES, Feed, apart, is_longer, to_its_end, wait
from kvbank._transport.over_grpc import AsyncGrpc, Grpc
from kvbank._transport.retrying import FIRST_CONTACT_S, Attempts, Contact
from kvbank._transport.same_host import SameHost
from kvbank._transport.sharing import Sharing
from kvbank._transport.write_stream import WriteStream
from kvbank.v1 import service_pb2 as pb
from kvbank.wire.scalars import Scalar

T = TypeVar("T")


class AsyncClient:
    """A connection to a memory service for asyncio, made by `kvbank.connect_async`.

    It is as `Client`, with coroutines, and asynchronous iterators for the lists. It belongs to the event loop of its
    first call, which it never blocks; tasks of that loop may share it, and in another loop every call raises
    `LoopMismatch`. In a forked process every call raises `ClientForked`.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float = _channel.DEFAULT_TIMEOUT,
        stream_timeout: float = _channel.DEFAULT_STREAM_TIMEOUT,
        options: Sequence[tuple[str, Any]] = (),
        mapped: bool = False,
        first_contact: float = FIRST_CONTACT_S,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Make a client of the server at `address`, "host:port" or "unix:PATH"; nothing is sent before the first call.

        timeout, and the others: see `kvbank.connect`. on_close: called when the client is closed.
        """
        self._address = checked_address("address", address)
        self._options = _channel.with_defaults(options)
        self._timeout = _arguments.seconds("timeout", timeout)
        self._stream_timeout = _arguments.seconds("stream_timeout", stream_timeout)
        self._on_close = on_close
        self._pid = os.getpid()
        self._closed = False
        self._bound = 0
        self._typed = False
        self._sharing = Sharing(address, _arguments.flag("mapped", mapped))
        self._contact = Contact(_arguments.seconds("first_contact", first_contact))
        self._loop: asyncio.AbstractEventLoop | None = None
        # Made in the loop to which it then belongs.
        self._transport: AsyncTransport | None = None
        # For writes, see `write_stream`.
        self._writing: Grpc | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._pid != os.getpid() or self._closed:
            return
        self._closed = True
        self._sharing.close()
        try:
            if self._transport is not None:
                await self._transport.close()
        finally:
            if self._writing is not None:
                await to_its_end(self._writing.close)
            if self._on_close is not None:
                await to_its_end(self._on_close)

    async def server_info(self, *, timeout: float | None = None) -> m.ServerInfo:
        return state_messages.server_info(await self._call("GetServerInfo", pb.GetServerInfoRequest(), timeout))

    async def stats(self, banks: Iterable[str] = (), *, timeout: float | None = None) -> m.Stats:
        requests = state_messages.stats_requests(banks)
        pages = [page for request in requests async for page in self._pages("GetStats", request, timeout)]
        return state_messages.stats(pages)

    async def compact(self, *, timeout: float | None = None) -> m.Compacted:
        return state_messages.compacted(await self._call("Compact", pb.CompactRequest(), timeout))

    # Banks

    async def create_bank(
        self,
        name: str,
        *,
        kv: m.KVSpec | None,
        embedding: m.EmbeddingSpec,
        exist_ok: bool = False,
        timeout: float | None = None,
        **settings: Unpack[BankSettings],
    ) -> m.Bank:
        _arguments.flag("exist_ok", exist_ok)
        request = bank_messages.create(name, kv, embedding, settings)
        attempts = self._attempts(timeout, self._timeout)
        await self._check_kept(request.bank, attempts)
        answer = await self._repeated("CreateBank", request, attempts)
        return bank_messages.read_created(answer, exist_ok or attempts.unsure)

    async def get_bank(self, name: str, *, timeout: float | None = None) -> m.Bank:
        return bank_messages.read((await self._call("GetBank", build(pb.GetBankRequest, name=name), timeout)).bank)

    async def list_banks(self, *, timeout: float | None = None) -> AsyncIterator[m.Bank]:
        async for page in self._pages("ListBanks", pb.ListBanksRequest(), timeout):
            for message in page.banks:
                yield bank_messages.read(message)

    async def update_bank(
        self,
        name: str,
        *,
        capacity: m.Capacity | EllipsisType | None = ...,
        policy: m.Policy | None = None,
        metadata: Mapping[str, Scalar] | None = None,
        quota: m.Quota | EllipsisType | None = ...,
        expiry: m.Expiry | EllipsisType | None = ...,
        index: m.IndexKind | None = None,
        timeout: float | None = None,
    ) -> m.Bank:
        request = bank_messages.update(
            name, capacity=capacity, policy=policy, metadata=metadata, quota=quota, expiry=expiry, index=index
        )
        await self._check_kept(request.bank, self._attempts(timeout, self._timeout))
        return bank_messages.read((await self._call("UpdateBank", request, timeout)).bank)

    async def delete_bank(self, name: str, missing_ok: bool = False, *, timeout: float | None = None) -> None:
        _arguments.flag("missing_ok", missing_ok)
        attempts = self._attempts(timeout, self._timeout)
        try:
            await self._repeated("DeleteBank", build(pb.DeleteBankRequest, name=name), attempts)
        except BankNotFound:
            if not missing_ok and not attempts.unsure:
                raise

    # Writing

    async def write(
        self, bank: str, chunk: m.NewChunk, *, reader_digest: str, embedder_digest: str, timeout: float | None = None
    ) -> m.WriteResult:
        results = await self.write_many(
            bank, [chunk], reader_digest=reader_digest, embedder_digest=embedder_digest, timeout=timeout
        )
        return results[0]

    async def write_many(
        self,
        bank: str,
        chunks: Iterable[m.NewChunk] | AsyncIterable[m.NewChunk],
        *,
        reader_digest: str,
        embedder_digest: str,
        timeout: float | None = None,
    ) -> list[m.WriteResult]:
        attempts = self._attempts(timeout, self._stream_timeout)
        await self._learn(attempts)
        folder = await self._shared(attempts)
        session = WriteSession(bank, (), reader_digest, embedder_digest, self._bound, self._typed)
        request_id = _channel.new_request_id()
        async with aclosing(Feed(session, chunks)) as feed:
            while await feed.more() or session.pending:
                attempts.progressed(session.waiting_since())
                try:
                    await self._write_stream(session, feed, folder, attempts, request_id)
                except ServiceError as error:
                    if folder is not None and takes_no_file(error):
                        self._sharing.doubted()
                        folder = None  # the rest goes over the stream
                        continue
                    attempts.progressed(session.waiting_since())
                    await asyncio.sleep(attempts.pause(error))
        return session.written()

    async def _learn(self, attempts: Attempts) -> None:
        """Ask the server, once, how much of a write may be unacknowledged, and which metadata it keeps."""
        self._check()
        if not self._bound:
            asked = self._sharing.question()
            info = await self._repeated("GetServerInfo", asked, attempts)
            self._bound = _channel.unacknowledged_bytes(info.max_unacknowledged_bytes)
            self._typed = info.typed_metadata
            if self._sharing.unknown():
                await asyncio.to_thread(self._sharing.learn, asked, info)

    async def _check_kept(self, message: Any, attempts: Attempts) -> None:
        """Check that the server keeps all metadata of a message. Errors: FailedPrecondition."""
        if message.typed_metadata:
            await self._learn(attempts)
            _metadata.check_kept(message, self._typed)

    async def _shared(self, attempts: Attempts) -> SameHost | None:
        """Return the data folder of the server, where it is on this machine and shared with this client; else None."""
        if self._sharing.unknown():
            asked = self._sharing.question()
            try:
                info = await self._repeated("GetServerInfo", asked, attempts)
                await asyncio.to_thread(self._sharing.learn, asked, info)
            except ServiceError:
                return None  # the call that follows will say it
        return self._sharing.path

    async def _write_stream(
        self, session: WriteSession, feed: Feed, folder: SameHost | None, attempts: Attempts, request_id: str
    ) -> None:
        """Write until the end of the chunks, or of the stream."""
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._translated(request_id):
            begin = partial(self._for_writes().write, request_id=request_id)
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

    # Reading

    async def retrieve(
        self,
        banks: str | Iterable[str],
        queries: npt.ArrayLike,
        *,
        top_k: int = 8,
        filter: m.Filter | None = None,
        reader_digest: str = "",
        embedder_digest: str = "",
        tensors: m.TensorKind = "numpy",
        timeout: float | None = None,
        **options: Unpack[RetrieveOptions],
    ) -> m.Retrieval:
        form = _tensors.form(tensors)
        made = partial(
            search_messages.retrieve,
            banks,
            queries,
            top_k=top_k,
            filter=filter,
            reader_digest=reader_digest,
            embedder_digest=embedder_digest,
            options=options,
        )
        held = getattr(options.get("held"), "checksums", ())
        request = await apart(is_longer(queries) or is_longer(held), made)
        attempts = self._attempts(timeout, self._stream_timeout)
        folder = None if request.omit_payload else await self._shared(attempts)
        return await self._run(reading.retrieval(request, folder, form), attempts, request.request_id.hex())

    async def fetch(
        self,
        bank: str,
        chunk_ids: Iterable[int],
        *,
        layers: Iterable[int] | None = None,
        reader_digest: str,
        tensors: m.TensorKind = "numpy",
        timeout: float | None = None,
    ) -> list[m.Chunk]:
        form = _tensors.form(tensors)
        request = search_messages.fetch(bank, chunk_ids, layers, reader_digest)
        attempts = self._attempts(timeout, self._stream_timeout)
        folder = await self._shared(attempts)
        return await self._run(reading.fetch(request, folder, form), attempts, _channel.new_request_id())

    # Chunks

    async def get_chunk(
        self, bank: str, chunk_id: int, with_embedding: bool = False, *, timeout: float | None = None
    ) -> m.Chunk:
        request = build(pb.GetChunkRequest, bank=bank, chunk_id=chunk_id, with_embedding=with_embedding)
        return chunk_messages.read((await self._call("GetChunk", request, timeout)).chunk)

    async def list_chunks(
        self,
        bank: str,
        with_embedding: bool = False,
        *,
        filter: m.Filter | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[m.Chunk]:
        request = search_messages.list_chunks(bank, with_embedding, filter)
        async for page in self._pages("ListChunks", request, timeout):
            for message in page.chunks:
                yield chunk_messages.read(message)

    async def update_chunk(
        self, bank: str, chunk_id: int, metadata: Mapping[str, Scalar], *, timeout: float | None = None
    ) -> m.Chunk:
        request = chunk_messages.update(bank, chunk_id, metadata)
        await self._check_kept(request, self._attempts(timeout, self._timeout))
        return chunk_messages.read((await self._call("UpdateChunk", request, timeout)).chunk)

    async def delete_chunks(self, bank: str, chunk_ids: Iterable[int], *, timeout: float | None = None) -> int:
        request = build(pb.DeleteChunksRequest, bank=bank, chunk_ids=chunk_ids)
        return int((await self._call("DeleteChunks", request, timeout)).deleted)

    async def pin_chunks(
        self, bank: str, chunk_ids: Iterable[int], pinned: bool = True, *, timeout: float | None = None
    ) -> int:
        request = build(pb.PinChunksRequest, bank=bank, chunk_ids=chunk_ids, pinned=pinned)
        return int((await self._call("PinChunks", request, timeout)).found)

    # Eviction

    async def explain_eviction(self, bank: str, need: int = 1, *, timeout: float | None = None) -> m.EvictionPlan:
        request = build(pb.ExplainEvictionRequest, bank=bank, need=need)
        return state_messages.eviction_plan(await self._call("ExplainEviction", request, timeout))

    async def list_evictions(self, bank: str, *, timeout: float | None = None) -> AsyncIterator[m.Eviction]:
        async for page in self._pages("ListEvictions", build(pb.ListEvictionsRequest, bank=bank), timeout):
            for message in page.evictions:
                yield state_messages.eviction(message)

    # How a request travels

    def _attempts(self, timeout: float | None, default: float) -> Attempts:
        """Return the attempts of one call. A caller who says how long it may take says so for a server that was never
        reached, too."""
        if timeout is None:
            return Attempts(default, self._contact)
        return Attempts(_arguments.seconds("timeout", timeout))

    async def _call(self, method: str, request: Any, timeout: float | None) -> Any:
        return await self._repeated(method, request, self._attempts(timeout, self._timeout))

    async def _repeated(self, method: str, request: Any, attempts: Attempts) -> Any:
        request_id = _channel.new_request_id()
        while True:
            try:
                with self._translated(request_id) as transport:
                    return await transport.unary(method, request, attempts.remaining(), request_id)
            except ServiceError as error:
                await asyncio.sleep(attempts.pause(error))

    async def _pages(self, method: str, request: Any, timeout: float | None) -> AsyncIterator[Any]:
        for _ in range(_channel.MOST_PAGES[method]):
            page = await self._call(method, request, timeout)
            yield page
            if not page.next_page_token:
                return
            if page.next_page_token == request.page_token:
                raise odd("the page after this one is this one")
            request.page_token = page.next_page_token
        raise odd(f"it has more than {_channel.MOST_PAGES[method]} pages")

    async def _run(self, steps: reading.Steps[T], attempts: Attempts, request_id: str) -> T:
        """Make the calls that `steps` ask for, and return what they return."""
        run = reading.Run(steps)
        call = run.begin()
        while call is not None:
            try:
                answer = await self._read(call, attempts, request_id)
            except ServiceError as error:
                self._sharing.failed(call, error)
                call = run.failed(error)
            else:
                if call.folder is not None:
                    await asyncio.to_thread(call.folder.fill, answer)
                many = is_longer(answer.header.chunks)
                call = await apart(many, partial(run.answered, answer))
        return run.result

    async def _read(self, call: reading.Call, attempts: Attempts, request_id: str) -> reading.Answer:
        """Make a call, and read its answer to the end; where it breaks, make it again."""
        while True:
            try:
                return await self._read_once(call, attempts.remaining(), request_id)
            except ServiceError as error:
                await asyncio.sleep(attempts.pause(error))

    async def _read_once(self, call: reading.Call, timeout: float, request_id: str) -> reading.Answer:
        answer, received = reading.Answer(), 0
        with self._translated(request_id) as transport:
            if call.folder is not None:
                answer.feed(await transport.unary(call.method, call.request, timeout, request_id))
            else:
                async with aclosing(transport.stream(call.method, call.request, timeout, request_id)) as frames:
                    async for frame in frames:
                        received += len(frame) if isinstance(frame, memoryview) else 0
                        await apart(received > SMALL_BYTES, partial(answer.feed, frame))
            answer.finish()
        return answer

    def _check(self) -> AsyncTransport:
        """Return the transport for a call. Errors, where none may be made: ClientForked, ClientClosed, LoopMismatch."""
        if self._pid != os.getpid():
            raise ClientForked("this client belongs to the parent process; call kvbank.connect_async() after the fork")
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._transport is None:
            self._loop = asyncio.get_running_loop()
            self._transport = AsyncGrpc(self._address, self._options)
        if self._loop is not asyncio.get_running_loop():
            raise LoopMismatch("this client belongs to another event loop; call kvbank.connect_async() in this one")
        return self._transport

    def _for_writes(self) -> Grpc:
        if self._writing is None:
            self._writing = Grpc(self._address, self._options)
        return self._writing

    @contextmanager
    def _translated(self, request_id: str) -> Iterator[AsyncTransport]:
        """Give the transport, and turn errors of gRPC into errors of this package.

        gRPC cancels the calls of a channel that is closed, as if their task had been cancelled.
        """
        transport = self._check()
        try:
            yield transport
            self._contact.made = True
        except (grpc.RpcError, ValueError, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):
                raise ClientClosed("the client was closed during the call") from None
            if isinstance(error, grpc.RpcError):
                raise status.from_rpc_error(error, request_id) from None
            raise
        except ServiceError as error:
            error.request_id = error.request_id or request_id
            raise


for _name, _method in vars(AsyncClient).items():
    if not _name.startswith("_"):
        _method.__doc__ = getattr(Client, _name).__doc__
