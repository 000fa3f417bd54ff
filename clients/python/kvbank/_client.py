"""The blocking client: the calls of `_codec` over a `grpc.Channel`."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import EllipsisType, TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy.typing as npt
from grpc.experimental import ChannelOptions

from kvbank import _arguments
from kvbank import _models as m
from kvbank._calls import codec, reading
from kvbank._calls import metadata as _metadata
from kvbank._calls import tensors as _tensors
from kvbank._calls.answers import odd
from kvbank._calls.messages import build
from kvbank._calls.writing import WriteSession
from kvbank._exceptions import BankNotFound, ClientClosed, ClientForked, ServiceError
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


class Client:
    """A connection to a memory service, made by `kvbank.connect`.

    Every method takes `timeout`, a deadline in seconds; left out it is the client's: `timeout` for single calls,
    `stream_timeout` for those that move tensors. Calls are made again when the server is away, until the deadline.
    Every method raises a `ServiceError` (the tree is in `kvbank._exceptions`), `ClientClosed` or `ClientForked`.

    Threads may share a client. A fork may not: in the child every call raises `ClientForked`.
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
        checked_address("address", address)
        self._timeout = _arguments.seconds("timeout", timeout)
        self._stream_timeout = _arguments.seconds("stream_timeout", stream_timeout)
        self._on_close = on_close
        self._pid = os.getpid()
        self._closed = threading.Event()
        self._bound = 0
        self._typed = False
        self._sharing = Sharing(address, _arguments.flag("mapped", mapped))
        self._contact = Contact(_arguments.seconds("first_contact", first_contact))
        # The calling thread reads an answer itself; by default two more would hand it each frame.
        own = ((ChannelOptions.SingleThreadedUnaryStream, 1),)
        self._channel = grpc.insecure_channel(
            addresses.for_grpc(address), options=[*_channel.with_defaults(options), *own]
        )
        self._stub: Any = make_stub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, and stop the service where `connect` started it. Calls under way fail."""
        if self._pid != os.getpid() or self._closed.is_set():
            return
        self._closed.set()
        self._sharing.close()
        self._channel.close()
        if self._on_close is not None:
            self._on_close()

    def server_info(self, *, timeout: float | None = None) -> m.ServerInfo:
        """Version, store id, durability and limits of the server."""
        return codec.server_info(self._call("GetServerInfo", pb.GetServerInfoRequest(), timeout))

    def stats(self, banks: Iterable[str] = (), *, timeout: float | None = None) -> m.Stats:
        """What the service has done since it started, and the state of its banks (of `banks`, or all)."""
        requests = codec.stats_requests(banks)
        return codec.stats([page for request in requests for page in self._pages("GetStats", request, timeout)])

    def compact(self, *, timeout: float | None = None) -> m.Compacted:
        """Give back to the disk what deleted chunks have left free in the database; others read and write meanwhile."""
        return codec.compacted(self._call("Compact", pb.CompactRequest(), timeout))

    # Banks

    def create_bank(
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
        """Create a bank; `kv=None` makes one of vectors only, `capacity=None` one without a bound.

        quota: hard bounds; None for none. expiry: of chunks that state none; None for never.
        index: how the bank is searched, see `Bank`.
        exist_ok: return an existing bank of the same specs as it is, whatever its capacity, policy and metadata.
        AlreadyExists for a bank of this name otherwise.
        """
        _arguments.flag("exist_ok", exist_ok)
        request = codec.create_bank(name, kv, embedding, capacity, policy, metadata, quota, expiry, index)
        attempts = self._attempts(timeout, self._timeout)
        self._check_kept(request.bank, attempts)
        answer = self._repeated("CreateBank", request, attempts)
        return codec.created_bank(answer, exist_ok or attempts.unsure)

    def get_bank(self, name: str, *, timeout: float | None = None) -> m.Bank:
        """The bank with its usage; BankNotFound."""
        return codec.bank(self._call("GetBank", build(pb.GetBankRequest, name=name), timeout).bank)

    def list_banks(self, *, timeout: float | None = None) -> Iterator[m.Bank]:
        """All banks, by name; fetched a page at a time, with `timeout` for each."""
        for page in self._pages("ListBanks", pb.ListBanksRequest(), timeout):
            yield from map(codec.bank, page.banks)

    def update_bank(
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
        """Change what is given and leave the rest; `metadata` replaces all of it.

        None removes the bound of `capacity` and `quota`, and with `expiry` lets new chunks live for ever.
        """
        request = codec.update_bank(name, capacity, policy, metadata, quota, expiry, index)
        self._check_kept(request.bank, self._attempts(timeout, self._timeout))
        return codec.bank(self._call("UpdateBank", request, timeout).bank)

    def delete_bank(self, name: str, missing_ok: bool = False, *, timeout: float | None = None) -> None:
        """Delete a bank and all its chunks; BankNotFound unless `missing_ok`."""
        _arguments.flag("missing_ok", missing_ok)
        attempts = self._attempts(timeout, self._timeout)
        try:
            self._repeated("DeleteBank", build(pb.DeleteBankRequest, name=name), attempts)
        except BankNotFound:
            if not missing_ok and not attempts.unsure:
                raise

    # Writing

    def write(
        self, bank: str, chunk: m.NewChunk, *, reader_digest: str, embedder_digest: str, timeout: float | None = None
    ) -> m.WriteResult:
        """Write one chunk; it is durable when this returns. See `write_many`."""
        return self.write_many(
            bank, [chunk], reader_digest=reader_digest, embedder_digest=embedder_digest, timeout=timeout
        )[0]

    def write_many(
        self,
        bank: str,
        chunks: Iterable[m.NewChunk],
        *,
        reader_digest: str,
        embedder_digest: str,
        timeout: float | None = None,
    ) -> list[m.WriteResult]:
        """Write chunks in order over one pipelined stream; results in order, each chunk durable.

        `chunks` is consumed in the calling thread, as the server acknowledges what went before. (An `AsyncClient` takes
        asynchronous iterables too, and consumes others than lists and tuples in another thread.) After a broken
        connection the unacknowledged chunks are sent again under their keys.
        The first refused chunk raises, and so does what `chunks` raises; those before it are written, and writing the
        same `NewChunk` objects again repeats none of them.

        timeout: longest wait for an acknowledgement, broken connections included, not for the whole.
        """
        attempts = self._attempts(timeout, self._stream_timeout)
        self._learn(attempts)
        path = self._shared(attempts)
        session = WriteSession(bank, chunks, reader_digest, embedder_digest, self._bound, path, self._typed)
        request_id = _channel.new_request_id()
        while not session.finished():
            attempts.progressed(session.waiting_since())
            try:
                self._write_stream(session, attempts, request_id)
            except ServiceError as error:
                if session.refused(error):
                    self._sharing.doubted()
                    continue
                attempts.progressed(session.waiting_since())
                self._pause(attempts.pause(error))
        return session.written()

    def _learn(self, attempts: Attempts) -> None:
        """Ask the server, once, how much of a write may be unacknowledged, and which metadata it keeps."""
        self._check()
        if not self._bound:
            asked = self._sharing.question()
            info = self._repeated("GetServerInfo", asked, attempts)
            self._bound = _channel.unacknowledged_bytes(info.max_unacknowledged_bytes)
            self._typed = info.typed_metadata
            if self._sharing.unknown():
                self._sharing.learn(asked, info)

    def _check_kept(self, message: Any, attempts: Attempts) -> None:
        """Check that the server keeps all metadata of a message. Errors: FailedPrecondition."""
        if message.typed_metadata:
            self._learn(attempts)
            _metadata.check_kept(message, self._typed)

    def _shared(self, attempts: Attempts) -> SameHost | None:
        """How to reach the server's files, where they are on this machine and it allows that."""
        if self._sharing.unknown():
            asked = self._sharing.question()
            try:
                self._sharing.learn(asked, self._repeated("GetServerInfo", asked, attempts))
            except ServiceError:
                return None  # the call that follows will say it
        return self._sharing.path

    def _write_stream(self, session: WriteSession, attempts: Attempts, request_id: str) -> None:
        """Write until the end of the chunks, or of the stream."""
        changed = threading.Condition()
        with self._translated(request_id):
            method = partial(self._stub.WriteChunks, metadata=_channel.metadata(request_id))
            stream = WriteStream(method, session, attempts, on_change=lambda: _notify(changed))
            try:
                while session.peek() is not None:
                    _wait(changed, stream.ready, stream.patience)
                    if stream.ended:
                        break
                    stream.send()
                stream.half_close()
                _wait(changed, stream.done, stream.patience)
                stream.check()
            finally:
                stream.cancel()

    # Reading

    def retrieve(
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
        """The nearest chunks of each query, with their tensors.

        banks: one or several whose specs agree.
        queries: float32 [n, dimension], or [dimension] for one, of numpy or torch.
        top_k: 1 to 1000.
        min_score: leave out hits below it.
        filter: only chunks that it selects.
        layers: tensors of these memory layers only; all when left out.
        held: payloads that the caller has and that are not sent again (`tensors` is None).
        payload: False for hits and metadata only; then `reader_digest` may be left out.
        count: False to look around without raising retrieval counts. A retry counts once, unless the server was started
            anew in between.
        tensors: "numpy" or "torch", which is what `Chunk.tensors` are of. With `mapped`, tensors of torch are copies.
            MissingExtra where torch is not installed.

        DataLoss when a received tensor does not match its checksum.
        """
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
            self._shared(attempts)
        return self._run(reading.retrieval(request, self._sharing, form), attempts, request.request_id.hex())

    def fetch(
        self,
        bank: str,
        chunk_ids: Iterable[int],
        *,
        layers: Iterable[int] | None = None,
        reader_digest: str,
        tensors: m.TensorKind = "numpy",
        timeout: float | None = None,
    ) -> list[m.Chunk]:
        """Chunks by id, in the order asked for, with their tensors (of `layers`, or all); ChunkNotFound, DataLoss.

        tensors: as in `retrieve`.
        """
        form = _tensors.form(tensors)
        request = codec.fetch(bank, chunk_ids, layers, reader_digest)
        attempts = self._attempts(timeout, self._stream_timeout)
        self._shared(attempts)
        return self._run(reading.fetch(request, self._sharing, form), attempts, _channel.new_request_id())

    # Chunks

    def get_chunk(
        self, bank: str, chunk_id: int, with_embedding: bool = False, *, timeout: float | None = None
    ) -> m.Chunk:
        """One chunk without its tensors; ChunkNotFound."""
        request = build(pb.GetChunkRequest, bank=bank, chunk_id=chunk_id, with_embedding=with_embedding)
        return codec.chunk(self._call("GetChunk", request, timeout).chunk)

    def list_chunks(
        self,
        bank: str,
        with_embedding: bool = False,
        *,
        filter: m.Filter | None = None,
        timeout: float | None = None,
    ) -> Iterator[m.Chunk]:
        """All chunks, or those of `filter`, without their tensors, ascending by id.

        They are fetched a page at a time, with `timeout` for each.
        """
        request = codec.list_chunks(bank, with_embedding, filter)
        for page in self._pages("ListChunks", request, timeout):
            yield from map(codec.chunk, page.chunks)

    def update_chunk(
        self, bank: str, chunk_id: int, metadata: Mapping[str, Scalar], *, timeout: float | None = None
    ) -> m.Chunk:
        """Replace a chunk's metadata; ChunkNotFound."""
        request = codec.update_chunk(bank, chunk_id, metadata)
        self._check_kept(request, self._attempts(timeout, self._timeout))
        return codec.chunk(self._call("UpdateChunk", request, timeout).chunk)

    def delete_chunks(self, bank: str, chunk_ids: Iterable[int], *, timeout: float | None = None) -> int:
        """Delete chunks by id; how many of them existed."""
        request = build(pb.DeleteChunksRequest, bank=bank, chunk_ids=chunk_ids)
        return int(self._call("DeleteChunks", request, timeout).deleted)

    def pin_chunks(
        self, bank: str, chunk_ids: Iterable[int], pinned: bool = True, *, timeout: float | None = None
    ) -> int:
        """Protect chunks from eviction, or with `pinned=False` no longer; how many of them exist."""
        request = build(pb.PinChunksRequest, bank=bank, chunk_ids=chunk_ids, pinned=pinned)
        return int(self._call("PinChunks", request, timeout).found)

    # Eviction

    def explain_eviction(self, bank: str, need: int = 1, *, timeout: float | None = None) -> m.EvictionPlan:
        """What would go next, in order, to make room for `need` of the capacity's unit; empty when it fits, and when
        nothing can go, which its `explanation` says."""
        request = build(pb.ExplainEvictionRequest, bank=bank, need=need)
        return codec.eviction_plan(self._call("ExplainEviction", request, timeout))

    def list_evictions(self, bank: str, *, timeout: float | None = None) -> Iterator[m.Eviction]:
        """What went, newest first, from a bounded log; fetched a page at a time, with `timeout` for each."""
        for page in self._pages("ListEvictions", build(pb.ListEvictionsRequest, bank=bank), timeout):
            yield from map(codec.eviction, page.evictions)

    # How a request travels

    def _attempts(self, timeout: float | None, default: float) -> Attempts:
        """Of one call; who says how long it may take says so also for a server that was never reached."""
        if timeout is None:
            return Attempts(default, self._contact)
        return Attempts(_arguments.seconds("timeout", timeout))

    def _call(self, method: str, request: Any, timeout: float | None) -> Any:
        return self._repeated(method, request, self._attempts(timeout, self._timeout))

    def _repeated(self, method: str, request: Any, attempts: Attempts) -> Any:
        request_id = _channel.new_request_id()
        while True:
            try:
                with self._translated(request_id):
                    return getattr(self._stub, method)(
                        request, timeout=attempts.remaining(), metadata=_channel.metadata(request_id)
                    )
            except ServiceError as error:
                self._pause(attempts.pause(error))

    def _pages(self, method: str, request: Any, timeout: float | None) -> Iterator[Any]:
        for _ in range(_channel.MOST_PAGES[method]):
            page = self._call(method, request, timeout)
            yield page
            if not page.next_page_token:
                return
            if page.next_page_token == request.page_token:
                raise odd("the page after this one is this one")
            request.page_token = page.next_page_token
        raise odd(f"it has more than {_channel.MOST_PAGES[method]} pages")

    def _run(self, steps: reading.Steps[T], attempts: Attempts, request_id: str) -> T:
        """Make the calls that `steps` ask for; what they return."""
        run = reading.Run(steps)
        call = run.begin()
        while call is not None:
            try:
                answer = self._read(call, attempts, request_id)
            except ServiceError as error:
                call = run.failed(error)
            else:
                call = run.answered(answer)
        return run.result

    def _read(self, call: reading.Call, attempts: Attempts, request_id: str) -> reading.Answer:
        """Make a call and read its answer to the end; when it breaks, from its start again."""
        while True:
            try:
                return self._read_once(call, attempts.remaining(), request_id)
            except ServiceError as error:
                self._pause(attempts.pause(error))

    def _read_once(self, call: reading.Call, timeout: float, request_id: str) -> reading.Answer:
        answer = reading.Answer()
        with self._translated(request_id):
            method = partial(getattr(self._stub, call.method), metadata=_channel.metadata(request_id))
            if call.single:
                found = self._sharing.ask(call.request, timeout, request_id)
                answer.feed(method(call.request, timeout=timeout) if found is None else found)
            else:
                stream = method(call.request, timeout=timeout)
                try:
                    for frame in stream:
                        answer.feed(frame)
                finally:
                    stream.cancel()
            answer.finish()
        return answer

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ClientForked("this client belongs to the parent process; call kvbank.connect() after the fork")
        if self._closed.is_set():
            raise ClientClosed("the client is closed")

    @contextmanager
    def _translated(self, request_id: str) -> Iterator[None]:
        """gRPC's errors in terms of this package; after a `close` in another thread every one is ClientClosed."""
        self._check()
        try:
            yield
            self._contact.made = True
        except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was closed before the call started
            if self._closed.is_set():
                raise ClientClosed("the client was closed during the call") from None
            if isinstance(error, grpc.RpcError):
                raise status.from_rpc_error(error, request_id) from None
            raise
        except ServiceError as error:  # the reader's, such as a checksum that does not match
            error.request_id = error.request_id or request_id
            raise

    def _pause(self, seconds: float) -> None:
        self._closed.wait(seconds)


def _notify(changed: threading.Condition) -> None:
    with changed:
        changed.notify_all()


def _wait(changed: threading.Condition, until: Callable[[], bool], patience: Callable[[], float]) -> None:
    with changed:
        while not until():
            changed.wait(patience())
