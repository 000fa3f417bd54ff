"""Revision 0002 adds expiry, pins, quotas and kinds of index. It moves the wide columns of `chunks` into `contents`,
and gives all keys, spent or not, one table."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_KEPT = (
    "chunk_id, bank_id, key, digest, start, original_length, stored_length, payload_bytes, meta, created,"
    " retrieval_count, last_retrieved"
)
_CONTENT = "chunk_id, token_ids, text, payload, embedding"


def _integers(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.Integer(), nullable=False) for name in names]


def upgrade() -> None:
    """Move the chunks to the new tables. A bank that is there has no quota, no expiry and the index that fits its
    size."""
    op.add_column("banks", sa.Column("chunks_expired", sa.Integer(), nullable=False, server_default=sa.text("0")))
    for name, default in (("quota", "'{}'"), ("expiry", "'{}'"), ("index_kind", "'auto'")):
        op.add_column("banks", sa.Column(name, sa.String(), nullable=False, server_default=sa.text(default)))
    op.drop_index("ix_chunks_bank_id_chunk_id")
    op.drop_index("ix_spent_keys_gone")
    op.rename_table("chunks", "chunks_0001")
    op.rename_table("spent_keys", "spent_keys_0001")
    _create_tables()
    op.execute(f"INSERT INTO chunks SELECT {_KEPT}, 0, 0, 0, NULL FROM chunks_0001")
    op.execute(f"INSERT INTO contents SELECT {_CONTENT} FROM chunks_0001")
    op.execute("INSERT INTO spent_keys SELECT bank_id, key, digest, chunk_id, gone FROM spent_keys_0001")
    for table in ("chunks", "spent_keys"):
        op.execute(f"INSERT INTO keys SELECT bank_id, key, chunk_id FROM {table}")
        op.drop_table(f"{table}_0001")
    op.create_index("ix_spent_keys_gone", "spent_keys", ["gone"])
    op.create_index("ix_chunks_bank_id_chunk_id", "chunks", ["bank_id", "chunk_id"])
    where = sa.text("expires IS NOT NULL")
    op.create_index("ix_chunks_expires", "chunks", ["expires"], sqlite_where=where)


def _create_tables() -> None:
    op.create_table(
        "chunks",
        *_integers("chunk_id", "bank_id"),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        *_integers("start", "original_length", "stored_length", "payload_bytes"),
        sa.Column("meta", sa.String(), nullable=False),
        *_integers("created", "retrieval_count"),
        sa.Column("last_retrieved", sa.Integer()),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        *_integers("ttl"),
        sa.Column("renew", sa.Boolean(), nullable=False),
        sa.Column("expires", sa.Integer()),
        sa.PrimaryKeyConstraint("chunk_id", name="pk_chunks"),
    )
    op.create_table(
        "contents",
        *_integers("chunk_id"),
        sa.Column("token_ids", sa.LargeBinary(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("payload", sa.String()),
        sa.Column("embedding", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("chunk_id", name="pk_contents"),
    )
    op.create_table(
        "keys",
        *_integers("bank_id"),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        *_integers("chunk_id"),
        sa.PrimaryKeyConstraint("bank_id", "key", name="pk_keys"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "spent_keys",
        *_integers("bank_id"),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        *_integers("chunk_id", "gone"),
        sa.PrimaryKeyConstraint("chunk_id", name="pk_spent_keys"),
    )
    op.create_table(
        "gone_banks",
        *_integers("bank_id"),
        sa.Column("uid", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("bank_id", name="pk_gone_banks"),
    )
    op.create_table(
        "eviction_plans",
        *_integers("bank_id"),
        sa.Column("plan", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("bank_id", name="pk_eviction_plans"),
    )
