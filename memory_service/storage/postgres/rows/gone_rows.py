"""The rows of what goes and has gone: removals, evictions with their log and plans, keys of chunks that are gone,
deleted banks. The caller has the lock of the bank's row, and counts what is returned."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import Connection

from memory_service.domain.eviction import NOBODY, Victims
from memory_service.domain.model import Eviction, EvictionReason
from memory_service.storage.chunks.removed import SPENT_KEY_US, Removed
from memory_service.storage.postgres.database import raw

_DELETE = """
    DELETE FROM chunks WHERE bank_id = %s AND chunk_id = ANY(%s) AND (NOT pinned OR %s)
    RETURNING chunk_id, key, start, stored_length, size, created, meta
"""
_DELETE_USE = "DELETE FROM chunk_use WHERE chunk_id = ANY(%s) RETURNING chunk_id, count"
_SPEND_KEYS = """
    UPDATE keys SET gone = %s FROM unnest(%s::bytea[]) AS spent(key) WHERE keys.bank_id = %s AND keys.key = spent.key
"""
_FORGET_KEYS = """
    DELETE FROM keys WHERE bank_id = %(bank)s AND key IN (
        SELECT key FROM keys WHERE bank_id = %(bank)s AND gone <= %(before)s LIMIT %(most)s
    )
"""
_LOG = """
    INSERT INTO evictions (bank_id, chunk_id, reason, retrieval_count, start, stored_length, created, evicted, meta)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
_CUT_LOG = """
    DELETE FROM evictions WHERE bank_id = %(bank)s AND sequence <= (
        SELECT sequence FROM evictions WHERE bank_id = %(bank)s ORDER BY sequence DESC LIMIT 1 OFFSET %(kept)s
    )
"""
# The log of a bank is cut when it has this part more than it is to keep: that reads as much of it as is kept.
_LOG_PART = 100
_VICTIM = "c.chunk_id, u.count, c.start, c.stored_length, c.created, c.meta"
# The bytes of metadata in an explanation, about, and the victims that are looked up at once for one.
_MOST_METADATA = 4 * 1024 * 1024
_VICTIMS = 100


class _Row(NamedTuple):
    """A chunk that was deleted."""

    chunk_id: int
    key: bytes
    start: int
    stored_length: int
    size: int
    created: int
    meta: str


def remove(connection: Connection, bank_id: int, chunk_ids: Sequence[int], now: int) -> Removed:
    """Remove the rows of chunks, and keep their keys as spent. Ids of which there is no chunk are passed over. now:
    microseconds since 1970."""
    rows, _ = _remove(connection, bank_id, chunk_ids, now, pinned=True)
    return _removed(rows)


def evict(connection: Connection, bank_id: int, victims: Victims, now: int, logged: int, before: int) -> Removed:
    """Log and remove those victims that still exist and are not pinned.

    logged: the evictions that the log of the bank keeps; it may have a hundredth more. before: how many chunks were
    evicted from the bank before.
    """
    rows, counts = _remove(connection, bank_id, victims.ids.tolist(), now, pinned=False)
    reason_of = dict(zip(victims.ids.tolist(), victims.reasons(), strict=True))
    with raw(connection).cursor() as cursor:
        cursor.executemany(_LOG, [_logged(bank_id, row, reason_of[row.chunk_id], counts, now) for row in rows])
        period = max(1, logged // _LOG_PART)
        if (before + len(rows)) // period > before // period:
            cursor.execute(_CUT_LOG, {"bank": bank_id, "kept": logged})
    return _removed(rows)._replace(reasons=Counter(reason_of[row.chunk_id] for row in rows))


def _logged(bank_id: int, row: _Row, reason: str, counts: Mapping[int, int], now: int) -> tuple[Any, ...]:
    chunk = (row.start, row.stored_length, row.created, now, row.meta)
    return (bank_id, row.chunk_id, reason, counts.get(row.chunk_id, 0), *chunk)


def _remove(
    connection: Connection, bank_id: int, chunk_ids: Sequence[int], now: int, *, pinned: bool
) -> tuple[list[_Row], dict[int, int]]:
    """Remove chunks, and return their rows, in the order of the ids, and how often each was retrieved."""
    driver = raw(connection)
    found = driver.execute(_DELETE, (bank_id, list(chunk_ids), pinned), binary=True).fetchall()
    by_id = {row.chunk_id: row for row in map(_Row._make, found)}
    rows = [by_id[chunk_id] for chunk_id in dict.fromkeys(chunk_ids) if chunk_id in by_id]
    if not rows:
        return [], {}
    counts: dict[int, int] = dict(driver.execute(_DELETE_USE, (list(by_id),), binary=True).fetchall())
    driver.execute(_SPEND_KEYS, (now, [row.key for row in rows], bank_id))
    # At most twice as many old keys go as were just spent: so the table does not grow for ever, and the keys of a day
    # with a million removals do not all go in one transaction a day later.
    driver.execute(_FORGET_KEYS, {"bank": bank_id, "before": now - SPENT_KEY_US, "most": 2 * len(rows)})
    return rows, counts


def _removed(rows: Sequence[_Row]) -> Removed:
    tokens, size = sum(row.stored_length for row in rows), sum(row.size for row in rows)
    return Removed([row.chunk_id for row in rows], tokens, size)


# Plans of evictions, in steps


def save_plan(connection: Connection, bank_id: int, steps: Sequence[Victims]) -> None:
    """Keep what is left of an eviction, so that any service can go on with it; an earlier plan is forgotten."""
    forget_plan(connection, bank_id)
    with raw(connection).cursor() as cursor:
        rows = [(bank_id, place, step.to_bytes()) for place, step in enumerate(steps)]
        cursor.executemany("INSERT INTO eviction_plans VALUES (%s, %s, %s)", rows)


def forget_plan(connection: Connection, bank_id: int) -> None:
    """Forget the plan of a bank."""
    raw(connection).execute("DELETE FROM eviction_plans WHERE bank_id = %s", (bank_id,))


def next_step(connection: Connection, bank_id: int) -> Victims:
    """Take the next step out of the plan of a bank; some of its chunks may be gone already."""
    statement = """
        DELETE FROM eviction_plans WHERE bank_id = %(bank)s
        AND step = (SELECT min(step) FROM eviction_plans WHERE bank_id = %(bank)s) RETURNING victims
    """
    row = raw(connection).execute(statement, {"bank": bank_id}, binary=True).fetchone()
    return NOBODY if row is None else Victims.from_bytes(row[0])


def steps_left(connection: Connection, bank_id: int) -> int:
    """Count the steps that are left of the plan of a bank."""
    row = raw(connection).execute("SELECT count(*) FROM eviction_plans WHERE bank_id = %s", (bank_id,)).fetchone()
    return 0 if row is None else int(row[0])


def plan_of(connection: Connection, bank_id: int, most: int) -> Victims:
    """Return what is left of the plan of a bank, as far as its steps have `most` chunks."""
    statement = "SELECT victims FROM eviction_plans WHERE bank_id = %s ORDER BY step LIMIT %s"
    rows = raw(connection).execute(statement, (bank_id, most), binary=True).fetchall()
    steps = [Victims.from_bytes(victims) for (victims,) in rows] or [NOBODY]
    return Victims(np.concatenate([step.ids for step in steps]), np.concatenate([step.codes for step in steps]))


def planned(connection: Connection) -> list[int]:
    """Return the ids of the banks that have a plan."""
    found = raw(connection).execute("SELECT DISTINCT bank_id FROM eviction_plans", binary=True).fetchall()
    return [bank_id for (bank_id,) in found]


# The log of evictions


def victims(connection: Connection, bank_id: int, chunk_ids: Sequence[int]) -> dict[int, tuple[Any, ...]]:
    """Read of chunks what the log would say of them, by id; only of the first chunks where their metadata are long."""
    statement = f"""
        SELECT {_VICTIM} FROM chunks c JOIN chunk_use u ON u.chunk_id = c.chunk_id
        WHERE c.bank_id = %s AND c.chunk_id = ANY(%s)
    """
    found: dict[int, tuple[Any, ...]] = {}
    room = _MOST_METADATA
    for begin in range(0, len(chunk_ids), _VICTIMS):
        some = list(chunk_ids[begin : begin + _VICTIMS])
        rows = raw(connection).execute(statement, (bank_id, some), binary=True).fetchall()
        found |= {row[0]: row for row in rows}
        room -= sum(len(row[-1]) for row in rows)
        if room < 0:
            break
    return found


def evictions(connection: Connection, bank_id: int, before: int) -> Iterator[tuple[int, Eviction]]:
    """Read (sequence, eviction) one after the other, newest first, from the first one before the sequence `before`."""
    statement = f"""
        SELECT sequence, reason, evicted, chunk_id, retrieval_count, start, stored_length, created, meta
        FROM evictions WHERE bank_id = %s AND sequence < %s ORDER BY sequence DESC LIMIT {_VICTIMS}
    """
    while rows := raw(connection).execute(statement, (bank_id, before), binary=True).fetchall():
        for sequence, reason, evicted, *victim in rows:
            yield sequence, eviction(victim, reason, evicted)
        before = rows[-1][0]


def eviction(victim: Sequence[Any], reason: EvictionReason, evicted: int | None) -> Eviction:
    """Make the value of a row of `victims` or of the log."""
    chunk_id, count, start, length, created, meta = victim
    return Eviction(
        chunk_id=chunk_id,
        reason=reason,
        retrieval_count=count,
        start=start,
        stored_length=length,
        created=created,
        metadata=json.loads(meta),
        evicted=evicted,
    )


# Deleted banks


def clear_bank(connection: Connection, bank_id: int, most: int) -> list[int] | None:
    """Remove some of what a deleted bank holds, `most` rows of a table, and return the ids of these chunks; None where
    nothing is left, and then the bank is forgotten."""
    driver, some = raw(connection), {"bank": bank_id, "most": most}
    # One after the other: of two at once, one finds only rows that the other removes, and takes that for the end.
    if driver.execute("SELECT 1 FROM gone_banks WHERE bank_id = %(bank)s FOR UPDATE", some).fetchone() is None:
        return None
    statement = """
        DELETE FROM chunks WHERE bank_id = %(bank)s AND chunk_id IN (
            SELECT chunk_id FROM chunks WHERE bank_id = %(bank)s ORDER BY chunk_id LIMIT %(most)s
        ) RETURNING chunk_id
    """
    ids = [chunk_id for (chunk_id,) in driver.execute(statement, some).fetchall()]
    driver.execute("DELETE FROM chunk_use WHERE chunk_id = ANY(%s)", (ids,))
    # With a bank goes what was taken out of its service.
    statement = """
        DELETE FROM quarantine WHERE chunk_id IN (
            SELECT chunk_id FROM quarantine WHERE bank_id = %(bank)s LIMIT %(most)s
        ) RETURNING chunk_id
    """
    ids += [chunk_id for (chunk_id,) in driver.execute(statement, some).fetchall()]
    left = len(ids)
    for table, key in (("keys", "key"), ("evictions", "sequence"), ("changes", "seq")):
        left += driver.execute(
            f"DELETE FROM {table} WHERE bank_id = %(bank)s AND {key} IN"
            f" (SELECT {key} FROM {table} WHERE bank_id = %(bank)s LIMIT %(most)s)",
            some,
        ).rowcount
    if left:
        return ids
    driver.execute("DELETE FROM gone_banks WHERE bank_id = %s", (bank_id,))
    return None
