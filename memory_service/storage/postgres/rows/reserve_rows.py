"""The rows of the chunks that go next from a full bank, in steps. The caller has the lock of the bank's row."""

from typing import NamedTuple

from sqlalchemy import Connection

from memory_service.domain.eviction import Victims
from memory_service.storage.postgres.database import raw

# Chunks of one step: as many are looked at for a write that evicts one.
_STEP = 64


class Step(NamedTuple):
    """The first chunks of a reserve. until: the time up to which each was used last when the reserve was made,
    microseconds since 1970."""

    number: int
    until: int
    victims: Victims


def save(connection: Connection, bank_id: int, victims: Victims, until: int) -> None:
    """Keep the chunks that go next from a bank, in order; an earlier reserve is forgotten. until: see `Step`."""
    forget(connection, bank_id)
    steps = [victims.part(begin, begin + _STEP).to_bytes() for begin in range(0, len(victims), _STEP)]
    statement = """
        INSERT INTO eviction_reserves (bank_id, step, until, victims)
        SELECT %s, number, %s, step FROM unnest(%s::bytea[]) WITH ORDINALITY AS steps(step, number)
    """
    raw(connection).execute(statement, (bank_id, until, steps))


def first(connection: Connection, bank_id: int) -> Step | None:
    """Read the first step of the reserve of a bank; None where there is none."""
    statement = "SELECT step, until, victims FROM eviction_reserves WHERE bank_id = %s ORDER BY step LIMIT 1"
    row = raw(connection).execute(statement, (bank_id,), binary=True).fetchone()
    return None if row is None else Step(row[0], row[1], Victims.from_bytes(row[2]))


def shorten(connection: Connection, bank_id: int, number: int, left: Victims) -> None:
    """Keep of a step what is left of it, which may be nothing."""
    if left:
        statement = "UPDATE eviction_reserves SET victims = %s WHERE bank_id = %s AND step = %s"
        raw(connection).execute(statement, (left.to_bytes(), bank_id, number))
    else:
        raw(connection).execute("DELETE FROM eviction_reserves WHERE bank_id = %s AND step = %s", (bank_id, number))


def forget(connection: Connection, bank_id: int) -> None:
    """Forget the reserve of a bank."""
    raw(connection).execute("DELETE FROM eviction_reserves WHERE bank_id = %s", (bank_id,))
