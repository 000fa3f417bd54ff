"""The second belt between tenants is row-level security. This file owns which rows a connection sees that works for one
tenant: those of the tenant, so that a statement with a mistake shows and changes no rows of others.

A connection says for which tenant it works by the setting `kvbank.tenant` (see `Database.of`). Where that is empty, the
store itself works, which sees all rows: what recurs, what follows changes, what looks at all tenants. Policies bind the
roles that do not own the tables: a service that connects as the owner does without this belt.

The tables of callers (`tenants`, `api_keys`) have no policies: from them the tenant of a call is known.
"""

from sqlalchemy import Connection

SETTING = "kvbank.tenant"
# Asked once in a statement, not once a row.
_TENANT = f"(SELECT coalesce(current_setting('{SETTING}', true), ''))"
# Rows that name their tenant, and rows of a bank, which are seen by who sees the row of the bank.
OF_TENANT = ("banks", "gone_banks", "sessions", "branches", "turns", "windows", "forgettings", "forgetting_ids")
OF_BANK = (
    *("chunks", "chunk_use", "keys", "changes", "evictions", "eviction_plans", "eviction_reserves", "quarantine"),
)


def create(connection: Connection, partitions: int) -> None:
    """Make the policies of all tables. A part of `chunks` has none: a statement that names it sees nothing of it."""
    seen = dict.fromkeys(OF_TENANT, f"{_TENANT} IN ('', tenant)")
    for table in OF_BANK:
        seen[table] = f"{_TENANT} = '' OR EXISTS (SELECT FROM banks WHERE banks.bank_id = {table}.bank_id)"
    for table, rows in seen.items():
        connection.exec_driver_sql(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        connection.exec_driver_sql(f"CREATE POLICY tenant ON {table} USING ({rows})")
    for number in range(partitions):
        connection.exec_driver_sql(f"ALTER TABLE chunks_{number:02} ENABLE ROW LEVEL SECURITY")
