"""What the store keeps of the time: the mark from which the next start goes on, and the ends that a leap moves."""

import sqlalchemy as sa
from sqlalchemy import Connection

from memory_service.clock import Mark
from memory_service.gone_rows import SPENT_KEY_US
from memory_service.schema import ClockRow, raw

# The newest chunk has the highest id; both questions are answered by an index.
_NEWEST = """
    SELECT max(coalesce((SELECT created FROM chunks ORDER BY chunk_id DESC LIMIT 1), 0),
        coalesce((SELECT max(gone) FROM spent_keys), 0))
"""
_MOVE_EXPIRY = "UPDATE chunks SET expires = expires + :by WHERE expires > :now"
_MOVE_SPENT = "UPDATE spent_keys SET gone = gone + :by WHERE gone > :now - :kept"
_SAVE = "INSERT OR REPLACE INTO clock (id, now, running, boot) VALUES (1, ?, ?, ?)"


def mark(connection: Connection) -> Mark | None:
    """The mark; None in a store of an earlier version."""
    row = connection.execute(sa.select(ClockRow.now, ClockRow.running, ClockRow.boot)).one_or_none()
    return None if row is None else Mark(*row)


def save(connection: Connection, mark: Mark) -> None:
    """Replace the mark."""
    raw(connection).execute(_SAVE, mark)


def newest(connection: Connection) -> int:
    """The latest time at which a chunk was written or went, as far as it is still known."""
    return int(raw(connection).execute(_NEWEST).fetchone()[0])


def move_ends(connection: Connection, now: int, by: int) -> None:
    """Move what lies ahead at the time `now`, the expiry of chunks and the end of spent keys, by so many microseconds,
    so that as much time is left when the clock has leapt as far."""
    times = {"now": now, "by": by, "kept": SPENT_KEY_US}
    raw(connection).execute(_MOVE_EXPIRY, times)
    raw(connection).execute(_MOVE_SPENT, times)
