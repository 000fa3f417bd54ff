"""The rows of a data folder as a copy carries them: how they are read out of SQLite, and written. This file owns that a
row is read as it is, whatever is wrong with it."""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from memory_service.care.copying import tables
from memory_service.care.copying.tables import Key, Row, Table
from memory_service.storage.chunks import row_checksum

# The rows of deleted banks, which are being removed.
_ALIVE = "NOT EXISTS (SELECT 1 FROM gone_banks g WHERE g.bank_id = {}.bank_id)"
# What a table is read from, with a condition that holds for all rows that count.
_FROM: Mapping[str, tuple[str, str]] = {
    "chunks": ("chunks t JOIN contents USING (chunk_id)", _ALIVE.format("t")),
    "spent_keys": ("keys t JOIN spent_keys s USING (chunk_id)", _ALIVE.format("t")),
    "evictions": ("evictions t", _ALIVE.format("t")),
    "eviction_plans": ("eviction_plans t", _ALIVE.format("t")),
}
_SPENT = {"bank_id": "t.bank_id", "key": "t.key", "chunk_id": "t.chunk_id", "digest": "s.digest", "gone": "s.gone"}
_FLAGS = {name: tables.CHUNKS.columns.index(name) for name in ("pinned", "renew")}
_CONTENT = ("chunk_id", "token_ids", "text", "payload", "embedding")
_CHUNK = tuple(name for name in tables.CHUNKS.columns if name not in _CONTENT[1:])
_DIGEST = tables.SPENT_KEYS.columns.index("digest")


def prepare(driver: sqlite3.Connection) -> None:
    """Let a connection read texts that are damaged and no UTF-8: their bytes that are none become lone surrogates."""
    driver.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")


def count(driver: sqlite3.Connection, table: Table) -> int:
    """Count the rows of a table."""
    source, condition = _FROM.get(table.name, (f"{table.name} t", "1"))
    return int(driver.execute(f"SELECT count(*) FROM {source} WHERE {condition}").fetchone()[0])


def select(driver: sqlite3.Connection, table: Table, after: Key, upto: Key, most: int | None) -> list[Row]:
    """Read rows of a table; see `Exported.rows`."""
    source, condition = _FROM.get(table.name, (f"{table.name} t", "1"))
    names = [_SPENT[name] if table is tables.SPENT_KEYS else name for name in table.columns]
    # A chunk's place by the names of the index, which those of the join are not.
    key = [f"t.{name}" for name in table.columns[: table.places]]
    found: list[Row] = []
    for where, values in _stretches(key, after, upto):
        statement = f"SELECT {', '.join(names)} FROM {source} WHERE {' AND '.join([condition, *where])}"
        left = -1 if most is None else most - len(found)
        found += driver.execute(f"{statement} ORDER BY {', '.join(key)} LIMIT ?", (*values, left))
    return [_carried(table, row) for row in found]


def _stretches(key: Sequence[str], after: Key, upto: Key) -> Iterator[tuple[list[str], list[Any]]]:
    """Yield conditions on the columns of a key, and their values, for rows behind one key and up to another, in order.

    The rows of one bank are a stretch of their own: by an index on (bank_id, chunk_id) SQLite finds chunks behind
    another one of a bank, but none behind a pair, since the id of a chunk is also the number of its row.
    """
    first, last = key[0], key[-1]
    if len(key) == 1 or not (after or upto):
        bounds = [(f"{first} {sign} ?", bound[0]) for sign, bound in ((">", after), ("<=", upto)) if bound]
        yield [text for text, _ in bounds], [value for _, value in bounds]
        return
    if after and upto and after[0] == upto[0]:
        yield [f"{first} = ?", f"{last} > ?", f"{last} <= ?"], [*after, upto[1]]
        return
    if after:
        yield [f"{first} = ?", f"{last} > ?"], [*after]
    bounds = [(f"{first} {sign} ?", bound[0]) for sign, bound in ((">", after), ("<", upto)) if bound]
    yield [text for text, _ in bounds], [value for _, value in bounds]
    if upto:
        yield [f"{first} = ?", f"{last} <= ?"], [*upto]


def _carried(table: Table, row: Row) -> Row:
    if table is tables.CHUNKS:
        values = list(row)
        for place in _FLAGS.values():
            values[place] = bool(values[place])
        return tuple(values)
    if table is tables.SPENT_KEYS:
        return (*row[:_DIGEST], row_checksum.digest_of(row[_DIGEST]), *row[_DIGEST + 1 :])
    return row


def delete(driver: sqlite3.Connection, table: Table, rows: Sequence[Row]) -> None:
    """Delete rows by their keys; with those of chunks go their contents and keys."""
    if table is tables.CHUNKS:
        named = list(map(table.named, rows))
        for name in ("chunks", "contents", "unsynced"):
            driver.executemany(f"DELETE FROM {name} WHERE chunk_id = :chunk_id", named)
        driver.executemany("DELETE FROM keys WHERE bank_id = :bank_id AND key = :key AND chunk_id = :chunk_id", named)
    elif table is tables.SPENT_KEYS:
        forget_spent(driver, rows)
    else:
        where = " AND ".join(f"{name} = ?" for name in table.columns[: table.places])
        driver.executemany(f"DELETE FROM {table.name} WHERE {where}", map(table.key, rows))


def forget_spent(driver: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Delete the keys of chunks that are gone, given as (bank id, key, chunk id, ...)."""
    for bank_id, key, chunk_id, *_ in rows:
        driver.execute("DELETE FROM keys WHERE bank_id = ? AND key = ? AND chunk_id = ?", (bank_id, key, chunk_id))
        driver.execute("DELETE FROM spent_keys WHERE chunk_id = ?", (chunk_id,))


def insert(driver: sqlite3.Connection, table: Table, rows: Sequence[Row], **more: Sequence[Any]) -> None:
    """Insert rows into a table. more: the values of columns that are the engine's own."""
    if table is tables.CHUNKS:
        _insert_chunks(driver, list(map(table.named, rows)))
    elif table is tables.SPENT_KEYS:
        driver.executemany(_insertion("keys", table.columns[:3]), [row[:3] for row in rows])
        driver.executemany(_insertion("spent_keys", table.columns), rows)
    else:
        names = (*table.columns, *more)
        driver.executemany(
            _insertion(table.name, names), [(*row, *own) for row, *own in zip(rows, *more.values(), strict=True)]
        )


def _insert_chunks(driver: sqlite3.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        # The key of a chunk that is gone may have been used again since an earlier run.
        spent = driver.execute("SELECT bank_id, key, chunk_id FROM keys WHERE bank_id = :bank_id AND key = :key", row)
        forget_spent(driver, spent.fetchall())
    for name, columns in (("chunks", _CHUNK), ("contents", _CONTENT), ("keys", ("bank_id", "key", "chunk_id"))):
        driver.executemany(_insertion(name, columns), [tuple(row[column] for column in columns) for row in rows])


def _insertion(name: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
