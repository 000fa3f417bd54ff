"""The store of a data folder: the records in SQLite, with what is kept in memory beside them. This file owns that
connections, the writer's operations, counts that are not written yet and ledgers of evictions go no further up.

Changes are operations of the writer's thread, which commits them in groups; what follows a commit (the known banks, the
followers, the evictions that it makes necessary) happens in that thread too, in the order of the commits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from memory_service.domain.clock import Clock
from memory_service.domain.errors import ServiceError
from memory_service.domain.model import Bank, Chunk, Eviction, Metadata
from memory_service.storage.base import Current, Follower, New, Retrievals, Seen, Totals, Written
from memory_service.storage.chunks.known_chunks import KnownChunks
from memory_service.storage.followers import Followers
from memory_service.storage.local import quarantine
from memory_service.storage.local.adding import Adding
from memory_service.storage.local.bank_changes import BankChanges
from memory_service.storage.local.evicting.capacity import Capacities
from memory_service.storage.local.evicting.ledgers import Ledgers
from memory_service.storage.local.evicting.removal import Removal
from memory_service.storage.local.files.disk_space import DiskSpace
from memory_service.storage.local.known_banks import KnownBanks
from memory_service.storage.local.records import bank_rows, chunk_rows
from memory_service.storage.local.records.records import Records
from memory_service.storage.local.records.writer import savepoint
from memory_service.storage.local.rows import QUOTAS
from memory_service.storage.local.syncing import Syncing
from memory_service.storage.local.view import LocalView

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LocalStore:
    """Implements `memory_service.storage.base.Store` for a data folder.

    data: where quarantine is.
    """

    data: Path
    records: Records
    known: KnownBanks
    space: DiskSpace
    followers: Followers
    removal: Removal
    ledgers: Ledgers
    capacities: Capacities
    adding: Adding
    changes: BankChanges
    known_chunks: KnownChunks
    syncing: Syncing

    @property
    def store_id(self) -> str:
        """Return the identity of what is stored."""
        return self.records.store_id

    @property
    def clock(self) -> Clock:
        """Return the clock by which chunks are stamped and expire."""
        return self.records.clock

    @property
    def searches(self) -> bool:
        """Return False, because SQLite does not search by vectors."""
        return False

    # Banks

    def create_bank(self, new: Bank) -> tuple[Bank, bool]:
        """Make a new bank; see `Store.create_bank`."""
        return self.changes.create(new)

    def bank(self, tenant: str, name: str) -> Bank:
        """Return a bank of a tenant, with the usage of some earlier time. Errors: BANK_NOT_FOUND."""
        return self.known.named(tenant, name)

    def bank_soon(self, tenant: str, name: str) -> Bank:
        """Return a bank of a tenant, which is in memory. Errors: BANK_NOT_FOUND."""
        return self.known.named(tenant, name)

    def known_banks(self) -> list[Bank]:
        """Return every bank of every tenant, with the usage of some earlier time."""
        return self.known.all()

    def update_bank(self, tenant: str, name: str, changes: Mapping[str, object]) -> Bank:
        """Replace fields of a bank; see `Store.update_bank`."""
        return self.changes.update(tenant, name, changes)

    def delete_bank(self, tenant: str, name: str) -> None:
        """Delete a bank with all its chunks; see `Store.delete_bank`."""
        self.changes.delete(tenant, name)

    def replace_bank(self, tenant: str, seen: Seen, by: str, by_uid: str, metadata: Metadata) -> Bank:
        """Delete a bank and give its name to another one; see `Store.replace_bank`."""
        return self.changes.replace(tenant, seen, by, by_uid, metadata)

    # Writing

    def new_id(self) -> "int | Future[range]":
        """Return an id for a chunk, or a future after which there are more of them; see `Store.new_id`."""
        chunk_id = self.records.ids.take()
        return self.records.ids.refill() if chunk_id is None else chunk_id

    def room_for(self, bank: Bank, chunk: Chunk) -> "Future[None] | None":
        """Return what a write should wait for; see `Store.room_for`."""
        return self.capacities.waited_for(bank.bank_id, chunk)

    def replay_of(self, bank: Bank, key: bytes, digest: bytes | None) -> Written | None:
        """Look whether a key was written already; see `Store.replay_of`. Errors: KEY_REUSED."""
        return self.adding.replay_of(bank, key, digest)

    def add(self, new: Sequence[New]) -> "list[Future[Written]]":
        """Add chunks to banks; see `Store.add`."""
        return self.adding.add(new)

    def set_metadata(self, bank: Bank, chunk_id: int, metadata: Metadata) -> bool:
        """Replace the metadata of a chunk; see `Store.set_metadata`."""
        bank_id = bank.bank_id
        self.space.for_records().give()

        def change(connection: Connection) -> bool:
            bank = self.known.current(bank_id)
            with savepoint(connection):  # a refusal takes the metadata back
                grown = chunk_rows.update(connection, bank_id, chunk_id, metadata, self.records.counts.unwritten())
                usage = bank_rows.usage(connection, bank_id)
                if grown is None or usage is None or bank is None:
                    return False
                QUOTAS.check_growth(connection, bank, grown)
                self.capacities.grown(bank, usage, chunk_id, grown)
            return True

        def applied(_: bool) -> None:
            self.followers.altered(bank, [chunk_id])
            self.capacities.settle_down(bank_id)

        return self.records.writer.submit(change, applied, tenant=bank.tenant).result()

    def pin(self, bank: Bank, chunk_ids: Sequence[int], pinned: bool) -> int:
        """Protect chunks from eviction, or no longer, and return how many of them exist."""

        def change(connection: Connection) -> int:
            found = chunk_rows.pin(connection, bank.bank_id, chunk_ids, pinned, self.records.counts.unwritten())
            self.ledgers.change(bank.bank_id, lambda ledger: ledger.pin(found, pinned))
            return len(found)

        def applied(_: int) -> None:
            self.followers.altered(bank, chunk_ids)

        return self.records.writer.submit(change, applied, tenant=bank.tenant).result()

    def remove(self, bank: Bank, chunk_ids: Sequence[int]) -> "Future[list[int]]":
        """Delete chunks, and return those that existed."""
        return self.removal.remove(bank, chunk_ids, "chunks_deleted")

    def set_aside(self, bank: Bank, why: Mapping[int, str]) -> list[int]:
        """Take damaged chunks out of service; see `Store.set_aside`. Errors: STORAGE_ERROR."""
        if made := self.syncing.mend(bank.uid, list(why)):
            text = f"the file of chunk {min(made)} was damaged, and has been made again; ask again"
            raise ServiceError("STORAGE_ERROR", text, errno="ENOENT")
        with self.records.read() as connection:
            quarantine.set_aside(connection, self.data, bank.uid, why)
        if self.known.current(bank.bank_id) is None:  # deleted meanwhile, with what quarantine had then
            quarantine.drop(self.data, bank.uid)
        return self.removal.remove(bank, list(why), "chunks_quarantined", keep_files=True).result()

    def count(self, counted: Mapping[int, Retrievals]) -> None:
        """Count retrievals by chunk id; they are written with the next transaction, which begins within a second."""
        self.records.counts.add(counted)

    # Reading

    @contextmanager
    def read(self, tenant: str = "", *, apart: bool = False) -> Iterator[LocalView]:
        """Look at the store as it is now. Errors: Cancelled."""
        unwritten = self.records.counts.unwritten()
        with self.records.read() as connection:
            yield LocalView(connection, unwritten, self.known_chunks)

    def show_counts(self) -> None:
        """Write the retrievals that were counted, so that views that begin later show them."""
        self.records.show_counts()

    def explain_eviction(self, bank: Bank, need: int) -> tuple[list[Eviction], str]:
        """Return what a write would evict; see `Store.explain_eviction`."""
        return self.capacities.explain(bank, need)

    def totals(self) -> Totals:
        """Add up what all banks hold."""
        with self.records.read() as connection:
            return Totals(*bank_rows.totals(connection), stalled=self.capacities.stalled)

    # What is derived from the store

    def follow(self, follower: Follower) -> None:
        """Tell a follower of every commit from here on."""
        self.followers.append(follower)

    def current(self, tenant: str, names: Sequence[str]) -> list[Current]:
        """Return banks of a tenant, of whose commits followers are told as soon as they happen. Errors:
        BANK_NOT_FOUND."""
        return [Current(self.known.named(tenant, name)) for name in names]

    def foreseen(self, _tenant: str, _name: str, _look: Callable[[Bank, LocalView], T | None]) -> None:
        """Return None, because what is current is known without a question."""

    def catch_up(self, banks: Sequence[Bank]) -> None:
        """Return at once, because the followers were told with the commit, before the write was acknowledged."""

    @contextmanager
    def snapshot(self, bank: Bank, begun: Callable[[], None]) -> Iterator[LocalView]:
        """Open a view at a moment between two commits; see `Store.snapshot`."""

        def begin() -> LocalView:
            unwritten = self.records.counts.unwritten()
            opened.append(self.records.snapshot())
            begun()
            return LocalView(opened[0], unwritten, self.known_chunks)

        opened: list[Connection] = []
        try:
            yield self.records.writer.between(begin).result()
        finally:
            for connection in opened:
                connection.close()

    def in_order(self, bank: Bank, action: Callable[[], T]) -> "Future[T]":
        """Call an action in the writer's thread, between two commits to any bank."""
        return self.records.writer.between(action)
