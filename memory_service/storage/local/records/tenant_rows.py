"""The rows of a tenant that is forgotten; implements `memory_service.storage.forgetting.rows.TenantRows`. A function of
this file runs in a transaction of the writer."""

from sqlalchemy import Connection

from memory_service.storage.local.records import bank_rows
from memory_service.storage.local.records.schema import raw
from memory_service.storage.sessions.turn_row import Gone


def delete_sessions(connection: Connection, name: str) -> tuple[int, list[str]]:
    """Delete the sessions of a tenant, their windows, and the receipts of what it had forgotten; return how many
    sessions there were, and the names of the files of the windows. Turns and branches are left."""
    sessions, *_ = (
        raw(connection).execute(f"DELETE FROM {table} WHERE tenant = ?", (name,)).rowcount
        for table in ("sessions", "forgettings", "forgetting_ids")
    )
    windows = raw(connection).execute("DELETE FROM windows WHERE tenant = ? RETURNING file", (name,)).fetchall()
    return sessions, [str(file) for (file,) in windows]


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


def banks_of(connection: Connection, tenant: str) -> list[tuple[int, str]]:
    """Return id and uid of each bank of a tenant."""
    return [(bank.bank_id, bank.uid) for bank in bank_rows.after(connection, tenant)]
