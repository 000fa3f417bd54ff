"""The tables of the database as they are in the last revision; see `revising` for those before.

Times are in microseconds since 1970. Columns that are JSON are text, because checksums go by their bytes; `tags` alone
is for filters.
"""

import secrets
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, Column, Connection, Index, LargeBinary, MetaData, Text, UniqueConstraint
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import UserDefinedType

from memory_service.domain.tenants import DEFAULT_TENANT
from memory_service.storage.postgres import row_security

# The longest vector that pgvector takes.
LARGEST_DIMENSION = 16_000
# Parts into which the chunks are cut, by their banks: each is cleaned up, and its indexes are kept, apart.
PARTITIONS = 16
# Ids that a service takes from the sequence at once.
BLOCK = 1024
# The keys of the locks (pg_advisory_xact_lock) of the number of all banks, of the sequence of ids where that has to be
# set, and of the numbers of purges.
BANKS_LOCK, IDS_LOCK, PURGES_LOCK = 0x6B76_0002, 0x6B76_0006, 0x6B76_0007

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


# In the order of code points, whatever the order of the database is.
WORD = Text(collation="C")


class Vector(UserDefinedType[bytes]):
    """The type `vector` of pgvector; see `vectors` for what it is in Python."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Return the name of the type."""
        return "vector"


def _table(name: str, *parts: Any, **options: Any) -> sa.Table:
    return sa.Table(name, METADATA, *parts, **options)


def _id(name: str) -> Column[Any]:
    return Column(name, BigInteger, primary_key=True, autoincrement=False)


def _word(name: str, *, key: bool = False) -> Column[Any]:
    return Column(name, WORD, primary_key=key, nullable=False)


def _number(name: str, default: int | None = None) -> Column[Any]:
    return Column(name, BigInteger, nullable=False, server_default=None if default is None else str(default))


def _data(name: str) -> Column[Any]:
    return Column(name, LargeBinary, nullable=False)


def _maybe(name: str, kind: Any = BigInteger) -> Column[Any]:
    return Column(name, kind, nullable=True)


# The store: one row each of its identity, and of the mark of the clock. By `version` services refuse this database that
# know no revisions.
STORE = _table("store", _id("id"), _word("store_id"), _number("version"))
CLOCK = _table("clock", _id("id"), _number("now"), _number("running"), _word("boot"))
CHUNK_IDS = sa.Sequence("chunk_ids", start=1, increment=BLOCK, data_type=BigInteger, metadata=METADATA)
BANK_IDS = sa.Sequence("bank_ids", data_type=BigInteger, metadata=METADATA)

# Banks. `seq` counts the transactions that have changed a bank, each of which is in `changes` for some time; `trimmed`
# is the last one that is not; `mark` is another number each time, by which a database that was put back to an earlier
# time is told from the one before, also where it has as many transactions again. `size` is what specs and metadata take
# of the memory of a service.
BANKS = _table(
    "banks",
    Column("bank_id", BigInteger, BANK_IDS, primary_key=True, autoincrement=False),
    _word("uid"),
    _word("tenant"),
    _word("name"),
    _word("spec"),
    _maybe("capacity", WORD),
    _word("policy"),
    _word("meta"),
    _word("quota"),
    _word("expiry"),
    _word("index_kind"),
    _number("size"),
    _number("created"),
    _number("seq", 0),
    _number("trimmed", 0),
    _number("chunks", 0),
    _number("tokens", 0),
    _number("bytes", 0),
    _number("chunks_written", 0),
    _number("chunks_evicted", 0),
    _number("chunks_deleted", 0),
    _number("chunks_quarantined", 0),
    _number("chunks_expired", 0),
    _number("mark", 0),
    UniqueConstraint("tenant", "name"),
    UniqueConstraint("uid"),
    # Every write changes the counters: its new row stays on the page, and in no index.
    postgresql_with={"fillfactor": 50},
)
# Deleted banks of which something is left.
GONE_BANKS = _table("gone_banks", _id("bank_id"), _word("uid"), _word("tenant"), _word("name"))

# Chunks. `digest` has the digest of the request and checksums of the row; `size` is the bytes that the chunk takes;
# `tags` are the metadata once more, with numbers as they are exactly.
CHUNKS = _table(
    "chunks",
    _id("bank_id"),
    _id("chunk_id"),
    _data("key"),
    _data("digest"),
    _number("start"),
    _number("original_length"),
    _number("stored_length"),
    _number("payload_bytes"),
    _number("size"),
    _number("created"),
    Column("pinned", Boolean, nullable=False),
    _number("ttl"),
    Column("renew", Boolean, nullable=False),
    _maybe("expires"),
    _word("meta"),
    Column("tags", JSONB, nullable=False),
    _data("token_ids"),
    # Bytes, because a text may have NUL characters, which no text of PostgreSQL has.
    _data("text"),
    _maybe("payload", WORD),
    Column("embedding", Vector, nullable=False),
    Index(None, "expires", postgresql_where=sa.text("expires IS NOT NULL")),
    postgresql_partition_by="HASH (bank_id)",
)
# How often, and when last, each chunk was retrieved: apart, because this changes all the time.
CHUNK_USE = _table(
    "chunk_use",
    _id("chunk_id"),
    _number("bank_id"),
    _number("count", 0),
    _maybe("last"),
    postgresql_with={"fillfactor": 50},
)
# Idempotency keys; `gone` is when the chunk went, whose key stays known for a day.
KEYS = _table(
    "keys",
    _id("bank_id"),
    Column("key", LargeBinary, primary_key=True),
    _number("chunk_id"),
    _data("digest"),
    _maybe("gone"),
    Index(None, "bank_id", "gone", postgresql_where=sa.text("gone IS NOT NULL")),
)
# What each transaction has changed of a bank, part by part: see `feed`.
CHANGES = _table(
    "changes",
    _id("bank_id"),
    _id("seq"),
    _id("part"),
    _word("kind"),
    Column("chunk_ids", ARRAY(BigInteger), nullable=False),
    _number("time"),
    _number("mark", 0),
    Index(None, "time"),
)
# The log of evictions, and what is left of plans of evictions, in steps.
EVICTIONS = _table(
    "evictions",
    Column("sequence", BigInteger, sa.Identity(always=False), primary_key=True),
    _number("bank_id"),
    _number("chunk_id"),
    _word("reason"),
    _number("retrieval_count"),
    _number("start"),
    _number("stored_length"),
    _number("created"),
    _number("evicted"),
    _word("meta"),
    Index(None, "bank_id", "sequence"),
)
EVICTION_PLANS = _table("eviction_plans", _id("bank_id"), _id("step"), _data("victims"))
# The chunks that go next, in steps; see `reserves`.
EVICTION_RESERVES = _table("eviction_reserves", _id("bank_id"), _id("step"), _number("until"), _data("victims"))
# Damaged chunks that were taken out of service: why, and the row as JSON.
QUARANTINE = _table(
    "quarantine", _id("chunk_id"), _number("bank_id"), _word("uid"), _word("why"), _number("time"), _word("record")
)
# Who does what only one service does at a time, and objects without a row that were seen once.
LEASES = _table("leases", _word("name", key=True), _word("holder"), _number("epoch"), _number("until"))
MARKS = _table("marks", _word("object", key=True), _number("time"))

# Access.
TENANTS = _table("tenants", _word("name", key=True), _word("quota"), _number("created"))
API_KEYS = _table(
    "api_keys",
    _word("key_id", key=True),
    _word("tenant"),
    _word("role"),
    _word("banks"),
    _data("secret_sha256"),
    _number("created"),
    _maybe("expires"),
    _maybe("revoked"),
    _maybe("last_used"),
    Index(None, "tenant"),
)

# Sessions; the columns mean what those of the local engine mean.
SESSIONS = _table(
    "sessions",
    _word("session_id", key=True),
    _word("tenant"),
    _maybe("name", WORD),
    _word("bank"),
    _word("reads"),
    _word("reader_digest"),
    _word("settings"),
    _word("meta"),
    _number("ttl"),
    _word("branch"),
    _number("head"),
    _number("tokens"),
    _maybe("forked_session", WORD),
    _maybe("forked_turn"),
    _number("created"),
    _number("updated"),
    _maybe("expires"),
    _number("epoch"),
    _maybe("holder", WORD),
    _maybe("lease_expires"),
    _maybe("lease_ttl"),
    _data("checksum"),
    UniqueConstraint("tenant", "name"),
    Index(None, "tenant", "updated"),
    Index(None, "tenant", "bank"),
    Index(None, "expires", postgresql_where=sa.text("expires IS NOT NULL")),
)
BRANCHES = _table(
    "branches",
    _word("branch", key=True),
    _word("session_id"),
    _word("tenant"),
    _maybe("parent", WORD),
    _number("cut_turn"),
    _number("cut_tokens"),
    _data("checksum"),
    _number("bytes"),
    Index(None, "session_id"),
    Index(None, "tenant"),
    Index(None, "parent"),
)
TURNS = _table(
    "turns",
    Column("turn_id", BigInteger, sa.Identity(always=False), primary_key=True),
    _word("tenant"),
    _word("key"),
    _word("branch"),
    _number("number"),
    _number("start"),
    _word("status"),
    _number("token_count"),
    _number("prompt_tokens"),
    _number("kept"),
    _number("created"),
    _number("size"),
    _data("digest"),
    _data("checksum"),
    _data("content"),
    _data("token_ids"),
    UniqueConstraint("branch", "number"),
    UniqueConstraint("tenant", "key"),
    Index(None, "branch", "start", postgresql_where=sa.text("status = 'forgotten'")),
)
WINDOWS = _table(
    "windows",
    _word("session_id", key=True),
    _word("tenant"),
    _number("turn"),
    _word("stamp"),
    _number("size"),
    _word("checksum"),
    _word("file"),
    Index(None, "tenant"),
)
FORGETTINGS = _table(
    "forgettings",
    _word("receipt_id", key=True),
    _word("tenant"),
    _word("subject"),
    _word("key_id"),
    _word("target"),
    _number("time"),
    _word("counts"),
    _maybe("work", WORD),
    Index(None, "tenant", "subject"),
)
# The chunks that are being forgotten by their ids; they may be many.
FORGETTING_IDS = _table(
    "forgetting_ids", _word("receipt_id", key=True), _word("tenant"), Column("ids", ARRAY(BigInteger), nullable=False)
)
# The banks of which all services must drop what they keep on their disks, in the order of their
# numbers.
PURGES = _table(
    "purges",
    Column("number", BigInteger, sa.Identity(always=False), primary_key=True),
    _number("bank_id"),
    _word("uid"),
    _number("time"),
)
GONE_BRANCHES = _table(
    "gone_branches", _word("branch", key=True), _number("start"), _number("gone"), Index(None, "gone")
)


def create(connection: Connection) -> None:
    """Make all tables, and what is always there. They equal tables that went through the migrations; Alembic, which
    takes a third of a second to import, is not needed for it."""
    connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS vector")
    METADATA.create_all(connection, checkfirst=False)
    for number in range(PARTITIONS):
        connection.exec_driver_sql(
            f"CREATE TABLE chunks_{number:02} PARTITION OF chunks FOR VALUES WITH"
            f" (MODULUS {PARTITIONS}, REMAINDER {number})"
        )
        # Vectors are not compressed: that takes time, and they get no shorter.
        connection.exec_driver_sql(f"ALTER TABLE chunks_{number:02} ALTER COLUMN embedding SET STORAGE EXTERNAL")
    row_security.create(connection, PARTITIONS)
    connection.execute(sa.insert(STORE).values(id=1, store_id=secrets.token_hex(16), version=2))
    now = sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()) * 1_000_000, BigInteger)
    connection.execute(sa.insert(TENANTS).values(name=DEFAULT_TENANT, quota="{}", created=now))
