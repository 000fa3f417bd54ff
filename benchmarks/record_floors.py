"""The floors of small durable records: the same bytes appended to a file, and inserted into SQLite. `appending` and
`inserting` return a function that takes the number of records to write."""

import os
import sqlite3
from collections.abc import Callable
from itertools import count
from pathlib import Path

Write = Callable[[int], None]


def appending(path: Path, record: bytes) -> Write:
    """Append a record to a file, again and again, and sync the file after each."""

    def append(records: int) -> None:
        with path.open("ab", buffering=0) as file:
            for _ in range(records):
                file.write(record)
                os.fsync(file.fileno())

    return append


def opened(path: Path) -> sqlite3.Connection:
    """Make a database whose commits are durable, with a table for records."""
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE records (id INTEGER PRIMARY KEY, text, bytes)")
    return database


def inserting(database: sqlite3.Connection, text: str, data: bytes) -> Write:
    """Insert records of this text and these bytes, all in one commit."""
    serial = count()

    def insert(records: int) -> None:
        with database:
            rows = ((next(serial), text, data) for _ in range(records))
            database.executemany("INSERT INTO records VALUES (?, ?, ?)", rows)

    return insert
