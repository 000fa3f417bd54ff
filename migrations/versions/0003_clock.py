"""The time of the service, from which a start goes on."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """No mark yet: the next start takes the wall clock, or the newest time in the records where that is later."""
    op.create_table(
        "clock",
        *[sa.Column(name, sa.Integer(), nullable=False) for name in ("id", "now", "running")],
        sa.Column("boot", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_clock"),
    )
