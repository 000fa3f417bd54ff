"""The blocking client, of which every method makes a request, sends it by a `Transport`, and reads the answer."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
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
from kvbank._exceptions import BankNotFound, ClientClosed, ClientForked, ServiceError
from kvbank._options import BankSettings, RetrieveOptions
from kvbank._targets import checked_address
from kvbank._transport import channel as _channel
from kvbank._transport import status
from kvbank._transport.base import Transport
from kvbank._transport.over_grpc import Grpc
from kvbank._transport.retrying import FIRST_CONTACT_S, Attempts, Contact
from kvbank._transport.same_host import SameHost
from kvbank._transport.sharing import Sharing
from kvbank._transport.socket_first import SocketFirst
from kvbank._transport.write_stream import WriteStream
from kvbank.v1 import service_pb2 as pb
from kvbank.wire.scalars import Scalar

T = TypeVar("T")


class Client:
    """A connection to a memory service, made by `kvbank.connect`.

    Every method takes `timeout`, a deadline in seconds; where it is left out the client's counts, which is `timeout`
    for single calls and `stream_timeout` for those that move tensors. Calls are made again when the server is away,
    until the deadline. Every method raises a `ServiceError` (docs/sdk.md draws their tree), `ClientClosed` or
    `ClientForked`.

    Threads may share a client. A forked process may not: in the child every call raises `ClientForked`.
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
        self._transport: Transport = SocketFirst(self._sharing, Grpc(address, _channel.with_defaults(options)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, and stop the service where `connect` started it. Calls under way fail."""
        if self._pid != os.getpid() or self._closed.is_set():
            return
        self._closed.set()
        self._transport.close()
        if self._on_close is not None:
            self._on_close()

    def server_info(self, *, timeout: float | None = None) -> m.ServerInfo:
        """Return version, store id, durability and limits of the server."""
        return state_messages.server_info(self._call("GetServerInfo", pb.GetServerInfoRequest(), timeout))

    def stats(self, banks: Iterable[str] = (), *, timeout: float | None = None) -> m.Stats:
        """Return what the service has done since it started, and the state of its banks: of those named, or of all."""
        requests = state_messages.stats_requests(banks)
        pages = [page for request in requests for page in self._pages("GetStats", request, timeout)]
        return state_messages.stats(pages)

    def compact(self, *, timeout: float | None = None) -> m.Compacted:
        """Give back to the disk what deleted chunks have left free in the database; others read and write meanwhile."""
        return state_messages.compacted(self._call("Compact", pb.CompactRequest(), timeout))

    # Banks

    def create_bank(
        self,
        name: str,
        *,
        kv: m.KVSpec | None,
        embedding: m.EmbeddingSpec,
        exist_ok: bool = False,
        timeout: float | None = None,
        **settings: Unpack[BankSettings],
    ) -> m.Bank:
        """Create a bank and return it; `kv=None` makes one of vectors only.

        settings: capacity, policy, metadata, quota, expiry, index; see `BankSettings`.
        exist_ok: return an existing bank of the same specs as it is, whatever its settings.
        Errors: AlreadyExists for a bank of this name, with other specs or without `exist_ok`.
        """
        _arguments.flag("exist_ok", exist_ok)
        request = bank_messages.create(name, kv, embedding, settings)
        attempts = self._attempts(timeout, self._timeout)
        self._check_kept(request.bank, attempts)
        answer = self._repeated("CreateBank", request, attempts)
        return bank_messages.read_created(answer, exist_ok or attempts.unsure)

    def get_bank(self, name: str, *, timeout: float | None = None) -> m.Bank:
        """Return the bank with its usage. Errors: BankNotFound."""
        return bank_messages.read(self._call("GetBank", build(pb.GetBankRequest, name=name), timeout).bank)

    def list_banks(self, *, timeout: float | None = None) -> Iterator[m.Bank]:
        """Yield all banks, by name. They are fetched a page at a time, with `timeout` for each."""
        for page in self._pages("ListBanks", pb.ListBanksRequest(), timeout):
            yield from map(bank_messages.read, page.banks)

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
        """Change what is given, leave the rest, and return the bank; `metadata` replaces all of it.

        None removes the bound of `capacity` and `quota`, and as `expiry` lets new chunks live for ever.
        Errors: BankNotFound.
        """
        request = bank_messages.update(
            name, capacity=capacity, policy=policy, metadata=metadata, quota=quota, expiry=expiry, index=index
        )
        self._check_kept(request.bank, self._attempts(timeout, self._timeout))
        return bank_messages.read(self._call("UpdateBank", request, timeout).bank)

    def delete_bank(self, name: str, missing_ok: bool = False, *, timeout: float | None = None) -> None:
        """Delete a bank and all its chunks. Errors: BankNotFound, unless `missing_ok`."""
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
        """Write one chunk, which is durable when this returns. See `write_many`."""
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
        """Write chunks in order over one pipelined stream; return their results in order, when each chunk is durable.

        `chunks` is consumed in the calling thread, as the server acknowledges what went before. (An `AsyncClient` takes
        asynchronous iterables too, which it consumes in its event loop, and consumes other iterables than lists and
        tuples in another thread.) After a broken connection the unacknowledged chunks are sent again under their keys.
        The first refused chunk raises, and so does what `chunks` raises; those before it are written, and writing the
        same `NewChunk` objects again repeats none of them.

        timeout: the longest wait for an acknowledgement, broken connections included, not for the whole.
        """
        attempts = self._attempts(timeout, self._stream_timeout)
        self._learn(attempts)
        folder = self._shared(attempts)
        session = WriteSession(bank, chunks, reader_digest, embedder_digest, self._bound, self._typed)
        request_id = _channel.new_request_id()
        while not session.finished():
            attempts.progressed(session.waiting_since())
            try:
                self._write_stream(session, folder, attempts, request_id)
            except ServiceError as error:
                if folder is not None and takes_no_file(error):
                    self._sharing.doubted()
                    folder = None  # the rest goes over the stream
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
        """Return the data folder of the server, where it is on this machine and shared with this client; else None."""
        if self._sharing.unknown():
            asked = self._sharing.question()
            try:
                self._sharing.learn(asked, self._repeated("GetServerInfo", asked, attempts))
            except ServiceError:
                return None  # the call that follows will say it
        return self._sharing.path

    def _write_stream(
        self, session: WriteSession, folder: SameHost | None, attempts: Attempts, request_id: str
    ) -> None:
        """Write until the end of the chunks, or of the stream."""
        changed = threading.Condition()
        with self._translated(request_id):
            begin = partial(self._transport.write, request_id=request_id)
            stream = WriteStream(begin, session, attempts, lambda: _notify(changed), folder)
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
        filter: m.Filter | None = None,
        reader_digest: str = "",
        embedder_digest: str = "",
        tensors: m.TensorKind = "numpy",
        timeout: float | None = None,
        **options: Unpack[RetrieveOptions],
    ) -> m.Retrieval:
        """Return the nearest chunks of each query, with their tensors.

        banks: one or several whose specs agree.
        queries: float32 [n, dimension], or [dimension] for one, of numpy or torch.
        top_k: hits of each query, 1 to 1000.
        filter: selects the chunks that may be hit; None is all.
        tensors: "numpy" or "torch", which is what `Chunk.tensors` are of. With `mapped`, tensors of torch are copies.
        options: min_score, layers, held, payload, count; see `RetrieveOptions`.
        Errors: DataLoss for a tensor that does not match its checksum; MissingExtra where torch is not installed.
        """
        form = _tensors.form(tensors)
        request = search_messages.retrieve(
            banks,
            queries,
            top_k=top_k,
            filter=filter,
            reader_digest=reader_digest,
            embedder_digest=embedder_digest,
            options=options,
        )
        attempts = self._attempts(timeout, self._stream_timeout)
        folder = None if request.omit_payload else self._shared(attempts)
        return self._run(reading.retrieval(request, folder, form), attempts, request.request_id.hex())

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
        """Return chunks by id, in the order asked for, with their tensors.

        layers: memory layers whose tensors are sent; None is all. tensors: as in `retrieve`.
        Errors: ChunkNotFound, DataLoss, MissingExtra.
        """
        form = _tensors.form(tensors)
        request = search_messages.fetch(bank, chunk_ids, layers, reader_digest)
        attempts = self._attempts(timeout, self._stream_timeout)
        folder = self._shared(attempts)
        return self._run(reading.fetch(request, folder, form), attempts, _channel.new_request_id())

    # Chunks

    def get_chunk(
        self, bank: str, chunk_id: int, with_embedding: bool = False, *, timeout: float | None = None
    ) -> m.Chunk:
        """Return one chunk without its tensors. Errors: ChunkNotFound."""
        request = build(pb.GetChunkRequest, bank=bank, chunk_id=chunk_id, with_embedding=with_embedding)
        return chunk_messages.read(self._call("GetChunk", request, timeout).chunk)

    def list_chunks(
        self,
        bank: str,
        with_embedding: bool = False,
        *,
        filter: m.Filter | None = None,
        timeout: float | None = None,
    ) -> Iterator[m.Chunk]:
        """Yield all chunks, or those that `filter` selects, without their tensors, ascending by id.

        The chunks are fetched a page at a time, with `timeout` for each.
        """
        request = search_messages.list_chunks(bank, with_embedding, filter)
        for page in self._pages("ListChunks", request, timeout):
            yield from map(chunk_messages.read, page.chunks)

    def update_chunk(
        self, bank: str, chunk_id: int, metadata: Mapping[str, Scalar], *, timeout: float | None = None
    ) -> m.Chunk:
        """Replace all metadata of a chunk, and return the chunk. Errors: ChunkNotFound."""
        request = chunk_messages.update(bank, chunk_id, metadata)
        self._check_kept(request, self._attempts(timeout, self._timeout))
        return chunk_messages.read(self._call("UpdateChunk", request, timeout).chunk)

    def delete_chunks(self, bank: str, chunk_ids: Iterable[int], *, timeout: float | None = None) -> int:
        """Delete chunks by id, and return how many of them existed."""
        request = build(pb.DeleteChunksRequest, bank=bank, chunk_ids=chunk_ids)
        return int(self._call("DeleteChunks", request, timeout).deleted)

    def pin_chunks(
        self, bank: str, chunk_ids: Iterable[int], pinned: bool = True, *, timeout: float | None = None
    ) -> int:
        """Protect chunks from eviction, or with `pinned=False` no longer, and return how many of them exist."""
        request = build(pb.PinChunksRequest, bank=bank, chunk_ids=chunk_ids, pinned=pinned)
        return int(self._call("PinChunks", request, timeout).found)

    # Eviction

    def explain_eviction(self, bank: str, need: int = 1, *, timeout: float | None = None) -> m.EvictionPlan:
        """Return what would go next, in order, to make room for `need` of the capacity's unit. The plan is empty where
        there is room, and where nothing can go; its `explanation` tells the two apart."""
        request = build(pb.ExplainEvictionRequest, bank=bank, need=need)
        return state_messages.eviction_plan(self._call("ExplainEviction", request, timeout))

    def list_evictions(self, bank: str, *, timeout: float | None = None) -> Iterator[m.Eviction]:
        """Yield what went, newest first, from a bounded log, fetched a page at a time with `timeout` for each."""
        for page in self._pages("ListEvictions", build(pb.ListEvictionsRequest, bank=bank), timeout):
            yield from map(state_messages.eviction, page.evictions)

    # How a request travels

    def _attempts(self, timeout: float | None, default: float) -> Attempts:
        """Return the attempts of one call. A caller who says how long it may take says so for a server that was never
        reached, too."""
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
                    return self._transport.unary(method, request, attempts.remaining(), request_id)
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
        """Make the calls that `steps` ask for, and return what they return."""
        run = reading.Run(steps)
        call = run.begin()
        while call is not None:
            try:
                answer = self._read(call, attempts, request_id)
            except ServiceError as error:
                self._sharing.failed(call, error)
                call = run.failed(error)
            else:
                if call.folder is not None:
                    call.folder.fill(answer)
                call = run.answered(answer)
        return run.result

    def _read(self, call: reading.Call, attempts: Attempts, request_id: str) -> reading.Answer:
        """Make a call, and read its answer to the end; where it breaks, make it again."""
        while True:
            try:
                return self._read_once(call, attempts.remaining(), request_id)
            except ServiceError as error:
                self._pause(attempts.pause(error))

    def _read_once(self, call: reading.Call, timeout: float, request_id: str) -> reading.Answer:
        answer = reading.Answer()
        with self._translated(request_id):
            if call.folder is not None:
                answer.feed(self._transport.unary(call.method, call.request, timeout, request_id))
            else:
                with closing(self._transport.stream(call.method, call.request, timeout, request_id)) as frames:
                    for frame in frames:
                        answer.feed(frame)
            answer.finish()
        return answer

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ClientForked("this client belongs to the parent process; call kvbank.connect() after the fork")
        if self._closed.is_set():
            raise ClientClosed("the client is closed")

    @contextmanager
    def _translated(self, request_id: str) -> Iterator[None]:
        """Turn errors of gRPC into errors of this package; after a `close` in another thread each is ClientClosed."""
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
