"""Many rows of numbers at once: they are copied in binary form into an array, without an object of Python for each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from memory_service.storage.postgres.database import raw

# The head of a copy in binary form: a signature, flags, the length of an extension that there is none of. A row begins
# with the number of its columns, a column with its length; the last row is a number alone.
_HEAD, _TAIL = 19, 2


def numbers(connection: Connection, query: str, values: Sequence[object], columns: Sequence[str]) -> dict[str, Any]:
    """Return the columns, int64 [n] each, of a query whose columns are bigint and never null."""
    rows = _copied(connection, query, values, np.dtype(_fields([(name, ">i8", ()) for name in columns])))
    return {name: rows[name].astype(np.int64) for name in columns}


def vectors(
    connection: Connection, query: str, values: Sequence[object], dimension: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return ids [n] and embeddings [n, d] of a query with these columns. Errors: ValueError where an embedding has
    another dimension."""
    fields = _fields([("chunk_id", ">i8", ()), ("embedding", ">f4", (dimension,))], head=4)
    rows = _copied(connection, query, values, np.dtype(fields))
    return rows["chunk_id"].astype(np.int64), rows["embedding"].astype("<f4")


def _fields(columns: Sequence[tuple[str, str, tuple[int, ...]]], head: int = 0) -> list[Any]:
    """Return the fields of a row. head: bytes before the values of a vector."""
    fields: list[Any] = [("columns", ">i2")]
    for name, kind, shape in columns:
        fields.append((f"length of {name}", ">i4"))
        if shape and head:
            fields.append((f"head of {name}", f"V{head}"))
        fields.append((name, kind, shape))
    return fields


def _copied(connection: Connection, query: str, values: Sequence[object], row: np.dtype[Any]) -> NDArray[Any]:
    data = bytearray()
    with raw(connection).cursor().copy(f"COPY ({query}) TO STDOUT (FORMAT BINARY)", values) as copy:
        for some in copy:
            data += some
    size = len(data) - _HEAD - _TAIL
    if size % row.itemsize:
        raise ValueError("a column has another length")
    rows = np.frombuffer(data, row, size // row.itemsize, _HEAD)
    for name in row.names or ():
        if name.startswith("length of ") and len(rows) and (rows[name] != _length(row, name)).any():
            raise ValueError("a column has another length")
    return rows


def _length(row: np.dtype[Any], name: str) -> int:
    """Return the bytes of the column whose length is in the field of this name: all up to the next length."""
    names = row.names or ()
    place = names.index(name) + 1
    own = [each for each in names[place : place + 2] if not each.startswith("length of ")]
    return sum(row[each].itemsize for each in own)
