"""Revision 0004 adds the chunks that go next from full banks, so that not every write which evicts reads all rows."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the table of reserves."""
    op.execute("""
        CREATE TABLE eviction_reserves (
            bank_id BIGINT NOT NULL, step BIGINT NOT NULL, until BIGINT NOT NULL, victims BYTEA NOT NULL,
            CONSTRAINT pk_eviction_reserves PRIMARY KEY (bank_id, step)
        )
    """)
