"""What the records say of every chunk, page by page, without trusting them: a row that cannot be used has a flaw."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from sqlalchemy import Connection, Row

from memory_service import bank_rows, chunk_rows, row_checksum
from memory_service.care.folder import Folder
from memory_service.domain import Payload, PayloadKind
from memory_service.payloads import seed

_PAGE = 512
_KINDS = get_args(PayloadKind)
_BANKS = "SELECT bank_id, uid, name, chunks FROM banks ORDER BY bank_id"
_CHUNKS = """
    SELECT c.chunk_id, c.bank_id, c.key, c.digest, c.start, c.original_length, c.stored_length, c.payload_bytes,
        c.created, CAST(c.meta AS BLOB) AS meta, t.chunk_id AS content, CAST(t.payload AS BLOB) AS payload,
        length(t.embedding) AS embedding_bytes, {wide}
    FROM chunks c LEFT JOIN contents t USING (chunk_id)
    WHERE c.bank_id = ? AND c.chunk_id > ? AND c.chunk_id <= ? ORDER BY c.chunk_id LIMIT ?
"""
_WIDE, _NARROW = "CAST(t.text AS BLOB) AS text, t.token_ids, t.embedding", "NULL AS embedding"


@dataclass(frozen=True, slots=True)
class BankEntry:
    """A bank, with its number of chunks of a moment ago; `dimension` is None when what it is cannot be read."""

    bank_id: int
    uid: str
    name: str
    dimension: int | None
    chunks: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A chunk; with a `flaw` (a sentence) nothing else is to be relied on."""

    bank: BankEntry
    chunk_id: int
    payload: Payload | None
    flaw: str = ""


def banks(folder: Folder) -> list[BankEntry]:
    """Every bank that is not being deleted."""
    with folder.read() as connection:
        rows = connection.exec_driver_sql(_BANKS).all()
        dimensions = [_dimension(connection, row.bank_id) for row in rows]
    return [
        BankEntry(row.bank_id, row.uid, row.name, dimension, row.chunks)
        for row, dimension in zip(rows, dimensions, strict=True)
    ]


def pages(folder: Folder, bank: BankEntry, *, whole: bool) -> Iterator[list[Entry]]:
    """The chunks that the bank has now, ascending by id; what is written later is left out, so that this ends.

    `whole`: look at their text, token ids and embedding too, and so at the checksums of their rows.
    """
    statement = _CHUNKS.format(wide=_WIDE if whole else _NARROW)
    with folder.read() as connection:
        last = connection.exec_driver_sql("SELECT max(chunk_id) FROM chunks WHERE bank_id = ?", (bank.bank_id,))
        end = last.scalar() or 0
    after = -(2**63)
    while True:
        with folder.read() as connection:
            # One after the other: a text may have megabytes.
            rows = connection.exec_driver_sql(statement, (bank.bank_id, after, end, _PAGE))
            page = [_entry(bank, row) for row in rows]
        if not page:
            return
        yield page
        after = page[-1].chunk_id


def _dimension(connection: Connection, bank_id: int) -> int | None:
    try:
        bank = bank_rows.get(connection, bank_id)
        return None if bank is None else int(bank.embedding.dimension)
    except (ValueError, KeyError, TypeError):
        return None


def _entry(bank: BankEntry, row: Row[Any]) -> Entry:
    try:
        payload = chunk_rows.payload_of(row.payload and row.payload.decode())
        flaw = _flaw(bank, row, payload) or (row_checksum.flaw(row._mapping) if row.embedding is not None else "")
    except (ValueError, KeyError, TypeError, struct.error):
        payload, flaw = None, "its descriptor, its metadata or a figure of it cannot be read"
    return Entry(bank, row.chunk_id, payload, flaw)


def _flaw(bank: BankEntry, row: Row[Any], payload: Payload | None) -> str:
    if row.content is None:
        return "its content is missing"
    if bank.dimension is not None and row.embedding_bytes != 4 * bank.dimension:
        return f"its embedding has {row.embedding_bytes} bytes instead of {4 * bank.dimension}"
    if row.embedding is not None and not np.isfinite(np.frombuffer(row.embedding, "<f4")).all():
        return "its embedding is not finite"
    length = payload.length if payload else 0
    if row.payload_bytes != length:
        return f"its descriptor has {length} bytes, its row {row.payload_bytes}"
    if payload is not None and payload.seed != seed(bank.uid, row.chunk_id):
        return "its descriptor belongs to another chunk"
    if payload is not None and not _kind_fits(payload):
        return f"its descriptor says that it is of the kind {payload.kind}, which it is not"
    if not isinstance(json.loads(row.meta), dict):
        return "its metadata cannot be read"
    return ""


def _kind_fits(payload: Payload) -> bool:
    soft = [tensor.name for tensor in payload.tensors] == ["soft"]
    return payload.kind in _KINDS and soft == (payload.kind == "soft_tokens")
