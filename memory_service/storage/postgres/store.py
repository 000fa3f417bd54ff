"""The store of a database: banks, chunks and their vectors. This file owns that connections and locks go no further up.

Changes are transactions of the thread that asks for them, or of one of the engine's threads where the caller gets a
future; what follows a commit in this service happens in the same thread, before the caller is told.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection

from memory_service.domain.clock import Clock
from memory_service.domain.errors import bank_not_found
from memory_service.domain.fair_threads import FairThreads
from memory_service.domain.model import Bank, Chunk, Eviction, Metadata
from memory_service.storage.base import Current, FlawedError, Follower, New, Retrievals, Seen, Totals, Written
from memory_service.storage.followers import Followers
from memory_service.storage.postgres import changing as changes
from memory_service.storage.postgres.adding import Adding
from memory_service.storage.postgres.bank_changes import BankChanges
from memory_service.storage.postgres.changing import Changing
from memory_service.storage.postgres.counting import Counting
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.evicting import Evicting
from memory_service.storage.postgres.feed import Feed
from memory_service.storage.postgres.foresight import ForesightView
from memory_service.storage.postgres.ids import ChunkIds
from memory_service.storage.postgres.removal import Removal
from memory_service.storage.postgres.rows import access_rows, aside_rows, bank_rows, chunk_rows, reserve_rows
from memory_service.storage.postgres.rows.change_rows import Changed
from memory_service.storage.postgres.statements import QUOTAS
from memory_service.storage.postgres.view import PostgresView

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PostgresStore:
    """Implements `memory_service.storage.base.Store` for a database."""

    store_id: str
    clock: Clock
    database: Database
    followers: Followers
    feed: Feed
    counting: Counting
    removal: Removal
    evicting: Evicting
    adding: Adding
    changes: BankChanges
    ids: ChunkIds
    threads: FairThreads

    @property
    def searches(self) -> bool:
        """Return True, because pgvector searches."""
        return True

    # Banks

    def create_bank(self, new: Bank) -> tuple[Bank, bool]:
        """Make a new bank; see `Store.create_bank`."""
        return self.changes.create(new)

    def bank(self, tenant: str, name: str) -> Bank:
        """Return a bank of a tenant, which the database is asked for: another service may have made it just now, or
        given its name to another one. Errors: BANK_NOT_FOUND."""
        bank = self.database.of(tenant).ask(partial(bank_rows.named, tenant=tenant, name=name))
        if bank is None:
            raise bank_not_found(name)
        return bank

    def bank_soon(self, tenant: str, name: str) -> "Future[Bank]":
        """Return the future of a bank of a tenant, for which a thread asks the database. Errors, by the future:
        BANK_NOT_FOUND."""
        return self.threads.submit(tenant, partial(self.bank, tenant, name))

    def known_banks(self) -> list[Bank]:
        """Return every bank of every tenant."""
        with self.database.read(to_the_end=True) as connection:
            return list(bank_rows.of_all(connection))

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
        chunk_id = self.ids.take()
        return self.ids.refill() if chunk_id is None else chunk_id

    def room_for(self, bank: Bank, chunk: Chunk) -> "Future[None] | None":
        """Return None, because a write that a bank must be brought down for waits when its bytes have come."""
        return None

    def replay_of(self, bank: Bank, key: bytes, digest: bytes | None) -> Written | None:
        """Look whether a key was written already; see `Store.replay_of`. Errors: KEY_REUSED."""
        return self.adding.replay_of(bank, key, digest)

    def add(self, new: Sequence[New]) -> "list[Future[Written]]":
        """Add chunks to banks; see `Store.add`."""
        return [self.adding.add(*each) for each in new]

    def set_metadata(self, bank: Bank, chunk_id: int, metadata: Metadata) -> bool:
        """Replace the metadata of a chunk; see `Store.set_metadata`."""
        unwritten = self.counting.counts.unwritten()
        crowded = False

        def change(changing: Changing) -> bool:
            nonlocal crowded
            grown = chunk_rows.update(changing.connection, bank.bank_id, chunk_id, metadata, unwritten)
            if grown is None:
                return False
            changing.grown["bytes"] += grown
            changing.write_usage()
            QUOTAS.check_growth(changing.connection, changing.bank, grown)
            crowded = self.evicting.grown(changing, grown)
            changing.tell("altered", [chunk_id])
            return True

        found = self._change(bank, change)
        if crowded:
            self.evicting.go_on(bank)
        return bool(found)

    def pin(self, bank: Bank, chunk_ids: Sequence[int], pinned: bool) -> int:
        """Protect chunks from eviction, or no longer, and return how many of them exist."""
        unwritten = self.counting.counts.unwritten()

        def change(changing: Changing) -> int:
            found = chunk_rows.pin(changing.connection, bank.bank_id, chunk_ids, pinned, unwritten)
            if found and not pinned:
                reserve_rows.forget(changing.connection, bank.bank_id)  # it lacks those that were pinned
            if found:
                changing.tell("altered", found)
            return len(found)

        return self._change(bank, change) or 0

    def _change(self, bank: Bank, change: Callable[[Changing], T]) -> T | None:
        """Change chunks of a bank in one transaction, and return its result; None where the bank is not there."""

        def operation(connection: Connection) -> tuple[Changing, Changed | None, T] | None:
            access_rows.held_tenant(connection, bank.tenant)  # before the bank, as all do who lock both
            changing = changes.begin(connection, bank)
            if changing is None:
                return None
            self.feed.begins(changing)
            result = change(changing)
            return changing, changing.write(self.clock.now_us()), result

        if (done := self.database.of(bank.tenant).change(operation)) is None:
            return None
        changing, changed, result = done
        self.feed.committed(changing, changed)
        return result

    def remove(self, bank: Bank, chunk_ids: Sequence[int]) -> "Future[list[int]]":
        """Delete chunks, and return those that existed."""
        return self.threads.submit(bank.tenant, partial(self.removal.remove, bank, chunk_ids, "chunks_deleted"))

    def set_aside(self, bank: Bank, why: Mapping[int, str]) -> list[int]:
        """Take damaged chunks out of service; see `Store.set_aside`. Their objects stay where they are."""
        keep = partial(aside_rows.keep, bank=bank, why=why, now=self.clock.now_us())
        return self.removal.remove(bank, list(why), "chunks_quarantined", before=keep, keep_objects=True)

    def count(self, counted: Mapping[int, Retrievals]) -> None:
        """Count retrievals by chunk id; they are written within a second."""
        self.counting.add(counted)

    # Reading

    @contextmanager
    def read(self, tenant: str = "", *, apart: bool = False) -> Iterator[PostgresView]:
        """Look at the store as it is now; see `Store.read`. Errors: Cancelled."""
        unwritten = self.counting.counts.unwritten()
        database = self.database.of(tenant)
        with database.look() if apart else database.read() as connection:
            yield PostgresView(connection, unwritten)

    def show_counts(self) -> None:
        """Write the retrievals that were counted, so that views that begin later show them."""
        self.counting.write()

    def explain_eviction(self, bank: Bank, need: int) -> tuple[list[Eviction], str]:
        """Return what a write would evict; see `Store.explain_eviction`."""
        return self.evicting.explain(bank, need)

    def totals(self) -> Totals:
        """Add up what all banks hold."""
        return Totals(*self.database.ask(bank_rows.totals), stalled=self.evicting.stalled)

    # What is derived from the store

    def follow(self, follower: Follower) -> None:
        """Tell a follower of every commit from here on."""
        self.followers.append(follower)

    def current(self, tenant: str, names: Sequence[str]) -> list[Current]:
        """Return banks of a tenant as they are now, when the followers know all that was acknowledged of them. Errors:
        BANK_NOT_FOUND."""
        unwritten = self.counting.counts.unwritten()
        ask = partial(bank_rows.current, tenant=tenant, names=names, now=unwritten.now)
        found = self.database.of(tenant).ask(ask)
        if missing := [name for name in names if name not in found]:
            raise bank_not_found(missing[0])
        banks = [found[name] for name in names]
        self.feed.bring_up([bank for bank, _, _ in banks], [head for _, head, _ in banks])
        for bank, head, _ in banks:
            self.feed.read(bank, head)
        return [Current(bank, chunk_rows.expired_of(expiring, unwritten)) for bank, _, expiring in banks]

    def foreseen(self, tenant: str, name: str, look: Callable[[Bank, PostgresView], T | None]) -> T | None:
        """Return what a look at a bank returns that is taken for what the followers know of it; see `Store.foreseen`.
        Errors: Cancelled; those of the look."""
        if (known := self.feed.known(tenant, name)) is None:
            return None
        unwritten = self.counting.counts.unwritten()

        def ask(connection: Connection) -> T | None:
            view = ForesightView(connection, unwritten, known)
            try:
                found = look(known.bank, view)
            except FlawedError:
                # Else they are rows of another bank: a database that was put back has given it the id of this one.
                if view.holds():
                    raise
                return None
            return found if found is not None and view.holds() else None

        return self.database.of(tenant).ask(ask, to_the_end=False)

    def catch_up(self, banks: Sequence[Bank]) -> None:
        """Return when the followers know all that was acknowledged of these banks, by any service."""
        self.feed.catch_up(banks)

    @contextmanager
    def snapshot(self, bank: Bank, begun: Callable[[], None]) -> Iterator[PostgresView]:
        """Open a view at a moment between two commits; see `Store.snapshot`."""
        unwritten = self.counting.counts.unwritten()
        with self.feed.at_one_moment(bank, begun) as connection:
            yield PostgresView(connection, unwritten)

    def in_order(self, bank: Bank, action: Callable[[], T]) -> "Future[T]":
        """Call an action in a thread while nothing is told of a bank."""
        return self.threads.submit(bank.tenant, partial(self.feed.in_order, bank, action))
