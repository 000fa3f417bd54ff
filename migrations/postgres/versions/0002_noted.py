"""Revision 0002 lets services of the first version refuse a database whose tables may be later ones: they know no notes
of revisions, and go by the number in `store`."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Give the store a number that the first version does not know."""
    op.execute("UPDATE store SET version = 2")
