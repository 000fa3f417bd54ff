"""The rows of what goes and has gone: removals, evictions with their log and plans, the keys of chunks that are gone
(spent keys), deleted banks."""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from memory_service.domain.eviction import NOBODY, Victims
from memory_service.domain.model import Eviction, EvictionReason
from memory_service.storage.chunks.removed import SPENT_KEY_US, Removed
from memory_service.storage.local.records.schema import raw
from memory_service.storage.local.records.tables import CHUNKS, EVICTION_PLANS, EVICTIONS, GONE_BANKS

# The bytes of metadata in an explanation, about, and the victims that are looked up at once for one.
_MOST_METADATA = 4 * 1024 * 1024
_VICTIMS = 100


_SIZES = """
    SELECT chunk_id, stored_length, size FROM json_each(?) JOIN chunks ON chunk_id = value
    WHERE bank_id = ? AND (NOT pinned OR ?) ORDER BY json_each.key
"""
_SPEND_KEYS = """
    INSERT INTO spent_keys (bank_id, key, digest, chunk_id, gone)
    SELECT bank_id, key, digest, chunk_id, ? FROM chunks WHERE chunk_id IN (SELECT value FROM json_each(?))
"""
_KEYS_OF = "SELECT bank_id, key, chunk_id FROM chunks WHERE chunk_id IN (SELECT value FROM json_each(?))"
_PAYLOADS = "SELECT chunk_id, payload FROM contents WHERE chunk_id IN (SELECT value FROM json_each(?))"
_OLD_KEYS = "SELECT bank_id, key, chunk_id FROM spent_keys WHERE gone <= ? LIMIT ?"
_LOG_EVICTIONS = """
    INSERT INTO evictions (bank_id, chunk_id, reason, retrieval_count, start, stored_length, created, evicted, meta)
    SELECT bank_id, chunk_id, ?, retrieval_count, start, stored_length, created, ?, meta
    FROM json_each(?) JOIN chunks ON chunk_id = value ORDER BY json_each.key
"""
_CUT_LOG = """
    DELETE FROM evictions WHERE bank_id = :bank AND sequence <= (
        SELECT sequence FROM evictions WHERE bank_id = :bank ORDER BY sequence DESC LIMIT 1 OFFSET :kept
    )
"""
_SOME_CHUNKS = "SELECT chunk_id FROM chunks WHERE bank_id = :bank ORDER BY chunk_id LIMIT :most"
_SOME_EVICTIONS = """
    DELETE FROM evictions WHERE sequence IN (SELECT sequence FROM evictions WHERE bank_id = :bank LIMIT :most)
"""


def remove(connection: Connection, bank_id: int, chunk_ids: Sequence[int], counter: str, now: int) -> Removed:
    """Remove the rows of chunks, keep their keys as spent, and add to `counter` of the bank (chunks_deleted, ...). Ids
    of which there is no chunk are passed over. now: microseconds since 1970."""
    return _remove(connection, bank_id, _found(connection, bank_id, chunk_ids, pinned=True), counter, now)


def forget(connection: Connection, bank_id: int, chunk_ids: Sequence[int]) -> tuple[Removed, dict[int, str | None]]:
    """Remove the rows of chunks with their keys, so that nothing tells that they were there; return them, and the
    descriptors of their payloads. Their tensors are as the caller leaves them."""
    driver, going = raw(connection), _found(connection, bank_id, chunk_ids, pinned=True)
    ids = json.dumps(going.ids)
    payloads = dict(driver.execute(_PAYLOADS, (ids,)).fetchall())
    forget_keys(driver, driver.execute(_KEYS_OF, (ids,)).fetchall())
    _remove_rows(connection, bank_id, going, "chunks_deleted")
    return going, payloads


def payloads_of(connection: Connection, bank_id: int, most: int) -> list[tuple[int, str | None]]:
    """Read ids of chunks of a bank, at most `most` of them, ascending, and the descriptors of their payloads."""
    statement = """
        SELECT chunk_id, payload FROM chunks JOIN contents USING (chunk_id) WHERE bank_id = ? ORDER BY chunk_id LIMIT ?
    """
    return raw(connection).execute(statement, (bank_id, most)).fetchall()


def logged_rows(connection: Connection, bank_id: int) -> list[dict[str, Any]]:
    """Read the log of evictions of a bank as rows of the chunks that were evicted, as far as it has them."""
    names = ("chunk_id", "start", "created", "meta")
    found = raw(connection).execute(f"SELECT {', '.join(names)} FROM evictions WHERE bank_id = ?", (bank_id,))
    return [{**dict(zip(names, row, strict=True)), "pinned": False} for row in found]


def forget_logged(connection: Connection, bank_id: int, chunk_ids: Sequence[int]) -> int:
    """Remove what is told of chunks that are gone: from the log of evictions, whose number is returned, and their
    keys."""
    driver, ids = raw(connection), json.dumps(list(chunk_ids))
    spent = "SELECT bank_id, key, chunk_id FROM spent_keys WHERE chunk_id IN (SELECT value FROM json_each(?))"
    forget_keys(driver, driver.execute(spent, (ids,)).fetchall())
    logged = "DELETE FROM evictions WHERE bank_id = ? AND chunk_id IN (SELECT value FROM json_each(?))"
    return driver.execute(logged, (bank_id, ids)).rowcount


def evict(connection: Connection, bank_id: int, victims: Victims, now: int, logged: int) -> Removed:
    """Log and remove those victims that still exist and are not pinned. logged: the evictions that the log of the bank
    keeps."""
    found = _found(connection, bank_id, victims.ids.tolist(), pinned=False)
    reason_of = dict(zip(victims.ids.tolist(), victims.reasons(), strict=True))
    for reason, ids in groupby(found.ids, key=reason_of.__getitem__):
        raw(connection).execute(_LOG_EVICTIONS, (reason, now, json.dumps(list(ids))))
    raw(connection).execute(_CUT_LOG, {"bank": bank_id, "kept": logged})
    reasons = Counter(reason_of[chunk_id] for chunk_id in found.ids)
    return _remove(connection, bank_id, found, "chunks_evicted", now)._replace(reasons=reasons)


def _found(connection: Connection, bank_id: int, chunk_ids: Sequence[int], *, pinned: bool) -> Removed:
    rows = raw(connection).execute(_SIZES, (json.dumps(list(dict.fromkeys(chunk_ids))), bank_id, pinned)).fetchall()
    ids, tokens, sizes = zip(*rows, strict=True) if rows else ((), (), ())
    return Removed(list(ids), sum(tokens), sum(sizes))


def _remove(connection: Connection, bank_id: int, going: Removed, counter: str, now: int) -> Removed:
    if not going.ids:
        return going
    driver, count = raw(connection), len(going.ids)
    driver.execute(_SPEND_KEYS, (now, json.dumps(going.ids)))
    # At most twice as many old keys go as were just spent: so the table does not grow for ever, and the keys of a day
    # with a million removals do not all go in one transaction a day later.
    forget_keys(driver, driver.execute(_OLD_KEYS, (now - SPENT_KEY_US, 2 * count)).fetchall())
    _remove_rows(connection, bank_id, going, counter)
    return going


def _remove_rows(connection: Connection, bank_id: int, going: Removed, counter: str) -> None:
    """Delete the rows of chunks, and take them from the usage of their bank."""
    _delete_chunks(connection, going.ids)
    count = len(going.ids)
    usage = f"chunks = chunks - ?, tokens = tokens - ?, bytes = bytes - ?, {counter} = {counter} + ?"
    values = (count, going.tokens, going.bytes, count, bank_id)
    raw(connection).execute(f"UPDATE banks SET {usage} WHERE bank_id = ?", values)


def forget_keys(driver: sqlite3.Connection, spent: Sequence[tuple[int, bytes, int]]) -> None:
    """Forget spent keys, given as (bank id, key, chunk id), so that they can be used again."""
    driver.executemany("DELETE FROM keys WHERE bank_id = ? AND key = ? AND chunk_id = ?", spent)
    driver.executemany("DELETE FROM spent_keys WHERE chunk_id = ?", [(chunk_id,) for _, _, chunk_id in spent])


def _delete_chunks(connection: Connection, chunk_ids: Sequence[int]) -> None:
    for table in ("chunks", "contents", "unsynced"):
        statement = f"DELETE FROM {table} WHERE chunk_id IN (SELECT value FROM json_each(?))"
        raw(connection).execute(statement, (json.dumps(list(chunk_ids)),))


def clear_bank(connection: Connection, bank_id: int, most: int) -> bool:
    """Remove some of what a deleted bank holds, `most` rows of a table, and return whether nothing is left."""
    driver = raw(connection)
    some = {"bank": bank_id, "most": most}
    ids = [chunk_id for (chunk_id,) in driver.execute(_SOME_CHUNKS, some)]
    _delete_chunks(connection, ids)
    spent = driver.execute("SELECT bank_id, key, chunk_id FROM keys WHERE bank_id = :bank LIMIT :most", some).fetchall()
    forget_keys(driver, spent)
    logged = driver.execute(_SOME_EVICTIONS, some).rowcount
    return most not in (len(ids), len(spent), logged)


def forget_bank(connection: Connection, bank_id: int) -> None:
    """Forget a deleted bank of which nothing is left, neither rows nor files."""
    connection.execute(sa.delete(GONE_BANKS).where(GONE_BANKS.c.bank_id == bank_id))


def save_plan(connection: Connection, bank_id: int, victims: Victims) -> None:
    """Keep what is left of an eviction, so that a restart can go on with it, or forget it where nothing is left."""
    connection.execute(sa.delete(EVICTION_PLANS).where(EVICTION_PLANS.c.bank_id == bank_id))
    if victims:
        connection.execute(sa.insert(EVICTION_PLANS).values(bank_id=bank_id, plan=victims.to_bytes()))


def saved_plan(connection: Connection, bank_id: int) -> Victims:
    """Return the plan that was kept; some of its chunks may be gone already."""
    plan = connection.scalar(sa.select(EVICTION_PLANS.c.plan).where(EVICTION_PLANS.c.bank_id == bank_id))
    return NOBODY if plan is None else Victims.from_bytes(plan)


def saved_plans(connection: Connection) -> set[int]:
    """Return the ids of the banks that have a plan."""
    return set(connection.scalars(sa.select(EVICTION_PLANS.c.bank_id)))


def victims(connection: Connection, bank_id: int, chunk_ids: Sequence[int]) -> Sequence[Row[Any]]:
    """Read of chunks what the log would say of them; only of the first chunks where their metadata are long."""
    names = ("chunk_id", "retrieval_count", "start", "stored_length", "created", "meta")
    statement = sa.select(*[CHUNKS.c[name] for name in names]).where(CHUNKS.c.bank_id == bank_id)
    found: list[Row[Any]] = []
    room = _MOST_METADATA
    for begin in range(0, len(chunk_ids), _VICTIMS):
        some = connection.execute(statement.where(CHUNKS.c.chunk_id.in_(chunk_ids[begin : begin + _VICTIMS]))).all()
        found += some
        room -= sum(len(row.meta) for row in some)
        if room < 0:
            break
    return found


def evictions(connection: Connection, bank_id: int, before: int) -> Iterator[tuple[int, Eviction]]:
    """Read (sequence, eviction) one after the other, newest first, from the first one before the sequence `before`."""
    where = (EVICTIONS.c.bank_id == bank_id, EVICTIONS.c.sequence < before)
    newest = EVICTIONS.c.sequence.desc()
    rows = connection.execute(sa.select(EVICTIONS).where(*where).order_by(newest))
    for row in rows:
        yield row.sequence, eviction(row, row.reason, row.evicted)


def eviction(row: Row[Any], reason: EvictionReason, evicted: int | None) -> Eviction:
    """Make the value of a row of `victims` or of the log."""
    return Eviction(
        chunk_id=row.chunk_id,
        reason=reason,
        retrieval_count=row.retrieval_count,
        start=row.start,
        stored_length=row.stored_length,
        created=row.created,
        metadata=json.loads(row.meta),
        evicted=evicted,
    )
