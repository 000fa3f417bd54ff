"""The rows of a tenant that is forgotten; implements `memory_service.storage.forgetting.rows.TenantRows`."""

from sqlalchemy import Connection

from memory_service.storage.postgres.database import raw
from memory_service.storage.postgres.rows import turn_rows
from memory_service.storage.sessions.turn_row import Gone


def delete_sessions(connection: Connection, name: str) -> tuple[int, list[str]]:
    """Delete the sessions of a tenant, their windows, and the receipts of what it had forgotten; return how many
    sessions there were, and the names of the files of the windows. Turns and branches are left."""
    sessions, *_ = (
        raw(connection).execute(f"DELETE FROM {table} WHERE tenant = %s", (name,)).rowcount
        for table in ("sessions", "forgettings", "forgetting_ids")
    )
    windows = raw(connection).execute("DELETE FROM windows WHERE tenant = %s RETURNING file", (name,)).fetchall()
    return sessions, [str(file) for (file,) in windows]


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
