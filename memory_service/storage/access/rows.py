"""What the rules of tenants and keys ask of an engine's statements, for which an engine has a module of functions. A
function that changes rows runs in a transaction that changes, one that only reads also in one that reads."""

from collections.abc import Iterator
from typing import Protocol

from sqlalchemy import Connection

from memory_service.domain.access import EVERY_BANK, ApiKey, KeyPlace
from memory_service.domain.tenants import DEFAULT_TENANT, Tenant, TenantQuota, TenantUsage


class AccessRows(Protocol):
    """The rows of tenants and of API keys."""

    def insert_tenant(self, connection: Connection, tenant: Tenant) -> bool:
        """Insert a tenant, and return whether its name was free."""

    def set_quota(self, connection: Connection, name: str, quota: TenantQuota) -> bool:
        """Replace the quota of a tenant, and return whether there is one of this name."""

    def delete_tenant(self, connection: Connection, name: str) -> None:
        """Delete the rows of a tenant and of its keys."""

    def tenant(self, connection: Connection, name: str) -> Tenant | None:
        """Read a tenant by its name; None where there is none."""

    def tenants(self, connection: Connection) -> Iterator[Tenant]:
        """Read all tenants, by name."""

    def usage(self, connection: Connection, name: str) -> TenantUsage:
        """Add up what the banks and sessions of a tenant hold now."""

    def insert_key(self, connection: Connection, key: ApiKey) -> bool:
        """Insert a key, and return whether its id was free."""

    def key(self, connection: Connection, key_id: str) -> ApiKey | None:
        """Read a key by its id; None where there is none."""

    def keys(
        self, connection: Connection, tenant: str | None, after: KeyPlace | None = None, most: int | None = None
    ) -> Iterator[ApiKey]:
        """Read the keys of a tenant, or all keys, oldest first. after: the place of the key behind which to begin.
        most: how many at most."""

    def count_taken(self, connection: Connection, tenant: str, now: int) -> int:
        """Count the keys of a tenant that are neither revoked nor expired at a time."""

    def ended_keys(self, connection: Connection, now: int, before: int, kept: int, most: int) -> list[str]:
        """Find the ids of keys to remove, at most `most`: those that ended by the time `before`, and of those that have
        ended by now, the ones beyond the `kept` of their tenant that ended last. The newest key of all is none of
        them."""

    def delete_keys(self, connection: Connection, key_ids: list[str]) -> None:
        """Delete keys by their ids."""

    def others_have_keys(self, connection: Connection, tenant: str) -> bool:
        """Tell whether any tenant but this one has a key, and keep such keys to the end of the transaction."""

    def any_key(self, connection: Connection) -> bool:
        """Tell whether there is a key at all, whether it is still good or not."""

    def revoke(self, connection: Connection, key_id: str, at: int) -> None:
        """Note from when on a key is revoked; an earlier time stays."""

    def give_key(self, connection: Connection, key_id: str, tenant: str, banks: tuple[str, ...]) -> None:
        """Let another tenant have a key, for these banks."""

    def used(self, connection: Connection, key_id: str, now: int) -> None:
        """Note when a key was last used."""


def delete_tenant(rows: AccessRows, connection: Connection, name: str, now: int) -> None:
    """Delete a tenant with its keys; where these are all that there are, the last one goes to the default tenant
    instead, revoked: without any key, a store would be open again to all who can connect. The caller has seen to the
    tenant's banks and sessions. now: the time of that."""
    own = list(rows.keys(connection, name))
    if own and not rows.others_have_keys(connection, name):
        rows.revoke(connection, own[-1].key_id, now)
        # Not for the banks that it names, which are another tenant's.
        rows.give_key(connection, own[-1].key_id, DEFAULT_TENANT, EVERY_BANK)
    rows.delete_tenant(connection, name)
