"""The rows of the store that concern the clock: the mark from which the next start goes on, and the times of expiry
that a leap of the clock moves."""

import sqlalchemy as sa
from sqlalchemy import Connection

from memory_service.domain.clock import Mark
from memory_service.storage.chunks.removed import SPENT_KEY_US
from memory_service.storage.local.records.schema import raw
from memory_service.storage.local.records.tables import CLOCK

_MOVE_EXPIRY = "UPDATE chunks SET expires = expires + :by WHERE expires > :now"
_MOVE_SPENT = "UPDATE spent_keys SET gone = gone + :by WHERE gone > :now - :kept"
_MOVE_SESSIONS = "UPDATE sessions SET expires = expires + :by WHERE expires > :now"
_MOVE_LEASES = "UPDATE sessions SET lease_expires = lease_expires + :by WHERE lease_expires > :now"
_SAVE = "INSERT OR REPLACE INTO clock (id, now, running, boot) VALUES (1, ?, ?, ?)"


def mark(connection: Connection) -> Mark | None:
    """Read the mark of the clock; None in a store of an earlier version."""
    row = connection.execute(sa.select(CLOCK.c.now, CLOCK.c.running, CLOCK.c.boot)).one_or_none()
    return None if row is None else Mark(*row)


def save(connection: Connection, mark: Mark) -> None:
    """Replace the mark of the clock."""
    raw(connection).execute(_SAVE, mark)


def move_ends(connection: Connection, now: int, by: int) -> None:
    """Move the expiry of chunks and sessions, the end of leases and that of spent keys, where they lie ahead of `now`,
    by `by` microseconds, so that as much time is left to them when the clock has leapt as far."""
    times = {"now": now, "by": by, "kept": SPENT_KEY_US}
    raw(connection).execute(_MOVE_EXPIRY, times)
    for statement in (_MOVE_SPENT, _MOVE_SESSIONS, _MOVE_LEASES):
        raw(connection).execute(statement, times)
