"""Revision 0008 adds the indexes by which API keys are listed, oldest first."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the indexes, of which one takes the place of that of tenants."""
    op.drop_index("ix_api_keys_tenant", "api_keys")
    op.create_index("ix_api_keys_tenant_created_key_id", "api_keys", ["tenant", "created", "key_id"])
    op.create_index("ix_api_keys_created_key_id", "api_keys", ["created", "key_id"])
