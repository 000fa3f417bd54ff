"""The marks of payload folders. In a folder without its mark, which may be the mount point of a disk that is missing,
no payload is written, and none is taken for damaged. This file owns which folders a start may mark: one that shows by
its files that it is the bank's, and all folders where no version with marks has served before.
"""

import logging
from collections.abc import Iterable

from sqlalchemy import Connection

from memory_service.domain.model import Bank
from memory_service.storage.local.files.objects import LocalObjects
from memory_service.storage.local.records import chunk_rows

# How many files of a bank are looked for; it is enough to find half of them.
_SAMPLE = 32
_log = logging.getLogger(__name__)


def mark(payloads: LocalObjects, connection: Connection, banks: Iterable[Bank], *, new_here: bool) -> list[Bank]:
    """Mark the folders that may be marked, and return the banks whose payloads are not there.

    new_here: whether no version with marks has served this data folder before.
    """
    banks = [bank for bank in banks if bank.kv.layers]
    # By the uid of a bank; see `_shown`.
    shown = {bank.uid: _shown(payloads, connection, bank) for bank in banks if not payloads.there(bank.uid)}
    for uid in (uid for uid, holds in shown.items() if holds):
        payloads.folders.mark(uid)
    if not payloads.folders.mounted():
        empty_and_new = new_here and not any(holds is False for holds in shown.values())
        if not banks or empty_and_new or any(payloads.there(bank.uid) for bank in banks):
            payloads.folders.mark_root()
            for uid in (uid for uid, holds in shown.items() if holds is None):
                payloads.folders.mark(uid)
    missing = [bank for bank in banks if not payloads.there(bank.uid)]
    for bank in missing:
        _log.error("the payloads of bank %s are not there; is a disk not mounted?", bank.title)
    return missing


def _shown(payloads: LocalObjects, connection: Connection, bank: Bank) -> bool | None:
    """Tell whether the bank's folder has files that the rows name; None where the rows name none."""
    ids = chunk_rows.some_payload_ids(connection, bank.bank_id, _SAMPLE)
    return 2 * sum(payloads.exists(bank.uid, chunk_id) for chunk_id in ids) >= len(ids) if ids else None
