"""The rows of chunks that are damaged, and cannot be used. This file owns how a read that has failed finds out which
rows are to blame: it reads the rows again one after the other, as bytes, and trusts nothing in them."""

import json
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from memory_service.domain.model import Bank, Payload, PayloadKind
from memory_service.domain.payload import seed
from memory_service.storage.base import FlawedError
from memory_service.storage.chunks import row_checksum
from memory_service.storage.chunks.payload_json import payload_of
from memory_service.storage.local.records.schema import raw

# The errors of a read that meets a value of a type or form that it cannot have.
_STUMBLES = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, struct.error)
_KINDS = get_args(PayloadKind)
_COLUMNS = """
    c.chunk_id, c.bank_id, CAST(c.key AS BLOB) AS key, CAST(c.digest AS BLOB) AS digest, c.start,
    c.original_length, c.stored_length, c.payload_bytes,
    c.created, CAST(c.meta AS BLOB) AS meta, t.chunk_id AS content, CAST(t.payload AS BLOB) AS payload,
    length(t.embedding) AS embedding_bytes, {types} AS types
"""
_EXPECTED = {
    "c.key": "blob",
    "c.digest": "blob",
    "c.meta": "text",
    "t.text": "text",
    "t.token_ids": "blob",
    "t.embedding": "blob",
    "c.start": "integer",
    "c.created": "integer",
}
_TYPES = " ".join(_EXPECTED.values())
_COLUMNS = _COLUMNS.format(types=" || ' ' || ".join(f"typeof({column})" for column in _EXPECTED))
_WIDE = """
    CAST(t.text AS BLOB) AS text, CAST(t.token_ids AS BLOB) AS token_ids, CAST(t.embedding AS BLOB) AS embedding
"""
NARROW = f"SELECT {_COLUMNS}, NULL AS embedding FROM chunks c LEFT JOIN contents t USING (chunk_id)"
WHOLE = f"SELECT {_COLUMNS}, {_WIDE} FROM chunks c LEFT JOIN contents t USING (chunk_id)"
_SOME = f"{WHOLE} WHERE c.bank_id = ? AND c.chunk_id IN (SELECT value FROM json_each(?)) ORDER BY c.chunk_id"
_ALL = f"{WHOLE} WHERE c.bank_id = ? ORDER BY c.chunk_id"


@contextmanager
def naming(connection: Connection, bank: Bank, ids: Sequence[int] | None = None) -> Iterator[None]:
    """Name the rows that are to blame for an error of the block, which reads rows of these ids, or any of the bank.
    Errors: FlawedError; that of the block where no row is to blame."""
    try:
        yield
    except (*_STUMBLES, DBAPIError, sqlite3.Error) as error:
        if not _of_a_row(error):
            raise
        if flaws := find(connection, bank, ids):
            raise FlawedError(bank, flaws) from error
        raise


def _of_a_row(error: Exception) -> bool:
    """Tell whether a row can be to blame for an error. SQLite has errors for text that is not UTF-8 and for malformed
    JSON, where one can, and others, such as for a disk that fails, where none can."""
    if not isinstance(error, DBAPIError | sqlite3.Error):
        return True
    said = str(getattr(error, "orig", error))
    return "UTF-8" in said or "malformed JSON" in said


def find(connection: Connection, bank: Bank, ids: Sequence[int] | None) -> dict[int, str]:
    """Return the ids, of those given or of the whole bank, whose rows cannot be used, each with what is wrong."""
    cursor = raw(connection).cursor()
    cursor.row_factory = sqlite3.Row
    if ids is None:
        rows = cursor.execute(_ALL, (bank.bank_id,))
    else:
        rows = cursor.execute(_SOME, (bank.bank_id, json.dumps(list(ids))))
    named = ((row["chunk_id"], checked(row, bank.uid, bank.embedding.dimension)[1]) for row in rows)
    return {chunk_id: flaw for chunk_id, flaw in named if flaw}


def checked(row: Any, uid: str, dimension: int | None) -> tuple[Payload | None, str]:
    """Return the descriptor of a row of NARROW or WHOLE, and what is wrong with the row, as a sentence, or ""."""
    try:
        payload = payload_of(row["payload"] and row["payload"].decode())
        flaw = _flaw(row, uid, dimension, payload) or (row_checksum.flaw(row) if row["embedding"] is not None else "")
    except _STUMBLES:
        payload, flaw = None, "its descriptor, its metadata or a figure of it cannot be read"
    return payload, flaw


def _flaw(row: Any, uid: str, dimension: int | None, payload: Payload | None) -> str:
    if row["content"] is None:
        return "its content is missing"
    if row["types"] != _TYPES:
        return "a column of its record has another type"
    return _embedding_flaw(row, dimension) or _payload_flaw(row, uid, payload) or _metadata_flaw(row)


def _embedding_flaw(row: Any, dimension: int | None) -> str:
    if dimension is not None and row["embedding_bytes"] != 4 * dimension:
        return f"its embedding has {row['embedding_bytes']} bytes instead of {4 * dimension}"
    if row["embedding"] is not None and not np.isfinite(np.frombuffer(row["embedding"], "<f4")).all():
        return "its embedding is not finite"
    return ""


def _payload_flaw(row: Any, uid: str, payload: Payload | None) -> str:
    length = payload.length if payload else 0
    if row["payload_bytes"] != length:
        return f"its descriptor has {length} bytes, its row {row['payload_bytes']}"
    if payload is not None and payload.seed != seed(uid, row["chunk_id"]):
        return "its descriptor belongs to another chunk"
    if payload is not None and not _kind_fits(payload):
        return f"its descriptor says that it is of the kind {payload.kind}, which it is not"
    return ""


def _metadata_flaw(row: Any) -> str:
    return "" if isinstance(json.loads(row["meta"]), dict) else "its metadata cannot be read"


def _kind_fits(payload: Payload) -> bool:
    soft = [tensor.name for tensor in payload.tensors] == ["soft"]
    return payload.kind in _KINDS and soft == (payload.kind == "soft_tokens")
