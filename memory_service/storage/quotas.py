"""The quotas of banks and of tenants, in the transaction of the change that they bound. An engine says by which
statements it finds what is held."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection

from memory_service.domain.chunk_size import size_of
from memory_service.domain.errors import QuotaError, bank_not_found, tenant_not_found
from memory_service.domain.model import Bank, Chunk, Quota, Unit, Usage
from memory_service.domain.tenants import Tenant, TenantUsage

_UNITS: tuple[Unit, ...] = ("chunks", "tokens", "bytes")


@dataclass(frozen=True, slots=True)
class Quotas:
    """Refuses what would pass a quota.

    tenant: reads a tenant by its name. held: what the banks and sessions of a tenant hold, as the transaction sees it.
    bank: the same of a bank, by its id. keys: counts the keys of a tenant that are neither revoked nor expired at a
    time. sessions: counts the sessions of a tenant.
    """

    tenant: Callable[[Connection, str], Tenant | None]
    held: Callable[[Connection, str], TenantUsage]
    bank: Callable[[Connection, int], Usage | None]
    keys: Callable[[Connection, str, int], int]
    sessions: Callable[[Connection, str], int]

    def check_chunk(self, connection: Connection, bank: Bank, chunk: Chunk) -> None:
        """Refuse a chunk beyond the quota of its bank or tenant; call this after the evictions, which may have made
        room, and before the chunk is there. Errors: BANK_NOT_FOUND, QUOTA_EXCEEDED."""
        sizes: dict[str, int] = {unit: size_of(chunk, unit) for unit in _UNITS}
        if bank.quota != Quota():
            usage = self.bank(connection, bank.bank_id)
            if usage is None:
                raise bank_not_found(bank.name)
            for unit, size in sizes.items():
                _check(f"bank:{bank.name}", unit, getattr(bank.quota, unit), getattr(usage, unit), size)
        self._check_tenant(connection, bank.tenant, sizes)

    def bounds(self, connection: Connection, bank: Bank) -> bool:
        """Tell whether a bank or its tenant has a quota that a chunk could pass."""
        tenant = self.tenant(connection, bank.tenant)
        return bank.quota != Quota() or (tenant is not None and any(getattr(tenant.quota, unit) for unit in _UNITS))

    def check_growth(self, connection: Connection, bank: Bank, grown: int) -> None:
        """Refuse that a chunk has grown by so many bytes, which is done already. Errors: QUOTA_EXCEEDED."""
        if grown > 0 and (usage := self.bank(connection, bank.bank_id)) is not None:
            _check(f"bank:{bank.name}", "bytes", bank.quota.bytes, usage.bytes - grown, grown)
            self._check_tenant(connection, bank.tenant, {"bytes": grown}, done=True)

    def check_bank(self, connection: Connection, new: Bank) -> None:
        """Refuse a bank for which there is no tenant, or no room in the tenant's quota. Errors: TENANT_NOT_FOUND,
        QUOTA_EXCEEDED."""
        if self.tenant(connection, new.tenant) is None:
            raise tenant_not_found(new.tenant)
        self._check_tenant(connection, new.tenant, {"banks": 1})

    def check_key(self, connection: Connection, tenant: str, now: int, most: int) -> None:
        """Refuse one more key of a tenant that has `most` which are neither revoked nor expired. now: in microseconds
        since 1970. Errors: QUOTA_EXCEEDED."""
        _check(f"tenant:{tenant}", "keys", most, self.keys(connection, tenant, now), 1)

    def check_session(self, connection: Connection, tenant: str, most: int) -> None:
        """Refuse a session for which there is no tenant, or which would be one more than `most` of it. Errors:
        TENANT_NOT_FOUND, QUOTA_EXCEEDED."""
        if self.tenant(connection, tenant) is None:
            raise tenant_not_found(tenant)
        _check(f"tenant:{tenant}", "sessions", most, self.sessions(connection, tenant), 1)

    def check_session_bytes(self, connection: Connection, tenant: str, size: int) -> None:
        """Refuse turns, or a window, of so many bytes more beyond the quota of their tenant; call this before they are
        there. Errors: QUOTA_EXCEEDED."""
        if size > 0:
            self._check_tenant(connection, tenant, {"bytes": size})

    def _check_tenant(self, connection: Connection, name: str, more: Mapping[str, int], *, done: bool = False) -> None:
        """Refuse what would take more than the quota of a tenant; one that is gone has none, and no banks. more: by
        unit. done: whether that is counted already. Errors: QUOTA_EXCEEDED."""
        tenant = self.tenant(connection, name)
        if tenant is None or not any(getattr(tenant.quota, unit) for unit in more):
            return
        usage = self.held(connection, name)
        for unit, size in more.items():
            used = getattr(usage, unit) - (size if done else 0)
            _check(f"tenant:{name}", unit, getattr(tenant.quota, unit), used, size)


def _check(subject: str, unit: str, limit: int, used: int, more: int) -> None:
    """Refuse what would take more than a limit; 0 is none. Errors: QUOTA_EXCEEDED."""
    if limit and used + more > limit:
        raise QuotaError(subject, unit, used, limit, more)
