"""The rows of chunks: narrow rows that searches and evictions scan, wide rows that answers are made of, and keys.

Statements that run for every chunk that is written or retrieved are text, for the driver: building and looking up the
same statement as an expression costs ten times its execution.
"""

import json
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from operator import attrgetter
from typing import Any, cast

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, Select, Table
from sqlalchemy.exc import DBAPIError

from memory_service.domain.model import Bank, Chunk, Filter, Metadata, Unit
from memory_service.storage.chunks import row_checksum
from memory_service.storage.chunks.counts import Unwritten
from memory_service.storage.chunks.keyed import Keyed
from memory_service.storage.chunks.known_chunks import KnownChunks, State
from memory_service.storage.chunks.message_bytes import bounds
from memory_service.storage.chunks.removed import SPENT_KEY_US
from memory_service.storage.chunks.row import chunk_of
from memory_service.storage.local.records import row_flaws
from memory_service.storage.local.records.conditions import holds, of_stretches
from memory_service.storage.local.records.gone_rows import forget_keys
from memory_service.storage.local.records.schema import raw
from memory_service.storage.local.records.tables import BANKS, CHUNKS, CONTENTS, GONE_BANKS, KEYS

# A chunk is a row of each. The embedding comes along where it is not asked for, because the row's checksum covers it.
_COLUMNS = [*CHUNKS.columns, *list(CONTENTS.columns)[1:]]


def _insertion(table: Table) -> str:
    names = [column.name for column in table.columns]
    return f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)})"


_FIND_KEY = """
    SELECT chunk_id, coalesce(chunks.digest, spent_keys.digest), gone, ttl, renew, expires
    FROM keys LEFT JOIN chunks USING (chunk_id) LEFT JOIN spent_keys USING (chunk_id)
    WHERE keys.bank_id = ? AND keys.key = ?
"""
_INSERT_CHUNK, _INSERT_CONTENT, _INSERT_KEY = _insertion(CHUNKS), _insertion(CONTENTS), _insertion(KEYS)
_ADD_USAGE = """
    UPDATE banks SET chunks = chunks + ?1, chunks_written = chunks_written + ?1,
    tokens = tokens + ?2, bytes = bytes + ?3 WHERE bank_id = ?4
"""
# As text, which SQLite makes in a third of the time in which Python takes a row for each id, and other threads go on.
_AT_ONCE = 1 << 16
_FIND_IDS = """
    SELECT group_concat(chunk_id), count(*), max(chunk_id)
    FROM (SELECT chunk_id FROM chunks WHERE bank_id = ? AND chunk_id > ? ORDER BY chunk_id LIMIT ?)
"""
_FIND_VECTORS = """
    SELECT chunk_id, embedding FROM contents WHERE chunk_id IN (SELECT value FROM json_each(?)) ORDER BY chunk_id
"""
# Rows of `_FIND_CHUNKS`, `_FIND_KEY` and of `expired_ids`, without the price of SQLAlchemy's.
_found_row = cast(Any, namedtuple("_Found", [column.name for column in _COLUMNS]))._make
_state_of = cast(Any, lambda row, of=attrgetter(*State._fields): State._make(of(row)))
_Keyed = namedtuple("_Keyed", ["chunk_id", "digest", "gone", "ttl", "renew", "expires"])
_Expiring = namedtuple("_Expiring", ["chunk_id", "ttl", "renew", "expires"])
# By name: SQLite would choose the index of the whole bank, and find out row by row.
_EXPIRED = "FROM chunks INDEXED BY ix_chunks_expires WHERE expires <= ?"
_FIND_CHUNKS = f"""
    SELECT {", ".join(map(str, _COLUMNS))} FROM chunks JOIN contents USING (chunk_id)
    WHERE bank_id = ? AND chunk_id IN (SELECT value FROM json_each(?))
"""
_FIND_STATES = f"""
    SELECT {", ".join(State._fields)} FROM chunks
    WHERE bank_id = ? AND chunk_id IN (SELECT value FROM json_each(?))
"""
_FIND_SIZES = """
    SELECT chunk_id, length(CAST(text AS BLOB)), length(token_ids), 2 * length(meta) + coalesce(length(payload), 0)
    FROM chunks JOIN contents USING (chunk_id) WHERE chunk_id IN (SELECT value FROM json_each(?))
"""


def find_key(connection: Connection, bank_id: int, key: bytes, unwritten: Unwritten) -> Keyed | None:
    """Find the chunk that was first written under a key, with the digest of its request; None for a new key. What is
    `unwritten` may have renewed the chunk."""
    found = raw(connection).execute(_FIND_KEY, (bank_id, key)).fetchone()
    if found is None:
        return None
    row = _Keyed._make(found)
    free = row.gone is not None and row.gone <= unwritten.now - SPENT_KEY_US
    gone = row.gone is not None or unwritten.expired(row)
    return Keyed(row.chunk_id, row_checksum.digest_of(row.digest or b""), gone, free, row.gone is not None)


def known_keys(connection: Connection, bank_id: int, keys: Sequence[bytes]) -> set[bytes]:
    """Return those of some keys, few enough for one statement, under which a chunk was ever written, as far as that is
    known."""
    statement = f"SELECT key FROM keys WHERE bank_id = ? AND key IN ({', '.join('?' * len(keys))})"
    return {key for (key,) in raw(connection).execute(statement, (bank_id, *keys))}


def free_key(connection: Connection, bank_id: int, key: bytes, chunk_id: int) -> None:
    """Forget the key of a chunk that is gone, so that it can be inserted again."""
    forget_keys(raw(connection), [(bank_id, key, chunk_id)])


def insert(connection: Connection, bank_id: int, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Insert rows of a bank and count them in its usage. Returns False when there is no such bank (any more)."""
    driver = raw(connection)
    tokens, size = sum(row["stored_length"] for row in rows), sum(row["size"] for row in rows)
    if driver.execute(_ADD_USAGE, (len(rows), tokens, size, bank_id)).rowcount == 0:
        return False
    for statement in (_INSERT_CHUNK, _INSERT_CONTENT, _INSERT_KEY):
        driver.executemany(statement, rows)
    return True


def ledger_rows(connection: Connection, bank_id: int, unit: Unit) -> Iterator[tuple[int, int, int, int, int]]:
    """Read (id, size in `unit`, retrievals, last use, pinned) of every chunk, ascending by id."""
    size = {"chunks": "1", "tokens": "stored_length", "bytes": "size"}[unit]
    columns = f"chunk_id, {size}, retrieval_count, max(created, coalesce(last_retrieved, 0)), pinned"
    return raw(connection).execute(f"SELECT {columns} FROM chunks WHERE bank_id = ? ORDER BY chunk_id", (bank_id,))


def found(
    connection: Connection, bank: Bank, chunk_ids: Iterable[int], unwritten: Unwritten, known: KnownChunks
) -> Iterator[Chunk]:
    """Read the chunks of these ids, as far as they exist in this bank and have not expired, one after the other and in
    no order. What is `unwritten` may have renewed them; of those that are `known` little is read. Errors:
    FlawedError."""
    wanted = list(chunk_ids)
    with row_flaws.naming(connection, bank, wanted):
        others = set(wanted)
        if seen := known.among(wanted):
            for state in _rows(connection, _FIND_STATES, bank, seen, State._make):
                if (chunk := known.now(state, bank)) is not None:
                    others.discard(chunk.chunk_id)
                    if not unwritten.expired(state):
                        yield chunk
        if others:
            for row in _rows(connection, _FIND_CHUNKS, bank, others, _found_row):
                if not unwritten.expired(row):
                    yield known.learn(_state_of(row), chunk_of(row, bank, False))


def _rows(
    connection: Connection, statement: str, bank: Bank, ids: Iterable[int], make: Callable[[Any], Any]
) -> Iterator[Any]:
    """Yield what is made of the rows of a bank's chunks of these ids."""
    # Closed also where a row cannot be read: the traceback of that error would keep the statement open, and with it the
    # end of the service waiting.
    with closing(raw(connection).execute(statement, (bank.bank_id, json.dumps(list(ids))))) as rows:
        yield from map(make, rows)


def message_bytes(connection: Connection, times: Mapping[int, int]) -> tuple[int, int]:
    """Return the least and the most bytes that chunks take in messages, each so many times, without loading their
    rows."""
    return bounds(raw(connection).execute(_FIND_SIZES, (json.dumps(list(times)),)), times)


def expired_ids(connection: Connection, bank_id: int, unwritten: Unwritten) -> NDArray[np.int64]:
    """Return the ids [n], ascending, of the bank's chunks that have expired and are not removed yet. This is cheap
    where there are none."""
    statement = f"SELECT chunk_id, ttl, renew, expires {_EXPIRED} AND bank_id = ?"
    rows = map(_Expiring._make, raw(connection).execute(statement, (unwritten.now, bank_id)).fetchall())
    return np.sort(np.array([row.chunk_id for row in rows if unwritten.expired(row)], np.int64))


def expired(connection: Connection, now: int, most: int) -> dict[int, list[int]]:
    """Return, by bank id, the ids of chunks that have expired as far as the counts are written, at most `most` in
    all."""
    found: dict[int, list[int]] = {}
    statement = f"SELECT bank_id, chunk_id {_EXPIRED} AND bank_id IN (SELECT bank_id FROM banks) LIMIT ?"
    for bank_id, chunk_id in raw(connection).execute(statement, (now, most)):
        found.setdefault(bank_id, []).append(chunk_id)
    return found


def matching_ids(
    connection: Connection, bank: Bank, filter_: Filter, among: Sequence[int] | None = None
) -> NDArray[np.int64]:
    """Return the ids [n], ascending, of the bank's chunks that a filter lets pass, expired ones included. among: the
    ids that are asked about; None for all. Errors: FlawedError."""
    where = [CHUNKS.c.bank_id == bank.bank_id, *_conditions(filter_)]
    if among is not None:
        wanted = sa.func.json_each(json.dumps(list(among))).table_valued("value")
        where.insert(1, CHUNKS.c.chunk_id.in_(sa.select(wanted.c.value)))
    with row_flaws.naming(connection, bank):
        rows = connection.execute(sa.select(CHUNKS.c.chunk_id).where(*where).order_by(CHUNKS.c.chunk_id))
        return np.fromiter((chunk_id for (chunk_id,) in rows), np.int64)


def matching_rows(rows: Iterable[Mapping[str, Any]], filter_: Filter) -> list[int]:
    """Return the ids of those rows, which are of no bank any more, that a filter lets pass. A row that cannot be
    compared passes."""
    found = list[int]()
    names = ("chunk_id", "start", "created", "pinned", "meta")
    statement = sa.select(CHUNKS.c.chunk_id).where(*_conditions(filter_))
    with sa.create_engine("sqlite://").connect() as connection:
        connection.exec_driver_sql(f"CREATE TABLE chunks ({', '.join(names)})")
        for row in rows:
            connection.exec_driver_sql("DELETE FROM chunks")
            values = ", ".join(f":{name}" for name in names)
            connection.exec_driver_sql(f"INSERT INTO chunks VALUES ({values})", {name: row[name] for name in names})
            try:
                found += connection.scalars(statement)
            except DBAPIError:
                found.append(row["chunk_id"])
    return found


def _conditions(filter_: Filter) -> list[ColumnElement[bool]]:
    bounds = [
        CHUNKS.c.created >= filter_.created_from if filter_.created_from is not None else None,
        CHUNKS.c.created < filter_.created_before if filter_.created_before is not None else None,
        CHUNKS.c.start >= filter_.start_from if filter_.start_from is not None else None,
        CHUNKS.c.start < filter_.start_before if filter_.start_before is not None else None,
        CHUNKS.c.pinned == filter_.pinned if filter_.pinned is not None else None,
    ]
    # The cheapest first: of a row that one of them keeps out, the others are not asked.
    stated = [bound for bound in bounds if bound is not None] + [
        holds(CHUNKS.c.meta, each) for each in filter_.metadata
    ]
    if filter_.stretches:
        stated.append(of_stretches(CHUNKS.c.meta, CHUNKS.c.start, filter_.stretches))
    if filter_.any_of:
        stated.append(sa.or_(*(sa.and_(sa.true(), *_conditions(each)) for each in filter_.any_of)))
    return stated


def _whole() -> Select[Any]:
    return sa.select(*_COLUMNS).join_from(CHUNKS, CONTENTS, CHUNKS.c.chunk_id == CONTENTS.c.chunk_id)


def _maybe_alive(now: int) -> ColumnElement[bool]:
    """Build the expression that tells whether a chunk has not expired, or may have been renewed by what is not
    written."""
    return sa.or_(CHUNKS.c.expires.is_(None), CHUNKS.c.expires > now, CHUNKS.c.renew)


def get(
    connection: Connection, bank: Bank, chunk_id: int, unwritten: Unwritten, *, embedding: bool = False
) -> Chunk | None:
    """Read a chunk of this bank, with the counts that are written; None where it does not exist or has expired. Errors:
    FlawedError."""
    where = (CHUNKS.c.bank_id == bank.bank_id, CHUNKS.c.chunk_id == chunk_id)
    with row_flaws.naming(connection, bank, [chunk_id]):
        row = connection.execute(_whole().where(*where)).one_or_none()
        return None if row is None or unwritten.expired(row) else chunk_of(row, bank, embedding)


def page(
    connection: Connection, bank: Bank, after: int, filter_: Filter, unwritten: Unwritten, *, embedding: bool
) -> Iterator[Chunk]:
    """Read the chunks of a bank one after the other, ascending by id, from the first one after `after`, without expired
    ones and with the counts that are written. Errors: FlawedError."""
    alive = _maybe_alive(unwritten.now)
    where = (CHUNKS.c.bank_id == bank.bank_id, CHUNKS.c.chunk_id > after, alive, *_conditions(filter_))
    with row_flaws.naming(connection, bank):
        for row in connection.execute(_whole().where(*where).order_by(CHUNKS.c.chunk_id)):
            if not unwritten.expired(row):
                yield chunk_of(row, bank, embedding)


def pin(
    connection: Connection, bank_id: int, chunk_ids: Sequence[int], pinned: bool, unwritten: Unwritten
) -> list[int]:
    """Set or clear `pinned`, and return the ids that exist and have not expired."""
    gone = expired_ids(connection, bank_id, unwritten).tolist()
    where = (CHUNKS.c.bank_id == bank_id, CHUNKS.c.chunk_id.in_(set(chunk_ids).difference(gone)))
    return list(connection.scalars(sa.update(CHUNKS).where(*where).values(pinned=pinned).returning(CHUNKS.c.chunk_id)))


def update(connection: Connection, bank_id: int, chunk_id: int, metadata: Metadata, unwritten: Unwritten) -> int | None:
    """Replace the metadata, and return by how many bytes the chunk has grown; None where it does not exist or has
    expired."""
    where = (CHUNKS.c.bank_id == bank_id, CHUNKS.c.chunk_id == chunk_id)
    columns = (CHUNKS.c.chunk_id, CHUNKS.c.digest, CHUNKS.c.ttl, CHUNKS.c.renew, CHUNKS.c.expires, CHUNKS.c.meta)
    row = connection.execute(sa.select(*columns).where(*where)).one_or_none()
    if row is None or unwritten.expired(row):
        return None
    meta = json.dumps(dict(metadata))
    grown = len(meta.encode()) - len(row.meta.encode())
    values = {
        "meta": meta,
        "digest": row_checksum.with_metadata(row.digest, meta),
        "size": CHUNKS.c.size + grown,
    }
    connection.execute(sa.update(CHUNKS).where(*where).values(values))
    raw(connection).execute("UPDATE banks SET bytes = bytes + ? WHERE bank_id = ?", (grown, bank_id))
    return grown


def ids(connection: Connection, bank_id: int) -> NDArray[np.int64]:
    """Return the ids [n], ascending, of the bank's chunks, expired ones included."""
    parts, after, count = [np.empty(0, np.int64)], -(1 << 63), _AT_ONCE
    while count == _AT_ONCE:
        text, count, after = raw(connection).execute(_FIND_IDS, (bank_id, after, _AT_ONCE)).fetchone()
        if count:
            parts.append(np.fromstring(text, np.int64, count, sep=","))
    return np.sort(np.concatenate(parts))  # SQLite promises no order within a text


def vectors(
    connection: Connection, bank: Bank, ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Read the embeddings [m, d] of those of the ids that exist in the bank, and return these ids [m], ascending, with
    them. Errors: FlawedError."""
    with row_flaws.naming(connection, bank, ids.tolist()):
        found, embeddings = _vectors(connection, bank.embedding.dimension, ids)
        # Of an embedding that is not finite no search is right.
        if not np.isfinite(embeddings).all():
            raise ValueError("an embedding is not finite")
        return found, embeddings


def _vectors(
    connection: Connection, dimension: int, ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    rows = raw(connection).execute(_FIND_VECTORS, (json.dumps(ids.tolist()),)).fetchall()
    found = np.array([chunk_id for chunk_id, _ in rows], np.int64)
    embeddings = [vector for _, vector in rows]
    if any(len(vector) != 4 * dimension for vector in embeddings):
        raise ValueError("an embedding is cut")
    return found, np.frombuffer(b"".join(embeddings), "<f4").reshape(len(rows), dimension)


def payload_ids(connection: Connection) -> dict[str, set[int] | None]:
    """Return, by bank uid, the ids of chunks that have a payload file; None stands for a bank that is being deleted."""
    known: dict[str, set[int]] = {uid: set() for uid in connection.scalars(sa.select(BANKS.c.uid))}
    statement = sa.select(BANKS.c.uid, CHUNKS.c.chunk_id).join(CHUNKS, CHUNKS.c.bank_id == BANKS.c.bank_id)
    for uid, chunk_id in connection.execute(statement.where(CHUNKS.c.payload_bytes > 0)):
        known[uid].add(chunk_id)
    return {**known, **dict.fromkeys(connection.scalars(sa.select(GONE_BANKS.c.uid)))}


def some_payload_ids(connection: Connection, bank_id: int, most: int) -> list[int]:
    """Return at most `most` ids of the bank's chunks that have a payload file, spread from the first to the last of
    them."""
    statement = "SELECT chunk_id FROM chunks WHERE bank_id = ? AND payload_bytes > 0 ORDER BY chunk_id"
    found = [chunk_id for (chunk_id,) in raw(connection).execute(statement, (bank_id,))]
    return found[:: -(-len(found) // most) or 1]
