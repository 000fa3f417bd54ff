"""How banks are made, changed and deleted in the local store. This file owns that a bank with K-V has the folder of its
payloads before its row, and what follows the commit of a bank: what is known of it in memory, the followers, its
evictions."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from sqlalchemy import Connection

from memory_service.domain import validate
from memory_service.domain.errors import bank_not_found, not_mounted
from memory_service.domain.eviction import NOBODY
from memory_service.domain.model import Bank, Metadata, bank_bytes
from memory_service.storage.banks import agreement
from memory_service.storage.base import NotThereError, Seen
from memory_service.storage.followers import Followers
from memory_service.storage.local.evicting.capacity import Capacities
from memory_service.storage.local.evicting.ledgers import Ledgers
from memory_service.storage.local.evicting.removal import Removal
from memory_service.storage.local.files.disk_space import DiskSpace
from memory_service.storage.local.files.objects import LocalObjects
from memory_service.storage.local.known_banks import KnownBanks
from memory_service.storage.local.records import bank_rows, gone_rows
from memory_service.storage.local.records.records import Records
from memory_service.storage.local.rows import QUOTAS


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many banks there may be, and how many bytes their specs and metadata may have together."""

    banks: int
    bytes: int


@dataclass(frozen=True, slots=True)
class BankChanges:
    """Makes, changes and deletes the banks of a data folder.

    later: runs a task in the background, once.
    """

    bounds: Bounds
    records: Records
    known: KnownBanks
    payloads: LocalObjects
    space: DiskSpace
    followers: Followers
    removal: Removal
    ledgers: Ledgers
    capacities: Capacities
    later: Callable[[Callable[[], object]], None]

    def create(self, new: Bank) -> tuple[Bank, bool]:
        """Make a new bank; see `Store.create_bank`."""
        new = replace(new, uid=secrets.token_hex(8), created=self.records.clock.now_us())

        def make(connection: Connection, *, ready: bool) -> Bank | None:
            """Return the bank of this name; None for one that would be new and is not `ready`, because it has no folder
            yet."""
            found = bank_rows.named(connection, new.tenant, new.name)
            if found is not None:
                agreement.check_same(found, new)
                return found
            QUOTAS.check_bank(connection, new)
            agreement.check_bound("banks of all tenants", self.bounds.banks, bank_rows.count(connection) + 1)
            self._check_bytes(bank_bytes(new))
            self.space.for_records().give()
            return replace(new, bank_id=bank_rows.insert(connection, new)) if ready else None

        bank = self.records.writer.submit(
            partial(make, ready=not new.kv.layers), self._changed, tenant=new.tenant
        ).result()
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
            bank = self.records.writer.submit(make, self._changed, tenant=new.tenant).result()
        finally:
            if bank is None or bank.uid != new.uid:
                self.later(partial(self.payloads.folders.drop, new.uid))
        assert bank is not None
        return bank

    def _check_bytes(self, more: int) -> None:
        """Refuse a bank with which all banks would take too much memory. Errors: TOO_LARGE."""
        if more > 0:
            agreement.check_bound(
                "bytes of specs and metadata of all tenants", self.bounds.bytes, self.known.bytes + more
            )

    def update(self, tenant: str, name: str, changes: Mapping[str, object]) -> Bank:
        """Replace fields of a bank; see `Store.update_bank`."""
        bank_id = self.known.named(tenant, name).bank_id

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
        return self.records.writer.submit(change, self._changed, tenant=tenant, last=True).result()

    def _changed(self, bank: Bank | None) -> None:
        """Let what is in memory follow the commit of a bank; this runs in the writer's thread."""
        if bank is None:
            return
        self.known.put(bank)
        self.followers.changed(bank)
        self.capacities.measure(bank)

    def delete(self, tenant: str, name: str, before: Callable[[Connection], object] = lambda _: None) -> None:
        """Delete a bank with all its chunks, in one step with what `before` does; see `Store.delete_bank`."""
        bank = self.known.named(tenant, name)

        def remove(connection: Connection) -> None:
            before(connection)
            # Another call may have deleted it, and a third made a bank of this name, since it was looked up.
            if not bank_rows.delete(connection, bank.bank_id):
                raise bank_not_found(name)

        self.records.writer.submit(remove, lambda _: self._deleted(bank), tenant=tenant).result()

    def replace(self, tenant: str, seen: Seen, by: str, by_uid: str, metadata: Metadata) -> Bank:
        """Delete a bank and give its name to another one; see `Store.replace_bank`."""

        def change(connection: Connection) -> tuple[Bank | None, Bank]:
            old = bank_rows.named(connection, tenant, seen.name)
            if old is not None and old.uid == by_uid:
                return None, old
            new = bank_rows.named(connection, tenant, by)
            if old is None or new is None:
                raise bank_not_found(seen.name if old is None else by)
            agreement.check_seen(old, seen, new, by_uid)
            kept = {name: getattr(old, name) for name in ("name", "capacity", "policy", "quota", "expiry", "index")}
            changed = replace(new, metadata=metadata, **kept)
            validate.bank(changed)
            self._check_bytes(bank_bytes(changed) - bank_bytes(new) - bank_bytes(old))
            bank_rows.delete(connection, old.bank_id)
            bank_rows.update(connection, changed)
            # A plan under way was made for other settings.
            gone_rows.save_plan(connection, new.bank_id, NOBODY)
            self.ledgers.drop(new.bank_id)
            return old, changed

        def applied(banks: tuple[Bank | None, Bank]) -> None:
            old, bank = banks
            if old is not None:
                self._deleted(old)
                self._changed(bank)

        return self.records.writer.submit(change, applied, tenant=tenant, last=True).result()[1]

    def delete_all_of(self, tenant: str, before: Callable[[Connection], None]) -> int:
        """Delete all banks of a tenant in one step with what `before` does, which refuses it where it raises, and
        return how many there were."""

        def remove(connection: Connection) -> list[Bank]:
            before(connection)
            banks = list(bank_rows.after(connection, tenant))
            for bank in banks:
                bank_rows.delete(connection, bank.bank_id)
            return banks

        def applied(banks: list[Bank]) -> None:
            for bank in banks:
                self._deleted(bank)

        return len(self.records.writer.submit(remove, applied, tenant=tenant, durable=True).result())

    def _deleted(self, bank: Bank) -> None:
        """Let what is in memory, and what the bank held, follow its deletion; this runs in the writer's thread."""
        self.known.remove(bank)
        self.capacities.forget(bank)
        self.removal.bank_deleted(bank)
