"""What the banks and sessions of each tenant hold together, as the writer's transaction sees it: a quota is asked of
every write, and a sum over the banks of a tenant would take milliseconds where it has thousands.

This file owns the sums. They lie in a table of the writer's connection alone, which the database itself keeps in step
with the rows of banks, of branches (the turns of sessions) and of windows, also where a change is taken back; nothing
of them is in the file.
"""

from sqlalchemy import Connection

from memory_service.domain.tenants import TenantUsage
from memory_service.storage.local.records.schema import raw

_BEGIN = (
    """
    CREATE TEMP TABLE tenant_usage (
        tenant TEXT PRIMARY KEY, banks INTEGER, chunks INTEGER, tokens INTEGER, bytes INTEGER) WITHOUT ROWID
    """,
    """
    INSERT INTO temp.tenant_usage
    SELECT tenant, count(*), sum(chunks), sum(tokens), sum(bytes) FROM main.banks GROUP BY tenant
    """,
    """
    INSERT INTO temp.tenant_usage SELECT tenant, 0, 0, 0, sum(bytes) FROM main.branches WHERE true GROUP BY tenant
    ON CONFLICT (tenant) DO UPDATE SET bytes = bytes + excluded.bytes
    """,
    """
    INSERT INTO temp.tenant_usage SELECT tenant, 0, 0, 0, sum(size) FROM main.windows WHERE true GROUP BY tenant
    ON CONFLICT (tenant) DO UPDATE SET bytes = bytes + excluded.bytes
    """,
    """
    CREATE TEMP TRIGGER bank_made AFTER INSERT ON main.banks BEGIN
        INSERT OR IGNORE INTO tenant_usage VALUES (NEW.tenant, 0, 0, 0, 0);
        UPDATE tenant_usage SET banks = banks + 1, chunks = chunks + NEW.chunks, tokens = tokens + NEW.tokens,
            bytes = bytes + NEW.bytes WHERE tenant = NEW.tenant;
    END
    """,
    """
    CREATE TEMP TRIGGER bank_used AFTER UPDATE OF chunks, tokens, bytes ON main.banks BEGIN
        UPDATE tenant_usage SET chunks = chunks + NEW.chunks - OLD.chunks, tokens = tokens + NEW.tokens - OLD.tokens,
            bytes = bytes + NEW.bytes - OLD.bytes WHERE tenant = NEW.tenant;
    END
    """,
    """
    CREATE TEMP TRIGGER bank_gone AFTER DELETE ON main.banks BEGIN
        UPDATE tenant_usage SET banks = banks - 1, chunks = chunks - OLD.chunks, tokens = tokens - OLD.tokens,
            bytes = bytes - OLD.bytes WHERE tenant = OLD.tenant;
        DELETE FROM tenant_usage WHERE tenant = OLD.tenant AND banks = 0 AND bytes = 0;
    END
    """,
    """
    CREATE TEMP TRIGGER branch_used AFTER UPDATE OF bytes ON main.branches BEGIN
        INSERT OR IGNORE INTO tenant_usage VALUES (NEW.tenant, 0, 0, 0, 0);
        UPDATE tenant_usage SET bytes = bytes + NEW.bytes - OLD.bytes WHERE tenant = NEW.tenant;
    END
    """,
    """
    CREATE TEMP TRIGGER branch_gone AFTER DELETE ON main.branches BEGIN
        UPDATE tenant_usage SET bytes = bytes - OLD.bytes WHERE tenant = OLD.tenant;
        DELETE FROM tenant_usage WHERE tenant = OLD.tenant AND banks = 0 AND bytes = 0;
    END
    """,
    """
    CREATE TEMP TRIGGER window_made AFTER INSERT ON main.windows BEGIN
        INSERT OR IGNORE INTO tenant_usage VALUES (NEW.tenant, 0, 0, 0, 0);
        UPDATE tenant_usage SET bytes = bytes + NEW.size WHERE tenant = NEW.tenant;
    END
    """,
    """
    CREATE TEMP TRIGGER window_kept AFTER UPDATE OF size ON main.windows BEGIN
        UPDATE tenant_usage SET bytes = bytes + NEW.size - OLD.size WHERE tenant = NEW.tenant;
    END
    """,
    """
    CREATE TEMP TRIGGER window_gone AFTER DELETE ON main.windows BEGIN
        UPDATE tenant_usage SET bytes = bytes - OLD.size WHERE tenant = OLD.tenant;
        DELETE FROM tenant_usage WHERE tenant = OLD.tenant AND banks = 0 AND bytes = 0;
    END
    """,
)
_FIND = "SELECT banks, chunks, tokens, bytes FROM temp.tenant_usage WHERE tenant = ?"


def begin(connection: Connection) -> None:
    """Add up what there is, and keep the sums from here on. The connection is the writer's."""
    for statement in _BEGIN:
        raw(connection).execute(statement)


def of(connection: Connection, tenant: str) -> TenantUsage:
    """Return what the banks and sessions of a tenant hold now. The connection is the writer's."""
    row = raw(connection).execute(_FIND, (tenant,)).fetchone()
    return TenantUsage() if row is None else TenantUsage(*row)
