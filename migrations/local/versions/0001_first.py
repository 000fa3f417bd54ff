"""Revision 0001 makes the first schema, from an empty database."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _integers(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.Integer(), nullable=False) for name in names]


def _texts(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.String(), nullable=False) for name in names]


def upgrade() -> None:
    """Create the tables of store, banks, chunks, spent keys and evictions."""
    op.create_table(
        "store", *_integers("id"), *_texts("store_id"), *_integers("next_chunk_id"), sa.PrimaryKeyConstraint("id")
    )
    op.create_table(
        "banks",
        *_integers("bank_id"),
        *_texts("uid", "name", "spec"),
        sa.Column("capacity", sa.String()),
        *_texts("policy", "meta"),
        *_integers("created", "chunks", "tokens", "bytes"),
        *_integers("chunks_written", "chunks_evicted", "chunks_deleted", "chunks_quarantined"),
        sa.PrimaryKeyConstraint("bank_id", name="pk_banks"),
        sa.UniqueConstraint("uid", name="uq_banks_uid"),
        sa.UniqueConstraint("name", name="uq_banks_name"),
        sqlite_autoincrement=True,
    )
    _create_chunks()
    op.create_table(
        "spent_keys",
        *_integers("bank_id"),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        *_integers("chunk_id", "gone"),
        sa.PrimaryKeyConstraint("bank_id", "key", name="pk_spent_keys"),
    )
    op.create_index("ix_spent_keys_gone", "spent_keys", ["gone"])
    op.create_table(
        "evictions",
        *_integers("sequence", "bank_id", "chunk_id"),
        *_texts("reason"),
        *_integers("retrieval_count", "start", "stored_length", "created", "evicted"),
        *_texts("meta"),
        sa.PrimaryKeyConstraint("sequence", name="pk_evictions"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_evictions_bank_id_sequence", "evictions", ["bank_id", "sequence"])


def _create_chunks() -> None:
    op.create_table(
        "chunks",
        *_integers("chunk_id", "bank_id"),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        *_integers("start", "original_length", "stored_length", "payload_bytes"),
        sa.Column("token_ids", sa.LargeBinary(), nullable=False),
        *_texts("text", "meta"),
        sa.Column("payload", sa.String()),
        *_integers("created", "retrieval_count"),
        sa.Column("last_retrieved", sa.Integer()),
        sa.Column("embedding", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("chunk_id", name="pk_chunks"),
        sa.ForeignKeyConstraint(["bank_id"], ["banks.bank_id"], name="fk_chunks_bank_id"),
        sa.UniqueConstraint("bank_id", "key", name="uq_chunks_bank_id_key"),
    )
    op.create_index("ix_chunks_bank_id_chunk_id", "chunks", ["bank_id", "chunk_id"])
