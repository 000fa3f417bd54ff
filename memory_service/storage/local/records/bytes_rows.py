"""Rows that are read as bytes, column by column. SQLite keeps a type with each value, so that a damaged row may have a
text that is not UTF-8 where a number belongs, upon which the driver would fail before anyone can say which row it
is."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sqlalchemy import FromClause

_READERS: Mapping[type, Callable[[bytes], Any]] = {str: bytes.decode, int: int, bytes: bytes}


def selected(names: Iterable[str]) -> str:
    """Return the list of columns of a SELECT that reads them as bytes."""
    return ", ".join(f"CAST({name} AS BLOB)" for name in names)


def reader(table: FromClause, names: Iterable[str]) -> Callable[[Iterable[bytes | None]], dict[str, Any]]:
    """Return the function that makes the values of a row that was read so, by column. Errors of the function:
    ValueError for a value that cannot be one of its column."""
    kinds = [(name, _READERS[table.columns[name].type.python_type]) for name in names]

    def read(row: Iterable[bytes | None]) -> dict[str, Any]:
        return {name: None if value is None else kind(value) for (name, kind), value in zip(kinds, row, strict=False)}

    return read
