"""How banks are made, changed and deleted. This file owns that those of one tenant come one after the other, in all
services, and what follows the commit of each: followers and evictions."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from memory_service.domain import validate
from memory_service.domain.errors import bank_not_found, invalid
from memory_service.domain.model import Bank, Metadata, bank_bytes
from memory_service.storage.banks import agreement
from memory_service.storage.base import Seen
from memory_service.storage.postgres import changing as changes
from memory_service.storage.postgres.changing import Changing
from memory_service.storage.postgres.database import Database, raw
from memory_service.storage.postgres.evicting import Evicting
from memory_service.storage.postgres.feed import Feed
from memory_service.storage.postgres.removal import Removal
from memory_service.storage.postgres.rows import bank_rows, gone_rows
from memory_service.storage.postgres.rows.change_rows import Changed
from memory_service.storage.postgres.schema import BANKS_LOCK, LARGEST_DIMENSION
from memory_service.storage.postgres.statements import QUOTAS

# A bank that a transaction has changed: how, and as it is now.
_Done = tuple[Changing, Changed | None, Bank]


@dataclass(frozen=True, slots=True)
class BankChanges:
    """Makes, changes and deletes banks; implements `memory_service.storage.transactions.BankDeletion`.

    most, most_bytes: how many banks there may be, and how many bytes their specs and metadata may have together.
    """

    most: int
    most_bytes: int
    database: Database
    feed: Feed
    removal: Removal
    evicting: Evicting

    def create(self, new: Bank) -> tuple[Bank, bool]:
        """Make a new bank; see `Store.create_bank`."""
        if new.embedding.dimension > LARGEST_DIMENSION:
            text = f"must be at most {LARGEST_DIMENSION} in a database with pgvector"
            raise invalid("bank.embedding.dimension", text)
        new = replace(new, uid=secrets.token_hex(8), created=self.removal.now())

        def make(connection: Connection) -> Bank:
            found = bank_rows.named(connection, new.tenant, new.name)
            if found is not None:
                agreement.check_same(found, new)
                return found
            QUOTAS.check_bank(connection, new)
            self._check_bounds(connection, 1, bank_bytes(new))
            return replace(new, bank_id=bank_rows.insert(connection, new))

        bank = self.database.change(make, tenant=new.tenant)
        if bank.uid == new.uid:
            self.feed.created(bank)
        return bank, bank.uid == new.uid

    def _check_bounds(self, connection: Connection, more: int, more_bytes: int) -> None:
        """Refuse what would be too much for all tenants together. Errors: TOO_LARGE."""
        if more <= 0 and more_bytes <= 0:
            return
        raw(connection).execute(f"SELECT pg_advisory_xact_lock({BANKS_LOCK})")
        banks, size = bank_rows.size_of_all(connection)
        if more > 0:
            agreement.check_bound("banks of all tenants", self.most, banks + more)
        if more_bytes > 0:
            what = "bytes of specs and metadata of all tenants"
            agreement.check_bound(what, self.most_bytes, size + more_bytes)

    def update(self, tenant: str, name: str, changed: Mapping[str, object]) -> Bank:
        """Replace fields of a bank; see `Store.update_bank`."""

        def change(connection: Connection) -> _Done:
            found = bank_rows.named(connection, tenant, name)
            changing = None if found is None else changes.begin(connection, found)
            if changing is None:
                raise bank_not_found(name)
            bank = replace(changing.bank, **changed)  # type: ignore[arg-type]
            validate.bank(bank)
            return self._rewritten(changing, bank, bank_bytes(bank) - bank_bytes(changing.bank))

        return self._changed(self.database.change(change, tenant=tenant))

    def _rewritten(self, changing: Changing, bank: Bank, grown: int) -> _Done:
        """Write what a bank says of itself now. grown: by how many bytes of specs and metadata all banks grow."""
        self.feed.begins(changing)
        self._check_bounds(changing.connection, 0, grown)
        bank_rows.update(changing.connection, bank)
        if (bank.capacity, bank.policy) != (changing.bank.capacity, changing.bank.policy):
            # A plan under way was made for the old ones.
            gone_rows.forget_plan(changing.connection, bank.bank_id)
        changing.tell("bank")
        return changing, changing.write(self.removal.now()), bank

    def _changed(self, done: _Done) -> Bank:
        """Let followers and evictions follow the commit of a bank."""
        changing, changed, bank = done
        self.feed.committed(changing, changed, bank)
        if bank.capacity is not None and getattr(bank.usage, bank.capacity.unit) > bank.capacity.limit:
            self.evicting.go_on(bank)
        return bank

    def delete(self, tenant: str, name: str) -> None:
        """Delete a bank with all its chunks; see `Store.delete_bank`."""

        def remove(connection: Connection) -> Bank:
            bank = bank_rows.named(connection, tenant, name, lock=True)
            if bank is None:
                raise bank_not_found(name)
            bank_rows.delete(connection, bank)
            return bank

        self.removal.bank_deleted(self.database.change(remove, tenant=tenant))

    def replace(self, tenant: str, seen: Seen, by: str, by_uid: str, metadata: Metadata) -> Bank:
        """Delete a bank and give its name to another one; see `Store.replace_bank`."""

        def change(connection: Connection) -> tuple[Bank | None, _Done | Bank]:
            old = bank_rows.named(connection, tenant, seen.name, lock=True)
            if old is not None and old.uid == by_uid:
                return None, old
            new = bank_rows.named(connection, tenant, by)
            changing = None if new is None else changes.begin(connection, new)
            if old is None or changing is None:
                raise bank_not_found(seen.name if old is None else by)
            agreement.check_seen(old, seen, changing.bank, by_uid)
            kept = {name: getattr(old, name) for name in ("name", "capacity", "policy", "quota", "expiry", "index")}
            bank = replace(changing.bank, metadata=metadata, **kept)
            validate.bank(bank)
            bank_rows.delete(connection, old)
            gone_rows.forget_plan(connection, bank.bank_id)
            return old, self._rewritten(changing, bank, bank_bytes(bank) - bank_bytes(changing.bank) - bank_bytes(old))

        old, done = self.database.change(change, tenant=tenant)
        if isinstance(done, Bank):
            return done
        if old is not None:
            self.removal.bank_deleted(old)
        return self._changed(done)

    def delete_all_of(self, tenant: str, before: Callable[[Connection], None]) -> int:
        """Delete all banks of a tenant in one step with what `before` does, which refuses it where it raises, and
        return how many there were."""

        def remove(connection: Connection) -> list[Bank]:
            before(connection)
            banks = list(bank_rows.after(connection, tenant))
            return [bank for bank in banks if bank_rows.delete(connection, bank)]

        gone = self.database.change(remove, tenant=tenant, durable=True)
        for bank in gone:
            self.removal.bank_deleted(bank)
        return len(gone)
