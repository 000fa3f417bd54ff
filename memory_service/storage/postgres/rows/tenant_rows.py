"""The rows of a tenant that is forgotten; implements `memory_service.storage.forgetting.rows.TenantRows`."""

from sqlalchemy import Connection

from memory_service.storage.postgres.database import raw
from memory_service.storage.postgres.rows import turn_rows
from memory_service.storage.sessions.turn_row import Gone


def delete_sessions(connection: Connection, name: str) -> tuple[int, int]:
    """Delete the sessions of a tenant, their windows, and the receipts of what it had forgotten; return how many
    sessions and windows there were. Turns and branches are left."""
    sessions, windows, *_ = (
        raw(connection).execute(f"DELETE FROM {table} WHERE tenant = %s", (name,)).rowcount
        for table in ("sessions", "windows", "forgettings", "forgetting_ids")
    )
    return sessions, windows


def clear_some_turns(connection: Connection, tenant: str, most: int) -> Gone:
    """Delete at most `most` turns of a tenant whose sessions are gone."""
    return turn_rows.clear_some_of(connection, tenant, most)


def clear_branches(connection: Connection, tenant: str) -> None:
    """Delete the branches of a tenant whose turns are gone."""
    raw(connection).execute("DELETE FROM branches WHERE tenant = %s", (tenant,))


def banks_of(connection: Connection, tenant: str) -> list[tuple[int, str]]:
    """Return id and uid of each bank of a tenant."""
    found = raw(connection).execute("SELECT bank_id, uid FROM banks WHERE tenant = %s ORDER BY name", (tenant,))
    return [(bank_id, uid) for bank_id, uid in found.fetchall()]
