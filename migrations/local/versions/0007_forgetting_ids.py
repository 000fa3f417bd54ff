"""Revision 0007 adds the table of the ids of chunks that are being forgotten."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add the table, with the ids of what a stop has interrupted."""
    op.create_table(
        "forgetting_ids",
        *(sa.Column(name, sa.String(), nullable=False) for name in ("receipt_id", "tenant", "ids")),
        sa.PrimaryKeyConstraint("receipt_id", name="pk_forgetting_ids"),
    )
    op.execute("""
        INSERT INTO forgetting_ids SELECT receipt_id, tenant, json_extract(work, '$.ids') FROM forgettings
        WHERE json_extract(work, '$.kind') = 'chunks'
    """)
    op.execute("UPDATE forgettings SET work = json_remove(work, '$.ids') WHERE work IS NOT NULL")
