"""The asyncio client: the calls of `_codec` over a `grpc.aio.Channel`. Same names and signatures as `Client`."""

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import EllipsisType, TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio
import numpy.typing as npt

from kvbank import _arguments
from kvbank import _models as m
from kvbank._calls import codec, reading
from kvbank._calls import metadata as _metadata
from kvbank._calls import tensors as _tensors
from kvbank._calls.answers import odd
from kvbank._calls.messages import build
from kvbank._calls.writing import WriteSession
from kvbank._client import Client
from kvbank._exceptions import BankNotFound, ClientClosed, ClientForked, LoopMismatch, ServiceError
from kvbank._targets import checked_address
from kvbank._transport import channel as _channel
from kvbank._transport import status
from kvbank._transport.retrying import FIRST_CONTACT_S, Attempts, Contact
from kvbank._transport.same_host import SameHost, Sharing
from kvbank._transport.write_stream import WriteStream
from kvbank.v1 import service_pb2 as pb
from kvbank.wire import addresses
from kvbank.wire.scalars import Scalar
from kvbank.wire.stub import make_stub

T = TypeVar("T")
# What comes after the last chunk; None could be one that a caller gives by mistake.
_END = object()


class AsyncClient:
    """A connection to a memory service for asyncio, made by `kvbank.connect_async`.

    As `Client`, with coroutines, and asynchronous iterators for the lists. It belongs to the event loop of its first
    call; tasks of that loop may share it, and in another one every call raises `LoopMismatch`. A fork may not: in the
    child every call raises `ClientForked`.
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
        """address: "host:port" or "unix:path". options: gRPC channel arguments, after (and over) our own.

        mapped, first_contact: see `kvbank.connect`.
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
        self._channel: Any = None
        self._stub: Any = None
        self._write_channel: Any = None

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
            if self._channel is not None:
                await self._channel.close()
        finally:
            if self._write_channel is not None:
                self._write_channel.close()
            if self._on_close is not None:
                await _to_its_end(self._on_close)

    async def server_info(self, *, timeout: float | None = None) -> m.ServerInfo:
        return codec.server_info(await self._call("GetServerInfo", pb.GetServerInfoRequest(), timeout))

    async def stats(self, banks: Iterable[str] = (), *, timeout: float | None = None) -> m.Stats:
        requests = codec.stats_requests(banks)
        return codec.stats([page for request in requests async for page in self._pages("GetStats", request, timeout)])

    async def compact(self, *, timeout: float | None = None) -> m.Compacted:
        return codec.compacted(await self._call("Compact", pb.CompactRequest(), timeout))

    # Banks

    async def create_bank(
        self,
        name: str,
        *,
        kv: m.KVSpec | None,
        embedding: m.EmbeddingSpec,
        capacity: m.Capacity | None = None,
        policy: m.Policy | None = None,
        metadata: Mapping[str, Scalar] = {},
        quota: m.Quota | None = None,
        expiry: m.Expiry | None = None,
        index: m.IndexKind = "auto",
        exist_ok: bool = False,
        timeout: float | None = None,
    ) -> m.Bank:
        _arguments.flag("exist_ok", exist_ok)
        request = codec.create_bank(name, kv, embedding, capacity, policy, metadata, quota, expiry, index)
        attempts = self._attempts(timeout, self._timeout)
        await self._check_kept(request.bank, attempts)
        answer = await self._repeated("CreateBank", request, attempts)
        return codec.created_bank(answer, exist_ok or attempts.unsure)

    async def get_bank(self, name: str, *, timeout: float | None = None) -> m.Bank:
        return codec.bank((await self._call("GetBank", build(pb.GetBankRequest, name=name), timeout)).bank)

    async def list_banks(self, *, timeout: float | None = None) -> AsyncIterator[m.Bank]:
        async for page in self._pages("ListBanks", pb.ListBanksRequest(), timeout):
            for message in page.banks:
                yield codec.bank(message)

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
        request = codec.update_bank(name, capacity, policy, metadata, quota, expiry, index)
        await self._check_kept(request.bank, self._attempts(timeout, self._timeout))
        return codec.bank((await self._call("UpdateBank", request, timeout)).bank)

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
        path = await self._shared(attempts)
        session = WriteSession(bank, (), reader_digest, embedder_digest, self._bound, path, self._typed)
        request_id, source = _channel.new_request_id(), _each(chunks)
        while await _more(session, source) or session.pending:
            attempts.progressed(session.waiting_since())
            try:
                await self._write_stream(session, source, attempts, request_id)
            except ServiceError as error:
                if session.refused(error):
                    self._sharing.doubted()
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
                self._sharing.learn(asked, info)

    async def _check_kept(self, message: Any, attempts: Attempts) -> None:
        """Check that the server keeps all metadata of a message. Errors: FailedPrecondition."""
        if message.typed_metadata:
            await self._learn(attempts)
            _metadata.check_kept(message, self._typed)

    async def _shared(self, attempts: Attempts) -> SameHost | None:
        """How to reach the server's files, where they are on this machine and it allows that."""
        if self._sharing.unknown():
            asked = self._sharing.question()
            try:
                self._sharing.learn(asked, await self._repeated("GetServerInfo", asked, attempts))
            except ServiceError:
                return None  # the call that follows will say it
        return self._sharing.path

    async def _write_stream(
        self, session: WriteSession, source: AsyncIterator[m.NewChunk], attempts: Attempts, request_id: str
    ) -> None:
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._translated(request_id):
            method = partial(self._write_stub().WriteChunks, metadata=_channel.metadata(request_id))
            stream = WriteStream(method, session, attempts, on_change=wake)
            try:
                while await _more(session, source):
                    await _wait(changed, stream.ready, stream.patience)
                    if stream.ended:
                        break
                    stream.send()
                stream.half_close()
                await _wait(changed, stream.done, stream.patience)
                stream.check()
            finally:
                await _to_its_end(stream.cancel)

    # Reading

    async def retrieve(
        self,
        banks: str | Iterable[str],
        queries: npt.ArrayLike,
        *,
        top_k: int = 8,
        min_score: float | None = None,
        filter: m.Filter | None = None,
        layers: Iterable[int] | None = None,
        held: m.Held | None = None,
        payload: bool = True,
        count: bool = True,
        reader_digest: str = "",
        embedder_digest: str = "",
        tensors: m.TensorKind = "numpy",
        timeout: float | None = None,
    ) -> m.Retrieval:
        form = _tensors.form(tensors)
        request = codec.retrieve(
            banks,
            queries,
            top_k=top_k,
            min_score=min_score,
            layers=layers,
            held=held,
            payload=payload,
            count=count,
            reader_digest=reader_digest,
            embedder_digest=embedder_digest,
            filter=filter,
        )
        attempts = self._attempts(timeout, self._stream_timeout)
        if payload:
            await self._shared(attempts)
        return await self._run(reading.retrieval(request, self._sharing, form), attempts, request.request_id.hex())

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
        request = codec.fetch(bank, chunk_ids, layers, reader_digest)
        attempts = self._attempts(timeout, self._stream_timeout)
        await self._shared(attempts)
        return await self._run(reading.fetch(request, self._sharing, form), attempts, _channel.new_request_id())

    # Chunks

    async def get_chunk(
        self, bank: str, chunk_id: int, with_embedding: bool = False, *, timeout: float | None = None
    ) -> m.Chunk:
        request = build(pb.GetChunkRequest, bank=bank, chunk_id=chunk_id, with_embedding=with_embedding)
        return codec.chunk((await self._call("GetChunk", request, timeout)).chunk)

    async def list_chunks(
        self,
        bank: str,
        with_embedding: bool = False,
        *,
        filter: m.Filter | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[m.Chunk]:
        request = codec.list_chunks(bank, with_embedding, filter)
        async for page in self._pages("ListChunks", request, timeout):
            for message in page.chunks:
                yield codec.chunk(message)

    async def update_chunk(
        self, bank: str, chunk_id: int, metadata: Mapping[str, Scalar], *, timeout: float | None = None
    ) -> m.Chunk:
        request = codec.update_chunk(bank, chunk_id, metadata)
        await self._check_kept(request, self._attempts(timeout, self._timeout))
        return codec.chunk((await self._call("UpdateChunk", request, timeout)).chunk)

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
        return codec.eviction_plan(await self._call("ExplainEviction", request, timeout))

    async def list_evictions(self, bank: str, *, timeout: float | None = None) -> AsyncIterator[m.Eviction]:
        async for page in self._pages("ListEvictions", build(pb.ListEvictionsRequest, bank=bank), timeout):
            for message in page.evictions:
                yield codec.eviction(message)

    # How a request travels

    def _attempts(self, timeout: float | None, default: float) -> Attempts:
        """Of one call; who says how long it may take says so also for a server that was never reached."""
        if timeout is None:
            return Attempts(default, self._contact)
        return Attempts(_arguments.seconds("timeout", timeout))

    async def _call(self, method: str, request: Any, timeout: float | None) -> Any:
        return await self._repeated(method, request, self._attempts(timeout, self._timeout))

    async def _repeated(self, method: str, request: Any, attempts: Attempts) -> Any:
        request_id = _channel.new_request_id()
        while True:
            try:
                with self._translated(request_id):
                    answer = await getattr(self._stub, method)(
                        request, timeout=attempts.remaining(), metadata=_channel.metadata(request_id)
                    )
                    if answer is None:  # grpc.aio's word for bytes that are no message
                        raise odd("its bytes are no message of this method")
                    return answer
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
        """Make the calls that `steps` ask for; what they return."""
        run = reading.Run(steps)
        call = run.begin()
        while call is not None:
            try:
                answer = await self._read(call, attempts, request_id)
            except ServiceError as error:
                call = run.failed(error)
            else:
                call = await self._answered(run, answer)
        return run.result

    async def _answered(self, run: reading.Run[Any], answer: reading.Answer) -> reading.Call | None:
        if self._sharing.path is None:
            return run.answered(answer)
        return await asyncio.to_thread(run.answered, answer)

    async def _read(self, call: reading.Call, attempts: Attempts, request_id: str) -> reading.Answer:
        """Make a call and read its answer to the end; when it breaks, from its start again."""
        while True:
            try:
                return await self._read_once(call, attempts.remaining(), request_id)
            except ServiceError as error:
                await asyncio.sleep(attempts.pause(error))

    async def _read_once(self, call: reading.Call, timeout: float, request_id: str) -> reading.Answer:
        answer = reading.Answer()
        with self._translated(request_id):
            method = partial(getattr(self._stub, call.method), metadata=_channel.metadata(request_id))
            if call.single:
                answer.feed(await method(call.request, timeout=timeout))
            else:
                stream = method(call.request, timeout=timeout)
                try:
                    async for frame in stream:
                        answer.feed(frame)
                finally:
                    stream.cancel()
            answer.finish()
        return answer

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ClientForked("this client belongs to the parent process; call kvbank.connect_async() after the fork")
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._loop is None:  # here and not in __init__, because a channel belongs to the running loop
            self._loop = asyncio.get_running_loop()
            self._channel = grpc.aio.insecure_channel(addresses.for_grpc(self._address), options=self._options)
            self._stub = make_stub(self._channel)
        if self._loop is not asyncio.get_running_loop():
            raise LoopMismatch("this client belongs to another event loop; call kvbank.connect_async() in this one")

    def _write_stub(self) -> Any:
        if self._write_channel is None:
            self._write_channel = grpc.insecure_channel(addresses.for_grpc(self._address), options=self._options)
        return make_stub(self._write_channel)

    @contextmanager
    def _translated(self, request_id: str) -> Iterator[None]:
        """As the blocking client's. gRPC cancels the calls of a channel that is closed, as if their task had been."""
        self._check()
        try:
            yield
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


async def _each(chunks: Iterable[m.NewChunk] | AsyncIterable[m.NewChunk]) -> AsyncIterator[m.NewChunk]:
    """The chunks of an iterable of either kind; what a generator does until its next one, it does in a thread."""
    if isinstance(chunks, AsyncIterable):
        async for chunk in chunks:
            yield chunk
    elif isinstance(chunks, list | tuple):
        for chunk in chunks:
            yield chunk
    else:
        iterator = iter(_arguments.iterable("chunks", chunks))
        while (found := await asyncio.to_thread(lambda: next(iterator, _END))) is not _END:
            yield found  # type: ignore[misc]  # no _END


async def _more(session: WriteSession, source: AsyncIterator[m.NewChunk]) -> bool:
    """Whether the session has a chunk that goes next; takes one from the source where it has none."""
    if session.peek() is None and session.failure is None:
        try:
            if (found := await anext(source, _END)) is not _END:
                await _put(session, _arguments.instance("chunk", found, m.NewChunk))
        except Exception as error:
            session.failure = error
    return session.peek() is not None


async def _put(session: WriteSession, chunk: m.NewChunk) -> None:
    if chunk.tensors:  # what is large is checked and summed elsewhere
        await asyncio.to_thread(session.put, chunk)
    else:
        session.put(chunk)


async def _to_its_end(call: Callable[[], None]) -> None:
    """Make a call that blocks in a thread, and wait for its end also where the task is cancelled meanwhile."""
    running = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


async def _wait(changed: asyncio.Event, until: Callable[[], bool], patience: Callable[[], float]) -> None:
    while not until():
        changed.clear()
        if not until():  # it may have come true before the clearing
            left = patience()  # which may raise, and a coroutine that was made before would never be awaited
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), left)


for _name, _method in vars(AsyncClient).items():
    if not _name.startswith("_"):
        _method.__doc__ = getattr(Client, _name).__doc__
