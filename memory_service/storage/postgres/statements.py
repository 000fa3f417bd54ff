"""The statements of the engine, as the rules take them that engines share."""

from memory_service.storage.access.rows import AccessRows
from memory_service.storage.forgetting.rows import ForgettingRows
from memory_service.storage.postgres.rows import (
    access_rows,
    bank_rows,
    forgotten_turns,
    receipt_rows,
    session_rows,
    tenant_rows,
    turn_rows,
    window_rows,
)
from memory_service.storage.quotas import Quotas
from memory_service.storage.sessions.rows import Rows

ROWS = Rows(session_rows, turn_rows, window_rows)
ACCESS_ROWS: AccessRows = access_rows
FORGETTING_ROWS = ForgettingRows(ROWS, access_rows, receipt_rows, forgotten_turns, tenant_rows)
QUOTAS = Quotas(
    access_rows.held_tenant, access_rows.usage, bank_rows.usage, access_rows.count_taken, session_rows.count
)
