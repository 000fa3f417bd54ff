"""The schema that the database of a data folder has. This file owns the rules that only the present
schema is served, and that no folder is begun anew whose records are lost."""

import logging
import sqlite3
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from kvbank.files import private
from kvbank.files.opening import free_bytes
from memory_service.domain.errors import StartError
from memory_service.storage import revisions as line
from memory_service.storage.local.files import ballast, layout
from memory_service.storage.local.records.tables import METADATA

_log = logging.getLogger(__name__)


def migrations() -> Path:
    """Return the folder of Alembic's migrations."""
    return Path(__file__).parent / "migrations"


def revisions() -> list[str]:
    """Return all schema versions, oldest first."""
    return line.names(migrations())


def engine(path: Path, *, synchronous: str, writer: bool) -> Engine:
    """Make the engine of SQLAlchemy for the database. A connection of the writer begins IMMEDIATE and checkpoints;
    connections of readers cannot write, and begin by hand.

    synchronous: FULL or NORMAL, as in PRAGMA synchronous.
    """
    if writer:
        private.make_file(path)
    made = create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"check_same_thread": False, "timeout": 30.0},
        # As many as threads ask for; the writer's thread, which opens snapshots, must not wait for one.
        pool_size=16,
        max_overflow=-1,
        # Else an error that is logged repeats the values of its statement: texts and metadata of callers.
        hide_parameters=True,
    )

    @event.listens_for(made, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's driver would begin transactions by itself
        if writer:
            # First, because an empty database has no choice any more once it has a page.
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            # What is deleted is overwritten, in pages that stay in use and in free ones; see `unused_bytes`.
            connection.execute("PRAGMA secure_delete=ON")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        if writer:
            # Often and little: a commit that checkpoints makes the others wait.
            connection.execute("PRAGMA wal_autocheckpoint=1000")
            connection.execute("PRAGMA cache_size=-16384")
            # The sums of `tenant_usage` need no file.
            connection.execute("PRAGMA temp_store=MEMORY")
        else:
            connection.execute("PRAGMA wal_autocheckpoint=0")
            connection.execute("PRAGMA query_only=ON")

    if writer:

        @event.listens_for(made, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return made


_VERSION_TABLE = """
    CREATE TABLE IF NOT EXISTS alembic_version (
        version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
    )
"""


def prepare(path: Path, data: Path, *, migrate: bool) -> str:
    """Create a fresh database or check its schema, and return the schema that it had.

    Errors: StartError for an older (without `migrate`) or newer one, and for payloads without records.
    """
    found, known = _ask(path, "SELECT version_num FROM alembic_version"), revisions()
    if _ask(path, "SELECT store_id FROM store") is None and layout.any_in(data):
        raise StartError(
            f"{data} has payloads in {layout.FOLDER}/, but no records of them: {path.name} is missing or empty; put a"
            f" backup in place (kvbank restore BACKUP DATA), or move {layout.FOLDER}/ away to begin anew"
        )
    if found == known[-1]:
        return found
    if found is not None and found not in known:
        raise StartError(f"{data} was written by a newer kvbank (schema {found}, this one knows {known[-1]})")
    if found is not None and not migrate:
        text = f"{data} has the older schema {found}; upgrade it with: kvbank serve --data {data} --migrate"
        raise StartError(text)
    if found is None:
        create(path)
        return known[-1]
    upgrade(path)
    return found


def _ask(path: Path, statement: str) -> str | None:
    """Ask a database for one value; None is returned when there is no database, table or row yet. Errors: StartError
    for a file that is not a database of kvbank, or cannot be read."""
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(path)) as connection:
            row = connection.execute(statement).fetchone()
    except sqlite3.DatabaseError as error:
        if "no such table" in str(error):
            return None
        if free_bytes(path.parent) < ballast.SIZE:
            raise StartError(f"cannot open {path.parent}: {ballast.explained(path.parent, error)}") from error
        raise StartError(f"{path} cannot be read, or is not a database of kvbank ({error})") from error
    return str(row[0]) if row else None


@cache
def _definitions() -> tuple[str, ...]:
    """Return the statements that make all tables and indexes which a database does not have. They are made once: a
    process that opens many folders would write each anew, which takes longer than to execute it."""
    made: list[CreateTable | CreateIndex] = []
    for table in METADATA.sorted_tables:
        made.append(CreateTable(table, if_not_exists=True))
        made += (CreateIndex(index, if_not_exists=True) for index in table.indexes)
    return tuple(str(statement.compile(dialect=sqlite.dialect())) for statement in made)


def create(path: Path) -> None:
    """Create a fresh database in one transaction. It equals one that went through the migrations; Alembic, which takes
    a third of a second to import, is not needed for it."""
    database = engine(path, synchronous="FULL", writer=True)
    try:
        with database.begin() as connection:
            for statement in _definitions():
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql(_VERSION_TABLE)
            connection.exec_driver_sql("INSERT INTO alembic_version VALUES (?)", (revisions()[-1],))
    finally:
        database.dispose()


def upgrade(path: Path, revision: str = "head") -> None:
    """Run the migrations up to `revision`."""
    database = engine(path, synchronous="FULL", writer=True)
    try:
        with database.connect() as connection:
            # The database of an earlier version keeps what it once had; one that was written anew can give it back.
            # First, so that a kill in between leaves an earlier version, and all of it is done again.
            _write_anew(path, raw(connection))
        with database.connect() as connection:
            line.run(migrations(), connection, revision)
    finally:
        database.dispose()


def _write_anew(path: Path, driver: sqlite3.Connection) -> None:
    """Write a database anew, or say in the log why it stays as it is, as where the disk has no room for a copy."""
    try:
        driver.execute("VACUUM")
    except sqlite3.Error as error:
        # The log has as much of the copy as the disk had room for, which the upgrade needs.
        driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        need = (path.stat().st_size >> 20) + 1
        text = "%s could not be written anew (%s): bytes of what was deleted before its upgrade may be left in it; to "
        _log.warning(
            f"{text}clear them, free %d MiB, stop the service, and run: sqlite3 %s VACUUM", path, error, need, path
        )


def raw(connection: Connection) -> sqlite3.Connection:
    """Return the driver's connection below one of SQLAlchemy; it is in the same transaction."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver
