"""The rows of a database as a copy carries them: how they are read out of PostgreSQL, and written."""

import json
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import Connection

from memory_service.care.copying import aside, tables
from memory_service.care.copying.tables import Key, Row, Table
from memory_service.domain.eviction import Victims
from memory_service.domain.limits import STANDARD
from memory_service.domain.model import bank_bytes
from memory_service.storage.banks.bank_json import bank_of
from memory_service.storage.chunks import row_checksum
from memory_service.storage.postgres.database import raw
from memory_service.storage.postgres.rows import gone_rows
from memory_service.storage.postgres.rows.conditions import tags
from memory_service.storage.postgres.vectors import Embedding

_USE = ("retrieval_count", "last_retrieved")
_CHUNK = tuple(name for name in tables.CHUNKS.columns if name not in _USE)
# The rows of deleted banks, which are being removed.
_ALIVE = "NOT EXISTS (SELECT 1 FROM gone_banks g WHERE g.bank_id = t.bank_id)"
_CONDITIONS = {"chunks": _ALIVE, "evictions": _ALIVE, "quarantine": _ALIVE, "keys": f"t.gone IS NOT NULL AND {_ALIVE}"}
_KEPT_AS = {"spent_keys": "keys"}
# A page of chunks is one statement for each table: the database then takes a third of the time of a statement a row.
_INSERTED = {
    **dict.fromkeys(_CHUNK, "int8"),
    **dict.fromkeys(("key", "digest", "token_ids", "text"), "bytea"),
    **dict.fromkeys(("pinned", "renew"), "bool"),
    **dict.fromkeys(("meta", "payload"), "text"),
    "embedding": "vector",
}
_INSERT_CHUNKS = f"""
    INSERT INTO chunks ({", ".join(_INSERTED)}, tags)
    SELECT * FROM unnest({", ".join(f"%({name})b::{kind}[]" for name, kind in _INSERTED.items())}, %(tags)s::jsonb[])
"""
_INSERT_USE = """
    INSERT INTO chunk_use (chunk_id, bank_id, count, last)
    SELECT * FROM unnest(
        %(chunk_id)s::int8[], %(bank_id)s::int8[], %(retrieval_count)s::int8[], %(last_retrieved)s::int8[])
"""
# The key of a chunk that is gone may have been used again since an earlier run.
_INSERT_KEYS = """
    INSERT INTO keys (bank_id, key, chunk_id, digest)
    SELECT * FROM unnest(%(bank_id)s::int8[], %(key)s::bytea[], %(chunk_id)s::int8[], %(asked)s::bytea[])
    ON CONFLICT (bank_id, key) DO UPDATE SET chunk_id = excluded.chunk_id, digest = excluded.digest, gone = NULL
"""
_PLANS = """
    SELECT bank_id, victims FROM eviction_plans WHERE bank_id = ANY(
        SELECT DISTINCT bank_id FROM eviction_plans {} ORDER BY bank_id LIMIT %s
    ) ORDER BY bank_id, step
"""
# The planner does not know yet what a table has that was just filled: without these, it would sort all of it for each
# span of rows.
BY_INDEX = "; ".join(f"SET enable_{way} = off" for way in ("seqscan", "bitmapscan", "hashjoin", "mergejoin", "sort"))


class _Form(NamedTuple):
    """A column that the database has in another form. selected: what reads it; read, write: change its value, the
    latter by the row that it is in."""

    name: str
    selected: str
    read: Callable[[Any], Any]
    write: Callable[[Mapping[str, Any]], Any]


def _quoted(name: str) -> tuple[_Form, ...]:
    """Return the form of a text that is JSON in the database, because it may have a NUL."""
    return (_Form(name, name, json.loads, lambda row: json.dumps(row[name])),)


def _aside(row: Mapping[str, Any]) -> str:
    return aside.as_record(row["row"], tags(json.loads(json.loads(row["row"])["meta"])))


_FORMS: Mapping[str, tuple[_Form, ...]] = {
    "chunks": (_Form("text", "text", lambda value: value.decode(errors="surrogateescape"), lambda row: row["text"]),),
    "sessions": _quoted("reader_digest"),
    "windows": _quoted("stamp"),
    "quarantine": (
        _Form("row", "record", aside.of_record, _aside),
        _Form("time", "time / 1000000", int, lambda row: row["time"] * 1_000_000),
    ),
}


def count(connection: Connection, table: Table) -> int:
    """Count the rows of a table."""
    if table is tables.PLANS:
        statement = "SELECT count(DISTINCT bank_id) FROM eviction_plans"
    else:
        name = _KEPT_AS.get(table.name, table.name)
        statement = f"SELECT count(*) FROM {name} t WHERE {_CONDITIONS.get(name, 'true')}"
    row = raw(connection).execute(statement).fetchone()
    assert row is not None
    return int(row[0])


def select(connection: Connection, table: Table, after: Key, upto: Key, most: int | None) -> list[Row]:
    """Read rows of a table; see `Exported.rows`."""
    where, values = _within(table, after, upto)
    values.append(most)
    if table is tables.PLANS:
        statement = _PLANS.format(f"WHERE {' AND '.join(where)}" if where else "")
        return _plans(raw(connection).execute(statement, values, binary=True).fetchall())
    name = _KEPT_AS.get(table.name, table.name)
    where.append(_CONDITIONS.get(name, "true"))
    selected = {form.name: form.selected for form in _FORMS.get(table.name, ())}
    names = [selected.get(each, each) for each in (_CHUNK if table is tables.CHUNKS else table.columns)]
    statement = f"SELECT {', '.join(names)} FROM {name} t WHERE {' AND '.join(where)}"
    statement += f" ORDER BY {', '.join(table.columns[: table.places])} LIMIT %s"
    if table is tables.CHUNKS:
        chosen = ", ".join(f"c.{each}" for each in _CHUNK)
        statement = f"""
            SELECT {chosen}, coalesce(u.count, 0), u.last FROM ({statement}) c
            LEFT JOIN chunk_use u ON u.chunk_id = c.chunk_id ORDER BY c.bank_id, c.chunk_id
        """
    rows = raw(connection).execute(statement, values, binary=True).fetchall()
    return [_read(table, row) for row in rows]


def _within(table: Table, after: Key, upto: Key) -> tuple[list[str], list[Any]]:
    """Return conditions for rows between two keys, and their values."""
    key = ", ".join(table.columns[: table.places])
    bounds = [(sign, bound) for sign, bound in ((">", after), ("<=", upto)) if bound]
    where = [f"({key}) {sign} ({', '.join(['%s'] * len(bound))})" for sign, bound in bounds]
    return where, [value for _, bound in bounds for value in bound]


def _read(table: Table, row: Row) -> Row:
    """Return a row as a copy carries it."""
    if not (forms := _FORMS.get(table.name)):
        return row
    values = list(row)
    for form in forms:
        place = table.columns.index(form.name)
        values[place] = form.read(values[place])
    return tuple(values)


def _plans(rows: Sequence[tuple[int, bytes]]) -> list[Row]:
    """Join the steps of plans."""
    steps: dict[int, list[Victims]] = {}
    for bank_id, victims in rows:
        steps.setdefault(bank_id, []).append(Victims.from_bytes(victims))
    return [(bank_id, _joined(each).to_bytes()) for bank_id, each in steps.items()]


def _joined(steps: Sequence[Victims]) -> Victims:
    return Victims(np.concatenate([step.ids for step in steps]), np.concatenate([step.codes for step in steps]))


def delete(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    """Delete rows by their keys; with those of chunks go their counts and keys."""
    named = list(map(table.named, rows))
    key = " AND ".join(f"{name} = %({name})s" for name in table.columns[: table.places])
    statements = [f"DELETE FROM {_KEPT_AS.get(table.name, table.name)} WHERE {key}"]
    if table is tables.CHUNKS:
        statements.append("DELETE FROM chunk_use WHERE chunk_id = %(chunk_id)s")
        statements.append("DELETE FROM keys WHERE bank_id = %(bank_id)s AND key = %(key)s AND chunk_id = %(chunk_id)s")
    with raw(connection).cursor() as cursor:
        for statement in statements:
            cursor.executemany(statement, named)


def insert(connection: Connection, table: Table, rows: Sequence[Row], **more: Sequence[Any]) -> None:
    """Insert rows into a table. more: the values of columns that are the engine's own."""
    named = list(map(table.named, rows))
    if table is tables.CHUNKS:
        _insert_chunks(connection, named)
    elif table is tables.PLANS:
        size = STANDARD.step_rows
        for bank_id, plan in rows:
            left = Victims.from_bytes(plan)
            gone_rows.save_plan(connection, bank_id, [left.part(at, at + size) for at in range(0, len(left), size)])
    else:
        _insert_plain(connection, table, named, more)


def _insert_chunks(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert chunks with their keys and counts."""
    given: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in tables.CHUNKS.columns}
    given |= {
        "asked": list(map(row_checksum.digest_of, given["digest"])),
        "text": [text.encode() for text in given["text"]],
        "embedding": list(map(Embedding, given["embedding"])),
        "tags": [tags(json.loads(meta)) for meta in given["meta"]],
    }
    for statement in (_INSERT_CHUNKS, _INSERT_USE, _INSERT_KEYS):
        raw(connection).execute(statement, given)


def _insert_plain(
    connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], more: Mapping[str, Sequence[Any]]
) -> None:
    own = dict(more)
    if table is tables.BANKS:
        own["size"] = [bank_bytes(bank_of(SimpleNamespace(**row))) for row in rows]
    if table is tables.QUARANTINE:
        own["bank_id"] = [json.loads(row["row"])["bank_id"] for row in rows]
    forms = {form.name: form for form in _FORMS.get(table.name, ())}
    names = [{"row": "record"}.get(name, name) for name in table.columns]
    statement = f"""
        INSERT INTO {_KEPT_AS.get(table.name, table.name)} ({", ".join([*names, *own])})
        VALUES ({", ".join(["%s"] * (len(names) + len(own)))})
    """
    # The key of a chunk that is gone may have been used again since an earlier run.
    if table is tables.SPENT_KEYS:
        statement += " ON CONFLICT (bank_id, key) DO UPDATE SET chunk_id = excluded.chunk_id,"
        statement += " digest = excluded.digest, gone = excluded.gone"
    values = [[forms[name].write(row) if name in forms else value for name, value in row.items()] for row in rows]
    with raw(connection).cursor() as cursor:
        cursor.executemany(statement, [[*row, *rest] for row, *rest in zip(values, *own.values(), strict=True)])
