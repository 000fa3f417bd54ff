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
    """What the transaction of a number, with a mark of its own, has changed of a bank, in order."""

    seq: int
    parts: Sequence[Part]
    mark: int


def append(connection: Connection, bank_id: int, changed: Changed, now: int) -> None:
    """Append what a transaction has changed of a bank. now: microseconds since 1970."""
    rows = [
        (bank_id, changed.seq, place, part.kind, list(part.chunk_ids), now, changed.mark)
        for place, part in enumerate(changed.parts)
    ]
    statement = """
        INSERT INTO changes (bank_id, seq, part, kind, chunk_ids, time, mark) VALUES (%s, %s, %s, %s, %s, %s, %s)
    """
    with raw(connection).cursor() as cursor:
        cursor.executemany(statement, rows)


def since(connection: Connection, bank_id: int, seq: int) -> list[Changed]:
    """Read what was changed of a bank by the transaction of the number `seq`, and by those behind it, in order."""
    statement = """
        SELECT seq, mark, kind, chunk_ids FROM changes WHERE bank_id = %s AND seq >= %s ORDER BY seq, part
    """
    found: dict[tuple[int, int], list[Part]] = {}
    for number, mark, kind, chunk_ids in raw(connection).execute(statement, (bank_id, seq), binary=True).fetchall():
        found.setdefault((number, mark), []).append(Part(kind, chunk_ids))
    return [Changed(number, parts, mark) for (number, mark), parts in found.items()]


def trim(connection: Connection, before: int, most: int) -> int:
    """Forget changes of before a time but for the last of them, of banks at most `most`, and return of how many banks.
    A service that has not followed so far begins anew with these banks."""
    statement = """
        WITH old AS (
            SELECT bank_id, max(seq) - 1 AS seq FROM changes WHERE time < %s
            GROUP BY bank_id HAVING min(seq) < max(seq) LIMIT %s
        ), kept AS (
            UPDATE banks SET trimmed = greatest(trimmed, old.seq) FROM old WHERE banks.bank_id = old.bank_id
        )
        DELETE FROM changes USING old WHERE changes.bank_id = old.bank_id AND changes.seq <= old.seq
        RETURNING changes.bank_id
    """
    return len({bank_id for (bank_id,) in raw(connection).execute(statement, (before, most)).fetchall()})
