"""The ids of chunks that were given, as far as anything in a data folder shows it. This file owns what a start does
where the records do not know some of these ids: SQLite ends a damaged log silently at the first bad frame, and so takes
back what was committed.

New ids then begin behind all that were given, and the store gets another identity: whatever was derived from the lost
records, such as snapshots of an index and what clients hold, belongs to another store.
"""

import logging
import secrets
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from sqlalchemy import Connection

from memory_service.storage.local import quarantine
from memory_service.storage.local.files import layout
from memory_service.storage.local.records.chunk_ids import Reservations
from memory_service.storage.local.records.schema import raw

# How many ids are skipped where neither records nor file can be relied on: more than can have been written since.
_FAR = 1 << 32
# The service has made no file whose name is a larger number.
_LARGEST = 1 << 62
_STORE = "SELECT store_id, next_chunk_id FROM store"
_IN_RECORDS = """
    SELECT max(coalesce((SELECT max(chunk_id) FROM chunks), 0), coalesce((SELECT max(chunk_id) FROM spent_keys), 0),
        coalesce((SELECT max(chunk_id) FROM keys), 0), coalesce((SELECT max(chunk_id) FROM evictions), 0))
"""
_BANKS = "SELECT uid FROM banks"
_log = logging.getLogger(__name__)


def settle(connection: Connection, data: Path, derived_id: Callable[[str], int]) -> bool:
    """Make sure that the ids that the records say are free were never given. Returns whether no version that reserves
    ids in a file has served the folder. This is cheap where file and records agree, as after every clean stop and
    nearly every kill.

    derived_id: returns the largest id in what is derived from a store of this identity, and lies outside of it.
    """
    store_id, free = raw(connection).execute(_STORE).fetchone()
    try:
        reserved, damaged = Reservations(data).read(), False
    except ValueError as error:
        _log.error("%s", error)
        reserved, damaged = None, True
    if reserved == free:
        return False
    largest = max(_largest(connection, data), derived_id(store_id))
    begin = max(free, reserved or 0, largest + 1) + (_FAR if damaged else 0)
    if largest >= free or damaged:
        text = "ids up to %d were given, but the records of %s know of none from %d on: they have lost what was written"
        _log.error(f"{text} last; see: kvbank check", begin - 1, data, free)
        raw(connection).execute("UPDATE store SET store_id = ?", (secrets.token_hex(16),))
    raw(connection).execute("UPDATE store SET next_chunk_id = ?", (begin,))
    return reserved is None and not damaged


def _largest(connection: Connection, data: Path) -> int:
    """Return the largest id that anything in the folder has; 0 where nothing has one."""
    (found,) = raw(connection).execute(_IN_RECORDS).fetchone()
    files = (chunk_id for bank in layout.banks_in(data) for chunk_id, _ in layout.files_in(bank))
    named = (chunk_id for chunk_id in chain(files, quarantine.ids(data)) if chunk_id < _LARGEST)
    return max(int(found), max(named, default=0))
