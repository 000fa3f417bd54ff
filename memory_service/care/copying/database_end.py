"""A database with a bucket as an end of a copy."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from memory_service.care.copying import database_rows, tables
from memory_service.care.copying.ends import Mark, Numbers, Object
from memory_service.care.copying.tables import Key, Row, Table
from memory_service.care.report import CareError
from memory_service.domain.limits import OBJECTS, ObjectLimits
from memory_service.domain.model import Bank
from memory_service.storage.postgres import failures, revising, schema, unfinished
from memory_service.storage.postgres.database import Database, raw
from memory_service.storage.postgres.rows import purge_rows
from memory_service.storage.s3 import layout
from memory_service.storage.s3.bucket import Bucket
from memory_service.storage.s3.mark import StoreMark
from memory_service.storage.s3.opening import open_bucket

# The key of the lock (pg_advisory_lock) of the one copy that makes a store.
_LOCK = 0x6B76_0003
_PATIENCE_MS = 5000
_NUMBERS = f"""
    SELECT (SELECT last_value + CASE WHEN is_called THEN {schema.BLOCK} ELSE 0 END FROM chunk_ids),
        (SELECT last_value - CASE WHEN is_called THEN 0 ELSE 1 END FROM bank_ids),
        (SELECT coalesce(max(turn_id), 0) FROM turns),
        (SELECT last_value - CASE WHEN is_called THEN 0 ELSE 1 END FROM evictions_sequence_seq),
        (SELECT coalesce(max(now), 0) FROM clock)
"""
_ALIVE = "SELECT chunk_id FROM chunks JOIN banks USING (bank_id) WHERE chunk_id = ANY(%s)"
_SAVE_CLOCK = """
    INSERT INTO clock VALUES (1, %s, 0, '') ON CONFLICT (id) DO UPDATE SET now = greatest(clock.now, excluded.now)
"""
# Whether nothing was ever kept in a store.
_EMPTY = """
    SELECT NOT EXISTS (SELECT 1 FROM banks) AND NOT EXISTS (SELECT 1 FROM sessions)
    AND NOT EXISTS (SELECT 1 FROM api_keys) AND NOT EXISTS (SELECT 1 FROM forgettings)
    AND NOT EXISTS (SELECT 1 FROM tenants WHERE name <> 'default') AND NOT EXISTS (SELECT 1 FROM gone_banks)
"""
# The folder of the windows of sessions below the prefix of a store.
_WINDOWS = "windows"


class DatabaseEnd:
    """Implements `memory_service.care.copying.ends.Exported` for a database with a bucket."""

    def __init__(self, database: Database, connection: Connection, bucket: Bucket) -> None:
        """Read a database over a connection, whose transaction decides what is seen."""
        self.title = database.title
        self._database, self._connection, self._bucket = database, connection, bucket
        self._windows: dict[tuple[str, str], str] = {}
        self.store_id = str(self._one("SELECT store_id FROM store")[0])

    def _one(self, statement: str, *values: object) -> tuple[object, ...]:
        row = raw(self._connection).execute(statement, values).fetchone()
        assert row is not None
        return row

    def numbers(self) -> Numbers:
        """Return what the store counts up; see `Exported.numbers`."""
        return Numbers(*(int(str(value)) for value in self._one(_NUMBERS)))

    def forgettings(self) -> tuple[set[str], bool]:
        """Return the receipts of what was forgotten, and whether something is being forgotten."""
        with self._database.lent() as connection:
            found = raw(connection).execute("SELECT receipt_id, work IS NOT NULL FROM forgettings").fetchall()
        return {receipt for receipt, _ in found}, any(pending for _, pending in found)

    def count(self, table: Table) -> int:
        """Count the rows of a table."""
        return database_rows.count(self._connection, table)

    def rows(self, table: Table, after: Key = (), upto: Key = (), most: int | None = None) -> Sequence[Row]:
        """Return rows of a table; see `Exported.rows`."""
        found = database_rows.select(self._connection, table, after, upto, most)
        if table is tables.WINDOWS:
            for row in map(table.named, found):
                place = (row["session_id"], row["checksum"])
                self._windows[place] = str(self._one("SELECT file FROM windows WHERE session_id = %s", place[0])[0])
        return found

    def alive(self, chunk_ids: Collection[int]) -> set[int]:
        """Return those of the chunks that are there still."""
        with self._database.lent() as connection:
            return {chunk_id for (chunk_id,) in raw(connection).execute(_ALIVE, (list(chunk_ids),)).fetchall()}

    def read(self, what: Object) -> bytes:
        """Read the bytes of an object; see `Exported.read`."""
        return self._bucket.whole(self._key(what))

    def ask(self, statement: str, *values: object) -> Sequence[tuple[Any, ...]]:
        """Return the rows of a statement, as they are at the moment of this end."""
        return raw(self._connection).execute(statement, values).fetchall()

    @property
    def connection(self) -> Connection:
        """Return the connection, whose transaction decides what is seen."""
        return self._connection

    def banks_listed(self) -> Iterator[str]:
        """Yield the uids of all banks that have objects now, ascending, as a listing tells them."""
        after = ""
        while page := next(self._bucket.pages(layout.below(), after), None):
            found = [chunk[0] for item in page if (chunk := layout.chunk_of(item.key)) is not None]
            yield from dict.fromkeys(found)
            # Behind all objects of the last bank, since no character of a key is behind a tilde.
            after = f"{layout.below(found[-1])}/~" if found else page[-1].key

    def listed(self, bank_uid: str) -> Iterator[tuple[int, int]]:
        """Yield the objects of a bank as a listing tells them now: chunk id, ascending, and bytes."""
        for page in self._bucket.pages(layout.below(bank_uid)):
            for item in page:
                if (found := layout.chunk_of(item.key)) is not None:
                    yield found[1], item.size

    def _key(self, what: Object) -> str:
        if what.kind != "window":
            return layout.key(what.owner, what.chunk_id)
        return f"{_WINDOWS}/{self._windows.get((what.owner, what.checksum)) or _window_name(what)}"


class NewDatabaseEnd(DatabaseEnd):
    """Implements `memory_service.care.copying.ends.Imported` for a database with a bucket."""

    def check(self, bank: Bank) -> None:
        """Refuse a bank that a database cannot have; see `Imported.check`."""
        if bank.embedding.dimension > schema.LARGEST_DIMENSION:
            most = schema.LARGEST_DIMENSION
            text = f"has embeddings of {bank.embedding.dimension} dimensions, and a database takes {most} at most"
            raise CareError(f"bank {bank.title} {text}")

    def put(self, what: Object, data: bytes) -> None:
        """Store the bytes of an object; see `Imported.put`. Errors: FileExistsError where another one is there."""
        self._bucket.put_new(self._key(what), [data])

    def replace(self, table: Table, had: Sequence[Row], rows: Sequence[Row]) -> None:
        """Put rows in the place of others; see `Imported.replace`."""
        old, new = set(had), set(rows)
        gone, added = [row for row in had if row not in new], [row for row in rows if row not in old]
        own = {"file": list(map(_file, added))} if table is tables.WINDOWS else {}

        def change(connection: Connection) -> None:
            database_rows.delete(connection, table, gone)
            database_rows.insert(connection, table, added, **own)

        self._database.change(change)

    def delete(self, objects: Sequence[Object]) -> None:
        """Delete objects by their names; those that are not there are passed over."""
        # A chunk that is aside has the same key as one that is not, which it may be by now.
        self._bucket.delete(self._key(what) for what in objects if what.kind != "aside")

    def finish(self, numbers: Numbers) -> None:
        """Let the database go on from these numbers, and take the mark of the copy away."""
        counted = (
            ("chunk_ids", numbers.chunk),
            ("bank_ids", numbers.bank + 1),
            ("turns_turn_id_seq", numbers.turn + 1),
            ("evictions_sequence_seq", numbers.eviction + 1),
        )

        def change(connection: Connection) -> None:
            driver = raw(connection)
            for name, value in counted:
                driver.execute("SELECT setval(%s, %s, false)", (name, value))
            driver.execute(_SAVE_CLOCK, (numbers.now,))
            unfinished.remove(connection)

        # First, so that the first service does not read all of a table for one row.
        raw(self._connection).execute("ANALYZE")
        self._database.change(change)


@contextmanager
def read(url: str, objects: str, *, live: bool = False, limits: ObjectLimits = OBJECTS) -> Iterator[DatabaseEnd]:
    """Open a store for reading, as it is at one moment, until the end of the block. live: whether services may have it
    open. limits: by which objects are read. Errors: CareError, StartError."""
    with opened(url, objects, limits) as (database, bucket):
        _check_tables(database)
        with database.read(to_the_end=True) as connection:
            driver = raw(connection)
            driver.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            driver.execute(database_rows.BY_INDEX.replace("SET ", "SET LOCAL "))
            unfinished.refuse(connection, database.title)
            if not live:
                _refuse_served(connection, database.title)
            end = DatabaseEnd(database, connection, bucket)
            if not StoreMark(bucket, end.store_id).found():
                raise CareError(f"{bucket.location} has no payloads of the store in {end.title}")
            yield end


def _check_tables(database: Database) -> None:
    """Refuse a database without a store, or with one of another version. Errors: CareError, StartError."""
    with database.lent() as connection:
        if not sa.inspect(connection).has_table("store"):
            raise CareError(f"{database.title} has no tables of kvbank")
    revising.opened(database, migrate=False)


def _refuse_served(connection: Connection, title: str) -> None:
    if services := purge_rows.alive(connection):
        text = f"{services} services have {title} open, and what they write from now on would not be in the copy"
        raise CareError(f"{text}; stop them (one that was killed counts for 10 seconds), or add --live")


@contextmanager
def made(url: str, objects: str, mark: Mark) -> Iterator[NewDatabaseEnd]:
    """Begin a database that is to be a copy, or take one up that was begun, until the end of the block. Errors:
    CareError, StartError."""
    with opened(url, objects) as (database, bucket):
        revising.opened(database, migrate=False)
        with database.lent() as connection:
            _lock(connection, database.title)
            database.change(lambda changing: _begin(changing, database.title, mark))
            raw(connection).execute(database_rows.BY_INDEX)
            end = NewDatabaseEnd(database, connection, bucket)
            StoreMark(bucket, end.store_id).claim(new=True)
            yield end


def _lock(connection: Connection, title: str) -> None:
    """Be the one process that makes a store, for as long as the connection lasts. Errors: CareError."""
    driver = raw(connection)
    # A process that was killed has it until the database notices that.
    driver.execute(f"SET lock_timeout = {_PATIENCE_MS}")
    try:
        driver.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
    except LockNotAvailable as error:
        raise CareError(f"another process is copying into {title}") from error
    driver.execute("RESET lock_timeout")


def _begin(connection: Connection, title: str, mark: Mark) -> None:
    """Put the mark into an empty store, or find it. Errors: CareError where the store is another one."""
    found = unfinished.find(connection)
    if found is None:
        row = raw(connection).execute(_EMPTY).fetchone()
        if row is None or not row[0] or purge_rows.alive(connection):
            raise CareError(f"{title} has a store already, or is being served; name an empty database")
        unfinished.put(connection, mark.store_id, mark.place)
    elif found[0] != mark.store_id:
        raise CareError(f"{title} is an unfinished copy of {found[1]}, another store; name an empty database")


@contextmanager
def opened(url: str, objects: str, limits: ObjectLimits = OBJECTS) -> Iterator[tuple[Database, Bucket]]:
    """Open a database and its bucket. limits: by which objects are read. Errors: CareError for those of the database,
    StartError."""
    with ExitStack() as stack:
        bucket = open_bucket(objects, limits)
        stack.callback(bucket.close)
        database = Database(url)
        stack.callback(database.close)
        try:
            yield database, bucket
        except (psycopg.Error, DBAPIError) as error:
            said = str(failures.of_driver(error) or error).strip().splitlines()
            text = said[0] if said else "no answer"
            raise CareError(f"the database {database.title} answered: {text}") from error


def _window_name(what: Object) -> str:
    return f"{what.owner}/{what.checksum}"


def _file(row: Row) -> str:
    """Return the name of the object of a window, whose row this is."""
    named = tables.WINDOWS.named(row)
    return _window_name(Object("window", named["session_id"], checksum=named["checksum"]))
