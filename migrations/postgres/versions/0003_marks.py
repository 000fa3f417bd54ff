"""Revision 0003 gives each change of a bank a mark, by which a database that was put back to an earlier time is told
from the one before. Services of the revision before write none, and go on."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the mark of each change, and of the last one of each bank."""
    for table in ("banks", "changes"):
        op.execute(f"ALTER TABLE {table} ADD COLUMN mark BIGINT DEFAULT '0' NOT NULL")
