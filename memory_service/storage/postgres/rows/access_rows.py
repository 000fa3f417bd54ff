"""The rows of tenants and of API keys; implements `memory_service.storage.access.rows.AccessRows`. This file owns that
what a tenant with a quota holds does not change between the look at it and the end of the transaction, and that of all
keys one stays, also where two services delete keys at once."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import Connection

from memory_service.domain.access import ApiKey, KeyPlace
from memory_service.domain.tenants import Tenant, TenantQuota, TenantUsage
from memory_service.storage.postgres.database import Asked, raw
from memory_service.storage.postgres.rows.sought import sought

# The key of the lock (pg_advisory_xact_lock) of those who delete keys.
_KEYS_LOCK = 0x6B76_0003
_TENANT = "SELECT name, quota, created FROM tenants"
_BOUNDED = f"""
    {_TENANT} WHERE name = %s AND EXISTS (
        SELECT 1 FROM jsonb_each_text(quota::jsonb) AS bound WHERE bound.key <> 'calls' AND bound.value <> '0'
    ) FOR NO KEY UPDATE
"""
_KEY_NAMES = tuple(field.name for field in fields(ApiKey))
_KEY = f"SELECT {', '.join(_KEY_NAMES)} FROM api_keys"
_INSERT_KEY = f"""
    INSERT INTO api_keys ({", ".join(_KEY_NAMES)}) VALUES ({", ".join(f"%({name})s" for name in _KEY_NAMES)})
    ON CONFLICT DO NOTHING
"""
_USAGE = """
    SELECT count(*), coalesce(sum(chunks), 0)::bigint, coalesce(sum(tokens), 0)::bigint,
        (coalesce(sum(bytes), 0) + (SELECT coalesce(sum(bytes), 0) FROM branches WHERE tenant = %(tenant)s)
            + (SELECT coalesce(sum(size), 0) FROM windows WHERE tenant = %(tenant)s))::bigint
    FROM banks WHERE tenant = %(tenant)s
"""
# A key ends when it expires, or when it is revoked, whichever comes first.
_ENDS = f"coalesce(least(expires, revoked), {2**63 - 1})"
_FIND_ENDED = f"""
    WITH ended AS (SELECT key_id, tenant, {_ENDS} AS ends FROM api_keys WHERE {_ENDS} <= %(now)s),
    placed AS (SELECT key_id, ends, row_number() OVER (PARTITION BY tenant ORDER BY ends DESC) AS place FROM ended)
    SELECT key_id FROM placed WHERE (ends <= %(before)s OR place > %(kept)s)
    AND key_id != (SELECT key_id FROM api_keys ORDER BY created DESC, key_id DESC LIMIT 1) LIMIT %(most)s
"""


# Tenants


def insert_tenant(connection: Connection, tenant: Tenant) -> bool:
    """Insert a tenant, and return whether its name was free."""
    statement = "INSERT INTO tenants (name, quota, created) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING"
    return bool(raw(connection).execute(statement, (tenant.name, _quota(tenant.quota), tenant.created)).rowcount)


def set_quota(connection: Connection, name: str, quota: TenantQuota) -> bool:
    """Replace the quota of a tenant, and return whether there is one of this name."""
    statement = "UPDATE tenants SET quota = %s WHERE name = %s"
    return bool(raw(connection).execute(statement, (_quota(quota), sought(name))).rowcount)


def delete_tenant(connection: Connection, name: str) -> None:
    """Delete the rows of a tenant and of its keys."""
    raw(connection).execute("DELETE FROM api_keys WHERE tenant = %s", (name,))
    raw(connection).execute("DELETE FROM tenants WHERE name = %s", (name,))


def tenant(connection: Connection, name: str) -> Tenant | None:
    """Read a tenant by its name; None where there is none."""
    row = raw(connection).execute(f"{_TENANT} WHERE name = %s", (sought(name),)).fetchone()
    return None if row is None else _tenant(row)


def held_tenant(connection: Connection, name: str) -> Tenant | None:
    """Read a tenant as `tenant` does; where it has a quota, what it holds does not change to the end of the
    transaction, but by the transaction itself."""
    found = tenant(connection, name)
    if found is None or found.quota == TenantQuota(calls=found.quota.calls):
        return found
    row = raw(connection).execute(f"{_TENANT} WHERE name = %s FOR NO KEY UPDATE", (name,)).fetchone()
    return None if row is None else _tenant(row)


def ask_bounded(connection: Connection, name: str) -> Asked:
    """Ask for a tenant as `held_tenant` does, but only where it has a quota of what it holds; see `read_bounded`."""
    return raw(connection).execute(_BOUNDED, (sought(name),))


def read_bounded(asked: Asked) -> Tenant | None:
    """Return the tenant that was asked for; None where it has no quota of what it holds."""
    row = asked.fetchone()
    return None if row is None else _tenant(row)


def tenants(connection: Connection) -> Iterator[Tenant]:
    """Read all tenants, by name."""
    return map(_tenant, raw(connection).execute(f"{_TENANT} ORDER BY name").fetchall())


def usage(connection: Connection, name: str) -> TenantUsage:
    """Add up what the banks and sessions of a tenant hold now."""
    row = raw(connection).execute(_USAGE, {"tenant": sought(name)}).fetchone()
    assert row is not None
    return TenantUsage(*row)


def _tenant(row: Sequence[Any]) -> Tenant:
    name, quota, created = row
    return Tenant(name, TenantQuota(**json.loads(quota)), created)


def _quota(quota: TenantQuota) -> str:
    return json.dumps(asdict(quota))


# Keys


def insert_key(connection: Connection, key: ApiKey) -> bool:
    """Insert a key, and return whether its id was free."""
    values = asdict(key) | {"banks": json.dumps(key.banks)}
    return bool(raw(connection).execute(_INSERT_KEY, values).rowcount)


def key(connection: Connection, key_id: str) -> ApiKey | None:
    """Read a key by its id; None where there is none."""
    row = raw(connection).execute(f"{_KEY} WHERE key_id = %s", (sought(key_id),)).fetchone()
    return None if row is None else _key(row)


def keys(
    connection: Connection, tenant: str | None, after: KeyPlace | None = None, most: int | None = None
) -> Iterator[ApiKey]:
    """Read the keys of a tenant, or all keys, oldest first. after: the place of the key behind which to begin. most:
    how many at most."""
    values: dict[str, object] = {"most": most}
    where = ["true"]
    if tenant is not None:
        where.append("tenant = %(tenant)s")
        values["tenant"] = sought(tenant)
    if after is not None:
        where.append("(created, key_id) > (%(created)s, %(key)s)")
        values |= {"created": after.created, "key": sought(after.key_id)}
    statement = f"{_KEY} WHERE {' AND '.join(where)} ORDER BY created, key_id LIMIT %(most)s"
    return map(_key, raw(connection).execute(statement, values).fetchall())


def count_taken(connection: Connection, tenant: str, now: int) -> int:
    """Count the keys of a tenant that are neither revoked nor expired at a time."""
    statement = f"SELECT count(*) FROM api_keys WHERE tenant = %s AND {_ENDS} > %s"
    row = raw(connection).execute(statement, (tenant, now)).fetchone()
    return 0 if row is None else int(row[0])


def ended_keys(connection: Connection, now: int, before: int, kept: int, most: int) -> list[str]:
    """Find the ids of keys to remove, at most `most`: those that ended by the time `before`, and of those that have
    ended by now, the ones beyond the `kept` of their tenant that ended last. The newest key of all is none of them."""
    _lock_keys(connection)
    asked = {"now": now, "before": before, "kept": kept, "most": most}
    return [key_id for (key_id,) in raw(connection).execute(_FIND_ENDED, asked)]


def delete_keys(connection: Connection, key_ids: list[str]) -> None:
    """Delete keys by their ids."""
    raw(connection).execute("DELETE FROM api_keys WHERE key_id = ANY(%s)", (key_ids,))


def others_have_keys(connection: Connection, tenant: str) -> bool:
    """Tell whether any tenant but this one has a key, and keep such keys to the end of the transaction."""
    _lock_keys(connection)
    statement = "SELECT 1 FROM api_keys WHERE tenant != %s LIMIT 1"
    return raw(connection).execute(statement, (tenant,)).fetchone() is not None


def any_key(connection: Connection) -> bool:
    """Tell whether there is a key at all, whether it is still good or not."""
    return raw(connection).execute("SELECT 1 FROM api_keys LIMIT 1").fetchone() is not None


def revoke(connection: Connection, key_id: str, at: int) -> None:
    """Note from when on a key is revoked; an earlier time stays."""
    statement = "UPDATE api_keys SET revoked = least(revoked, %s) WHERE key_id = %s"
    raw(connection).execute(statement, (at, sought(key_id)))


def give_key(connection: Connection, key_id: str, tenant: str, banks: tuple[str, ...]) -> None:
    """Let another tenant have a key, for these banks."""
    statement = "UPDATE api_keys SET tenant = %s, banks = %s WHERE key_id = %s"
    raw(connection).execute(statement, (tenant, json.dumps(banks), key_id))


def used(connection: Connection, key_id: str, now: int) -> None:
    """Note when a key was last used."""
    statement = "UPDATE api_keys SET last_used = greatest(last_used, %s) WHERE key_id = %s"
    raw(connection).execute(statement, (now, sought(key_id)))


def _key(row: Sequence[Any]) -> ApiKey:
    found = dict(zip(_KEY_NAMES, row, strict=True))
    return ApiKey(**(found | {"banks": tuple(json.loads(found["banks"]))}))


def _lock_keys(connection: Connection) -> None:
    raw(connection).execute("SELECT pg_advisory_xact_lock(%s)", (_KEYS_LOCK,))
