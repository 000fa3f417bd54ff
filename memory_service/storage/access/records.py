"""The tenants and API keys of an engine, in the same database as its banks, so that a tenant goes with its banks in one
step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Connection

from memory_service.domain.access import ApiKey, KeyPlace
from memory_service.domain.clock import Clock
from memory_service.domain.errors import ServiceError, tenant_not_found
from memory_service.domain.tenants import DEFAULT_TENANT, Tenant, TenantQuota, TenantUsage
from memory_service.storage.access.rows import AccessRows, delete_tenant
from memory_service.storage.base import Space
from memory_service.storage.quotas import Quotas
from memory_service.storage.sessions.windows import SessionWindows
from memory_service.storage.transactions import BankDeletion, Transactions

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Access:
    """Implements `memory_service.storage.base.AccessRecords` over rows.

    windows: those of sessions, of which some go with a tenant. is_going: tells whether a tenant of a name is being
    forgotten.
    """

    records: Transactions
    clock: Clock
    rows: AccessRows
    quotas: Quotas
    space: Space
    banks: BankDeletion
    windows: SessionWindows
    is_going: Callable[[Connection, str], bool]

    # Tenants

    def tenants(self) -> list[Tenant]:
        """Return all tenants, by name."""
        with self.records.read() as connection:
            return list(self.rows.tenants(connection))

    def tenant(self, name: str) -> Tenant:
        """Return the tenant of a name. Errors: TENANT_NOT_FOUND."""
        with self.records.read() as connection:
            return self._tenant(connection, name)

    def tenant_usage(self, name: str) -> TenantUsage:
        """Add up what the banks of a tenant hold now."""
        with self.records.read() as connection:
            return self.rows.usage(connection, name)

    def add_tenant(self, name: str, quota: TenantQuota) -> Tenant:
        """Make a tenant, which has no banks yet. Errors: TENANT_EXISTS, DISK_FULL."""
        self.space.for_records().give()
        new = Tenant(name, quota, self.clock.now_us())

        def add(connection: Connection) -> Tenant:
            if self.is_going(connection, name):
                text = f"a tenant {name!r} is being forgotten; make it when that is done"
                raise ServiceError("TENANT_EXISTS", text, tenant=name)
            if not self.rows.insert_tenant(connection, new):
                raise ServiceError("TENANT_EXISTS", f"there is a tenant {name!r} already", tenant=name)
            return new

        return self._change(add, name)

    def set_tenant_quota(self, name: str, quota: TenantQuota) -> Tenant:
        """Replace the quota of a tenant. Errors: TENANT_NOT_FOUND."""

        def change(connection: Connection) -> Tenant:
            self.rows.set_quota(connection, name, quota)
            return self._tenant(connection, name)

        return self._change(change, name)

    def drop_tenant(self, name: str, *, force: bool = False) -> int:
        """Delete a tenant with its keys, and return how many banks went with it; see `AccessRecords.drop_tenant`."""
        if name == DEFAULT_TENANT:
            raise ServiceError("TENANT_NOT_EMPTY", f"the tenant {name!r} is always there", tenant=name)

        def drop(connection: Connection) -> None:
            self._tenant(connection, name)
            banks, count = self.rows.usage(connection, name).banks, sessions.count(connection, name)
            if (banks or count) and not force:
                what = f"{banks} banks and {count} sessions" if count else f"{banks} banks"
                text = f"the tenant {name!r} has {what}; delete them first, or all with it"
                raise ServiceError("TENANT_NOT_EMPTY", text, tenant=name, banks=banks, sessions=count)
            sessions.delete_all_of(connection, name)
            delete_tenant(self.rows, connection, name, self.clock.now_us())

        sessions = self.windows.rows.sessions
        banks = self.banks.delete_all_of(name, drop)
        self.windows.later(self.windows.sweep)
        return banks

    # Keys

    def add_key(self, key: ApiKey, *, most: int | None = None) -> bool:
        """Keep a key, and return whether its id was free; see `AccessRecords.add_key`."""
        self.space.for_records().give()

        def add(connection: Connection) -> bool:
            self._tenant(connection, key.tenant)
            if most is not None:
                self.quotas.check_key(connection, key.tenant, self.clock.now_us(), most)
            return self.rows.insert_key(connection, key)

        return self._change(add, key.tenant)

    def key(self, key_id: str) -> ApiKey | None:
        """Return the key of an id; None where there is none."""
        with self.records.read() as connection:
            return self.rows.key(connection, key_id)

    def keys_of(
        self, tenant: str | None = None, *, after: KeyPlace | None = None, most: int | None = None
    ) -> list[ApiKey]:
        """Return the keys of a tenant, or all keys, oldest first; see `AccessRecords.keys_of`."""
        with self.records.read() as connection:
            return list(self.rows.keys(connection, tenant, after, most))

    def has_keys(self) -> bool:
        """Tell whether there is any key, good or not; see `AccessRecords.has_keys`."""
        with self.records.read() as connection:
            return self.rows.any_key(connection)

    def revoke_key(self, key_id: str, at: int) -> ApiKey | None:
        """Revoke a key from a time on, and return it; None where there is none."""

        def revoke(connection: Connection) -> ApiKey | None:
            self.rows.revoke(connection, key_id, at)
            return self.rows.key(connection, key_id)

        return self._change(revoke)

    def used_key(self, key_id: str, at: int) -> None:
        """Note when a key was used last."""
        self.records.change(lambda connection: self.rows.used(connection, key_id, at))

    def _change(self, operation: Callable[[Connection], T], tenant: str = "") -> T:
        """Run an operation in a transaction, which is durable whatever the setting says of chunks: a key that was
        revoked must not be good again after a power cut."""
        return self.records.change(operation, tenant=tenant, durable=True)

    def _tenant(self, connection: Connection, name: str) -> Tenant:
        """Read the tenant of a name. Errors: TENANT_NOT_FOUND."""
        found = self.rows.tenant(connection, name)
        if found is None:
            raise tenant_not_found(name)
        return found
