"""How rules that engines share reach the rows of an engine: in transactions, on a connection of SQLAlchemy."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from sqlalchemy import Connection

T = TypeVar("T")


class Transactions(Protocol):
    """Runs what reads and what changes the rows of an engine."""

    def of(self, tenant: str) -> "Transactions":
        """Return what runs the same on the rows of one tenant: an engine may keep those of others from it."""

    def read(self, *, to_the_end: bool = False) -> AbstractContextManager[Connection]:
        """Begin a read transaction, which sees the rows of one moment. Errors: Cancelled, when the caller has gone,
        unless the block is to run to the end."""

    def change(self, operation: Callable[[Connection], T], *, tenant: str = "", durable: bool = False) -> T:
        """Run an operation in one transaction, and return its result. The operations of one tenant come one after the
        other; one that raises has changed nothing. An operation has no effect but on rows: it is run again where its
        transaction could not be committed because of others. durable: whether what it has changed must outlast a power
        cut whatever the settings say of chunks."""


class BankDeletion(Protocol):
    """Deletes banks, as those of sessions and of tenants that go."""

    def delete(self, tenant: str, name: str) -> None:
        """Delete a bank with all its chunks. Errors: BANK_NOT_FOUND."""

    def delete_all_of(self, tenant: str, before: Callable[[Connection], None]) -> int:
        """Delete all banks of a tenant in one step with what `before` does, which refuses it where it raises, and
        return how many there were."""
