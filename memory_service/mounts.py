"""The marks of payload folders, without which nothing is put into them or taken for damaged. Owns which folder a start
may mark: one that shows by its files that it is the bank's, and all of a folder that no version with marks has served.
"""

import logging
from collections.abc import Iterable

from sqlalchemy import Connection

from memory_service import chunk_rows
from memory_service.domain import Bank
from memory_service.payloads import Payloads

# Files of a bank that are looked for; half of them are enough.
_SAMPLE = 32
_log = logging.getLogger(__name__)


def mark(payloads: Payloads, connection: Connection, banks: Iterable[Bank], *, new_here: bool) -> list[Bank]:
    """Mark what can be marked; the banks whose payloads are not there. `new_here`: no version with marks was here."""
    banks = [bank for bank in banks if bank.kv.layers]
    # Of a bank without any: None.
    shown = {bank.uid: _shown(payloads, connection, bank) for bank in banks if not payloads.present(bank.uid)}
    for uid in (uid for uid, holds in shown.items() if holds):
        payloads.mark_bank(uid)
    if not payloads.mounted():
        empty_and_new = new_here and not any(holds is False for holds in shown.values())
        if not banks or empty_and_new or any(payloads.present(bank.uid) for bank in banks):
            payloads.mark_root()
            for uid in (uid for uid, holds in shown.items() if holds is None):
                payloads.mark_bank(uid)
    missing = [bank for bank in banks if not payloads.present(bank.uid)]
    for bank in missing:
        _log.error("the payloads of bank %s are not there; is a disk not mounted?", bank.name)
    return missing


def _shown(payloads: Payloads, connection: Connection, bank: Bank) -> bool | None:
    """Whether files that the rows name are in the bank's folder; None where the rows name none."""
    ids = chunk_rows.some_payload_ids(connection, bank.bank_id, _SAMPLE)
    return 2 * sum(payloads.path(bank.uid, chunk_id).exists() for chunk_id in ids) >= len(ids) if ids else None
