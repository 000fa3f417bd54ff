"""Changes to a database that no server has open: the caller holds the folder's lock, or the folder is in the making.
This file owns that the database is one file again after a change."""

import secrets
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import Connection

from memory_service.care.folder import DATABASE
from memory_service.domain.clock import Clock
from memory_service.storage.local.records import clock_rows, gone_rows, schema

_BATCH = 500


@contextmanager
def transaction(folder: Path) -> Iterator[Connection]:
    """Begin a durable transaction, after which the database is one file again."""
    engine = schema.engine(folder / DATABASE, synchronous="FULL", writer=True)
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def remove(connection: Connection, bank_id: int, chunk_ids: Sequence[int], counter: str) -> None:
    """Take chunks out of the records, as the server does it. counter: that of the bank which says why."""
    clock = Clock()
    clock.resume(clock_rows.mark(connection))
    for begin in range(0, len(chunk_ids), _BATCH):
        gone_rows.remove(connection, bank_id, chunk_ids[begin : begin + _BATCH], counter, clock.now_us())


def leave_out(folder: Path, chunks: Iterable[tuple[int, str, int]]) -> None:
    """Take chunks out of the records of a folder in the making; the windows of sessions, which are a cache whose files
    are not copied; and the bytes of payload files, all of which are durable there. chunks: bank id, counter of the
    bank, chunk id."""
    left_out: dict[tuple[int, str], list[int]] = defaultdict(list)
    for bank_id, counter, chunk_id in chunks:
        left_out[bank_id, counter].append(chunk_id)
    with transaction(folder) as connection:
        connection.exec_driver_sql("DELETE FROM windows")
        connection.exec_driver_sql("DELETE FROM unsynced")
        for (bank_id, counter), chunk_ids in left_out.items():
            remove(connection, bank_id, chunk_ids, counter)


def renew_identity(folder: Path) -> str:
    """Give a folder a new store id, and return it: what clients have cached of the old folder is not taken for that of
    the new one."""
    store_id = secrets.token_hex(16)
    with transaction(folder) as connection:
        connection.exec_driver_sql("UPDATE store SET store_id = ?", (store_id,))
    return store_id


def forget_database(folder: Path) -> None:
    """Remove a database with all that SQLite put beside it."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        (folder / f"{DATABASE}{suffix}").unlink(missing_ok=True)


def put_to_rest(folder: Path) -> None:
    """Take a database out of WAL mode, so that a reader leaves nothing beside it; a server puts it back."""
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
