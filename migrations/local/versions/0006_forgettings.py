"""Revision 0006 adds the tables of what was forgotten, and an index of forgotten turns."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the tables, which are empty, and the index."""
    texts = ("receipt_id", "tenant", "subject", "key_id", "target")
    op.create_table(
        "forgettings",
        *(sa.Column(name, sa.String(), nullable=False) for name in texts),
        sa.Column("time", sa.Integer(), nullable=False),
        sa.Column("counts", sa.String(), nullable=False),
        sa.Column("work", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("receipt_id", name="pk_forgettings"),
    )
    op.create_index("ix_forgettings_tenant_subject", "forgettings", ["tenant", "subject"])
    op.create_table(
        "gone_branches",
        sa.Column("branch", sa.String(), nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("start", "gone")),
        sa.PrimaryKeyConstraint("branch", name="pk_gone_branches"),
    )
    op.create_index("ix_gone_branches_gone", "gone_branches", ["gone"])
    forgotten = sa.text("status = 'forgotten'")
    op.create_index("ix_turns_branch_start", "turns", ["branch", "start"], sqlite_where=forgotten)
