"""A data folder or a backup, seen by a pure reader. This file owns the rule that looking at a folder changes nothing,
also where a server has it open.

The database is opened with `mode=ro` and `query_only`: such a connection takes read locks, but neither writes nor
checkpoints, not even when it is the last one to close. So it cannot be the second writer that SQLite's WAL-reset bug
needs. On a folder that is not served it may leave an empty metadata.db-wal and its -shm behind, which the next server
takes over; one that cannot be written to is opened as `immutable`. An open read transaction keeps the log from starting
anew, so they are short, a page of rows each; only the integrity check and a backup's copy of the database take longer.

No file of a database is opened by hand while SQLite has it open in this process: closing it would drop SQLite's locks.
"""

import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from sqlalchemy import Connection, QueuePool, create_engine, event
from sqlalchemy.exc import DatabaseError, NoResultFound

from kvbank.files import private
from memory_service.care.report import CareError
from memory_service.storage.local.files.folder import UNFINISHED, unserved
from memory_service.storage.local.records import schema, unsynced_rows

DATABASE = "metadata.db"

_ALIVE = """
    SELECT chunk_id FROM chunks JOIN banks USING (bank_id) WHERE chunk_id IN (SELECT value FROM json_each(?))
"""


class Folder:
    """Reads a folder whose records have the present schema, until the end of the `with` block."""

    def __init__(self, path: Path, upgrade: str = "kvbank serve --data {path} --migrate") -> None:
        """Open the database of a folder. upgrade: the command that an error names where the schema is an older one.
        Errors: CareError."""
        if not path.exists():
            raise CareError(f"there is no folder {path}")
        if not path.is_dir():
            raise CareError(f"{path} is not a folder")
        if (path / UNFINISHED).exists():
            raise CareError(f"{path} is an unfinished copy of another store; go on with: kvbank store copy FROM {path}")
        if not (path / DATABASE).is_file():
            raise CareError(f"{path} is not a data folder of kvbank: it has no {DATABASE}")
        self.path = path
        self._how = _how_to_open(path)
        self._engine = create_engine("sqlite://", creator=self._connect, poolclass=QueuePool)
        event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        try:
            self.schema = self._schema(upgrade)
        except BaseException:
            self.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        uri = f"file:{quote(os.fsencode(self.path.absolute() / DATABASE))}?{self._how}"
        connection = sqlite3.connect(uri, uri=True, timeout=30.0, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA query_only=ON")
        return connection

    def _schema(self, upgrade: str) -> str:
        try:
            with self.read() as connection:
                found = str(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one())
        except NoResultFound as error:
            raise CareError(f"{self.path / DATABASE} has no schema") from error
        except DatabaseError as error:
            raise CareError(f"{self.path / DATABASE} cannot be read as a database of kvbank ({error.orig})") from error
        known = schema.revisions()
        if found not in known:
            raise CareError(f"{self.path} was written by a newer kvbank (schema {found}, this one knows {known[-1]})")
        if found != known[-1]:
            command = upgrade.format(path=self.path)
            raise CareError(f"{self.path} has the older schema {found}; upgrade it with: {command}")
        return found

    def read(self) -> AbstractContextManager[Connection]:
        """Begin a read transaction, which the caller keeps short."""
        return self._engine.begin()

    def store_id(self) -> str:
        """Return the identity of the store."""
        with self.read() as connection:
            return str(connection.exec_driver_sql("SELECT store_id FROM store").scalar_one())

    def forgettings(self) -> tuple[set[str], bool]:
        """Return the ids of all receipts of what was forgotten, and whether something is being forgotten."""
        with self.read() as connection:
            found = connection.exec_driver_sql("SELECT receipt_id, work IS NOT NULL FROM forgettings").all()
        return {receipt for receipt, _ in found}, any(pending for _, pending in found)

    def alive(self, chunk_ids: Collection[int]) -> set[int]:
        """Return those of the ids that have a row now, in a bank that is not being deleted."""
        if not chunk_ids:
            return set()
        with self.read() as connection:
            return set(connection.exec_driver_sql(_ALIVE, (json.dumps(list(chunk_ids)),)).scalars())

    def unsynced(self, chunk_ids: Collection[int]) -> dict[int, bytes]:
        """Return the bytes, by chunk id, of those files of chunks that may not be on the disk: what the records have of
        a file counts, and a start makes the file of it again."""
        with self.read() as connection:
            found = unsynced_rows.files(connection, chunk_ids)
            return {chunk_id: data for chunk_id, data in found if data is not None}

    def copy_database(self, target: Path) -> None:
        """Copy the database as it is now into the folder `target`, in one read transaction. Errors: sqlite3.Error."""
        private.make_file(target / DATABASE)
        with closing(self._connect()) as source, closing(sqlite3.connect(target / DATABASE)) as copy:
            source.backup(copy)

    def close(self) -> None:
        """Close the database of this folder."""
        self._engine.dispose()

    def __enter__(self) -> "Folder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _how_to_open(path: Path) -> str:
    """Return the parameters of the URI by which a database is opened.

    A reader too makes the log of the database and its -shm where they are not there. Where it may not, it can do
    without if the log is empty and nothing else writes. Errors: CareError for a log that cannot be read.
    """
    log, shared = (path / f"{DATABASE}{suffix}" for suffix in ("-wal", "-shm"))
    if os.access(path, os.W_OK, effective_ids=True) or (log.exists() and shared.exists()):
        return "mode=ro"
    if log.exists() and log.stat().st_size:
        raise CareError(
            f"{path} cannot be written to, and was not stopped cleanly: {log.name} is not in the database yet; look at"
            " a copy that can be written to"
        )
    return "immutable=1"


def settled(folder: Folder, find: Callable[[Folder], Iterable[str]], *, alone: bool) -> list[str]:
    """Return what `find` finds, unless a server may be about to add or remove it. alone: whether the caller holds the
    folder's lock."""
    found = list(find(folder))
    if alone or not found:
        return found
    with unserved(folder.path) as free:
        still = set(find(folder)) if free else set()
    return [name for name in found if name in still]


def names(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; none where it is gone, since a server may just have removed it."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
