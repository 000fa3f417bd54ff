"""The rows of a tenant that is forgotten, as far as they go at once."""

from typing import NamedTuple

from sqlalchemy import Connection

from memory_service.domain.errors import ServiceError, tenant_not_found
from memory_service.domain.tenants import DEFAULT_TENANT
from memory_service.storage.access.rows import delete_tenant
from memory_service.storage.forgetting.rows import ForgettingRows


class Went(NamedTuple):
    """How many rows went with a tenant, and the names of the files of windows that are to go."""

    keys: int
    sessions: int
    windows: list[str]


def delete(rows: ForgettingRows, connection: Connection, name: str, now: int) -> Went:
    """Delete a tenant with its keys, its sessions, their windows, and the receipts of what it had forgotten; banks and
    turns are left to the caller. This runs in a transaction that changes. now: the time of that. Errors:
    TENANT_NOT_FOUND, TENANT_NOT_EMPTY."""
    if name == DEFAULT_TENANT:
        raise ServiceError("TENANT_NOT_EMPTY", f"the tenant {name!r} is always there", tenant=name)
    if rows.access.tenant(connection, name) is None:
        raise tenant_not_found(name)
    keys = len(list(rows.access.keys(connection, name)))
    went = Went(keys, *rows.tenants.delete_sessions(connection, name))
    delete_tenant(rows.access, connection, name, now)
    return went
