"""The blocking client, of which every method makes a request, has a `Caller` send it, and reads the answer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import EllipsisType, TracebackType
from typing import Self, Unpack

import numpy.typing as npt

from kvbank import _arguments
from kvbank import _models as m
from kvbank._access import Access
from kvbank._calls import bank_messages, chunk_messages, reading, search_messages, session_messages, state_messages
from kvbank._calls import tensors as _tensors
from kvbank._calls.messages import build
from kvbank._calls.writing import WriteSession
from kvbank._exceptions import BankNotFound
from kvbank._options import BankSettings, ConnectOptions, RetrieveOptions
from kvbank._session_models import Receipt
from kvbank._sessions import Sessions
from kvbank._transport import channel as _channel
from kvbank._transport.caller import Caller
from kvbank.v1 import service_pb2 as pb
from kvbank.wire.scalars import Scalar


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
        on_close: Callable[[], None] | None = None,
        **options: Unpack[ConnectOptions],
    ) -> None:
        """Make a client of the server at `address`, "host:port" or "unix:PATH"; nothing is sent before the first call.

        timeout, options: see `kvbank.connect`. on_close: called when the client is closed.
        """
        self._caller = Caller(address, timeout, **options)
        self._on_close = on_close
        self._access = Access(self._caller)
        self._sessions = Sessions(self._caller)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, and stop the service where `connect` started it. Calls under way fail."""
        if self._caller.close() and self._on_close is not None:
            self._on_close()

    def server_info(self, *, timeout: float | None = None) -> m.ServerInfo:
        """Return version, store id, durability and limits of the server."""
        return state_messages.server_info(self._caller.call("GetServerInfo", pb.GetServerInfoRequest(), timeout))

    def stats(self, banks: Iterable[str] = (), *, timeout: float | None = None) -> m.Stats:
        """Return what the service has done since it started, and the state of its banks: of those named, or of all."""
        requests = state_messages.stats_requests(banks)
        pages = [page for request in requests for page in self._caller.pages("GetStats", request, timeout)]
        return state_messages.stats(pages)

    def compact(self, *, timeout: float | None = None) -> m.Compacted:
        """Give back to the disk what deleted chunks have left free in the database; others read and write meanwhile."""
        return state_messages.compacted(self._caller.call("Compact", pb.CompactRequest(), timeout))

    @property
    def access(self) -> Access:
        """Return what manages the keys and tenants of the service."""
        return self._access

    @property
    def sessions(self) -> Sessions:
        """Return what keeps the conversations of the service, which any worker continues."""
        return self._sessions

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
        attempts = self._caller.attempts(timeout)
        self._caller.check_kept(request.bank, attempts)
        answer = self._caller.repeated("CreateBank", request, attempts)
        return bank_messages.read_created(answer, exist_ok or attempts.unsure)

    def get_bank(self, name: str, *, timeout: float | None = None) -> m.Bank:
        """Return the bank with its usage. Errors: BankNotFound."""
        return bank_messages.read(self._caller.call("GetBank", build(pb.GetBankRequest, name=name), timeout).bank)

    def list_banks(self, *, timeout: float | None = None) -> Iterator[m.Bank]:
        """Yield all banks, by name. They are fetched a page at a time, with `timeout` for each."""
        for page in self._caller.pages("ListBanks", pb.ListBanksRequest(), timeout):
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
        self._caller.check_kept(request.bank, self._caller.attempts(timeout))
        return bank_messages.read(self._caller.call("UpdateBank", request, timeout).bank)

    def delete_bank(self, name: str, missing_ok: bool = False, *, timeout: float | None = None) -> None:
        """Delete a bank and all its chunks. Errors: BankNotFound, unless `missing_ok`."""
        _arguments.flag("missing_ok", missing_ok)
        attempts = self._caller.attempts(timeout)
        try:
            self._caller.repeated("DeleteBank", build(pb.DeleteBankRequest, name=name), attempts)
        except BankNotFound:
            if not missing_ok and not attempts.unsure:
                raise

    def replace_bank(
        self,
        bank: m.Bank,
        by: m.Bank,
        *,
        metadata: Mapping[str, Scalar] | None = None,
        timeout: float | None = None,
    ) -> m.Bank:
        """Delete `bank` and all its chunks, give its name to the bank `by` in the same step, and return that.

        So a bank is made anew beside the old one, which answers until then. bank, by: as they were last seen. `by`
        takes capacity, policy, quota, expiry and index of the bank that is deleted. metadata: of the bank from then on;
        None is those of the bank that is deleted.
        Errors: FailedPrecondition (BANK_CHANGED) where `bank` was written to, or chunks of it are gone, since it was
        seen; BankNotFound.
        """
        request = bank_messages.replace(bank, by, metadata)
        attempts = self._caller.attempts(timeout)
        self._caller.check_kept(request, attempts)
        return bank_messages.read(self._caller.repeated("ReplaceBank", request, attempts).bank)

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
        begin = partial(WriteSession, bank, chunks, reader_digest, embedder_digest)
        return self._caller.write(begin, self._caller.stream_attempts(timeout)).written()

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
        options: min_score, min_share, layers, held, payload, count; see `RetrieveOptions`.
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
        steps, attempts = partial(reading.retrieval, request, form=form), self._caller.stream_attempts(timeout)
        self._caller.check_alternatives(request, attempts)
        return self._caller.read(steps, attempts, request.request_id.hex())

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
        steps, attempts = partial(reading.fetch, request, form=form), self._caller.stream_attempts(timeout)
        return self._caller.read(steps, attempts, _channel.new_request_id())

    # Chunks

    def get_chunk(
        self, bank: str, chunk_id: int, with_embedding: bool = False, *, timeout: float | None = None
    ) -> m.Chunk:
        """Return one chunk without its tensors. Errors: ChunkNotFound."""
        request = build(pb.GetChunkRequest, bank=bank, chunk_id=chunk_id, with_embedding=with_embedding)
        return chunk_messages.read(self._caller.call("GetChunk", request, timeout).chunk)

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
        self._caller.check_alternatives(request, self._caller.attempts(timeout))
        for page in self._caller.pages("ListChunks", request, timeout):
            yield from map(chunk_messages.read, page.chunks)

    def update_chunk(
        self, bank: str, chunk_id: int, metadata: Mapping[str, Scalar], *, timeout: float | None = None
    ) -> m.Chunk:
        """Replace all metadata of a chunk, and return the chunk. Errors: ChunkNotFound."""
        request = chunk_messages.update(bank, chunk_id, metadata)
        self._caller.check_kept(request, self._caller.attempts(timeout))
        return chunk_messages.read(self._caller.call("UpdateChunk", request, timeout).chunk)

    def delete_chunks(self, bank: str, chunk_ids: Iterable[int], *, timeout: float | None = None) -> int:
        """Delete chunks by id, and return how many of them existed."""
        request = build(pb.DeleteChunksRequest, bank=bank, chunk_ids=chunk_ids)
        return int(self._caller.call("DeleteChunks", request, timeout).deleted)

    def pin_chunks(
        self, bank: str, chunk_ids: Iterable[int], pinned: bool = True, *, timeout: float | None = None
    ) -> int:
        """Protect chunks from eviction, or with `pinned=False` no longer, and return how many of them exist."""
        request = build(pb.PinChunksRequest, bank=bank, chunk_ids=chunk_ids, pinned=pinned)
        return int(self._caller.call("PinChunks", request, timeout).found)

    def forget_chunks(self, bank: str, filter: m.Filter, *, timeout: float | None = None) -> Receipt:
        """Forget chunks of a bank for good, such as those of a document, and return what went. filter: selects them.

        What was forgotten before is answered with the receipt of then, for 30 days. K-V that sessions made of their own
        turns while they read the bank are those of the sessions, and stay. Errors: BankNotFound.
        """
        request = search_messages.forget(bank, filter)
        self._caller.check_alternatives(request.chunks, self._caller.attempts(timeout))
        return session_messages.receipt(self._caller.call("Forget", request, timeout).receipt)

    # Eviction

    def explain_eviction(self, bank: str, need: int = 1, *, timeout: float | None = None) -> m.EvictionPlan:
        """Return what would go next, in order, to make room for `need` of the capacity's unit. The plan is empty where
        there is room, and where nothing can go; its `explanation` tells the two apart."""
        request = build(pb.ExplainEvictionRequest, bank=bank, need=need)
        return state_messages.eviction_plan(self._caller.call("ExplainEviction", request, timeout))

    def list_evictions(self, bank: str, *, timeout: float | None = None) -> Iterator[m.Eviction]:
        """Yield what went, newest first, from a bounded log, fetched a page at a time with `timeout` for each."""
        for page in self._caller.pages("ListEvictions", build(pb.ListEvictionsRequest, bank=bank), timeout):
            yield from map(state_messages.eviction, page.evictions)
