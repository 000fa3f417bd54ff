"""The asyncio client, with the names and signatures of `Client`; each method has the docstring of that one.

What would block the event loop goes through `kvbank._transport.loop`.
"""

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping
from functools import partial
from types import EllipsisType, TracebackType
from typing import Self, Unpack

import numpy.typing as npt

from kvbank import _arguments
from kvbank import _models as m
from kvbank._async_access import AsyncAccess
from kvbank._async_sessions import AsyncSessions
from kvbank._calls import bank_messages, chunk_messages, reading, search_messages, session_messages, state_messages
from kvbank._calls import tensors as _tensors
from kvbank._calls.messages import build
from kvbank._calls.writing import WriteSession
from kvbank._client import Client
from kvbank._exceptions import BankNotFound
from kvbank._options import BankSettings, ConnectOptions, RetrieveOptions
from kvbank._session_models import Receipt
from kvbank._transport import channel as _channel
from kvbank._transport.async_caller import AsyncCaller
from kvbank._transport.loop import apart, are_many, is_longer
from kvbank.v1 import service_pb2 as pb
from kvbank.wire.scalars import Scalar


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
        on_close: Callable[[], None] | None = None,
        **options: Unpack[ConnectOptions],
    ) -> None:
        """Make a client of the server at `address`, "host:port" or "unix:PATH"; nothing is sent before the first call.

        timeout, options: see `kvbank.connect`. on_close: called when the client is closed.
        """
        self._caller = AsyncCaller(address, timeout, **options)
        self._on_close = on_close
        self._access = AsyncAccess(self._caller)
        self._sessions = AsyncSessions(self._caller)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._caller.close(self._on_close)

    async def server_info(self, *, timeout: float | None = None) -> m.ServerInfo:
        return state_messages.server_info(await self._caller.call("GetServerInfo", pb.GetServerInfoRequest(), timeout))

    async def stats(self, banks: Iterable[str] = (), *, timeout: float | None = None) -> m.Stats:
        requests = state_messages.stats_requests(banks)
        pages = [page for request in requests async for page in self._caller.pages("GetStats", request, timeout)]
        return state_messages.stats(pages)

    async def compact(self, *, timeout: float | None = None) -> m.Compacted:
        return state_messages.compacted(await self._caller.call("Compact", pb.CompactRequest(), timeout))

    @property
    def access(self) -> AsyncAccess:
        return self._access

    @property
    def sessions(self) -> AsyncSessions:
        return self._sessions

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
        attempts = self._caller.attempts(timeout)
        await self._caller.check_kept(request.bank, attempts)
        answer = await self._caller.repeated("CreateBank", request, attempts)
        return bank_messages.read_created(answer, exist_ok or attempts.unsure)

    async def get_bank(self, name: str, *, timeout: float | None = None) -> m.Bank:
        return bank_messages.read(
            (await self._caller.call("GetBank", build(pb.GetBankRequest, name=name), timeout)).bank
        )

    async def list_banks(self, *, timeout: float | None = None) -> AsyncIterator[m.Bank]:
        async for page in self._caller.pages("ListBanks", pb.ListBanksRequest(), timeout):
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
        await self._caller.check_kept(request.bank, self._caller.attempts(timeout))
        return bank_messages.read((await self._caller.call("UpdateBank", request, timeout)).bank)

    async def delete_bank(self, name: str, missing_ok: bool = False, *, timeout: float | None = None) -> None:
        _arguments.flag("missing_ok", missing_ok)
        attempts = self._caller.attempts(timeout)
        try:
            await self._caller.repeated("DeleteBank", build(pb.DeleteBankRequest, name=name), attempts)
        except BankNotFound:
            if not missing_ok and not attempts.unsure:
                raise

    async def replace_bank(
        self,
        bank: m.Bank,
        by: m.Bank,
        *,
        metadata: Mapping[str, Scalar] | None = None,
        timeout: float | None = None,
    ) -> m.Bank:
        request = bank_messages.replace(bank, by, metadata)
        attempts = self._caller.attempts(timeout)
        await self._caller.check_kept(request, attempts)
        return bank_messages.read((await self._caller.repeated("ReplaceBank", request, attempts)).bank)

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
        begin = partial(WriteSession, bank, (), reader_digest, embedder_digest)
        session = await self._caller.write(begin, chunks, self._caller.stream_attempts(timeout))
        return session.written()

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
        request = await apart(are_many(queries) or is_longer(held), made)
        steps, attempts = partial(reading.retrieval, request, form=form), self._caller.stream_attempts(timeout)
        await self._caller.check_alternatives(request, attempts)
        return await self._caller.read(steps, attempts, request.request_id.hex())

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
        steps, attempts = partial(reading.fetch, request, form=form), self._caller.stream_attempts(timeout)
        return await self._caller.read(steps, attempts, _channel.new_request_id())

    # Chunks

    async def get_chunk(
        self, bank: str, chunk_id: int, with_embedding: bool = False, *, timeout: float | None = None
    ) -> m.Chunk:
        request = build(pb.GetChunkRequest, bank=bank, chunk_id=chunk_id, with_embedding=with_embedding)
        return chunk_messages.read((await self._caller.call("GetChunk", request, timeout)).chunk)

    async def list_chunks(
        self,
        bank: str,
        with_embedding: bool = False,
        *,
        filter: m.Filter | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[m.Chunk]:
        request = search_messages.list_chunks(bank, with_embedding, filter)
        await self._caller.check_alternatives(request, self._caller.attempts(timeout))
        async for page in self._caller.pages("ListChunks", request, timeout):
            for message in page.chunks:
                yield chunk_messages.read(message)

    async def update_chunk(
        self, bank: str, chunk_id: int, metadata: Mapping[str, Scalar], *, timeout: float | None = None
    ) -> m.Chunk:
        request = chunk_messages.update(bank, chunk_id, metadata)
        await self._caller.check_kept(request, self._caller.attempts(timeout))
        return chunk_messages.read((await self._caller.call("UpdateChunk", request, timeout)).chunk)

    async def delete_chunks(self, bank: str, chunk_ids: Iterable[int], *, timeout: float | None = None) -> int:
        request = build(pb.DeleteChunksRequest, bank=bank, chunk_ids=chunk_ids)
        return int((await self._caller.call("DeleteChunks", request, timeout)).deleted)

    async def pin_chunks(
        self, bank: str, chunk_ids: Iterable[int], pinned: bool = True, *, timeout: float | None = None
    ) -> int:
        request = build(pb.PinChunksRequest, bank=bank, chunk_ids=chunk_ids, pinned=pinned)
        return int((await self._caller.call("PinChunks", request, timeout)).found)

    async def forget_chunks(self, bank: str, filter: m.Filter, *, timeout: float | None = None) -> Receipt:
        request = search_messages.forget(bank, filter)
        await self._caller.check_alternatives(request.chunks, self._caller.attempts(timeout))
        return session_messages.receipt((await self._caller.call("Forget", request, timeout)).receipt)

    # Eviction

    async def explain_eviction(self, bank: str, need: int = 1, *, timeout: float | None = None) -> m.EvictionPlan:
        request = build(pb.ExplainEvictionRequest, bank=bank, need=need)
        return state_messages.eviction_plan(await self._caller.call("ExplainEviction", request, timeout))

    async def list_evictions(self, bank: str, *, timeout: float | None = None) -> AsyncIterator[m.Eviction]:
        async for page in self._caller.pages("ListEvictions", build(pb.ListEvictionsRequest, bank=bank), timeout):
            for message in page.evictions:
                yield state_messages.eviction(message)


for _name, _method in vars(AsyncClient).items():
    if not _name.startswith("_"):
        _method.__doc__ = getattr(Client, _name).__doc__
