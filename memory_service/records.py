"""The truth: store, banks, chunks, spent keys, evictions in SQLite. Owns the commit point, chunk ids and counts.

Functions that take a `Connection` run inside a transaction of the writer (changes) or of a reader (questions).
"""

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, Select, bindparam, delete, func, insert, literal, select, update
from sqlalchemy.exc import DBAPIError

from memory_service import schema
from memory_service.domain import (
    Bank,
    Capacity,
    Chunk,
    EmbeddingSpec,
    Eviction,
    EvictionReason,
    KvSpec,
    Payload,
    Policy,
    Producer,
    Tensor,
    Usage,
)
from memory_service.eviction import Candidate
from memory_service.schema import BankRow, ChunkRow, EvictionRow, SpentKeyRow, StoreRow
from memory_service.writer import Writer

ID_BLOCK = 1024
SPENT_KEY_US = 24 * 3600 * 1_000_000
EVICTION_LOG = 10_000
_USAGE = [BankRow.__table__.c[name.name] for name in fields(Usage)]
_WITHOUT_EMBEDDING = [column for column in ChunkRow.__table__.columns if column.name != "embedding"]


def now_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


class Counts:
    """Retrievals counted in memory, until the writer takes them into its next transaction."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[int, int]] = {}

    def add(self, counted: Mapping[int, tuple[int, int]]) -> None:
        """`counted`: chunk id -> (retrievals, time of the last)."""
        with self._lock:
            for chunk_id, (count, last) in counted.items():
                before, before_last = self._pending.get(chunk_id, (0, 0))
                self._pending[chunk_id] = (before + count, max(before_last, last))

    def take(self) -> dict[int, tuple[int, int]]:
        """All that is pending; the caller writes it or adds it again."""
        with self._lock:
            taken, self._pending = self._pending, {}
        return taken

    def __bool__(self) -> bool:
        return bool(self._pending)


class Records:
    """The database of a data folder."""

    def __init__(self, data: Path, *, durable: bool, migrate: bool = False) -> None:
        path = data / "metadata.db"
        schema.prepare(path, data, migrate=migrate)
        self.counts = Counts()
        level = "FULL" if durable else "NORMAL"
        self._readers = schema.engine(path, synchronous=level, writer=False)
        self.writer = Writer(
            schema.engine(path, synchronous=level, writer=True), self._flush, lambda: bool(self.counts)
        )
        try:
            self.store_id = self.writer.submit(_identity).result()
            self.ids = ChunkIds(self.writer)
        except BaseException:
            self.close()
            raise

    def read(self) -> AbstractContextManager[Connection]:
        """A short read transaction on a connection of its own."""
        return self._readers.begin()

    def flush_counts(self) -> None:
        """Make every pending count visible."""
        if self.counts:
            self.writer.submit(lambda _connection: None).result()

    def close(self) -> None:
        """Readers first: SQLite checkpoints when the last connection closes, and that must be the writer's."""
        self._readers.dispose()
        self.writer.close()

    def _flush(self, connection: Connection) -> Callable[[], None]:
        taken = self.counts.take()
        if taken:
            rows = [{"id": chunk_id, "n": count, "last": last} for chunk_id, (count, last) in taken.items()]
            try:
                connection.execute(_COUNT, rows)
            except DBAPIError:
                self.counts.add(taken)
                raise
        return lambda: self.counts.add(taken)


_COUNT = (
    update(ChunkRow)
    .where(ChunkRow.chunk_id == bindparam("id"))
    .values(retrieval_count=ChunkRow.retrieval_count + bindparam("n"), last_retrieved=bindparam("last"))
)


def _identity(connection: Connection) -> str:
    store_id = connection.scalar(select(StoreRow.store_id))
    if store_id is None:
        store_id = secrets.token_hex(16)
        connection.execute(insert(StoreRow).values(id=1, store_id=store_id, next_chunk_id=1))
    return store_id


class ChunkIds:
    """Ids from blocks that are reserved durably before an id is used: monotonic, never reused, below 2^63."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        self._blocks: list[range] = []
        self._refill: Future[range] | None = None
        self.first = self.refill().result().start

    def take(self) -> int | None:
        """The next id; None when a `refill` must be awaited first. Never blocks."""
        with self._lock:
            if not self._blocks:
                return None
            block = self._blocks[0]
            self._blocks[:1] = [block[1:]] if len(block) > 1 else []
        if len(block) < ID_BLOCK // 2:
            self.refill()
        return block[0]

    def refill(self) -> "Future[range]":
        """Reserve one more block, unless more than one is at hand or under way."""
        with self._lock:
            if self._refill is None or (self._refill.done() and len(self._blocks) < 2):
                self._refill = self._writer.submit(self._reserve, self._extend)
            return self._refill

    @staticmethod
    def _reserve(connection: Connection) -> range:
        statement = update(StoreRow).values(next_chunk_id=StoreRow.next_chunk_id + ID_BLOCK)
        end = connection.execute(statement.returning(StoreRow.next_chunk_id)).scalar_one()
        return range(end - ID_BLOCK, end)

    def _extend(self, block: range) -> None:
        with self._lock:
            self._blocks.append(block)


# Banks


def insert_bank(connection: Connection, bank: Bank) -> int:
    """Its bank_id. The caller has checked that the name is free."""
    values = _bank_values(bank) | {"uid": bank.uid, "name": bank.name, "created": bank.created} | asdict(Usage())
    return int(connection.execute(insert(BankRow).values(values).returning(BankRow.bank_id)).scalar_one())


def update_bank(connection: Connection, bank: Bank) -> None:
    """Write capacity, policy and metadata."""
    connection.execute(update(BankRow).where(BankRow.bank_id == bank.bank_id).values(_bank_values(bank)))


def delete_bank(connection: Connection, bank_id: int) -> bool:
    """The bank with everything that it holds; whether it existed."""
    for table in (ChunkRow, SpentKeyRow, EvictionRow):
        connection.execute(delete(table).where(table.bank_id == bank_id))
    return connection.execute(delete(BankRow).where(BankRow.bank_id == bank_id)).rowcount == 1


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


def usage(connection: Connection, bank_id: int) -> Usage | None:
    """The bank's usage now; None when there is no such bank."""
    row = connection.execute(select(*_USAGE).where(BankRow.bank_id == bank_id)).one_or_none()
    return None if row is None else Usage(*row)


def _bank_values(bank: Bank) -> dict[str, Any]:
    kv = asdict(bank.kv) | {"reader_parts": dict(bank.kv.reader_parts)}
    return {
        "spec": json.dumps({"kv": kv, "embedding": asdict(bank.embedding)}),
        "capacity": None if bank.capacity is None else json.dumps(asdict(bank.capacity)),
        "policy": json.dumps(asdict(bank.policy)),
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
    )


# Chunks

# As text: building and looking up the same statement as an expression costs ten times its execution, and these four
# run for every chunk that is written or retrieved.
_FIND_KEY = """
    SELECT chunk_id, digest, 0 FROM chunks WHERE bank_id = ? AND key = ?
    UNION ALL SELECT chunk_id, digest, 1 FROM spent_keys WHERE bank_id = ? AND key = ?
"""
_INSERT_CHUNK = f"""
    INSERT INTO chunks ({", ".join(column.name for column in ChunkRow.__table__.columns)})
    VALUES ({", ".join("?" * len(ChunkRow.__table__.columns))})
"""
_ADD_USAGE = """
    UPDATE banks SET chunks = chunks + 1, chunks_written = chunks_written + 1, tokens = tokens + ?, bytes = bytes + ?
    WHERE bank_id = ?
"""
_CHUNKS = f"""
    SELECT {", ".join(column.name for column in _WITHOUT_EMBEDDING)} FROM chunks
    WHERE bank_id = ? AND chunk_id IN (SELECT value FROM json_each(?))
"""


def find_key(connection: Connection, bank_id: int, key: bytes) -> tuple[int, bytes, bool] | None:
    """(chunk id, request digest, gone) of the chunk first written under this key."""
    row = connection.exec_driver_sql(_FIND_KEY, (bank_id, key, bank_id, key)).one_or_none()
    return None if row is None else (row[0], row[1], bool(row[2]))


def insert_chunk(connection: Connection, bank_id: int, chunk: Chunk, digest: bytes) -> bool:
    """The row, and the bank's usage; False when there is no such bank (any more)."""
    size = chunk.payload.length if chunk.payload else 0
    values = {
        "chunk_id": chunk.chunk_id,
        "bank_id": bank_id,
        "key": chunk.key,
        "digest": digest,
        "start": chunk.start,
        "original_length": chunk.original_length,
        "stored_length": chunk.stored_length,
        "payload_bytes": size,
        "token_ids": chunk.token_ids,
        "text": chunk.text,
        "meta": json.dumps(dict(chunk.metadata)),
        "payload": _payload_json(chunk.payload),
        "created": chunk.created,
        "retrieval_count": 0,
        "last_retrieved": None,
        "embedding": chunk.embedding,
    }
    connection.exec_driver_sql(_INSERT_CHUNK, tuple(values[column.name] for column in ChunkRow.__table__.columns))
    return connection.exec_driver_sql(_ADD_USAGE, (chunk.stored_length, size, bank_id)).rowcount == 1


def candidates(connection: Connection, bank_id: int, capacity: Capacity) -> list[Candidate]:
    """Every live chunk, oldest first, sized in the capacity's unit."""
    sizes = {"chunks": literal(1), "tokens": ChunkRow.stored_length, "bytes": ChunkRow.payload_bytes}
    columns = select(ChunkRow.chunk_id, sizes[capacity.unit], ChunkRow.retrieval_count)
    rows = connection.execute(columns.where(ChunkRow.bank_id == bank_id).order_by(ChunkRow.chunk_id))
    return [Candidate(chunk_id, size, count) for chunk_id, size, count in rows]


def remove(connection: Connection, bank_id: int, chunk_ids: Sequence[int], counter: str) -> list[int]:
    """Delete rows, spend their keys, add to `counter` of the bank (chunks_evicted, ...); those that existed."""
    chosen = (ChunkRow.bank_id == bank_id, ChunkRow.chunk_id.in_(chunk_ids))
    total = select(func.count(), func.sum(ChunkRow.stored_length), func.sum(ChunkRow.payload_bytes)).where(*chosen)
    count, tokens, size = connection.execute(total).one()
    if not count:
        return []
    now = now_us()
    spent: Select[Any, Any, Any, Any, Any] = select(
        ChunkRow.bank_id, ChunkRow.key, ChunkRow.digest, ChunkRow.chunk_id, bindparam("now", now)
    )
    connection.execute(
        insert(SpentKeyRow).from_select(["bank_id", "key", "digest", "chunk_id", "gone"], spent.where(*chosen))
    )
    connection.execute(delete(SpentKeyRow).where(SpentKeyRow.gone < now - SPENT_KEY_US))
    gone = connection.scalars(delete(ChunkRow).where(*chosen).returning(ChunkRow.chunk_id)).all()
    connection.execute(
        update(BankRow)
        .where(BankRow.bank_id == bank_id)
        .values(
            {
                "chunks": BankRow.chunks - count,
                "tokens": BankRow.tokens - tokens,
                "bytes": BankRow.bytes - size,
                counter: getattr(BankRow, counter) + count,
            }
        )
    )
    return list(gone)


def chunks(connection: Connection, bank: Bank, chunk_ids: Iterable[int]) -> dict[int, Chunk]:
    """Those of the ids that exist in this bank."""
    rows = connection.exec_driver_sql(_CHUNKS, (bank.bank_id, json.dumps(list(chunk_ids))))
    return {row.chunk_id: _chunk(row, bank.name, False) for row in rows}


def chunk(connection: Connection, bank: Bank, chunk_id: int, *, embedding: bool = False) -> Chunk | None:
    """One chunk of this bank."""
    where = (ChunkRow.bank_id == bank.bank_id, ChunkRow.chunk_id == chunk_id)
    row = connection.execute(select(*_columns(embedding)).where(*where)).one_or_none()
    return None if row is None else _chunk(row, bank.name, embedding)


def page(connection: Connection, bank: Bank, after: int, limit: int, *, embedding: bool) -> Iterator[Chunk]:
    """Ascending by id, from the first one after `after`."""
    where = (ChunkRow.bank_id == bank.bank_id, ChunkRow.chunk_id > after)
    statement = select(*_columns(embedding)).where(*where).order_by(ChunkRow.chunk_id).limit(limit)
    for row in connection.execute(statement):
        yield _chunk(row, bank.name, embedding)


def update_chunk(connection: Connection, bank_id: int, chunk_id: int, metadata: Mapping[str, str]) -> bool:
    """Replace the metadata; whether the chunk exists."""
    where = (ChunkRow.bank_id == bank_id, ChunkRow.chunk_id == chunk_id)
    changed = connection.execute(update(ChunkRow).where(*where).values(meta=json.dumps(dict(metadata))))
    return changed.rowcount == 1


def embeddings(connection: Connection, bank: Bank) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids [n] ascending and vectors [n, d] of a bank."""
    where = ChunkRow.bank_id == bank.bank_id
    total = connection.scalar(select(func.count()).select_from(ChunkRow).where(where)) or 0
    ids = np.empty(total, np.int64)
    vectors = np.empty((total, bank.embedding.dimension), np.float32)
    rows = connection.execute(select(ChunkRow.chunk_id, ChunkRow.embedding).where(where).order_by(ChunkRow.chunk_id))
    for position, (chunk_id, vector) in enumerate(rows):
        ids[position] = chunk_id
        vectors[position] = np.frombuffer(vector, "<f4")
    return ids, vectors


def payload_ids(connection: Connection) -> dict[str, set[int]]:
    """Bank uid -> ids of its chunks that have a payload file."""
    known: dict[str, set[int]] = {uid: set() for uid in connection.scalars(select(BankRow.uid))}
    statement = select(BankRow.uid, ChunkRow.chunk_id).join(ChunkRow, ChunkRow.bank_id == BankRow.bank_id)
    for uid, chunk_id in connection.execute(statement.where(ChunkRow.payload.is_not(None))):
        known[uid].add(chunk_id)
    return known


def _columns(embedding: bool) -> list[Any]:
    return list(ChunkRow.__table__.columns) if embedding else _WITHOUT_EMBEDDING


def _chunk(row: Row[Any], name: str, embedding: bool) -> Chunk:
    return Chunk(
        key=row.key,
        start=row.start,
        original_length=row.original_length,
        stored_length=row.stored_length,
        token_ids=row.token_ids,
        text=row.text,
        metadata=json.loads(row.meta),
        embedding=row.embedding if embedding else b"",
        payload=_payload(row.payload),
        chunk_id=row.chunk_id,
        bank=name,
        created=row.created,
        retrieval_count=row.retrieval_count,
        last_retrieved=row.last_retrieved,
    )


def _payload_json(payload: Payload | None) -> str | None:
    if payload is None:
        return None
    tensors = [astuple(tensor) for tensor in payload.tensors]
    return json.dumps([tensors, asdict(payload.producer), payload.seed, payload.checksum])


def _payload(text: str | None) -> Payload | None:
    if text is None:
        return None
    rows, producer, seed, checksum = json.loads(text)
    tensors = tuple(
        Tensor(name, dtype, tuple(shape), offset, length, check) for name, dtype, shape, offset, length, check in rows
    )
    return Payload(tensors, Producer(**producer), seed, checksum)


# Evictions


def log_evictions(connection: Connection, bank_id: int, reasons: Mapping[int, EvictionReason]) -> None:
    """Enter chunks that are about to be removed, in the order given, and cut the log to its bound."""
    rows = {row.chunk_id: row for row in eviction_rows(connection, bank_id, list(reasons))}
    now = now_us()
    entries = [
        {**rows[chunk_id]._mapping, "bank_id": bank_id, "reason": reason, "evicted": now}
        for chunk_id, reason in reasons.items()
        if chunk_id in rows
    ]
    if entries:
        connection.execute(insert(EvictionRow), entries)
    kept = select(EvictionRow.sequence).where(EvictionRow.bank_id == bank_id).order_by(EvictionRow.sequence.desc())
    oldest = kept.offset(EVICTION_LOG).limit(1).scalar_subquery()
    connection.execute(delete(EvictionRow).where(EvictionRow.bank_id == bank_id, EvictionRow.sequence <= oldest))


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
