"""The rows of sessions' local windows; implements `memory_service.storage.sessions.rows.WindowRows`."""

import json

from sqlalchemy import Connection

from memory_service.domain.sessions import Window
from memory_service.storage.postgres.database import raw

_SAVE = """
    INSERT INTO windows (session_id, tenant, turn, stamp, size, checksum, file) VALUES (%s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (session_id) DO UPDATE SET
    turn = excluded.turn, stamp = excluded.stamp, size = excluded.size, checksum = excluded.checksum,
    file = excluded.file
"""


def get(connection: Connection, session_id: str) -> tuple[Window, str] | None:
    """Read the window of a session, and the name of its file; None where there is none."""
    statement = "SELECT turn, stamp, size, checksum, file FROM windows WHERE session_id = %s"
    row = raw(connection).execute(statement, (session_id,)).fetchone()
    if row is None:
        return None
    turn, stamp, size, checksum, file = row
    return Window(session_id, turn, json.loads(stamp), size, int(checksum, 16)), file


def save(connection: Connection, tenant: str, window: Window, file: str) -> None:
    """Insert or replace the window of a session."""
    stamp, checksum = json.dumps(window.stamp), f"{window.checksum:016x}"
    values = (window.session_id, tenant, window.turn, stamp, window.size, checksum, file)
    raw(connection).execute(_SAVE, values)


def delete(connection: Connection, session_id: str, after: int = -1) -> str:
    """Delete the window of a session, if it is of a turn behind the number `after`; return the name of its file, "" for
    none."""
    statement = "DELETE FROM windows WHERE session_id = %s AND turn > %s RETURNING file"
    row = raw(connection).execute(statement, (session_id, after)).fetchone()
    return "" if row is None else str(row[0])


def drop(connection: Connection, file: str) -> None:
    """Delete the window that has a file, if it is still that of its session."""
    raw(connection).execute("DELETE FROM windows WHERE file = %s", (file,))


def files(connection: Connection) -> set[str]:
    """Return the names of the files of all windows."""
    return {file for (file,) in raw(connection).execute("SELECT file FROM windows")}
