"""A view of the local store: one read transaction of SQLite, together with the retrievals that were counted and are not
in the rows yet. This file owns that no statement outside this engine sees either of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from sqlalchemy import Connection

from memory_service.domain.answer_size import HeaderSize, HeaderTooLarge
from memory_service.domain.model import Bank, Chunk, Eviction, Filter
from memory_service.storage.base import Ids, Vectors
from memory_service.storage.chunks.counts import Unwritten
from memory_service.storage.chunks.known_chunks import KnownChunks
from memory_service.storage.local.records import bank_rows, chunk_rows, gone_rows

# Rows of so many bytes together are read with the search that has found them: an answer of no more waits for no turn.
_SHORT_BYTES = 64 * 1024


class LocalView:
    """Implements `memory_service.storage.base.View` over one read transaction."""

    def __init__(self, connection: Connection, unwritten: Unwritten, known: KnownChunks) -> None:
        """Look through a connection. unwritten: taken before the transaction of the connection has begun to read.
        known: chunks that were read before."""
        self._connection = connection
        self._unwritten = unwritten
        self._known = known

    def exists(self, bank: Bank) -> bool:
        """Tell whether a bank is there, and not deleted."""
        return bank_rows.usage(self._connection, bank.bank_id) is not None

    def bank(self, bank_id: int) -> Bank | None:
        """Read a bank by its id, with its usage; None where it is not there."""
        return bank_rows.get(self._connection, bank_id)

    def banks(self, tenant: str, after: str = "") -> Iterator[Bank]:
        """Read the banks of a tenant with their usage, by name, from the first one after the name `after`."""
        return bank_rows.after(self._connection, tenant, after)

    def banks_of_all(self, tenant: str = "", name: str = "") -> Iterator[Bank]:
        """Read the banks of all tenants with their usage, by tenant and name, from the first one after these."""
        return bank_rows.of_all(self._connection, tenant, name)

    def chunk(self, bank: Bank, chunk_id: int, *, embedding: bool = False) -> Chunk | None:
        """Read a chunk of a bank; None where it is not there. Errors: FlawedError."""
        return chunk_rows.get(self._connection, bank, chunk_id, self._unwritten, embedding=embedding)

    def chunks(self, bank: Bank, chunk_ids: Iterable[int]) -> Iterator[Chunk]:
        """Read those of the chunks that are there, in no order and without embeddings. Errors: FlawedError."""
        return chunk_rows.found(self._connection, bank, chunk_ids, self._unwritten, self._known)

    def page(self, bank: Bank, after: int, where: Filter, *, embedding: bool) -> Iterator[Chunk]:
        """Read the chunks that a filter lets pass, ascending by id, from the first one after `after`. Errors:
        FlawedError."""
        return chunk_rows.page(self._connection, bank, after, where, self._unwritten, embedding=embedding)

    def message_bytes(self, times: Mapping[int, int]) -> tuple[int, int]:
        """Return the least and the most bytes that chunks take in messages, each id so many times."""
        return chunk_rows.message_bytes(self._connection, times)

    def ids(self, bank: Bank) -> Ids:
        """Return the ids of all chunks of a bank, expired ones included."""
        return chunk_rows.ids(self._connection, bank.bank_id)

    def vectors(self, bank: Bank, ids: Ids) -> tuple[Ids, Vectors]:
        """Return those of the ids that are there, ascending, and their embeddings [m, d]. Errors: FlawedError."""
        return chunk_rows.vectors(self._connection, bank, ids)

    def seen(self, bank: Bank, chunk_ids: Sequence[int]) -> list[Chunk]:
        """Return those of the chunks that have not expired, where all are short together; see `View.seen`. Errors:
        FlawedError."""
        size, seen = HeaderSize(_SHORT_BYTES), list[Chunk]()
        with suppress(HeaderTooLarge):
            for chunk in self.chunks(bank, chunk_ids) if chunk_ids else ():
                size.add(chunk)
                seen.append(chunk)
            return seen
        return []

    def nearest(self, _bank: Bank, _query: Vectors, _most: int, _allowed: Ids | None, _excluded: Ids) -> None:
        """Return None, because SQLite does not search by vectors."""

    def expired(self, bank: Bank) -> Ids:
        """Return the ids of chunks that have expired and are not removed yet."""
        return chunk_rows.expired_ids(self._connection, bank.bank_id, self._unwritten)

    def matching(self, bank: Bank, where: Filter, among: Sequence[int] | None = None) -> Ids:
        """Return the ids of chunks that a filter lets pass; see `View.matching`. Errors: FlawedError."""
        return chunk_rows.matching_ids(self._connection, bank, where, among)

    def evictions(self, bank: Bank, before: int) -> Iterator[tuple[int, Eviction]]:
        """Read (sequence, eviction) from the log of a bank, newest first, from the first one before `before`."""
        return gone_rows.evictions(self._connection, bank.bank_id, before)
