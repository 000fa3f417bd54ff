"""Revision 0004 gives every bank a tenant, within which its name is its own, and adds the tables of tenants and API
keys. What was there before belongs to the tenant "default"."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_KEPT = (
    "bank_id, uid, name, spec, capacity, policy, meta, created, chunks, tokens, bytes, chunks_written, chunks_evicted,"
    " chunks_deleted, chunks_quarantined, chunks_expired, quota, expiry, index_kind"
)


def _integers(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.Integer(), nullable=False) for name in names]


def _texts(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.String(), nullable=False) for name in names]


def _text_with_default(name: str, default: str) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=False, server_default=sa.text(default))


def upgrade() -> None:
    """Make the table of banks anew, because SQLite cannot drop the rule that names are unique. Ids go on from where
    they were, also where the last banks are deleted."""
    op.rename_table("banks", "banks_0003")
    _create_banks()
    op.execute(f"INSERT INTO banks ({_KEPT}) SELECT {_KEPT} FROM banks_0003")
    op.execute("DELETE FROM sqlite_sequence WHERE name = 'banks'")
    op.execute(
        "INSERT INTO sqlite_sequence (name, seq) SELECT 'banks', seq FROM sqlite_sequence WHERE name = 'banks_0003'"
    )
    op.drop_table("banks_0003")
    op.create_table(
        "tenants", *_texts("name", "quota"), *_integers("created"), sa.PrimaryKeyConstraint("name", name="pk_tenants")
    )
    op.execute(f"INSERT INTO tenants (name, quota, created) VALUES ('default', '{{}}', {time.time_ns() // 1000})")
    op.create_table(
        "api_keys",
        *_texts("key_id", "tenant", "role", "banks"),
        sa.Column("secret_sha256", sa.LargeBinary(), nullable=False),
        *_integers("created"),
        *[sa.Column(name, sa.Integer()) for name in ("expires", "revoked", "last_used")],
        sa.PrimaryKeyConstraint("key_id", name="pk_api_keys"),
    )
    op.create_index("ix_api_keys_tenant", "api_keys", ["tenant"])


def _create_banks() -> None:
    op.create_table(
        "banks",
        *_integers("bank_id"),
        *_texts("uid", "name", "spec"),
        sa.Column("capacity", sa.String()),
        *_texts("policy", "meta"),
        *_integers("created", "chunks", "tokens", "bytes"),
        *_integers("chunks_written", "chunks_evicted", "chunks_deleted", "chunks_quarantined"),
        sa.Column("chunks_expired", sa.Integer(), nullable=False, server_default=sa.text("0")),
        _text_with_default("quota", "'{}'"),
        _text_with_default("expiry", "'{}'"),
        _text_with_default("index_kind", "'auto'"),
        _text_with_default("tenant", "'default'"),
        sa.PrimaryKeyConstraint("bank_id", name="pk_banks"),
        sa.UniqueConstraint("uid", name="uq_banks_uid"),
        sa.UniqueConstraint("tenant", "name", name="uq_banks_tenant_name"),
        sqlite_autoincrement=True,
    )
