"""The rows of sessions' local windows. A function that changes them runs in a transaction of the writer, one that only
reads also in that of a reader."""

from sqlalchemy import Connection

from memory_service.domain.sessions import Window
from memory_service.storage.local.records.schema import raw

# No REPLACE, whose deletions the sums of `tenant_usage` are not told.
_SAVE = """
    INSERT INTO windows (session_id, tenant, turn, stamp, size, checksum, file) VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (session_id) DO UPDATE SET
    turn = excluded.turn, stamp = excluded.stamp, size = excluded.size, checksum = excluded.checksum,
    file = excluded.file
"""


def get(connection: Connection, session_id: str) -> tuple[Window, str] | None:
    """Read the window of a session, and the name of its file; None where there is none, or its row is damaged."""
    statement = "SELECT turn, CAST(stamp AS BLOB), size, checksum, file FROM windows WHERE session_id = ?"
    row = raw(connection).execute(statement, (session_id,)).fetchone()
    if row is None:
        return None
    turn, stamp, size, checksum, file = row
    try:
        return Window(session_id, int(turn), stamp.decode(), int(size), int(checksum, 16)), str(file)
    except (ValueError, TypeError):
        return None


def save(connection: Connection, tenant: str, window: Window, file: str) -> None:
    """Insert or replace the window of a session."""
    values = (window.session_id, tenant, window.turn, window.stamp, window.size, f"{window.checksum:016x}", file)
    raw(connection).execute(_SAVE, values)


def delete(connection: Connection, session_id: str, after: int = -1) -> str:
    """Delete the window of a session, if it is of a turn behind the number `after`; return the name of its file, "" for
    none."""
    statement = "DELETE FROM windows WHERE session_id = ? AND turn > ? RETURNING file"
    row = raw(connection).execute(statement, (session_id, after)).fetchone()
    return "" if row is None else str(row[0])


def drop(connection: Connection, file: str) -> None:
    """Delete the window that has a file, if it is still that of its session."""
    raw(connection).execute("DELETE FROM windows WHERE file = ?", (file,))


def files(connection: Connection) -> set[str]:
    """Return the names of the files of all windows."""
    return {str(file) for (file,) in raw(connection).execute("SELECT file FROM windows")}
