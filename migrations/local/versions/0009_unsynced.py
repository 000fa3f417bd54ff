"""Revision 0009 adds the bytes of small payload files that are acknowledged before their files are synced."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the table, which is empty, because every file of before is synced."""
    op.create_table(
        "unsynced",
        sa.Column("chunk_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("checksum", sa.LargeBinary(), nullable=False),
        sa.Column("file", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("chunk_id", name="pk_unsynced"),
    )
