"""The truth: store, banks, chunks, spent keys, evictions in SQLite. Owns the commit point, chunk ids and counts.

Functions that take a `Connection` run inside a transaction of the writer (changes) or of a reader (questions).
"""

import json
import secrets
import sqlite3
import time
from collections import Counter, namedtuple
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    Table,
    bindparam,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from memory_service import schema
from memory_service.chunk_ids import ChunkIds
from memory_service.counts import Counts, Unwritten
from memory_service.domain import (
    Bank,
    Capacity,
    Chunk,
    Condition,
    EmbeddingSpec,
    Eviction,
    EvictionReason,
    Expiry,
    Filter,
    KvSpec,
    Payload,
    Policy,
    Producer,
    Quota,
    Tensor,
    Unit,
    Usage,
)
from memory_service.eviction import NOBODY, Victims
from memory_service.ledger import Ledgers
from memory_service.metrics import Metrics
from memory_service.schema import (
    BankRow,
    ChunkRow,
    ContentRow,
    EvictionPlanRow,
    EvictionRow,
    GoneBankRow,
    KeyRow,
    StoreRow,
)
from memory_service.writer import Writer

SPENT_KEY_US = 24 * 3600 * 1_000_000
EVICTION_LOG = 10_000
_USAGE = [BankRow.__table__.c[name.name] for name in fields(Usage)]
_CHUNKS: Table = ChunkRow.__table__  # type: ignore[assignment]
_CONTENTS: Table = ContentRow.__table__  # type: ignore[assignment]
_KEYS: Table = KeyRow.__table__  # type: ignore[assignment]
# A chunk is a row of each; the embedding only where it is asked for.
_WITH_EMBEDDING = [*_CHUNKS.columns, *list(_CONTENTS.columns)[1:]]
_WITHOUT_EMBEDDING = _WITH_EMBEDDING[:-1]


def _raw(connection: Connection) -> sqlite3.Connection:
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


def now_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


class Records:
    """The database of a data folder."""

    def __init__(self, data: Path, *, durable: bool, metrics: Metrics, migrate: bool = False) -> None:
        path = data / "metadata.db"
        schema.prepare(path, data, migrate=migrate)
        self.counts = Counts()
        self.ledgers = Ledgers()
        level = "FULL" if durable else "NORMAL"
        self._readers = schema.engine(path, synchronous=level, writer=False)
        self.writer = Writer(schema.engine(path, synchronous=level, writer=True), self, metrics, durable=durable)
        try:
            self.store_id = self.writer.submit(_identity, durable=True).result()
            self.ids = ChunkIds(self.writer)
        except BaseException:
            self.close()
            raise

    def read(self) -> AbstractContextManager[Connection]:
        """A short read transaction on a connection of its own."""
        return self._readers.begin()

    def snapshot(self) -> Connection:
        """A read transaction that sees the rows as they are now, for another thread to use and close."""
        connection = self._readers.connect()
        connection.begin()
        connection.exec_driver_sql("SELECT 1 FROM store")
        return connection

    def flush_counts(self) -> None:
        """Make every pending count visible."""
        if self.counts or self.counts.under_way:
            self.writer.submit(lambda _connection: None).result()

    def close(self) -> None:
        """Readers first: SQLite checkpoints when the last connection closes, and that must be the writer's."""
        self._readers.dispose()
        self.writer.close()

    # What goes along with the writer's transactions

    def pending(self) -> bool:
        """Whether counts wait."""
        return bool(self.counts)

    def begun(self, connection: Connection) -> None:
        """Write the counts, so that what follows in the transaction sees them."""
        if taken := self.counts.take():
            connection.execute(_COUNT, [{"id": chunk_id, **some._asdict()} for chunk_id, some in taken.items()])
            self.ledgers.counted(taken)

    def committed(self) -> None:
        """The counts are written."""
        self.counts.settle()

    def failed(self) -> None:
        """Nothing of the transaction happened."""
        self.counts.restore()
        self.ledgers.forget_all()


# A chunk that had expired when it was first retrieved stays expired: it may be gone from the index already. One that
# had not lived on, so that the others found it.
_RENEWED = case(
    (ChunkRow.renew & (ChunkRow.expires > bindparam("first")), bindparam("last") + ChunkRow.ttl), else_=ChunkRow.expires
)
_COUNT = (
    update(ChunkRow)
    .where(ChunkRow.chunk_id == bindparam("id"))
    .values(
        retrieval_count=ChunkRow.retrieval_count + bindparam("times"),
        last_retrieved=bindparam("last"),
        expires=_RENEWED,
    )
)


def _identity(connection: Connection) -> str:
    store_id = connection.scalar(select(StoreRow.store_id))
    if store_id is None:
        store_id = secrets.token_hex(16)
        connection.execute(insert(StoreRow).values(id=1, store_id=store_id, next_chunk_id=1))
    return store_id


# Banks


def insert_bank(connection: Connection, bank: Bank) -> int:
    """Its bank_id. The caller has checked that the name is free."""
    values = _bank_values(bank) | {"uid": bank.uid, "name": bank.name, "created": bank.created} | asdict(Usage())
    return int(connection.execute(insert(BankRow).values(values).returning(BankRow.bank_id)).scalar_one())


def update_bank(connection: Connection, bank: Bank) -> None:
    """Write capacity, policy and metadata."""
    connection.execute(update(BankRow).where(BankRow.bank_id == bank.bank_id).values(_bank_values(bank)))


def delete_bank(connection: Connection, bank_id: int) -> bool:
    """The bank itself; `clear_gone_bank` removes what it holds. Whether it existed."""
    uid = connection.scalar(delete(BankRow).where(BankRow.bank_id == bank_id).returning(BankRow.uid))
    if uid is None:
        return False
    connection.execute(insert(GoneBankRow).values(bank_id=bank_id, uid=uid))
    connection.execute(delete(EvictionPlanRow).where(EvictionPlanRow.bank_id == bank_id))
    return True


def gone_banks(connection: Connection) -> list[int]:
    """Deleted banks of which something is left."""
    return list(connection.scalars(select(GoneBankRow.bank_id)))


def clear_gone_bank(connection: Connection, bank_id: int, most: int) -> bool:
    """Remove some of what a deleted bank holds, `most` rows of a table; whether nothing is left."""
    raw = _raw(connection)
    some = {"bank": bank_id, "most": most}
    ids = [chunk_id for (chunk_id,) in raw.execute(_SOME_CHUNKS, some)]
    _delete_chunks(connection, ids)
    spent = raw.execute("SELECT bank_id, key, chunk_id FROM keys WHERE bank_id = :bank LIMIT :most", some).fetchall()
    _forget_keys(raw, spent)
    logged = raw.execute(_SOME_EVICTIONS, some).rowcount
    left = most in (len(ids), len(spent), logged)
    if not left:
        connection.execute(delete(GoneBankRow).where(GoneBankRow.bank_id == bank_id))
    return not left


def banks(connection: Connection, after: str = "", limit: int = -1) -> list[Bank]:
    """By name, from the first one after `after`."""
    rows = connection.execute(select(BankRow.__table__).where(BankRow.name > after).order_by(BankRow.name).limit(limit))
    return [_bank(row) for row in rows]


def bank(connection: Connection, bank_id: int) -> Bank | None:
    """The bank with its usage now."""
    row = connection.execute(select(BankRow.__table__).where(BankRow.bank_id == bank_id)).one_or_none()
    return None if row is None else _bank(row)


def bank_named(connection: Connection, name: str) -> Bank | None:
    """As `bank`, by name."""
    row = connection.execute(select(BankRow.__table__).where(BankRow.name == name)).one_or_none()
    return None if row is None else _bank(row)


def totals(connection: Connection) -> tuple[int, int, int, int]:
    """Banks, and their live chunks, tokens and payload bytes."""
    row = _raw(connection).execute("SELECT count(*), sum(chunks), sum(tokens), sum(bytes) FROM banks").fetchone()
    return row[0], row[1] or 0, row[2] or 0, row[3] or 0


def usage(connection: Connection, bank_id: int) -> Usage | None:
    """The bank's usage now; None when there is no such bank."""
    row = _raw(connection).execute(_FIND_USAGE, (bank_id,)).fetchone()
    return None if row is None else Usage(*row)


def _bank_values(bank: Bank) -> dict[str, Any]:
    kv = asdict(bank.kv) | {"reader_parts": dict(bank.kv.reader_parts)}
    return {
        "spec": json.dumps({"kv": kv, "embedding": asdict(bank.embedding)}),
        "capacity": None if bank.capacity is None else json.dumps(asdict(bank.capacity)),
        "policy": json.dumps(asdict(bank.policy)),
        "quota": json.dumps(asdict(bank.quota)),
        "expiry": json.dumps(asdict(bank.expiry)),
        "index_kind": bank.index,
        "meta": json.dumps(dict(bank.metadata)),
    }


def _bank(row: Row[Any]) -> Bank:
    spec = json.loads(row.spec)
    kv = spec["kv"]
    return Bank(
        name=row.name,
        kv=KvSpec(**(kv | {"layers": tuple(kv["layers"])})),
        embedding=EmbeddingSpec(**spec["embedding"]),
        capacity=None if row.capacity is None else Capacity(**json.loads(row.capacity)),
        policy=Policy(**json.loads(row.policy)),
        metadata=json.loads(row.meta),
        bank_id=row.bank_id,
        uid=row.uid,
        created=row.created,
        usage=Usage(*(getattr(row, column.name) for column in _USAGE)),
        quota=Quota(**json.loads(row.quota)),
        expiry=Expiry(**json.loads(row.expiry)),
        index=row.index_kind,
    )


# Chunks


def _insertion(table: Table) -> str:
    names = [column.name for column in table.columns]
    return f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)})"


# As text, and by the driver: building and looking up the same statement as an expression costs ten times its
# execution, and these run for every chunk that is written, retrieved or evicted.
_FIND_USAGE = f"SELECT {', '.join(column.name for column in _USAGE)} FROM banks WHERE bank_id = ?"
_FIND_KEY = """
    SELECT chunk_id, coalesce(chunks.digest, spent_keys.digest), chunks.chunk_id IS NULL
    FROM keys LEFT JOIN chunks USING (chunk_id) LEFT JOIN spent_keys USING (chunk_id)
    WHERE keys.bank_id = ? AND keys.key = ?
"""
_INSERT_CHUNK, _INSERT_CONTENT, _INSERT_KEY = _insertion(_CHUNKS), _insertion(_CONTENTS), _insertion(_KEYS)
_ADD_USAGE = """
    UPDATE banks SET chunks = chunks + 1, chunks_written = chunks_written + 1,
    tokens = tokens + :stored_length, bytes = bytes + :payload_bytes WHERE bank_id = :bank_id
"""
_SIZES = """
    SELECT chunk_id, stored_length, payload_bytes FROM json_each(?) JOIN chunks ON chunk_id = value
    WHERE bank_id = ? AND (NOT pinned OR ?) ORDER BY json_each.key
"""
_SPEND_KEYS = """
    INSERT INTO spent_keys (bank_id, key, digest, chunk_id, gone)
    SELECT bank_id, key, digest, chunk_id, ? FROM chunks WHERE chunk_id IN (SELECT value FROM json_each(?))
"""
_OLD_KEYS = "SELECT bank_id, key, chunk_id FROM spent_keys WHERE gone < ? LIMIT ?"
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
# By name: SQLite would choose the index of the whole bank, and find out row by row.
_FIND_VECTORS = """
    SELECT chunk_id, embedding FROM contents WHERE chunk_id IN (SELECT value FROM json_each(?)) ORDER BY chunk_id
"""
_SOME_CHUNKS = "SELECT chunk_id FROM chunks WHERE bank_id = :bank ORDER BY chunk_id LIMIT :most"
_SOME_EVICTIONS = """
    DELETE FROM evictions WHERE sequence IN (SELECT sequence FROM evictions WHERE bank_id = :bank LIMIT :most)
"""
# Rows of `_FIND_CHUNKS` and of `expired_ids`, without the price of SQLAlchemy's.
_found_row = cast(Any, namedtuple("_Found", [column.name for column in _WITHOUT_EMBEDDING]))._make
_Expiring = namedtuple("_Expiring", ["chunk_id", "ttl", "renew", "expires"])
# By name: SQLite would choose the index of the whole bank, and find out row by row.
_EXPIRED = "FROM chunks INDEXED BY ix_chunks_expires WHERE expires <= ?"
_FIND_CHUNKS = f"""
    SELECT {", ".join(map(str, _WITHOUT_EMBEDDING))} FROM chunks JOIN contents USING (chunk_id)
    WHERE bank_id = ? AND chunk_id IN (SELECT value FROM json_each(?))
"""


def find_key(connection: Connection, bank_id: int, key: bytes) -> tuple[int, bytes, bool] | None:
    """(chunk id, request digest, gone) of the chunk first written under this key."""
    row = _raw(connection).execute(_FIND_KEY, (bank_id, key)).fetchone()
    return None if row is None else (row[0], row[1], bool(row[2]))


def row_of(bank_id: int, chunk: Chunk, digest: bytes) -> Mapping[str, Any]:
    """What `insert_chunk` takes; made beforehand, because the writer's time is everybody's."""
    expiry = chunk.expiry or Expiry()
    return {
        "chunk_id": chunk.chunk_id,
        "bank_id": bank_id,
        "key": chunk.key,
        "digest": digest,
        "start": chunk.start,
        "original_length": chunk.original_length,
        "stored_length": chunk.stored_length,
        "payload_bytes": chunk.payload.length if chunk.payload else 0,
        "meta": json.dumps(dict(chunk.metadata)),
        "created": chunk.created,
        "retrieval_count": 0,
        "last_retrieved": None,
        "pinned": chunk.pinned,
        "ttl": expiry.ttl,
        "renew": expiry.renew,
        "expires": chunk.created + expiry.ttl if expiry.ttl else None,
        "token_ids": chunk.token_ids,
        "text": chunk.text,
        "payload": _payload_json(chunk.payload),
        "embedding": chunk.embedding,
    }


def insert_chunk(connection: Connection, row: Mapping[str, Any]) -> bool:
    """The bank's usage, and the row; False when there is no such bank (any more)."""
    raw = _raw(connection)
    if raw.execute(_ADD_USAGE, row).rowcount == 0:
        return False
    for statement in (_INSERT_CHUNK, _INSERT_CONTENT, _INSERT_KEY):
        raw.execute(statement, row)
    return True


def ledger_rows(connection: Connection, bank_id: int, unit: Unit) -> Iterator[tuple[int, int, int, int, int]]:
    """(id, size in `unit`, retrievals, last use, pinned) of every chunk, ascending by id."""
    size = {"chunks": "1", "tokens": "stored_length", "bytes": "payload_bytes"}[unit]
    columns = f"chunk_id, {size}, retrieval_count, coalesce(last_retrieved, created), pinned"
    return _raw(connection).execute(f"SELECT {columns} FROM chunks WHERE bank_id = ? ORDER BY chunk_id", (bank_id,))


class Removed(NamedTuple):
    """Chunks that are gone now, and what they had taken."""

    ids: list[int]
    tokens: int
    bytes: int
    # Of an eviction: how many for each.
    reasons: Mapping[EvictionReason, int] = {}

    def size(self, unit: Unit) -> int:
        """In the unit of a capacity."""
        return {"chunks": len(self.ids), "tokens": self.tokens, "bytes": self.bytes}[unit]


def remove(connection: Connection, bank_id: int, chunk_ids: Sequence[int], counter: str) -> Removed:
    """Delete rows, spend their keys, add to `counter` of the bank (chunks_deleted, ...); unknown ids are fine."""
    return _remove(connection, bank_id, _found(connection, bank_id, chunk_ids, pinned=True), counter)


def evict(connection: Connection, bank_id: int, victims: Victims) -> Removed:
    """Log and remove those that still exist and are not pinned."""
    found = _found(connection, bank_id, victims.ids.tolist(), pinned=False)
    reason_of, now = dict(zip(victims.ids.tolist(), victims.reasons(), strict=True)), now_us()
    for reason, ids in groupby(found.ids, key=reason_of.__getitem__):
        _raw(connection).execute(_LOG_EVICTIONS, (reason, now, json.dumps(list(ids))))
    _raw(connection).execute(_CUT_LOG, {"bank": bank_id, "kept": EVICTION_LOG})
    reasons = Counter(reason_of[chunk_id] for chunk_id in found.ids)
    return _remove(connection, bank_id, found, "chunks_evicted")._replace(reasons=reasons)


def _found(connection: Connection, bank_id: int, chunk_ids: Sequence[int], *, pinned: bool) -> Removed:
    rows = _raw(connection).execute(_SIZES, (json.dumps(list(dict.fromkeys(chunk_ids))), bank_id, pinned)).fetchall()
    ids, tokens, sizes = zip(*rows, strict=True) if rows else ((), (), ())
    return Removed(list(ids), sum(tokens), sum(sizes))


def _remove(connection: Connection, bank_id: int, going: Removed, counter: str) -> Removed:
    if not going.ids:
        return going
    raw, now, count = _raw(connection), now_us(), len(going.ids)
    raw.execute(_SPEND_KEYS, (now, json.dumps(going.ids)))
    # Twice as many as were just spent: it keeps up, and a day with a million of them does not come back at once.
    _forget_keys(raw, raw.execute(_OLD_KEYS, (now - SPENT_KEY_US, 2 * count)).fetchall())
    _delete_chunks(connection, going.ids)
    usage = f"chunks = chunks - ?, tokens = tokens - ?, bytes = bytes - ?, {counter} = {counter} + ?"
    raw.execute(f"UPDATE banks SET {usage} WHERE bank_id = ?", (count, going.tokens, going.bytes, count, bank_id))
    return going


def _forget_keys(raw: sqlite3.Connection, spent: Sequence[tuple[int, bytes, int]]) -> None:
    raw.executemany("DELETE FROM keys WHERE bank_id = ? AND key = ?", [(bank_id, key) for bank_id, key, _ in spent])
    raw.executemany("DELETE FROM spent_keys WHERE chunk_id = ?", [(chunk_id,) for _, _, chunk_id in spent])


def _delete_chunks(connection: Connection, chunk_ids: Sequence[int]) -> None:
    for table in ("chunks", "contents"):
        statement = f"DELETE FROM {table} WHERE chunk_id IN (SELECT value FROM json_each(?))"
        _raw(connection).execute(statement, (json.dumps(list(chunk_ids)),))


def chunks(connection: Connection, bank: Bank, chunk_ids: Iterable[int], unwritten: Unwritten) -> dict[int, Chunk]:
    """Those of the ids that exist in this bank and have not expired; what is `unwritten` may have renewed them."""
    found = _raw(connection).execute(_FIND_CHUNKS, (bank.bank_id, json.dumps(list(chunk_ids))))
    rows, now = map(_found_row, found), now_us()
    return {row.chunk_id: _chunk(row, bank.name, False) for row in rows if not _expired(row, now, unwritten)}


def _expired(row: Any, now: int, unwritten: Unwritten) -> bool:
    if row.expires is None or row.expires > now:
        return False
    found = unwritten.of(row.chunk_id) if row.renew else None
    return found is None or found.first >= row.expires or found.last + int(row.ttl) <= now


def expired_ids(connection: Connection, bank_id: int, now: int, unwritten: Unwritten) -> NDArray[np.int64]:
    """Ids [n] ascending of the bank's chunks past their time and not removed yet. Cheap where there are none."""
    statement = f"SELECT chunk_id, ttl, renew, expires {_EXPIRED} AND bank_id = ?"
    rows = map(_Expiring._make, _raw(connection).execute(statement, (now, bank_id)))
    return np.sort(np.array([row.chunk_id for row in rows if _expired(row, now, unwritten)], np.int64))


def expired(connection: Connection, now: int, most: int) -> dict[int, list[int]]:
    """Bank id -> ids of chunks that are past their time, as far as the counts are written; `most` in all."""
    found: dict[int, list[int]] = {}
    statement = f"SELECT bank_id, chunk_id {_EXPIRED} AND bank_id IN (SELECT bank_id FROM banks) LIMIT ?"
    for bank_id, chunk_id in _raw(connection).execute(statement, (now, most)):
        found.setdefault(bank_id, []).append(chunk_id)
    return found


def matching_ids(connection: Connection, bank_id: int, filter_: Filter) -> NDArray[np.int64]:
    """Ids [n] ascending of the bank's chunks that a filter lets pass, expired ones included."""
    where = (ChunkRow.bank_id == bank_id, *_conditions(filter_))
    rows = connection.execute(select(ChunkRow.chunk_id).where(*where).order_by(ChunkRow.chunk_id))
    return np.fromiter((chunk_id for (chunk_id,) in rows), np.int64)


def _conditions(filter_: Filter) -> list[ColumnElement[bool]]:
    bounds = [
        ChunkRow.created >= filter_.created_from if filter_.created_from is not None else None,
        ChunkRow.created < filter_.created_before if filter_.created_before is not None else None,
        ChunkRow.start >= filter_.start_from if filter_.start_from is not None else None,
        ChunkRow.start < filter_.start_before if filter_.start_before is not None else None,
        ChunkRow.pinned == filter_.pinned if filter_.pinned is not None else None,
    ]
    return [bound for bound in bounds if bound is not None] + [_holds(condition) for condition in filter_.metadata]


def _holds(condition: Condition) -> ColumnElement[bool]:
    entry = func.json_each(ChunkRow.meta).table_valued("key", "value")
    of_key = select(entry.c.key).where(entry.c.key == condition.key)
    found = (of_key.where(entry.c.value.in_(condition.values)) if condition.values else of_key).exists()
    return ~found if condition.negate else found


def _whole(*, embedding: bool) -> Select[Any]:
    columns = _WITH_EMBEDDING if embedding else _WITHOUT_EMBEDDING
    return select(*columns).join_from(_CHUNKS, _CONTENTS, _CHUNKS.c.chunk_id == _CONTENTS.c.chunk_id)


def _alive(now: int) -> ColumnElement[bool]:
    return or_(ChunkRow.expires.is_(None), ChunkRow.expires > now)


def chunk(connection: Connection, bank: Bank, chunk_id: int, *, embedding: bool = False) -> Chunk | None:
    """One chunk of this bank; None for an expired one, as far as the counts are written."""
    where = (ChunkRow.bank_id == bank.bank_id, ChunkRow.chunk_id == chunk_id, _alive(now_us()))
    row = connection.execute(_whole(embedding=embedding).where(*where)).one_or_none()
    return None if row is None else _chunk(row, bank.name, embedding)


def page(
    connection: Connection, bank: Bank, after: int, limit: int, filter_: Filter, *, embedding: bool
) -> Iterator[Chunk]:
    """Ascending by id, from the first one after `after`; without expired ones, as far as the counts are written."""
    where = (ChunkRow.bank_id == bank.bank_id, ChunkRow.chunk_id > after, _alive(now_us()), *_conditions(filter_))
    statement = _whole(embedding=embedding).where(*where).order_by(ChunkRow.chunk_id).limit(limit)
    for row in connection.execute(statement):
        yield _chunk(row, bank.name, embedding)


def pin(connection: Connection, bank_id: int, chunk_ids: Sequence[int], pinned: bool) -> list[int]:
    """Set or clear `pinned`; the ids that exist."""
    where = (ChunkRow.bank_id == bank_id, ChunkRow.chunk_id.in_(chunk_ids))
    return list(connection.scalars(update(ChunkRow).where(*where).values(pinned=pinned).returning(ChunkRow.chunk_id)))


def update_chunk(connection: Connection, bank_id: int, chunk_id: int, metadata: Mapping[str, str]) -> bool:
    """Replace the metadata; whether the chunk exists."""
    where = (ChunkRow.bank_id == bank_id, ChunkRow.chunk_id == chunk_id)
    changed = connection.execute(update(ChunkRow).where(*where).values(meta=json.dumps(dict(metadata))))
    return changed.rowcount == 1


def chunk_ids(connection: Connection, bank_id: int) -> NDArray[np.int64]:
    """Ids [n] ascending of the bank's chunks, expired ones included."""
    rows = _raw(connection).execute("SELECT chunk_id FROM chunks WHERE bank_id = ? ORDER BY chunk_id", (bank_id,))
    return np.fromiter(chain.from_iterable(rows), np.int64)


def vectors(connection: Connection, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Embeddings [m, d] of those of the ids that exist, and these [m], ascending; all of one bank."""
    rows = _raw(connection).execute(_FIND_VECTORS, (json.dumps(ids.tolist()),)).fetchall()
    found = np.array([chunk_id for chunk_id, _ in rows], np.int64)
    return found, np.frombuffer(b"".join([vector for _, vector in rows]), "<f4").reshape(len(rows), -1 if rows else 0)


def payload_ids(connection: Connection) -> dict[str, set[int]]:
    """Bank uid -> ids of its chunks that have a payload file."""
    known: dict[str, set[int]] = {uid: set() for uid in connection.scalars(select(BankRow.uid))}
    statement = select(BankRow.uid, ChunkRow.chunk_id).join(ChunkRow, ChunkRow.bank_id == BankRow.bank_id)
    for uid, chunk_id in connection.execute(statement.where(ChunkRow.payload_bytes > 0)):
        known[uid].add(chunk_id)
    return known


def _chunk(row: Any, name: str, embedding: bool) -> Chunk:
    return Chunk(
        key=row.key,
        start=row.start,
        original_length=row.original_length,
        stored_length=row.stored_length,
        token_ids=row.token_ids,
        text=row.text,
        metadata=json.loads(row.meta),
        embedding=row.embedding if embedding else b"",
        payload=_cached_payload_of(row.payload),
        chunk_id=row.chunk_id,
        bank=name,
        created=row.created,
        retrieval_count=row.retrieval_count,
        last_retrieved=row.last_retrieved,
        pinned=bool(row.pinned),
        expiry=Expiry(row.ttl, bool(row.renew)) if row.ttl else None,
        expires=row.expires,
    )


def _payload_json(payload: Payload | None) -> str | None:
    if payload is None:
        return None
    # Not dataclasses.astuple, which copies deeply.
    tensors = [(t.name, t.dtype, t.shape, t.offset, t.length, t.checksum) for t in payload.tensors]
    return json.dumps([tensors, asdict(payload.producer), payload.seed, payload.checksum])


def payload_of(text: str | None) -> Payload | None:
    """A descriptor as `contents` holds it. Errors: ValueError, TypeError for one that is damaged."""
    if text is None:
        return None
    rows, producer, seed, checksum = json.loads(text)
    tensors = tuple(
        Tensor(name, dtype, tuple(shape), offset, length, check) for name, dtype, shape, offset, length, check in rows
    )
    return Payload(tensors, Producer(**producer), seed, checksum)


# What is retrieved often is parsed once: it never changes.
_cached_payload_of = lru_cache(512)(payload_of)


# Evictions


def save_plan(connection: Connection, bank_id: int, victims: Victims) -> None:
    """Keep what is left of an eviction, so that a restart can go on with it; nothing is left: forget it."""
    connection.execute(delete(EvictionPlanRow).where(EvictionPlanRow.bank_id == bank_id))
    if victims:
        connection.execute(insert(EvictionPlanRow).values(bank_id=bank_id, plan=victims.to_bytes()))


def saved_plan(connection: Connection, bank_id: int) -> Victims:
    """What was kept; some of them may be gone already."""
    plan = connection.scalar(select(EvictionPlanRow.plan).where(EvictionPlanRow.bank_id == bank_id))
    return NOBODY if plan is None else Victims.from_bytes(plan)


def saved_plans(connection: Connection) -> set[int]:
    """Ids of the banks that have one."""
    return set(connection.scalars(select(EvictionPlanRow.bank_id)))


def eviction_rows(connection: Connection, bank_id: int, chunk_ids: Sequence[int]) -> Sequence[Row[Any]]:
    """What the log says of chunks, in no order; at most some thousand ids."""
    names = ("chunk_id", "retrieval_count", "start", "stored_length", "created", "meta")
    columns = [getattr(ChunkRow, name) for name in names]
    where = (ChunkRow.bank_id == bank_id, ChunkRow.chunk_id.in_(chunk_ids))
    return connection.execute(select(*columns).where(*where)).all()


def evictions(connection: Connection, bank_id: int, before: int, limit: int) -> list[tuple[int, Eviction]]:
    """(sequence, eviction), newest first, from the first one before the sequence `before`."""
    where = (EvictionRow.bank_id == bank_id, EvictionRow.sequence < before)
    newest = EvictionRow.sequence.desc()
    rows = connection.execute(select(EvictionRow.__table__).where(*where).order_by(newest).limit(limit))
    return [(row.sequence, eviction(row, row.reason, row.evicted)) for row in rows]


def eviction(row: Row[Any], reason: EvictionReason, evicted: int | None) -> Eviction:
    """A row of `eviction_rows` or of the log as a value."""
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
