"""The service of kvbank.v1: for each RPC a message comes in, an operation runs, a message goes out.

This file owns which operation an RPC is. How a method becomes a call, in a storage thread when it is its turn, stands
in `calls.handlers`; the streams in `streams`.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from kvbank.v1 import service_pb2 as pb
from kvbank.v1 import service_pb2_grpc
from memory_service import __version__
from memory_service.api.answers import Answers, Streamed
from memory_service.api.calls.budget import Budget
from memory_service.api.calls.handlers import (
    HandledService,
    Handling,
    HeldRequests,
    asked,
    current_caller,
    refusing,
    streaming,
    unary,
    wide,
)
from memory_service.api.calls.rate_turns import RateTurns
from memory_service.api.calls.storage_threads import StorageThreads
from memory_service.api.calls.turns import AnswerTurns, Load
from memory_service.api.messages import convert, metadata
from memory_service.api.messages.paging import number_of, page_size
from memory_service.api.messages.parsing import Received
from memory_service.api.same_host import SameHost
from memory_service.api.stats import Stats
from memory_service.api.streams.chunk_frames import frames
from memory_service.api.streams.receiving import Bounds, Receiver
from memory_service.api.streams.sending import Sender
from memory_service.domain.access import Caller
from memory_service.domain.errors import invalid
from memory_service.domain.limits import NO_PAUSES, STANDARD, Limits, Pauses
from memory_service.domain.validate import LARGEST_INT64
from memory_service.observe.metrics import Metrics
from memory_service.operations.banks import Banks
from memory_service.operations.found import Opened, close
from memory_service.settings import Settings
from memory_service.storage.base import Seen

T = TypeVar("T")
# The fields of a bank that UpdateBank changes.
_UPDATABLE = ("capacity", "policy", "metadata", "quota", "expiry", "index")


class MemoryService(HandledService, service_pb2_grpc.MemoryServiceServicer):
    """The RPCs of kvbank.v1.MemoryService; the proto says what each of them promises."""

    def __init__(
        self,
        banks: Banks,
        settings: Settings,
        threads: StorageThreads,
        rate_turns: RateTurns,
        metrics: Metrics,
        same_host: SameHost | None,
        limits: Limits = STANDARD,
        pauses: Pauses = NO_PAUSES,
    ) -> None:
        """Serve the RPCs over `banks`. rate_turns: where chunks wait for the rates of their tenants. same_host: where
        clients may read payload files and stage their own; None where they may not."""
        limit, most_bytes = settings.max_inflight_bytes, settings.max_message_bytes

        def budget() -> Budget:
            """Make a budget of the same size; each use has one, so that bytes of ordinary answers do not queue behind
            large headers."""
            return Budget(limit, limits.stalled_s)

        turns = AnswerTurns(threads, budget(), most_bytes, pauses)
        super().__init__(Handling(threads, turns, HeldRequests(limit), most_bytes, pauses))
        self._banks = banks
        self._settings = settings
        self._stats = Stats(banks, settings, metrics, limits)
        self._same_host = same_host
        self._answers = Answers(banks, same_host, most_bytes, metrics)
        self._sender = Sender(banks.damage, threads.pool, budget(), metrics, pauses)
        window = settings.max_unacknowledged_bytes
        bounds = Bounds(window, limits.inline_bytes)
        self._receiver = Receiver(banks, threads.pool, budget(), rate_turns, bounds, same_host, metrics)

    # Server and banks

    @refusing
    async def GetServerInfo(self, received: Received) -> bytes:  # noqa: N802
        """Answer with version, identity and limits, also when all storage threads are busy."""
        asked: pb.GetServerInfoRequest = received.message()
        shared = self._same_host
        info = pb.GetServerInfoResponse(
            version=__version__,
            store_id=self._banks.store_id,
            durability=self._settings.durability,
            max_message_bytes=self._settings.max_message_bytes,
            max_chunk_bytes=self._settings.max_chunk_bytes,
            max_unacknowledged_bytes=self._settings.max_unacknowledged_bytes,
            typed_metadata=True,
            alternatives=True,
            max_inline_bytes=self._receiver.inline_bytes,
            same_host=shared.message(asked.challenge) if shared is not None and current_caller().is_owner else None,
        )
        return info.SerializeToString()

    @unary
    def CreateBank(self, caller: Caller, request: pb.CreateBankRequest) -> pb.CreateBankResponse:  # noqa: N802
        """Make a new bank; one of the same name and specs that exists is returned as it is."""
        bank, created = self._banks.create(replace(convert.bank(request.bank), tenant=caller.tenant))
        return pb.CreateBankResponse(bank=convert.bank_message(bank), created=created)

    @unary
    def GetBank(self, caller: Caller, request: pb.GetBankRequest) -> pb.GetBankResponse:  # noqa: N802
        """Answer with one bank and its usage."""
        return pb.GetBankResponse(bank=convert.bank_message(self._banks.get(caller.tenant, request.name)))

    @wide
    def ListBanks(self, caller: Caller, request: pb.ListBanksRequest) -> pb.ListBanksResponse:  # noqa: N802
        """Answer with a page of banks by name. The token is the last name of the page before; a page of large banks is
        shorter than asked for."""
        banks, more = self._banks.after(caller, request.page_token, page_size(request.page_size))
        token = banks[-1].name if more else ""
        return pb.ListBanksResponse(banks=map(convert.bank_message, banks), next_page_token=token)

    @unary
    def UpdateBank(self, caller: Caller, request: pb.UpdateBankRequest) -> pb.UpdateBankResponse:  # noqa: N802
        """Replace those fields of a bank that the mask names."""
        new = convert.bank(request.bank)
        changes = {path: getattr(new, path) for path in request.update_mask.paths if path in _UPDATABLE}
        if not changes or len(changes) != len(request.update_mask.paths):
            raise invalid("update_mask", f"must name some of {', '.join(_UPDATABLE)}, each once")
        bank = self._banks.update(caller.tenant, new.name, changes)
        return pb.UpdateBankResponse(bank=convert.bank_message(bank))

    @unary
    def DeleteBank(self, caller: Caller, request: pb.DeleteBankRequest) -> pb.DeleteBankResponse:  # noqa: N802
        """Delete a bank with all its chunks."""
        self._banks.delete(caller.tenant, request.name)
        return pb.DeleteBankResponse()

    @unary
    def ReplaceBank(self, caller: Caller, request: pb.ReplaceBankRequest) -> pb.ReplaceBankResponse:  # noqa: N802
        """Delete a bank and give its name to another one."""
        seen = Seen(request.name, request.uid, request.chunks, request.chunks_written)
        metadata_ = metadata.read("metadata", request)
        bank = self._banks.replace(caller.tenant, seen, request.by, request.by_uid, metadata_)
        return pb.ReplaceBankResponse(bank=convert.bank_message(bank))

    # Writing

    @streaming
    async def WriteChunks(self, requests: AsyncIterator[Received]) -> AsyncIterator[pb.WriteChunksResponse]:  # noqa: N802
        """Write chunks side by side; their acknowledgements come in order."""
        async for ack in self._receiver.acks(current_caller(), frames(requests, self.handling.threads.run)):
            yield ack

    # Reading

    @streaming
    async def Retrieve(self, received: Received) -> AsyncIterator[bytes]:  # noqa: N802
        """Answer with all hits and descriptors, then with verified bytes of K-V."""
        async for part in self._streamed("Retrieve", partial(_found, self._answers.retrieved, received)):
            yield part

    @streaming
    async def FetchChunks(self, received: Received) -> AsyncIterator[bytes]:  # noqa: N802
        """Answer with chunks by id, in the order asked for, then with verified bytes of K-V."""
        async for part in self._streamed("FetchChunks", partial(_found, self._answers.fetched, received)):
            yield part

    async def _streamed(self, kind: str, find: Callable[[], Load[Streamed]]) -> AsyncIterator[bytes]:
        """Yield the header of an answer, then the bytes of K-V, and close their files. kind, find: see
        `AnswerTurns.made`."""
        files: list[Opened] = []
        try:
            async with self.handling.turns.made(kind, find) as (header, files):
                yield header
            del header  # what follows may take long
            # The frames are closed before the files, also where the caller goes, because a thread may still be reading.
            async with aclosing(self._sender.frames(files)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            close(files)

    @streaming
    async def RetrieveFiles(self, received: Received) -> AsyncIterator[bytes]:  # noqa: N802
        """Answer as Retrieve does, with the names of the files instead of their bytes, in one message."""
        find = partial(_found, self._answers.retrieved_files, received)
        async with self.handling.turns.made("Retrieve", find) as answer:
            yield answer

    @streaming
    async def FetchFiles(self, received: Received) -> AsyncIterator[bytes]:  # noqa: N802
        """Answer as FetchChunks does, with the names of the files instead of their bytes, in one message."""
        find = partial(_found, self._answers.fetched_files, received)
        async with self.handling.turns.made("FetchChunks", find) as answer:
            yield answer

    @contextmanager
    def retrieve_files(self, request: pb.RetrieveFilesRequest) -> Iterator[bytes]:
        """Answer as RetrieveFiles does, in a thread of the caller, which sends the answer in the block."""
        with self.handling.turns.made_here(partial(self._answers.retrieved_files, current_caller(), request)) as answer:
            yield answer

    @contextmanager
    def fetch_files(self, request: pb.FetchFilesRequest) -> Iterator[bytes]:
        """Answer as FetchFiles does, in a thread of the caller, which sends the answer in the block."""
        with self.handling.turns.made_here(partial(self._answers.fetched_files, current_caller(), request)) as answer:
            yield answer

    # Chunks

    @wide
    def GetChunk(self, caller: Caller, request: pb.GetChunkRequest) -> pb.GetChunkResponse:  # noqa: N802
        """Answer with what is known of one chunk, without its bytes of K-V."""
        chunk = self._banks.get_chunk(caller.tenant, request.bank, request.chunk_id, embedding=request.with_embedding)
        return pb.GetChunkResponse(chunk=convert.chunk_message(chunk))

    @wide
    def ListChunks(self, caller: Caller, request: pb.ListChunksRequest) -> pb.ListChunksResponse:  # noqa: N802
        """Answer with a page of chunks by id. The token is the last id of the page before; a page of large chunks is
        shorter than asked for."""
        size, after = page_size(request.page_size), number_of(request.page_token, 0)
        where = convert.filter_(request.filter)
        chunks, more = self._banks.list_chunks(
            caller.tenant, request.bank, after, size, where, embedding=request.with_embedding
        )
        token = str(chunks[-1].chunk_id) if more else ""
        return pb.ListChunksResponse(chunks=map(convert.chunk_message, chunks), next_page_token=token)

    @wide
    def UpdateChunk(self, caller: Caller, request: pb.UpdateChunkRequest) -> pb.UpdateChunkResponse:  # noqa: N802
        """Replace the metadata of a chunk."""
        chunk = self._banks.update_chunk(
            caller.tenant, request.bank, request.chunk_id, metadata.read("metadata", request)
        )
        return pb.UpdateChunkResponse(chunk=convert.chunk_message(chunk))

    @unary
    def DeleteChunks(self, caller: Caller, request: pb.DeleteChunksRequest) -> pb.DeleteChunksResponse:  # noqa: N802
        """Delete chunks by id; unknown ids are fine."""
        deleted = self._banks.delete_chunks(caller.tenant, request.bank, list(request.chunk_ids))
        return pb.DeleteChunksResponse(deleted=deleted)

    @unary
    def PinChunks(self, caller: Caller, request: pb.PinChunksRequest) -> pb.PinChunksResponse:  # noqa: N802
        """Protect chunks by id from eviction, or no longer; unknown ids are fine."""
        found = self._banks.pin_chunks(caller.tenant, request.bank, list(request.chunk_ids), request.pinned)
        return pb.PinChunksResponse(found=found)

    # Evictions

    @wide
    def ExplainEviction(self, caller: Caller, request: pb.ExplainEvictionRequest) -> pb.ExplainEvictionResponse:  # noqa: N802
        """Answer with the chunks that would go next, and with a sentence that says why."""
        if request.need < 0:
            raise invalid("need", "must not be negative")
        victims, text = self._banks.explain_eviction(caller.tenant, request.bank, request.need or 1)
        return pb.ExplainEvictionResponse(victims=map(convert.eviction_message, victims), explanation=text)

    @wide
    def ListEvictions(self, caller: Caller, request: pb.ListEvictionsRequest) -> pb.ListEvictionsResponse:  # noqa: N802
        """Answer with a page of the log of evictions, newest first; a page is as those of ListChunks."""
        size, before = page_size(request.page_size), number_of(request.page_token, LARGEST_INT64)
        log, more = self._banks.list_evictions(caller.tenant, request.bank, before, size)
        token = str(log[-1][0]) if more else ""
        evictions = [convert.eviction_message(eviction) for _, eviction in log]
        return pb.ListEvictionsResponse(evictions=evictions, next_page_token=token)

    # The service itself

    @wide
    def GetStats(self, caller: Caller, request: pb.GetStatsRequest) -> pb.GetStatsResponse:  # noqa: N802
        """Answer with the figures of this moment, of some banks or of all."""
        if request.banks:
            return self._stats.of_banks(caller, list(request.banks))
        return self._stats.page(caller, request.page_token, page_size(request.page_size, 1000))

    @wide
    def Compact(self, _caller: Caller, _: pb.CompactRequest) -> pb.CompactResponse:  # noqa: N802
        """Give the free bytes of the database back to the disk."""
        before, after = self._banks.compact()
        return pb.CompactResponse(database_bytes_before=before.taken, database_bytes=after.taken)


def _found(find: Callable[[Caller, Any], Load[T]], received: Received) -> Load[T]:
    """Find what an answer to a request is made of. Errors: those of `asked` and of `find`."""
    return find(*asked(received))
