"""The store of a data folder: the records in SQLite, with what is kept in memory beside them. This file owns that
connections, the writer's operations, counts that are not written yet and ledgers of evictions go no further up.

Changes are operations of the writer's thread, which commits them in groups; what follows a commit (the known banks, the
followers, the evictions that it makes necessary) happens in that thread too, in the order of the commits.
"""

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from memory_service.domain import validate
from memory_service.domain.clock import Clock
from memory_service.domain.errors import ServiceError, bank_not_found, not_mounted
from memory_service.domain.eviction import NOBODY
from memory_service.domain.model import Bank, Chunk, Eviction, Metadata, bank_bytes
from memory_service.storage.base import Follower, NotThereError, Retrievals, Totals, Written
from memory_service.storage.local import quarantine, quotas
from memory_service.storage.local.adding import Adding
from memory_service.storage.local.evicting.capacity import Capacities
from memory_service.storage.local.evicting.ledgers import Ledgers
from memory_service.storage.local.evicting.removal import Removal
from memory_service.storage.local.files.disk_space import DiskSpace
from memory_service.storage.local.files.objects import LocalObjects
from memory_service.storage.local.followers import Followers
from memory_service.storage.local.known_banks import KnownBanks
from memory_service.storage.local.records import bank_rows, chunk_rows, gone_rows
from memory_service.storage.local.records.records import Records
from memory_service.storage.local.records.writer import savepoint
from memory_service.storage.local.view import LocalView

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many banks there may be, and how many bytes their specs and metadata may have together."""

    banks: int
    bytes: int


@dataclass(frozen=True, slots=True)
class LocalStore:
    """Implements `memory_service.storage.base.Store` for a data folder.

    later: runs a task in the background, once.
    """

    data: Path
    bounds: Bounds
    records: Records
    known: KnownBanks
    payloads: LocalObjects
    space: DiskSpace
    followers: Followers
    removal: Removal
    ledgers: Ledgers
    capacities: Capacities
    adding: Adding
    later: Callable[[Callable[[], object]], None]

    @property
    def store_id(self) -> str:
        """Return the identity of what is stored."""
        return self.records.store_id

    @property
    def clock(self) -> Clock:
        """Return the clock by which chunks are stamped and expire."""
        return self.records.clock

    # Banks

    def create_bank(self, new: Bank) -> tuple[Bank, bool]:
        """Make a new bank; see `Store.create_bank`."""
        new = replace(new, uid=secrets.token_hex(8), created=self.clock.now_us())

        def make(connection: Connection, *, ready: bool) -> Bank | None:
            """Return the bank of this name; None for one that would be new and is not `ready`, because it has no folder
            yet."""
            if (found := _found(connection, new)) is not None:
                return found
            _check_bound("banks", self.bounds.banks, bank_rows.count(connection) + 1)
            self._check_bytes(bank_bytes(new))
            self.space.for_records().give()
            return replace(new, bank_id=bank_rows.insert(connection, new)) if ready else None

        bank = self.records.writer.submit(partial(make, ready=not new.kv.layers), self._changed).result()
        if bank is None:
            bank = self._with_folder(new, partial(make, ready=True))
        return bank, bank.uid == new.uid

    def _with_folder(self, new: Bank, make: Callable[[Connection], Bank | None]) -> Bank:
        """Make the folder of a bank's payloads, then its row: a bank that has no folder is one whose disk is
        missing."""
        try:
            self.payloads.folders.begin(new.uid)
        except NotThereError as error:
            raise not_mounted(new.name) from error
        bank: Bank | None = None
        try:
            bank = self.records.writer.submit(make, self._changed).result()
        finally:
            if bank is None or bank.uid != new.uid:
                self.later(partial(self.payloads.folders.drop, new.uid))
        assert bank is not None
        return bank

    def _check_bytes(self, more: int) -> None:
        """Refuse a bank with which all banks would take too much memory. Errors: TOO_LARGE."""
        if more > 0:
            _check_bound("bytes of specs and metadata of all banks", self.bounds.bytes, self.known.bytes + more)

    def bank(self, name: str) -> Bank:
        """Return a bank, with the usage of some earlier time. Errors: BANK_NOT_FOUND."""
        return self.known.named(name)

    def known_banks(self) -> list[Bank]:
        """Return every bank, with the usage of some earlier time."""
        return self.known.all()

    def update_bank(self, name: str, changes: Mapping[str, object]) -> Bank:
        """Replace fields of a bank; see `Store.update_bank`."""
        bank_id = self.known.named(name).bank_id

        def change(connection: Connection) -> Bank:
            bank = bank_rows.get(connection, bank_id)
            if bank is None:
                raise bank_not_found(name)
            changed = replace(bank, **changes)  # type: ignore[arg-type]
            validate.bank(changed)
            self._check_bytes(bank_bytes(changed) - bank_bytes(bank))
            if not changes.keys() <= {"capacity", "policy"}:
                self.space.for_records().give()
            bank_rows.update(connection, changed)
            if (changed.capacity, changed.policy) != (bank.capacity, bank.policy):
                # A plan under way was made for the old ones.
                gone_rows.save_plan(connection, bank_id, NOBODY)
                self.ledgers.drop(bank_id)
            return changed

        # A write behind it goes by what it says: one that knew the old capacity would make a plan for that.
        return self.records.writer.submit(change, self._changed, last=True).result()

    def _changed(self, bank: Bank | None) -> None:
        """Let what is in memory follow the commit of a bank; this runs in the writer's thread."""
        if bank is None:
            return
        self.known.put(bank)
        self.followers.changed(bank)
        self.capacities.measure(bank)

    def delete_bank(self, name: str) -> None:
        """Delete a bank with all its chunks; see `Store.delete_bank`."""
        bank = self.known.named(name)

        def remove(connection: Connection) -> None:
            # Another call may have deleted it, and a third made a bank of this name, since it was looked up.
            if not bank_rows.delete(connection, bank.bank_id):
                raise bank_not_found(name)

        def applied(_none: None) -> None:
            self.known.remove(bank)
            self.capacities.forget(bank)
            self.removal.bank_deleted(bank)

        self.records.writer.submit(remove, applied).result()

    # Writing

    def new_id(self) -> "int | Future[range]":
        """Return an id for a chunk, or a future after which there are more of them; see `Store.new_id`."""
        chunk_id = self.records.ids.take()
        return self.records.ids.refill() if chunk_id is None else chunk_id

    def room_for(self, bank: Bank, chunk: Chunk) -> "Future[None] | None":
        """Return what a write should wait for; see `Store.room_for`."""
        return self.capacities.waited_for(bank.bank_id, chunk)

    def replay_of(self, bank: Bank, key: bytes, digest: bytes) -> Written | None:
        """Look whether a key was written already; see `Store.replay_of`. Errors: KEY_REUSED."""
        return self.adding.replay_of(bank, key, digest)

    def add(self, bank: Bank, chunk: Chunk, digest: bytes) -> "Future[Written]":
        """Add a chunk to a bank; see `Store.add`."""
        return self.adding.add(bank, chunk, digest)

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
                if grown > 0:
                    quotas.check(bank, "bytes", usage.bytes - grown, grown)
                self.capacities.grown(bank, usage, chunk_id, grown)
            return True

        return self.records.writer.submit(change, lambda _: self.capacities.settle_down(bank_id)).result()

    def pin(self, bank: Bank, chunk_ids: Sequence[int], pinned: bool) -> int:
        """Protect chunks from eviction, or no longer, and return how many of them exist."""

        def change(connection: Connection) -> int:
            found = chunk_rows.pin(connection, bank.bank_id, chunk_ids, pinned, self.records.counts.unwritten())
            self.ledgers.change(bank.bank_id, lambda ledger: ledger.pin(found, pinned))
            return len(found)

        return self.records.writer.submit(change).result()

    def remove(self, bank: Bank, chunk_ids: Sequence[int]) -> "Future[list[int]]":
        """Delete chunks, and return those that existed."""
        return self.removal.remove(bank, chunk_ids, "chunks_deleted")

    def set_aside(self, bank: Bank, why: Mapping[int, str]) -> list[int]:
        """Take damaged chunks out of service; see `Store.set_aside`."""
        with self.records.read() as connection:
            quarantine.set_aside(connection, self.data, bank.uid, why)
        return self.removal.remove(bank, list(why), "chunks_quarantined", keep_files=True).result()

    def count(self, counted: Mapping[int, Retrievals]) -> None:
        """Count retrievals by chunk id; they are written with the next transaction, which begins within a second."""
        self.records.counts.add(counted)

    # Reading

    @contextmanager
    def read(self) -> Iterator[LocalView]:
        """Look at the store as it is now. Errors: Cancelled."""
        unwritten = self.records.counts.unwritten()
        with self.records.read() as connection:
            yield LocalView(connection, unwritten)

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

    def catch_up(self, banks: Sequence[Bank]) -> None:
        """Return at once, because the followers were told with the commit, before the write was acknowledged."""

    @contextmanager
    def snapshot(self, begun: Callable[[], None]) -> Iterator[LocalView]:
        """Open a view at a moment between two commits; see `Store.snapshot`."""

        def begin() -> LocalView:
            unwritten = self.records.counts.unwritten()
            opened.append(self.records.snapshot())
            begun()
            return LocalView(opened[0], unwritten)

        opened: list[Connection] = []
        try:
            yield self.records.writer.between(begin).result()
        finally:
            for connection in opened:
                connection.close()

    def in_order(self, action: Callable[[], T]) -> "Future[T]":
        """Call an action in the writer's thread, between two commits."""
        return self.records.writer.between(action)


def _found(connection: Connection, new: Bank) -> Bank | None:
    """Find the bank of the name of a new one. Errors: BANK_EXISTS, when its specs are others."""
    found = bank_rows.named(connection, new.name)
    if found is None:
        return None
    # A hidden size that is not stated is whatever the bank's is.
    other_size = new.kv.hidden_size not in (0, found.kv.hidden_size)
    if other_size or (found.kv, found.embedding) != (new.kv, new.embedding):
        text = f"there is a bank {new.name!r} with another spec"
        raise ServiceError(
            "BANK_EXISTS",
            text,
            bank_digest=found.kv.reader_digest,
            request_digest=new.kv.reader_digest,
        )
    return found


def _check_bound(what: str, limit: int, size: int) -> None:
    if size > limit:
        text = f"there would be {size} {what}; this server takes {limit}"
        raise ServiceError("TOO_LARGE", text, limit=limit, size=size)
