"""Tables of metadata.db, and which schema a folder has. Owns the rule that only the present schema is served."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, ForeignKey, Index, MetaData, UniqueConstraint, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memory_service.errors import StartError

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)


class StoreRow(Base):
    """One row: the identity of the folder and the first chunk id that is not reserved."""

    __tablename__ = "store"
    id: Mapped[int] = mapped_column(primary_key=True)
    store_id: Mapped[str]
    next_chunk_id: Mapped[int]


class BankRow(Base):
    """A bank; specs as JSON, usage kept in step by every commit."""

    __tablename__ = "banks"
    bank_id: Mapped[int] = mapped_column(primary_key=True)
    uid: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(unique=True)
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
    __table_args__ = ({"sqlite_autoincrement": True},)


class ChunkRow(Base):
    """A live chunk: embedding float32 LE, payload descriptor as JSON, counts."""

    __tablename__ = "chunks"
    chunk_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    bank_id: Mapped[int] = mapped_column(ForeignKey("banks.bank_id"))
    key: Mapped[bytes]
    digest: Mapped[bytes]
    start: Mapped[int]
    original_length: Mapped[int]
    stored_length: Mapped[int]
    payload_bytes: Mapped[int]
    token_ids: Mapped[bytes]
    text: Mapped[str]
    meta: Mapped[str]
    payload: Mapped[str | None]
    created: Mapped[int]
    retrieval_count: Mapped[int]
    last_retrieved: Mapped[int | None]
    # Last, so that the other columns are read without it.
    embedding: Mapped[bytes]
    __table_args__ = (UniqueConstraint("bank_id", "key"), Index(None, "bank_id", "chunk_id"))


class SpentKeyRow(Base):
    """The key of a chunk that is gone, kept for 24 h so that a replay is recognised."""

    __tablename__ = "spent_keys"
    bank_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    key: Mapped[bytes] = mapped_column(primary_key=True)
    digest: Mapped[bytes]
    chunk_id: Mapped[int]
    gone: Mapped[int] = mapped_column(index=True)


class EvictionRow(Base):
    """The log of evictions, bounded per bank."""

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


def migrations() -> Path:
    """The Alembic folder, in the wheel and (by a link) in the checkout."""
    return Path(__file__).parent / "migrations"


def revisions() -> list[str]:
    """All schema versions, oldest first; a version's file name starts with it."""
    return sorted(path.name.split("_")[0] for path in (migrations() / "versions").glob("[0-9]*_*.py"))


def engine(path: Path, *, synchronous: str, writer: bool) -> Engine:
    """Connections to the database: the writer's one begins IMMEDIATE and checkpoints; readers cannot write."""
    made = create_engine(f"sqlite:///{path}", connect_args={"check_same_thread": False, "timeout": 30.0})

    @event.listens_for(made, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's driver would begin transactions by itself
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        connection.execute("PRAGMA wal_autocheckpoint=4000" if writer else "PRAGMA wal_autocheckpoint=0")
        if not writer:
            connection.execute("PRAGMA query_only=ON")

    @event.listens_for(made, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")

    return made


_VERSION_TABLE = """
    CREATE TABLE IF NOT EXISTS alembic_version (
        version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
    )
"""


def prepare(path: Path, data: Path, *, migrate: bool) -> None:
    """Create a fresh database or check its schema. Errors: StartError for an older (without `migrate`) or newer one."""
    found, known = _current(path), revisions()
    if found == known[-1]:
        return
    if found is not None and found not in known:
        raise StartError(f"{data} was written by a newer kvbank (schema {found}, this one knows {known[-1]})")
    if found is not None and not migrate:
        text = f"{data} has the older schema {found}; upgrade it with: kvbank serve --data {data} --migrate"
        raise StartError(text)
    if found is None:
        create(path)
    else:
        upgrade(path)


def _current(path: Path) -> str | None:
    """The schema version of a database; None when there is none yet."""
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(path)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.DatabaseError as error:
        if "no such table" in str(error):
            return None
        raise StartError(f"{path} cannot be read, or is not a database of kvbank ({error})") from error
    return str(row[0]) if row else None


def create(path: Path) -> None:
    """A fresh database, in one transaction. Equal to one that went through the migrations, without Alembic's start."""
    database = engine(path, synchronous="FULL", writer=True)
    try:
        with database.begin() as connection:
            Base.metadata.create_all(connection)
            connection.exec_driver_sql(_VERSION_TABLE)
            connection.exec_driver_sql("INSERT INTO alembic_version VALUES (?)", (revisions()[-1],))
    finally:
        database.dispose()


def upgrade(path: Path, revision: str = "head") -> None:
    """Run the migrations up to `revision`."""
    # A third of a second to import, and needed on an old folder only.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations()).replace("%", "%%"))
    database = engine(path, synchronous="FULL", writer=True)
    try:
        with database.connect() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
    finally:
        database.dispose()
