"""Revision 0005 lets the database keep tenants apart by row-level security. Services of the revision before say no
tenant, and see all rows as before."""

from alembic import op

revision = "0005"
down_revision = "0004"

_PARTITIONS = 16
_TENANT = "(SELECT coalesce(current_setting('kvbank.tenant', true), ''))"
_OF_TENANT = "banks gone_banks sessions branches turns windows forgettings forgetting_ids"
_OF_BANK = "chunks chunk_use keys changes evictions eviction_plans eviction_reserves quarantine"


def upgrade() -> None:
    """Add the policies of all tables, and close the parts of `chunks` for statements that name them."""
    for table in _OF_TENANT.split():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY tenant ON {table} USING ({_TENANT} IN ('', tenant))")
    for table in _OF_BANK.split():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        bank = f"EXISTS (SELECT FROM banks WHERE banks.bank_id = {table}.bank_id)"
        op.execute(f"CREATE POLICY tenant ON {table} USING ({_TENANT} = '' OR {bank})")
    for number in range(_PARTITIONS):
        op.execute(f"ALTER TABLE chunks_{number:02} ENABLE ROW LEVEL SECURITY")
