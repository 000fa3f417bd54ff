"""A data folder, or a backup, as an end of a copy."""

import json
import os
import secrets
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection

from kvbank.files import durable, private
from kvbank.files.opening import opener
from memory_service.care import manifest
from memory_service.care.copying import aside, folder_rows, tables
from memory_service.care.copying.ends import Mark, Numbers, Object
from memory_service.care.copying.tables import Key, Row, Table
from memory_service.care.folder import DATABASE, Folder
from memory_service.care.report import CareError
from memory_service.domain.errors import StartError
from memory_service.domain.model import Bank
from memory_service.storage.base import DamagedError
from memory_service.storage.local.files import layout, marks, window_files
from memory_service.storage.local.files.bank_folders import BankFolders
from memory_service.storage.local.files.folder import MANIFEST, NOTE, UNFINISHED, DataFolder, unserved
from memory_service.storage.local.records import bank_rows, schema, unsynced_rows
from memory_service.storage.local.records.chunk_ids import Reservations
from memory_service.storage.local.records.schema import raw

_NUMBERS = """
    SELECT next_chunk_id, (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'banks'),
        (SELECT coalesce(max(turn_id), 0) FROM turns),
        (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'evictions'),
        (SELECT coalesce(max(now), 0) FROM clock)
    FROM store
"""
# Behind the key of every row that is aside.
_LAST: Key = ("\U0010ffff",)
_COUNT_UP = "UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?"
_BEGIN_COUNT = (
    "INSERT INTO sqlite_sequence SELECT ?2, ?1 WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = ?2)"
)


class FolderEnd:
    """Implements `memory_service.care.copying.ends.Exported` for a folder that stays as it is."""

    def __init__(self, data: Path, connection: Connection) -> None:
        """Read a folder over a connection of its database."""
        self.title = str(data)
        self._data = data
        self._connection = connection
        self._driver = raw(connection)
        folder_rows.prepare(self._driver)
        # The names of the files of windows, by session and checksum.
        self._windows: dict[tuple[str, str], str] = {}

    @property
    def store_id(self) -> str:
        """Return the identity of the store."""
        return str(self._driver.execute("SELECT store_id FROM store").fetchone()[0])

    def numbers(self) -> Numbers:
        """Return what the store counts up; see `Exported.numbers`."""
        found = Numbers(*self._driver.execute(_NUMBERS).fetchone())
        try:
            reserved = Reservations(self._data).read() or 0
        except ValueError as error:
            raise CareError(f"{error}; serve the folder once, which finds out which ids were given") from error
        return found._replace(chunk=max(found.chunk, reserved))

    def forgettings(self) -> tuple[set[str], bool]:
        """Return the receipts of what was forgotten, and whether something is being forgotten."""
        found = self._driver.execute("SELECT receipt_id, work IS NOT NULL FROM forgettings").fetchall()
        return {receipt for receipt, _ in found}, any(pending for _, pending in found)

    def count(self, table: Table) -> int:
        """Count the rows of a table."""
        if table is tables.QUARANTINE:
            return len(self._aside())
        return folder_rows.count(self._driver, table)

    def rows(self, table: Table, after: Key = (), upto: Key = (), most: int | None = None) -> Sequence[Row]:
        """Return rows of a table; see `Exported.rows`."""
        if table is tables.QUARANTINE:
            found = [row for row in self._aside() if after < table.key(row) <= (upto or _LAST)]
            return found[:most]
        found = folder_rows.select(self._driver, table, after, upto, most)
        if table is tables.WINDOWS:
            for row in map(table.named, found):
                place, values = (row["session_id"], row["checksum"]), (row["session_id"],)
                (name,) = self._driver.execute("SELECT file FROM windows WHERE session_id = ?", values).fetchone()
                self._windows[place] = name
        return found

    def _aside(self) -> list[Row]:
        banks = dict(self._driver.execute("SELECT uid, bank_id FROM banks").fetchall())
        return list(aside.in_folder(self._data, banks))

    def alive(self, chunk_ids: Collection[int]) -> set[int]:
        """Return all chunks, since the folder stays as it is."""
        return set(chunk_ids)

    def read(self, what: Object) -> bytes:
        """Read the bytes of an object; see `Exported.read`."""
        path = self._path(what)
        if what.kind == "payload" and (unsynced := self._unsynced(what.chunk_id)) is not None:
            return unsynced
        try:
            with open(path, "rb", opener=opener) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            marked = marks.marked(self._data / layout.FOLDER / what.owner)
            # Folders of earlier versions, and backups, have neither marks nor this file.
            if what.kind == "payload" and not marked and (self._data / Reservations.NAME).exists():
                text = f"the payloads of the bank {what.owner} are not there; is a disk not mounted?"
                raise CareError(text) from None
            raise FileNotFoundError(path) from None
        except OSError as error:
            raise DamagedError(f"its file cannot be read: {error.strerror}") from error

    def _unsynced(self, chunk_id: int) -> bytes | None:
        """Return the bytes of a file that may not be on the disk; None for one that is synced."""
        return next((file.data for file in unsynced_rows.files(self._connection, [chunk_id])), None)

    def _path(self, what: Object) -> Path:
        match what.kind:
            case "payload":
                return self._data / layout.name(what.owner, what.chunk_id)
            case "aside":
                return self._data / layout.QUARANTINE / what.owner / f"{what.chunk_id}{layout.SUFFIX}"
        name = self._windows.get((what.owner, what.checksum)) or _window_name(what)
        return self._data / window_files.FOLDER / name


class NewFolderEnd(FolderEnd):
    """Implements `memory_service.care.copying.ends.Imported` for a folder."""

    def _aside(self) -> list[Row]:
        return list(aside.in_folder(self._data, None))  # the banks come last

    def check(self, bank: Bank) -> None:
        """Return at once, since a folder can have any bank."""

    def put(self, what: Object, data: bytes) -> None:
        """Store the bytes of an object; see `Imported.put`."""
        path = self._path(what)
        durable.make_folder(path.parent)
        durable.replace(path, [data])

    def replace(self, table: Table, had: Sequence[Row], rows: Sequence[Row]) -> None:
        """Put rows in the place of others; see `Imported.replace`."""
        old, new = set(had), set(rows)
        added = [row for row in rows if row not in old]
        if table is tables.QUARANTINE:
            for row in old - new:
                aside.remove_from_folder(self._data, row)
            for row in added:
                aside.put_in_folder(self._data, row)
            return
        own = {"file": list(map(_file, added))} if table is tables.WINDOWS else {}
        with _transaction(self._driver):
            folder_rows.delete(self._driver, table, [row for row in had if row not in new])
            folder_rows.insert(self._driver, table, added, **own)

    def delete(self, objects: Sequence[Object]) -> None:
        """Delete objects by their names; those that are not there are passed over."""
        for path in map(self._path, objects):
            path.unlink(missing_ok=True)

    def finish(self, numbers: Numbers) -> None:
        """Let the folder go on from these numbers, mark its payloads, and take the mark of the copy away."""
        driver = self._driver
        with _transaction(driver):
            driver.execute("UPDATE store SET next_chunk_id = max(next_chunk_id, ?)", (numbers.chunk,))
            for value, name in ((numbers.bank, "banks"), (numbers.eviction, "evictions")):
                driver.execute(_COUNT_UP, (value, name))
                driver.execute(_BEGIN_COUNT, (value, name))
            driver.execute("INSERT OR REPLACE INTO clock (id, now, running, boot) VALUES (1, ?, 0, '')", (numbers.now,))
        # The file says the same as the database: so the first start knows that no id is lost.
        Reservations(self._data).write(self.numbers().chunk)
        folders = BankFolders(self._data, durable=True)
        folders.mark_root()
        for bank in bank_rows.of_all(self._connection):
            if bank.kv.layers:
                folders.mark(bank.uid)
        self._connection.rollback()  # the reading that SQLAlchemy has begun
        for folder, _, _ in os.walk(self._data, topdown=False):
            durable.sync_folder(Path(folder))
        (self._data / UNFINISHED).unlink()
        durable.sync_folder(self._data)


@contextmanager
def read(data: Path) -> Iterator[FolderEnd]:
    """Open a folder that no server has open, or a backup, until the end of the block. Errors: CareError."""
    if (data / MANIFEST).exists():
        content = manifest.read(data)
        if manifest.digest(data / DATABASE) != content["database"]["xxh3_64"]:
            raise CareError(f"the database of {data} does not match its checksum")
    with Folder(data) as folder, unserved(data) as free:
        if not free:
            raise CareError(f"{data} is being served; stop the server, or make a backup and copy that")
        with folder.read() as connection:
            yield FolderEnd(data, connection)


@contextmanager
def made(data: Path, mark: Mark) -> Iterator[NewFolderEnd]:
    """Begin a folder that is to be a copy, or take one up that was begun, until the end of the block. Errors:
    CareError."""
    _check_free(data, mark)
    try:
        owned = DataFolder(data, unfinished=True)
    except StartError as error:
        raise CareError(str(error)) from error
    try:
        _check_free(data, mark)
        _begin(data, mark)
        engine = schema.engine(data / DATABASE, synchronous="FULL", writer=True)
        try:
            with engine.connect() as connection:
                _identify(raw(connection))
                yield NewFolderEnd(data, connection)
        finally:
            engine.dispose()
    finally:
        owned.release()


def _check_free(data: Path, mark: Mark) -> None:
    """Refuse a place that has anything but an unfinished copy of the same store. Errors: CareError."""
    if (data / UNFINISHED).exists():
        found = _read_mark(data)
        if found is None or found.store_id != mark.store_id:
            whence = f" of {found.place}" if found else ""
            raise CareError(f"{data} is an unfinished copy{whence}, another store; remove it, or name another folder")
        return
    # A run may have been killed before it put its mark.
    if data.is_dir() and {entry.name for entry in data.iterdir()} - {NOTE}:
        raise CareError(f"{data} exists and is not an empty folder")
    if not data.parent.is_dir():
        raise CareError(f"there is no folder {data.parent}")


def _read_mark(data: Path) -> Mark | None:
    try:
        said = json.loads((data / UNFINISHED).read_bytes())
        return Mark(str(said["store_id"]), str(said["from"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _begin(data: Path, mark: Mark) -> None:
    """Put the mark into a folder, then make its database, unless an earlier run has."""
    if not (data / UNFINISHED).exists():
        said = {"from": mark.place, "store_id": mark.store_id}
        durable.replace(data / UNFINISHED, [json.dumps(said).encode()])
    if not _has_tables(data / DATABASE):
        private.make_file(data / DATABASE)
        schema.create(data / DATABASE)
        durable.sync_folder(data)


def _has_tables(path: Path) -> bool:
    if not path.exists():
        return False
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone() is not None
    finally:
        connection.close()


def _identify(driver: sqlite3.Connection) -> None:
    """Give a new store its identity, unless it has one."""
    with _transaction(driver):
        statement = "INSERT INTO store SELECT 1, ?, 1 WHERE NOT EXISTS (SELECT 1 FROM store)"
        driver.execute(statement, (secrets.token_hex(16),))


@contextmanager
def _transaction(driver: sqlite3.Connection) -> Iterator[None]:
    driver.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        driver.execute("ROLLBACK")
        raise
    driver.execute("COMMIT")


def _window_name(what: Object) -> str:
    return f"{what.owner}-{what.checksum}"


def _file(row: Row) -> str:
    """Return the name of the file of a window, whose row this is."""
    named = tables.WINDOWS.named(row)
    return _window_name(Object("window", named["session_id"], checksum=named["checksum"]))
