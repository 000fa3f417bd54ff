"""Revision 0005 adds the tables of sessions: the sessions themselves, their branches, turns and windows."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def _integers(*names: str, null: bool = False) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.Integer(), nullable=null) for name in names]


def _texts(*names: str, null: bool = False) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.String(), nullable=null) for name in names]


def _blobs(*names: str) -> list[sa.Column[bytes]]:
    return [sa.Column(name, sa.LargeBinary(), nullable=False) for name in names]


def upgrade() -> None:
    """Add the tables, which are empty."""
    op.create_table(
        "sessions",
        *_texts("session_id", "tenant"),
        *_texts("name", null=True),
        *_texts("bank", "reads", "reader_digest", "settings", "meta"),
        *_integers("ttl"),
        *_texts("branch"),
        *_integers("head", "tokens"),
        *_texts("forked_session", null=True),
        *_integers("forked_turn", null=True),
        *_integers("created", "updated"),
        *_integers("expires", null=True),
        *_integers("epoch"),
        *_texts("holder", null=True),
        *_integers("lease_expires", "lease_ttl", null=True),
        *_blobs("checksum"),
        sa.PrimaryKeyConstraint("session_id", name="pk_sessions"),
        sa.UniqueConstraint("tenant", "name", name="uq_sessions_tenant_name"),
    )
    op.create_index("ix_sessions_tenant_updated", "sessions", ["tenant", "updated"])
    op.create_index("ix_sessions_tenant_bank", "sessions", ["tenant", "bank"])
    op.create_index("ix_sessions_expires", "sessions", ["expires"], sqlite_where=sa.text("expires IS NOT NULL"))
    op.create_table(
        "branches",
        *_texts("branch", "session_id", "tenant"),
        *_texts("parent", null=True),
        *_integers("cut_turn", "cut_tokens"),
        *_blobs("checksum"),
        *_integers("bytes"),
        sa.PrimaryKeyConstraint("branch", name="pk_branches"),
    )
    for column in ("session_id", "tenant", "parent"):
        op.create_index(f"ix_branches_{column}", "branches", [column])
    op.create_table(
        "turns",
        *_integers("turn_id"),
        *_texts("tenant", "key", "branch"),
        *_integers("number", "start"),
        *_texts("status"),
        *_integers("token_count", "prompt_tokens", "kept", "created", "size"),
        *_blobs("digest", "checksum", "content", "token_ids"),
        sa.PrimaryKeyConstraint("turn_id", name="pk_turns"),
        sa.UniqueConstraint("branch", "number", name="uq_turns_branch_number"),
        sa.UniqueConstraint("tenant", "key", name="uq_turns_tenant_key"),
    )
    op.create_table(
        "windows",
        *_texts("session_id", "tenant"),
        *_integers("turn"),
        *_texts("stamp"),
        *_integers("size"),
        *_texts("checksum", "file"),
        sa.PrimaryKeyConstraint("session_id", name="pk_windows"),
    )
