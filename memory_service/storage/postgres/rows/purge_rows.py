"""The rows that tell all services to drop what they keep of banks on their disks, and how far each service has come."""

from typing import NamedTuple

from sqlalchemy import Connection

from memory_service.storage.forgetting.receipt_row import KEPT_US
from memory_service.storage.postgres.database import NOW, raw
from memory_service.storage.postgres.schema import PURGES_LOCK

# Of a service that lives, among the leases: its last purge is the epoch. By the clock of the database.
_NAME = "purges of "
# Numbers are given in the order of commits: a service that has seen one looks for no lower ones.
_LOCK = "SELECT pg_advisory_xact_lock(%s)"
_ADD = "INSERT INTO purges (bank_id, uid, time) VALUES (%s, %s, %s)"
_AFTER = "SELECT number, bank_id, uid, time FROM purges WHERE number > %s ORDER BY number"
_ONE = "SELECT number, bank_id, uid, time FROM purges WHERE number = %s"
_NOTE = f"""
    INSERT INTO leases (name, holder, epoch, until) VALUES (%s, %s, %s, {NOW} + %s)
    ON CONFLICT (name) DO UPDATE SET epoch = excluded.epoch, until = excluded.until
"""
_LIVES = f"SELECT count(*) FROM leases WHERE starts_with(name, %s) AND until > {NOW}"
_BEHIND = f"{_LIVES} AND epoch < %s"
# Of a service that was killed, or stands still: that one notes itself again.
_ENDED = f"DELETE FROM leases WHERE starts_with(name, %s) AND until < {NOW} - 86400000000"


class Purge(NamedTuple):
    """A bank of which something was forgotten. time: microseconds since 1970."""

    number: int
    bank_id: int
    uid: str
    time: int


def add(connection: Connection, bank_id: int, uid: str, now: int) -> None:
    """Tell all services that something of a bank was forgotten, and forget services that ended a day ago."""
    raw(connection).execute("DELETE FROM purges WHERE time <= %s", (now - KEPT_US,))
    raw(connection).execute(_ENDED, (_NAME,))
    raw(connection).execute(_LOCK, (PURGES_LOCK,))
    raw(connection).execute(_ADD, (bank_id, uid, now))


def after(connection: Connection, number: int) -> list[Purge]:
    """Return what services are told behind a number, in order."""
    return [Purge(*row) for row in raw(connection).execute(_AFTER, (number,)).fetchall()]


def one(connection: Connection, number: int) -> Purge | None:
    """Return what services are told under a number; None where that is not there, or no more."""
    row = raw(connection).execute(_ONE, (number,)).fetchone()
    return None if row is None else Purge(*row)


def last(connection: Connection) -> int:
    """Return the number of the last purge; 0 for none."""
    row = raw(connection).execute("SELECT max(number) FROM purges").fetchone()
    return 0 if row is None or row[0] is None else int(row[0])


def note(connection: Connection, service: str, number: int, period: int) -> None:
    """Note that a service has dropped what it was told up to a number, and lives for so many microseconds."""
    raw(connection).execute(_NOTE, (_NAME + service, service, number, period))


def leave(connection: Connection, service: str) -> None:
    """Note that a service has ended."""
    raw(connection).execute("DELETE FROM leases WHERE name = %s", (_NAME + service,))


def behind(connection: Connection, number: int) -> int:
    """Count the services that live and have not dropped what they were told up to a number."""
    row = raw(connection).execute(_BEHIND, (_NAME, number)).fetchone()
    return 0 if row is None else int(row[0])


def alive(connection: Connection) -> int:
    """Count the services that live."""
    row = raw(connection).execute(_LIVES, (_NAME,)).fetchone()
    return 0 if row is None else int(row[0])
