"""The rows of a tenant that is forgotten. A function of this file runs in a transaction of the writer."""

from typing import NamedTuple

from sqlalchemy import Connection

from memory_service.domain.errors import ServiceError, tenant_not_found
from memory_service.domain.tenants import DEFAULT_TENANT
from memory_service.storage.access.rows import delete_tenant
from memory_service.storage.local.records import access_rows
from memory_service.storage.local.records.schema import raw
from memory_service.storage.sessions.turn_row import Gone


class Went(NamedTuple):
    """How many rows went with a tenant."""

    keys: int
    sessions: int
    windows: int


def delete(connection: Connection, name: str, now: int) -> Went:
    """Delete a tenant with its keys, its sessions, their windows, and the receipts of what it had forgotten; banks and
    turns are left to the caller. now: the time of that. Errors: TENANT_NOT_FOUND, TENANT_NOT_EMPTY."""
    if name == DEFAULT_TENANT:
        raise ServiceError("TENANT_NOT_EMPTY", f"the tenant {name!r} is always there", tenant=name)
    if access_rows.tenant(connection, name) is None:
        raise tenant_not_found(name)
    keys = len(list(access_rows.keys(connection, name)))
    sessions, windows, *_ = (
        raw(connection).execute(f"DELETE FROM {table} WHERE tenant = ?", (name,)).rowcount
        for table in ("sessions", "windows", "forgettings", "forgetting_ids")
    )
    delete_tenant(access_rows, connection, name, now)
    return Went(keys, sessions, windows)


def clear_some_turns(connection: Connection, tenant: str, most: int) -> Gone:
    """Delete at most `most` turns of a tenant whose sessions are gone."""
    statement = """
        DELETE FROM turns WHERE turn_id IN (SELECT turn_id FROM turns WHERE tenant = ? LIMIT ?)
        RETURNING token_count, size
    """
    gone = raw(connection).execute(statement, (tenant, most)).fetchall()
    return Gone(len(gone), sum(tokens for tokens, _ in gone), sum(size for _, size in gone))


def clear_branches(connection: Connection, tenant: str) -> None:
    """Delete the branches of a tenant whose turns are gone."""
    raw(connection).execute("DELETE FROM branches WHERE tenant = ?", (tenant,))
