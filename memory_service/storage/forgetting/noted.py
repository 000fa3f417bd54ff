"""A forgetting under way: the row that says so, and the counts of its receipt. This file owns that each step and its
count are one transaction, so that a receipt is right also where a kill came between two steps."""

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection

from memory_service.domain.forgetting import ForgottenChunk, Receipt
from memory_service.domain.model import Bank
from memory_service.storage.chunks.payload_json import payload_of
from memory_service.storage.forgetting.receipt_row import Pending
from memory_service.storage.forgetting.rows import ReceiptRows
from memory_service.storage.sessions.turn_row import Gone
from memory_service.storage.transactions import Transactions

T = TypeVar("T")


class Removed(Protocol):
    """Rows of chunks that were removed: their ids, and the tokens and bytes that they had together."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Noted:
    """A forgetting that is written down. what: its row."""

    records: Transactions
    rows: ReceiptRows
    what: Pending

    @property
    def tenant(self) -> str:
        """Return the tenant in which something is forgotten."""
        return self.what.tenant

    @property
    def work(self) -> Mapping[str, Any]:
        """Return what is to be done."""
        return self.what.work

    def ids(self) -> list[int]:
        """Return the ids of the chunks that are to be forgotten."""
        with self.records.read(to_the_end=True) as connection:
            return self.rows.ids_of(connection, self.what.receipt_id)

    def receipt(self) -> Receipt:
        """Return what is gone so far."""
        with self.records.read(to_the_end=True) as connection:
            return self.rows.get(connection, self.what.receipt_id)

    def step(self, operation: Callable[[Connection], T]) -> T:
        """Run an operation in a durable transaction."""
        return self.records.change(operation, tenant=self.tenant, durable=True)

    def add(self, **went: Any) -> None:
        """Count what went elsewhere than in rows; see `Receipt.plus`."""
        self.step(partial(self.count, **went))

    def count(self, connection: Connection, **went: Any) -> None:
        """Count what goes in a transaction; see `Receipt.plus`."""
        if any(went.values()):
            receipt = self.rows.get(connection, self.what.receipt_id)
            self.rows.save(connection, receipt.plus(**went))

    def until_none(self, some: Callable[[Connection], Gone]) -> None:
        """Let turns go, some in each transaction, until none is left."""

        def step(connection: Connection) -> int:
            gone = some(connection)
            self.count(connection, turns=gone.turns, tokens=gone.tokens, size=gone.size, rows=gone.turns)
            return gone.turns

        while self.step(step):
            pass

    def count_chunks(
        self,
        bank: Bank,
        attended: Set[int],
        tokens: bool,
        connection: Connection,
        removed: Removed,
        payloads: Mapping[int, str | None],
    ) -> None:
        """Count chunks of a bank that go in a transaction. attended: of those that had attended to what is forgotten,
        with others. tokens: whether those of the chunks count. payloads: descriptors by chunk id."""
        again = len(attended & set(removed.ids))
        named = [ForgottenChunk(bank.name, chunk_id, checksum_of(payloads.get(chunk_id))) for chunk_id in removed.ids]
        went = {"chunks": named, "size": removed.bytes, "tokens": removed.tokens if tokens else 0, "again": again}
        objects = sum(payload is not None for payload in payloads.values())
        self.count(connection, **went, rows=len(removed.ids), objects=objects)

    def done(self) -> None:
        """Note that all is gone."""
        self.step(partial(self.rows.done, receipt_id=self.what.receipt_id))


def checksum_of(payload: str | None) -> int:
    """Return the checksum that a descriptor has; 0 for none, and for one that is damaged."""
    with suppress(ValueError, TypeError, KeyError):
        found = payload_of(payload)
        return 0 if found is None else found.checksum
    return 0
