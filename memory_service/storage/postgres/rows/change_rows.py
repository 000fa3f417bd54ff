"""The rows that say what has changed of a bank, transaction by transaction, so that other services follow."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from sqlalchemy import Connection

from memory_service.storage.postgres.database import raw

# A bank has changed in what it says of itself, where the kind is "bank".
Kind = Literal["added", "removed", "altered", "bank"]


class Part(NamedTuple):
    """A part of what a transaction has changed."""

    kind: Kind
    chunk_ids: Sequence[int] = ()


class Changed(NamedTuple):
    """What the transaction of a number has changed of a bank, in order."""

    seq: int
    parts: Sequence[Part]


def append(connection: Connection, bank_id: int, changed: Changed, now: int) -> None:
    """Append what a transaction has changed of a bank. now: microseconds since 1970."""
    rows = [
        (bank_id, changed.seq, place, part.kind, list(part.chunk_ids), now) for place, part in enumerate(changed.parts)
    ]
    with raw(connection).cursor() as cursor:
        cursor.executemany("INSERT INTO changes VALUES (%s, %s, %s, %s, %s, %s)", rows)


def after(connection: Connection, bank_id: int, seq: int) -> list[Changed]:
    """Read what was changed of a bank behind the transaction of the number `seq`, in order."""
    statement = """
        SELECT seq, kind, chunk_ids FROM changes WHERE bank_id = %s AND seq > %s ORDER BY seq, part
    """
    found: dict[int, list[Part]] = {}
    for number, kind, chunk_ids in raw(connection).execute(statement, (bank_id, seq), binary=True).fetchall():
        found.setdefault(number, []).append(Part(kind, chunk_ids))
    return [Changed(number, parts) for number, parts in found.items()]


def trim(connection: Connection, before: int, most: int) -> int:
    """Forget changes of before a time, of banks at most `most`, and return of how many banks. A service that has not
    followed so far begins anew with these banks."""
    statement = """
        WITH old AS (
            SELECT bank_id, max(seq) AS seq FROM changes WHERE time < %s GROUP BY bank_id LIMIT %s
        ), kept AS (
            UPDATE banks SET trimmed = greatest(trimmed, old.seq) FROM old WHERE banks.bank_id = old.bank_id
        )
        DELETE FROM changes USING old WHERE changes.bank_id = old.bank_id AND changes.seq <= old.seq
        RETURNING changes.bank_id
    """
    return len({bank_id for (bank_id,) in raw(connection).execute(statement, (before, most)).fetchall()})
