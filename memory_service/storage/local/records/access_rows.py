"""The rows of tenants and of API keys; implements `memory_service.storage.access.rows.AccessRows`. A function that
changes rows runs in a transaction of the writer, one that only reads also in that of a reader."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from memory_service.domain.access import ApiKey, KeyPlace
from memory_service.domain.tenants import Tenant, TenantQuota, TenantUsage
from memory_service.storage.local.records.schema import raw
from memory_service.storage.local.records.tables import API_KEYS, TENANTS

_FIND_TENANT = "SELECT name, quota, created FROM tenants WHERE name = ?"
_FIND_USAGE = """
    SELECT count(*), coalesce(sum(chunks), 0), coalesce(sum(tokens), 0), coalesce(sum(bytes), 0)
        + (SELECT coalesce(sum(bytes), 0) FROM branches WHERE tenant = ?1)
        + (SELECT coalesce(sum(size), 0) FROM windows WHERE tenant = ?1)
    FROM banks WHERE tenant = ?1
"""
# A key ends when it expires, or when it is revoked, whichever comes first.
_NEVER = 2**63 - 1
_ENDS = f"min(coalesce(expires, {_NEVER}), coalesce(revoked, {_NEVER}))"
_COUNT_TAKEN = f"SELECT count(*) FROM api_keys WHERE tenant = ? AND {_ENDS} > ?"
_FIND_ENDED = f"""
    WITH ended AS (SELECT key_id, tenant, {_ENDS} AS ends FROM api_keys WHERE {_ENDS} <= :now),
    placed AS (SELECT key_id, ends, row_number() OVER (PARTITION BY tenant ORDER BY ends DESC) AS place FROM ended)
    SELECT key_id FROM placed WHERE (ends <= :before OR place > :kept)
    AND key_id != (SELECT key_id FROM api_keys ORDER BY created DESC, key_id DESC LIMIT 1) LIMIT :most
"""


# Tenants


def insert_tenant(connection: Connection, tenant: Tenant) -> bool:
    """Insert a tenant, and return whether its name was free."""
    values = {"name": tenant.name, "quota": json.dumps(asdict(tenant.quota)), "created": tenant.created}
    statement = sa.insert(TENANTS).prefix_with("OR IGNORE").values(values)
    return bool(connection.execute(statement).rowcount)


def set_quota(connection: Connection, name: str, quota: TenantQuota) -> bool:
    """Replace the quota of a tenant, and return whether there is one of this name."""
    statement = sa.update(TENANTS).where(TENANTS.c.name == name).values(quota=json.dumps(asdict(quota)))
    return bool(connection.execute(statement).rowcount)


def delete_tenant(connection: Connection, name: str) -> None:
    """Delete the rows of a tenant and of its keys."""
    connection.execute(sa.delete(API_KEYS).where(API_KEYS.c.tenant == name))
    connection.execute(sa.delete(TENANTS).where(TENANTS.c.name == name))


def tenant(connection: Connection, name: str) -> Tenant | None:
    """Read a tenant by its name; None where there is none."""
    row = raw(connection).execute(_FIND_TENANT, (name,)).fetchone()
    return None if row is None else _tenant(*row)


def tenants(connection: Connection) -> Iterator[Tenant]:
    """Read all tenants, by name."""
    rows = connection.execute(sa.select(TENANTS.c.name, TENANTS.c.quota, TENANTS.c.created).order_by(TENANTS.c.name))
    yield from (_tenant(*row) for row in rows)


def usage(connection: Connection, name: str) -> TenantUsage:
    """Add up what the banks and sessions of a tenant hold now."""
    return TenantUsage(*raw(connection).execute(_FIND_USAGE, (name,)).fetchone())


def _tenant(name: str, quota: str, created: int) -> Tenant:
    return Tenant(name, _quota(quota), created)


# Each write asks for the quota of its tenant.
@lru_cache(512)
def _quota(text: str) -> TenantQuota:
    return TenantQuota(**json.loads(text))


# Keys


def insert_key(connection: Connection, key: ApiKey) -> bool:
    """Insert a key, and return whether its id was free."""
    values = asdict(key) | {"banks": json.dumps(key.banks)}
    return bool(connection.execute(sa.insert(API_KEYS).prefix_with("OR IGNORE").values(values)).rowcount)


def key(connection: Connection, key_id: str) -> ApiKey | None:
    """Read a key by its id; None where there is none."""
    row = connection.execute(sa.select(API_KEYS).where(API_KEYS.c.key_id == key_id)).one_or_none()
    return None if row is None else _key(row)


def keys(
    connection: Connection, tenant: str | None, after: KeyPlace | None = None, most: int | None = None
) -> Iterator[ApiKey]:
    """Read the keys of a tenant, or all keys, oldest first. after: the place of the key behind which to begin. most:
    how many at most."""
    order = (API_KEYS.c.created, API_KEYS.c.key_id)
    statement = sa.select(API_KEYS).order_by(*order).limit(most)
    if tenant is not None:
        statement = statement.where(API_KEYS.c.tenant == tenant)
    if after is not None:
        statement = statement.where(sa.tuple_(*order) > sa.tuple_(*after))
    yield from map(_key, connection.execute(statement))


def count_taken(connection: Connection, tenant: str, now: int) -> int:
    """Count the keys of a tenant that are neither revoked nor expired at a time."""
    return int(raw(connection).execute(_COUNT_TAKEN, (tenant, now)).fetchone()[0])


def ended_keys(connection: Connection, now: int, before: int, kept: int, most: int) -> list[str]:
    """Find the ids of keys to remove, at most `most`: those that ended by the time `before`, and of those that have
    ended by now, the ones beyond the `kept` of their tenant that ended last. The newest key of all is none of them."""
    asked = {"now": now, "before": before, "kept": kept, "most": most}
    return [key_id for (key_id,) in raw(connection).execute(_FIND_ENDED, asked)]


def delete_keys(connection: Connection, key_ids: list[str]) -> None:
    """Delete keys by their ids."""
    connection.execute(sa.delete(API_KEYS).where(API_KEYS.c.key_id.in_(key_ids)))


def others_have_keys(connection: Connection, tenant: str) -> bool:
    """Tell whether any tenant but this one has a key; the one writer deletes none meanwhile."""
    return raw(connection).execute("SELECT 1 FROM api_keys WHERE tenant != ? LIMIT 1", (tenant,)).fetchone() is not None


def any_key(connection: Connection) -> bool:
    """Tell whether there is a key at all, whether it is still good or not."""
    return raw(connection).execute("SELECT 1 FROM api_keys LIMIT 1").fetchone() is not None


def revoke(connection: Connection, key_id: str, at: int) -> None:
    """Note from when on a key is revoked; an earlier time stays."""
    statement = "UPDATE api_keys SET revoked = min(coalesce(revoked, ?1), ?1) WHERE key_id = ?2"
    raw(connection).execute(statement, (at, key_id))


def give_key(connection: Connection, key_id: str, tenant: str, banks: tuple[str, ...]) -> None:
    """Let another tenant have a key, for these banks."""
    changed = {"tenant": tenant, "banks": json.dumps(banks)}
    connection.execute(sa.update(API_KEYS).where(API_KEYS.c.key_id == key_id).values(changed))


def used(connection: Connection, key_id: str, now: int) -> None:
    """Note when a key was last used."""
    statement = "UPDATE api_keys SET last_used = max(coalesce(last_used, 0), ?) WHERE key_id = ?"
    raw(connection).execute(statement, (now, key_id))


def _key(row: Row[Any]) -> ApiKey:
    return ApiKey(**(row._asdict() | {"banks": tuple(json.loads(row.banks))}))
