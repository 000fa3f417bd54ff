"""The rows of chunks, of their idempotency keys, and of how often they were retrieved."""

import json
import math
from collections import namedtuple
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import psycopg
from numpy.typing import NDArray
from sqlalchemy import Connection

from memory_service.domain.clock import SECOND
from memory_service.domain.eviction import Candidates
from memory_service.domain.model import Bank, Chunk, Filter, Metadata, Unit
from memory_service.storage.base import FlawedError
from memory_service.storage.chunks import row_checksum
from memory_service.storage.chunks.counts import Unwritten
from memory_service.storage.chunks.keyed import Keyed
from memory_service.storage.chunks.message_bytes import bounds
from memory_service.storage.chunks.removed import SPENT_KEY_US
from memory_service.storage.chunks.row import chunk_of
from memory_service.storage.postgres.database import Asked, raw
from memory_service.storage.postgres.rows import copied
from memory_service.storage.postgres.rows.bank_rows import UNCHANGED
from memory_service.storage.postgres.rows.conditions import passing, tags
from memory_service.storage.postgres.vectors import Embedding

# The columns of a row, as `chunks.row` makes and reads them.
_STORED = (
    *("bank_id", "chunk_id", "key", "digest", "start", "original_length", "stored_length", "payload_bytes", "size"),
    *("created", "pinned", "ttl", "renew", "expires", "meta", "token_ids", "text", "payload", "embedding"),
)
_row = cast(Any, namedtuple("_ChunkRow", [*_STORED, "retrieval_count", "last_retrieved"]))._make
_TEXT, _EMBEDDING = _STORED.index("text"), _STORED.index("embedding")
_FIND = f"""
    SELECT {", ".join(f"c.{name}" for name in _STORED)}, u.count, u.last
    FROM chunks c JOIN chunk_use u ON u.chunk_id = c.chunk_id
"""
# Columns that may be long, and the bytes that those of one chunk have together at most where they are read with many
# others of which few are wanted.
_LONG, _SHORT = ("meta", "token_ids", "text", "payload"), 8192
_IS_SHORT = " + ".join(f"coalesce(octet_length(c.{name}), 0)" for name in _LONG) + f" <= {_SHORT}"
_ONLY_SHORT = (f"CASE WHEN {_IS_SHORT} THEN c.{name} END" if name in _LONG else f"c.{name}" for name in _STORED)
_FIND_SHORT = f"""
    SELECT {", ".join(_ONLY_SHORT)}, u.count, u.last, {_IS_SHORT}, {UNCHANGED}
    FROM chunks c JOIN chunk_use u ON u.chunk_id = c.chunk_id
    WHERE c.bank_id = %(bank)s AND c.chunk_id = ANY(%(ids)s) ORDER BY c.chunk_id
"""
_INSERT = f"""
    INSERT INTO chunks ({", ".join(_STORED)}, tags)
    VALUES ({", ".join(f"%({name})s" for name in _STORED)}, %(tags)s)
"""
_INSERT_USE = "INSERT INTO chunk_use (chunk_id, bank_id) VALUES (%(chunk_id)s, %(bank_id)s)"
_INSERT_KEY = """
    INSERT INTO keys (bank_id, key, chunk_id, digest) VALUES (%(bank_id)s, %(key)s, %(chunk_id)s, %(asked)s)
    ON CONFLICT (bank_id, key) DO UPDATE SET chunk_id = excluded.chunk_id, digest = excluded.digest, gone = NULL
"""
# All that a chunk is, in one statement.
_INSERT_ALL = f"WITH chunk AS ({_INSERT}), used AS ({_INSERT_USE}) {_INSERT_KEY}"
# What a deleted bank held is there for some time.
_FIND_KEYS = """
    SELECT k.key, k.chunk_id, k.digest, k.gone, c.ttl, c.renew, c.expires
    FROM banks JOIN keys k USING (bank_id) LEFT JOIN chunks c ON c.bank_id = k.bank_id AND c.chunk_id = k.chunk_id
    WHERE k.bank_id = %s AND k.key = ANY(%s)
"""
_FIND_SIZES = """
    SELECT c.chunk_id, length(text), length(token_ids), 2 * octet_length(meta) + coalesce(octet_length(payload), 0)
    FROM chunk_use u JOIN chunks c ON c.bank_id = u.bank_id AND c.chunk_id = u.chunk_id WHERE u.chunk_id = ANY(%s)
"""
_SIZES: Mapping[Unit, str] = {"chunks": "1::int8", "tokens": "stored_length", "bytes": "size"}
# A chunk that retrievals renew is removed so much later than it expires: another service may have counted one, which it
# writes within a second where the database answers it.
_LATE_US = 10 * SECOND
_CANDIDATES = ("chunk_id", "size", "count", "used")
# Chunks that are read at once, and the errors of reading a row that is damaged.
_PAGE = 128
# So few embeddings are read by a statement that the database has prepared, sooner than a copy of them begins.
_FEW = 256
_STUMBLES = (ValueError, KeyError, TypeError, IndexError, AttributeError)


class _Expiring(NamedTuple):
    """What says whether a chunk has expired."""

    chunk_id: int
    ttl: int
    renew: bool
    expires: int | None


def find_keys(connection: Connection, bank_id: int, keys: Sequence[bytes], unwritten: Unwritten) -> dict[bytes, Keyed]:
    """Find the chunks that were first written under keys. What is `unwritten` may have renewed them."""
    return read_keys(ask_keys(connection, bank_id, keys), unwritten)


def ask_keys(connection: Connection, bank_id: int, keys: Sequence[bytes]) -> Asked:
    """Ask for chunks as `find_keys` does; see `read_keys`."""
    return raw(connection).execute(_FIND_KEYS, (bank_id, list(keys)), binary=True)


def read_keys(asked: Asked, unwritten: Unwritten) -> dict[bytes, Keyed]:
    """Return the chunks that were asked for, by key. unwritten: what there was before they were asked for."""
    found = {}
    for key, chunk_id, digest, gone, *lives in asked:
        free = gone is not None and gone <= unwritten.now - SPENT_KEY_US
        expired = gone is None and unwritten.expired(_Expiring(chunk_id, *lives))
        found[key] = Keyed(chunk_id, digest, gone is not None or expired, free, gone is not None)
    return found


def insert(connection: Connection, rows: Sequence[Mapping[str, Any]], metadata: Sequence[Metadata]) -> None:
    """Insert rows, as `chunks.row.row_of` makes them, with their keys. metadata: those of each row."""
    given = [
        {
            **row,
            "asked": row_checksum.digest_of(row["digest"]),
            "text": row["text"].encode(),
            "embedding": Embedding(row["embedding"]),
            "tags": tags(pairs),
        }
        for row, pairs in zip(rows, metadata, strict=True)
    ]
    with raw(connection).cursor() as cursor:
        cursor.executemany(_INSERT_ALL, given)


def get(
    connection: Connection, bank: Bank, chunk_id: int, unwritten: Unwritten, *, embedding: bool = False
) -> Chunk | None:
    """Read a chunk of a bank, with the counts that are written; None where it does not exist or has expired. Errors:
    FlawedError."""
    found = list(_read(connection, bank, "c.chunk_id = %s", [chunk_id], unwritten, embedding=embedding))
    return found[0] if found else None


def found(connection: Connection, bank: Bank, chunk_ids: Iterable[int], unwritten: Unwritten) -> Iterator[Chunk]:
    """Read the chunks of these ids, as far as they exist in this bank and have not expired, in no order. Errors:
    FlawedError."""
    return _read(connection, bank, "c.chunk_id = ANY(%s)", [list(chunk_ids)], unwritten)


def page(
    connection: Connection, bank: Bank, after: int, where: Filter, unwritten: Unwritten, *, embedding: bool
) -> Iterator[Chunk]:
    """Read the chunks of a bank one after the other, ascending by id, from the first one after `after`, without expired
    ones and with the counts that are written. Errors: FlawedError."""
    values: list[Any] = []
    condition = passing(where, values)
    alive = "(expires IS NULL OR expires > %s OR renew)"
    statement = f"{_FIND} WHERE c.bank_id = %s AND c.chunk_id > %s AND {alive} AND {condition}"
    statement += f" ORDER BY c.chunk_id LIMIT {_PAGE}"
    while True:
        given = [bank.bank_id, after, unwritten.now, *values]
        rows = raw(connection).execute(statement, given, binary=True).fetchall()
        yield from _chunks(rows, bank, unwritten, embedding=embedding)
        if len(rows) < _PAGE:
            return
        after = rows[-1][1]


def _read(
    connection: Connection,
    bank: Bank,
    which: str,
    values: Sequence[object],
    unwritten: Unwritten,
    *,
    embedding: bool = False,
) -> Iterator[Chunk]:
    statement = f"{_FIND} WHERE c.bank_id = %s AND {which}"
    rows = raw(connection).execute(statement, (bank.bank_id, *values), binary=True).fetchall()
    return _chunks(rows, bank, unwritten, embedding=embedding)


def made(rows: Sequence[tuple[Any, ...]], bank: Bank, unwritten: Unwritten) -> list[Chunk]:
    """Make the values of rows that `beside` has returned, without those that have expired. Errors: FlawedError."""
    return list(_chunks(rows, bank, unwritten, embedding=False))


def _chunks(rows: Sequence[tuple[Any, ...]], bank: Bank, unwritten: Unwritten, *, embedding: bool) -> Iterator[Chunk]:
    """Make the values of rows, without those that have expired. Errors: FlawedError, with all rows of these that cannot
    be used."""
    made, flaws = [], dict[int, str]()
    for values in rows:
        try:
            row = _row((*values[:_TEXT], values[_TEXT].decode(), *values[_TEXT + 1 :]))
            if not unwritten.expired(row):
                made.append(chunk_of(row, bank, embedding))
        except _STUMBLES as error:
            flaws[values[1]] = str(error)
    if flaws:
        raise FlawedError(bank, flaws)
    return iter(made)


def message_bytes(connection: Connection, times: Mapping[int, int]) -> tuple[int, int]:
    """Return the least and the most bytes that chunks take in messages, each so many times, without their texts."""
    return bounds(raw(connection).execute(_FIND_SIZES, (list(times),), binary=True), times)


def expired_ids(connection: Connection, bank_id: int, unwritten: Unwritten) -> NDArray[np.int64]:
    """Return the ids [n], ascending, of the bank's chunks that have expired and are not removed yet. This is cheap
    where there are none."""
    # Between two bounds, so that the planner, who does not know the values, takes these for few.
    statement = "SELECT chunk_id, ttl, renew, expires FROM chunks WHERE bank_id = %s AND expires BETWEEN 0 AND %s"
    rows = raw(connection).execute(statement, (bank_id, unwritten.now), binary=True).fetchall()
    return np.array(sorted(row[0] for row in rows if unwritten.expired(_Expiring._make(row))), np.int64)


def expired_of(expiring: Sequence[int], unwritten: Unwritten) -> NDArray[np.int64]:
    """Return the ids [n], ascending, of those chunks that have expired. expiring: chunk_id, ttl, renew and expires of
    each, one after the other."""
    numbers = zip(*[iter(expiring)] * 4, strict=True)
    rows = (_Expiring(chunk_id, ttl, bool(renew), expires) for chunk_id, ttl, renew, expires in numbers)
    return np.array(sorted(row.chunk_id for row in rows if unwritten.expired(row)), np.int64)


def expired(connection: Connection, now: int, most: int) -> dict[int, list[int]]:
    """Return, by bank id, the ids of chunks that have expired, and that no count of another service is to renew, at
    most `most` in all."""
    found: dict[int, list[int]] = {}
    statement = (
        "SELECT bank_id, chunk_id FROM chunks WHERE expires BETWEEN 0 AND %s AND (NOT renew OR expires <= %s) LIMIT %s"
    )
    for bank_id, chunk_id in raw(connection).execute(statement, (now, now - _LATE_US, most), binary=True).fetchall():
        found.setdefault(bank_id, []).append(chunk_id)
    return found


def matching_ids(
    connection: Connection, bank: Bank, where: Filter, among: Sequence[int] | None = None
) -> NDArray[np.int64]:
    """Return the ids [n], ascending, of the bank's chunks that a filter lets pass, expired ones included. among: the
    ids that are asked about; None for all."""
    values: list[Any] = [bank.bank_id]
    chosen = ""
    if among is not None:
        chosen = "AND chunk_id = ANY(%s)"
        values.append(list(among))
    condition = passing(where, values)
    query = f"SELECT chunk_id FROM chunks WHERE bank_id = %s {chosen} AND {condition} ORDER BY chunk_id"
    return np.array([i for (i,) in raw(connection).execute(query, values, binary=True).fetchall()], np.int64)


def pin(
    connection: Connection, bank_id: int, chunk_ids: Sequence[int], pinned: bool, unwritten: Unwritten
) -> list[int]:
    """Set or clear `pinned`, and return the ids that exist and have not expired."""
    gone = expired_ids(connection, bank_id, unwritten).tolist()
    wanted = sorted(set(chunk_ids).difference(gone))
    statement = "UPDATE chunks SET pinned = %s WHERE bank_id = %s AND chunk_id = ANY(%s) RETURNING chunk_id"
    return [i for (i,) in raw(connection).execute(statement, (pinned, bank_id, wanted), binary=True).fetchall()]


def update(connection: Connection, bank_id: int, chunk_id: int, metadata: Metadata, unwritten: Unwritten) -> int | None:
    """Replace the metadata, and return by how many bytes the chunk has grown; None where it does not exist or has
    expired."""
    driver, place = raw(connection), (bank_id, chunk_id)
    statement = """
        SELECT chunk_id, ttl, renew, expires, digest, octet_length(meta) FROM chunks
        WHERE bank_id = %s AND chunk_id = %s
    """
    row = driver.execute(statement, place, binary=True).fetchone()
    if row is None or unwritten.expired(_Expiring._make(row[:4])):
        return None
    meta = json.dumps(dict(metadata))
    digest, grown = row_checksum.with_metadata(row[4], meta), len(meta.encode()) - row[5]
    statement = """
        UPDATE chunks SET meta = %s, tags = %s, digest = %s, size = size + %s WHERE bank_id = %s AND chunk_id = %s
    """
    driver.execute(statement, (meta, tags(metadata), digest, grown, *place))
    return int(grown)


def ids(connection: Connection, bank_id: int) -> NDArray[np.int64]:
    """Return the ids [n], ascending, of the bank's chunks, expired ones included."""
    query = "SELECT chunk_id FROM chunks WHERE bank_id = %s ORDER BY chunk_id"
    found: NDArray[np.int64] = copied.numbers(connection, query, (bank_id,), ["chunk_id"])["chunk_id"]
    return found


def vectors(
    connection: Connection, bank: Bank, ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Read the embeddings [m, d] of those of the ids that exist in the bank, and return these ids [m], ascending, with
    them. Errors: FlawedError."""
    query = "SELECT chunk_id, embedding FROM chunks WHERE bank_id = %s AND chunk_id = ANY(%s) ORDER BY chunk_id"
    values, dimension = (bank.bank_id, ids.tolist()), bank.embedding.dimension
    with _naming(connection, bank):
        if len(ids) > _FEW:
            return copied.vectors(connection, query, values, dimension)
        rows = raw(connection).execute(query, values, binary=True).fetchall()
        return np.array([chunk_id for chunk_id, _ in rows], np.int64), _joined([row[1] for row in rows], dimension)


def _joined(embeddings: Sequence[bytes], dimension: int) -> NDArray[np.float32]:
    """Return embeddings as [m, d]. Errors: ValueError for one that has another dimension."""
    # Each for itself, because one that is too long and one that is too short have the bytes of two.
    if any(len(embedding) != 4 * dimension for embedding in embeddings):
        raise ValueError("an embedding has another dimension")
    return np.frombuffer(b"".join(embeddings), "<f4").reshape(len(embeddings), dimension)


class Beside(NamedTuple):
    """What is read beside a question about a bank: ids [m], ascending, and embeddings [m, d] of chunks; by id the rows
    of those that are short, for `made`; and the answer, which is None where there is no chunk."""

    ids: NDArray[np.int64]
    vectors: NDArray[np.float32]
    rows: Mapping[int, tuple[Any, ...]]
    unchanged: bool | None


def beside(connection: Connection, bank: Bank, chunk_ids: Sequence[int], values: Mapping[str, object]) -> Beside:
    """Read those of the chunks that exist, whole but for what of them is long, and ask whether `bank_rows.UNCHANGED`
    holds for these values, in one statement. Errors: FlawedError."""
    ids = "{" + ",".join(map(str, chunk_ids)) + "}"  # sooner made and read than each number by itself
    rows = raw(connection).execute(_FIND_SHORT, {**values, "ids": ids}, binary=True).fetchall()
    with _naming(connection, bank):
        vectors = _joined([row[_EMBEDDING] for row in rows], bank.embedding.dimension)
    short = {row[1]: row[:-2] for row in rows if row[-2]}
    return Beside(np.array([row[1] for row in rows], np.int64), vectors, short, rows[0][-1] if rows else None)


def nearest(
    connection: Connection,
    bank: Bank,
    query: NDArray[np.float32],
    most: int,
    allowed: NDArray[np.int64] | None,
    excluded: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Return ids [m] and embeddings [m, d] of the chunks, at most `most`, that have the largest inner products with a
    vector [d]; of equal ones those of the lowest ids. allowed, excluded: the ids that may be returned, None for all,
    and that may not. None is returned where a product leaves float32. Errors: FlawedError."""
    given: dict[str, Any] = {"query": Embedding(query.astype("<f4").tobytes()), "bank": bank.bank_id, "most": most}
    conditions = "bank_id = %(bank)s"
    if allowed is not None:
        given["allowed"] = allowed.tolist()
        conditions += " AND chunk_id = ANY(%(allowed)s)"
    if len(excluded):
        given["excluded"] = excluded.tolist()
        # By a join, which hashes them: `<> ALL` would compare each chunk with each of them.
        conditions += " AND NOT EXISTS (SELECT FROM unnest(%(excluded)s::int8[]) AS gone(id) WHERE gone.id = chunk_id)"
    statement = f"""
        SELECT chunk_id, embedding, embedding <#> %(query)s AS distance FROM chunks WHERE {conditions}
        ORDER BY distance, chunk_id LIMIT %(most)s
    """
    with _naming(connection, bank):
        try:
            rows = raw(connection).execute(statement, given, binary=True).fetchall()
        except psycopg.errors.DataException as error:
            raise ValueError(str(error)) from error
        if not all(map(math.isfinite, (distance for *_, distance in rows))):
            return None
        vectors = np.frombuffer(b"".join(embedding for _, embedding, _ in rows), "<f4")
        vectors = vectors.reshape(len(rows), bank.embedding.dimension)
        return np.array([chunk_id for chunk_id, *_ in rows], np.int64), vectors


@contextmanager
def _naming(connection: Connection, bank: Bank) -> Iterator[None]:
    """Name the rows whose embedding has another length where the block stumbles over one. Errors: FlawedError."""
    try:
        yield
    except ValueError as error:
        statement = "SELECT chunk_id FROM chunks WHERE bank_id = %s AND vector_dims(embedding) <> %s"
        found = raw(connection).execute(statement, (bank.bank_id, bank.embedding.dimension)).fetchall()
        if flaws := {chunk_id: "its embedding has another dimension" for (chunk_id,) in found}:
            raise FlawedError(bank, flaws) from error
        raise


def candidates(
    connection: Connection, bank_id: int, unit: Unit, unwritten: Unwritten, among: Sequence[int] | None = None
) -> Candidates:
    """Read the chunks that an eviction chooses from, oldest first: those that are not pinned. unit: that of their
    sizes. among: the ids that are asked about; None for all."""
    chosen, values = ("", [bank_id]) if among is None else ("AND c.chunk_id = ANY(%s)", [bank_id, list(among)])
    query = f"""
        SELECT c.chunk_id, {_SIZES[unit]}, u.count, greatest(c.created, coalesce(u.last, 0))
        FROM chunks c JOIN chunk_use u ON u.chunk_id = c.chunk_id
        WHERE c.bank_id = %s AND NOT c.pinned {chosen} ORDER BY c.created, c.chunk_id
    """
    found = copied.numbers(connection, query, values, _CANDIDATES)
    read = Candidates(*(found[name] for name in _CANDIDATES))
    for chunk_id in unwritten.pending.keys() | unwritten.taken.keys():
        counted, [*places] = unwritten.of(chunk_id), np.flatnonzero(read.ids == chunk_id)
        if counted is not None and places:
            read.retrievals[places] += counted.times
            read.used[places] = np.maximum(read.used[places], counted.last)
    return read
