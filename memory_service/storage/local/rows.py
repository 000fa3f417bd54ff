"""The statements of the local engine, as the rules take them that engines share."""

from memory_service.storage.forgetting.rows import ForgettingRows
from memory_service.storage.local.records import (
    access_rows,
    bank_rows,
    forgetting_rows,
    forgotten_turns,
    session_rows,
    tenant_rows,
    tenant_usage,
    turn_rows,
    window_rows,
)
from memory_service.storage.quotas import Quotas
from memory_service.storage.sessions.rows import Rows

ROWS = Rows(session_rows, turn_rows, window_rows)
FORGETTING_ROWS = ForgettingRows(ROWS, access_rows, forgetting_rows, forgotten_turns, tenant_rows)
QUOTAS = Quotas(access_rows.tenant, tenant_usage.of, bank_rows.usage, access_rows.count_taken, session_rows.count)
