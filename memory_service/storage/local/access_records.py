"""The tenants and API keys of a data folder, in the same database as its banks, so that a tenant goes with its banks in
one step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Connection

from memory_service.domain.access import ApiKey, KeyPlace
from memory_service.domain.errors import ServiceError, tenant_not_found
from memory_service.domain.tenants import DEFAULT_TENANT, Tenant, TenantQuota, TenantUsage
from memory_service.storage.local import quotas
from memory_service.storage.local.bank_changes import BankChanges
from memory_service.storage.local.files.disk_space import DiskSpace
from memory_service.storage.local.records import access_rows, forgetting_rows, session_deletion, session_rows
from memory_service.storage.local.records.records import Records
from memory_service.storage.local.windows import LocalWindows

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LocalAccess:
    """Implements `memory_service.storage.base.AccessRecords` for a data folder."""

    records: Records
    space: DiskSpace
    changes: BankChanges
    windows: LocalWindows

    # Tenants

    def tenants(self) -> list[Tenant]:
        """Return all tenants, by name."""
        with self.records.read() as connection:
            return list(access_rows.tenants(connection))

    def tenant(self, name: str) -> Tenant:
        """Return the tenant of a name. Errors: TENANT_NOT_FOUND."""
        with self.records.read() as connection:
            return _tenant(connection, name)

    def tenant_usage(self, name: str) -> TenantUsage:
        """Add up what the banks of a tenant hold now."""
        with self.records.read() as connection:
            return access_rows.usage(connection, name)

    def add_tenant(self, name: str, quota: TenantQuota) -> Tenant:
        """Make a tenant, which has no banks yet. Errors: TENANT_EXISTS, DISK_FULL."""
        self.space.for_records().give()
        new = Tenant(name, quota, self.records.clock.now_us())

        def add(connection: Connection) -> Tenant:
            if forgetting_rows.is_pending(connection, forgetting_rows.of_tenant(name)):
                text = f"a tenant {name!r} is being forgotten; make it when that is done"
                raise ServiceError("TENANT_EXISTS", text, tenant=name)
            if not access_rows.insert_tenant(connection, new):
                raise ServiceError("TENANT_EXISTS", f"there is a tenant {name!r} already", tenant=name)
            return new

        return self._change(add)

    def set_tenant_quota(self, name: str, quota: TenantQuota) -> Tenant:
        """Replace the quota of a tenant. Errors: TENANT_NOT_FOUND."""

        def change(connection: Connection) -> Tenant:
            access_rows.set_quota(connection, name, quota)
            return _tenant(connection, name)

        return self._change(change)

    def drop_tenant(self, name: str, *, force: bool = False) -> int:
        """Delete a tenant with its keys, and return how many banks went with it; see `AccessRecords.drop_tenant`."""
        if name == DEFAULT_TENANT:
            raise ServiceError("TENANT_NOT_EMPTY", f"the tenant {name!r} is always there", tenant=name)

        def drop(connection: Connection) -> None:
            _tenant(connection, name)
            banks, sessions = access_rows.usage(connection, name).banks, session_rows.count(connection, name)
            if (banks or sessions) and not force:
                what = f"{banks} banks and {sessions} sessions" if sessions else f"{banks} banks"
                text = f"the tenant {name!r} has {what}; delete them first, or all with it"
                raise ServiceError("TENANT_NOT_EMPTY", text, tenant=name, banks=banks, sessions=sessions)
            session_deletion.delete_all_of(connection, name)
            access_rows.delete_tenant(connection, name, self.records.clock.now_us())

        banks = self.changes.delete_all_of(name, drop)
        self.windows.later(self.windows.sweep)
        return banks

    # Keys

    def add_key(self, key: ApiKey, *, most: int | None = None) -> bool:
        """Keep a key, and return whether its id was free; see `AccessRecords.add_key`."""
        self.space.for_records().give()

        def add(connection: Connection) -> bool:
            _tenant(connection, key.tenant)
            if most is not None:
                quotas.check_key(connection, key.tenant, self.records.clock.now_us(), most)
            return access_rows.insert_key(connection, key)

        return self._change(add)

    def key(self, key_id: str) -> ApiKey | None:
        """Return the key of an id; None where there is none."""
        with self.records.read() as connection:
            return access_rows.key(connection, key_id)

    def keys_of(
        self, tenant: str | None = None, *, after: KeyPlace | None = None, most: int | None = None
    ) -> list[ApiKey]:
        """Return the keys of a tenant, or all keys, oldest first; see `AccessRecords.keys_of`."""
        with self.records.read() as connection:
            return list(access_rows.keys(connection, tenant, after, most))

    def has_keys(self) -> bool:
        """Tell whether there is any key, good or not; see `AccessRecords.has_keys`."""
        with self.records.read() as connection:
            return access_rows.any_key(connection)

    def revoke_key(self, key_id: str, at: int) -> ApiKey | None:
        """Revoke a key from a time on, and return it; None where there is none."""

        def revoke(connection: Connection) -> ApiKey | None:
            access_rows.revoke(connection, key_id, at)
            return access_rows.key(connection, key_id)

        return self._change(revoke)

    def used_key(self, key_id: str, at: int) -> None:
        """Note when a key was used last."""
        self.records.writer.submit(lambda connection: access_rows.used(connection, key_id, at)).result()

    def _change(self, operation: Callable[[Connection], T]) -> T:
        """Run an operation in a transaction, which is durable whatever the setting says of chunks: a key that was
        revoked must not be good again after a power cut."""
        return self.records.writer.submit(operation, durable=True).result()


def _tenant(connection: Connection, name: str) -> Tenant:
    """Read the tenant of a name. Errors: TENANT_NOT_FOUND."""
    found = access_rows.tenant(connection, name)
    if found is None:
        raise tenant_not_found(name)
    return found
