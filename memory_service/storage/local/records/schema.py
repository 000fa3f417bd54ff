"""The tables of metadata.db, and the schema that a data folder has. This file owns the rules that only the present
schema is served, and that no folder is begun anew whose records are lost."""

import logging
import sqlite3
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, Index, MetaData, UniqueConstraint, create_engine, event, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateIndex, CreateTable

from kvbank.files import private
from kvbank.files.opening import free_bytes
from memory_service.domain.errors import StartError
from memory_service.domain.tenants import DEFAULT_TENANT
from memory_service.storage import revisions as line
from memory_service.storage.local.files import ballast, layout

_log = logging.getLogger(__name__)

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """The base of all tables, which names their indexes and keys alike in every version."""

    metadata = MetaData(naming_convention=NAMING)


class StoreRow(Base):
    """The table of one row that has the identity of the folder and the first chunk id that is not reserved."""

    __tablename__ = "store"
    id: Mapped[int] = mapped_column(primary_key=True)
    store_id: Mapped[str]
    next_chunk_id: Mapped[int]


class ClockRow(Base):
    """The table of one row that has the mark of the clock: the time of the service at some moment (`now`), the
    machine's clock that cannot be set at that moment (`running`), both in microseconds, and a name of the start of the
    machine (`boot`)."""

    __tablename__ = "clock"
    id: Mapped[int] = mapped_column(primary_key=True)
    now: Mapped[int]
    running: Mapped[int]
    boot: Mapped[str]


class BankRow(Base):
    """The table of banks: specs are JSON, and every commit keeps the usage in step with the chunks. Names are unique
    within a tenant."""

    __tablename__ = "banks"
    bank_id: Mapped[int] = mapped_column(primary_key=True)
    uid: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    spec: Mapped[str]
    capacity: Mapped[str | None]
    policy: Mapped[str]
    meta: Mapped[str]
    created: Mapped[int]
    chunks: Mapped[int]
    tokens: Mapped[int]
    bytes: Mapped[int]
    chunks_written: Mapped[int]
    chunks_evicted: Mapped[int]
    chunks_deleted: Mapped[int]
    chunks_quarantined: Mapped[int]
    chunks_expired: Mapped[int] = mapped_column(server_default=text("0"))
    quota: Mapped[str] = mapped_column(server_default=text("'{}'"))
    expiry: Mapped[str] = mapped_column(server_default=text("'{}'"))
    index_kind: Mapped[str] = mapped_column(server_default=text("'auto'"))
    tenant: Mapped[str] = mapped_column(server_default=text(f"'{DEFAULT_TENANT}'"))
    __table_args__ = (UniqueConstraint("tenant", "name"), {"sqlite_autoincrement": True})


class TenantRow(Base):
    """The table of tenants, with their quotas as JSON; what a tenant uses is the sum of its banks."""

    __tablename__ = "tenants"
    name: Mapped[str] = mapped_column(primary_key=True)
    quota: Mapped[str]
    created: Mapped[int]


class ApiKeyRow(Base):
    """The table of API keys, of which it has no secret but the SHA-256; `banks` is a JSON list of globs. Times are in
    microseconds."""

    __tablename__ = "api_keys"
    key_id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    role: Mapped[str]
    banks: Mapped[str]
    secret_sha256: Mapped[bytes]
    created: Mapped[int]
    expires: Mapped[int | None]
    revoked: Mapped[int | None]
    last_used: Mapped[int | None]
    __table_args__ = (Index(None, "tenant", "created", "key_id"), Index(None, "created", "key_id"))


class GoneBankRow(Base):
    """The table of deleted banks whose chunks and files are still being removed; a bank's row here goes last."""

    __tablename__ = "gone_banks"
    bank_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    uid: Mapped[str]


class ChunkRow(Base):
    """The table of live chunks, with the columns that searches and evictions scan.

    Times are in microseconds; `expires` is null for a chunk that never expires. `digest` has the digest of the request
    and checksums of the row (see `row_checksum`), `size` the bytes that the chunk takes on the disk (see `chunk_size`).
    """

    __tablename__ = "chunks"
    chunk_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    bank_id: Mapped[int]
    key: Mapped[bytes]
    digest: Mapped[bytes]
    start: Mapped[int]
    original_length: Mapped[int]
    stored_length: Mapped[int]
    payload_bytes: Mapped[int]
    meta: Mapped[str]
    created: Mapped[int]
    retrieval_count: Mapped[int]
    last_retrieved: Mapped[int | None]
    pinned: Mapped[bool]
    ttl: Mapped[int]
    renew: Mapped[bool]
    expires: Mapped[int | None]
    size: Mapped[int] = mapped_column(server_default=text("0"))
    __table_args__ = (
        Index(None, "bank_id", "chunk_id"),
        Index(None, "expires", sqlite_where=text("expires IS NOT NULL")),
    )


class ContentRow(Base):
    """The table of the wide columns of chunks, apart so that scans of `chunks` stay cheap. The embedding is float32 LE,
    the descriptor of the payload JSON."""

    __tablename__ = "contents"
    chunk_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    token_ids: Mapped[bytes]
    text: Mapped[str]
    payload: Mapped[str | None]
    # Last, so that the other columns are read without it.
    embedding: Mapped[bytes]


class KeyRow(Base):
    """The table of idempotency keys, with the chunk that was written under each, whether it lives or is gone.

    This is the only index of keys. Keys are random, so that neighbours lie on different pages: eviction leaves this
    table alone, and so writes to few pages.
    """

    __tablename__ = "keys"
    bank_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    key: Mapped[bytes] = mapped_column(primary_key=True)
    chunk_id: Mapped[int]
    __table_args__ = ({"sqlite_with_rowid": False},)


class SpentKeyRow(Base):
    """The table of chunks that are gone, kept for 24 h with their keys so that a repeated write is recognised."""

    __tablename__ = "spent_keys"
    bank_id: Mapped[int]
    key: Mapped[bytes]
    digest: Mapped[bytes]
    chunk_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    gone: Mapped[int] = mapped_column(index=True)


class EvictionRow(Base):
    """The log of evictions, which keeps a bounded number for each bank."""

    __tablename__ = "evictions"
    sequence: Mapped[int] = mapped_column(primary_key=True)
    bank_id: Mapped[int]
    chunk_id: Mapped[int]
    reason: Mapped[str]
    retrieval_count: Mapped[int]
    start: Mapped[int]
    stored_length: Mapped[int]
    created: Mapped[int]
    evicted: Mapped[int]
    meta: Mapped[str]
    __table_args__ = (Index(None, "bank_id", "sequence"), {"sqlite_autoincrement": True})


class EvictionPlanRow(Base):
    """The table of evictions that go on in the background: what is left of each plan, so that a restart goes on with
    it."""

    __tablename__ = "eviction_plans"
    bank_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    plan: Mapped[bytes]


class SessionRow(Base):
    """The table of sessions; lists and maps are JSON, and `name` is null where there is none. `checksum` is that of the
    row but for the times of expiry, which a leap of the clock moves."""

    __tablename__ = "sessions"
    session_id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    name: Mapped[str | None]
    bank: Mapped[str]
    reads: Mapped[str]
    reader_digest: Mapped[str]
    settings: Mapped[str]
    meta: Mapped[str]
    ttl: Mapped[int]
    branch: Mapped[str]
    head: Mapped[int]
    tokens: Mapped[int]
    forked_session: Mapped[str | None]
    forked_turn: Mapped[int | None]
    created: Mapped[int]
    updated: Mapped[int]
    expires: Mapped[int | None]
    epoch: Mapped[int]
    holder: Mapped[str | None]
    lease_expires: Mapped[int | None]
    lease_ttl: Mapped[int | None]
    checksum: Mapped[bytes]
    __table_args__ = (
        UniqueConstraint("tenant", "name"),
        Index(None, "tenant", "updated"),
        Index(None, "tenant", "bank"),
        Index(None, "expires", sqlite_where=text("expires IS NOT NULL")),
    )


class BranchRow(Base):
    """The table of branches of sessions. A branch goes on behind the turn `cut_turn` of its parent (null for one that
    begins at the first turn), up to which there are `cut_tokens`. `session_id` is the session that has appended to it,
    or, where that is gone, one that has some of its turns. `bytes` is the sum of the sizes of its turns."""

    __tablename__ = "branches"
    branch: Mapped[str] = mapped_column(primary_key=True)
    session_id: Mapped[str] = mapped_column(index=True)
    tenant: Mapped[str] = mapped_column(index=True)
    parent: Mapped[str | None] = mapped_column(index=True)
    cut_turn: Mapped[int]
    cut_tokens: Mapped[int]
    checksum: Mapped[bytes]
    # Below `checksum`, whose type has this name.
    bytes: Mapped[int]


class TurnRow(Base):
    """The table of turns. `content` is the JSON of items, usage and metadata, `token_ids` uint32 LE, `digest` that of
    what the caller said, `size` what the turn counts of its tenant's bytes, `checksum` that of the row and that of the
    token ids."""

    __tablename__ = "turns"
    turn_id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    key: Mapped[str]
    branch: Mapped[str]
    number: Mapped[int]
    start: Mapped[int]
    status: Mapped[str]
    token_count: Mapped[int]
    prompt_tokens: Mapped[int]
    kept: Mapped[int]
    created: Mapped[int]
    size: Mapped[int]
    digest: Mapped[bytes]
    checksum: Mapped[bytes]
    content: Mapped[bytes]
    # Last, so that the other columns are read without it.
    token_ids: Mapped[bytes]
    __table_args__ = (
        UniqueConstraint("branch", "number"),
        UniqueConstraint("tenant", "key"),
        Index(None, "branch", "start", sqlite_where=text("status = 'forgotten'")),
    )


class WindowRow(Base):
    """The table of local windows, of which each session has at most one; `file` is the name of the file with its bytes,
    and `checksum` the hexadecimal digits of their xxh3-64."""

    __tablename__ = "windows"
    session_id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    turn: Mapped[int]
    stamp: Mapped[str]
    size: Mapped[int]
    checksum: Mapped[str]
    file: Mapped[str]


class ForgettingRow(Base):
    """The table of what was forgotten, without any of it: the receipt, and in `work`, as JSON of ids and numbers, what
    is still to be done; null where all is done. `subject` names what was asked for, so that asking again is answered
    with the same receipt; `counts` is JSON."""

    __tablename__ = "forgettings"
    receipt_id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    subject: Mapped[str]
    key_id: Mapped[str]
    target: Mapped[str]
    time: Mapped[int]
    counts: Mapped[str]
    work: Mapped[str | None]
    __table_args__ = (Index(None, "tenant", "subject"),)


class ForgettingIdsRow(Base):
    """The table of the chunks that are being forgotten by their ids, a JSON list, until all are gone. They may be many,
    and so do not stand in the row of `forgettings`, which each step writes anew."""

    __tablename__ = "forgetting_ids"
    receipt_id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str]
    ids: Mapped[str]


class GoneBranchRow(Base):
    """The table of branches of sessions that were forgotten: a chunk of one that begins at `start` or behind it is not
    written any more. `gone` is the time of that."""

    __tablename__ = "gone_branches"
    branch: Mapped[str] = mapped_column(primary_key=True)
    start: Mapped[int]
    gone: Mapped[int] = mapped_column(index=True)


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
    for table in Base.metadata.sorted_tables:
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
