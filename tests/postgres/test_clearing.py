"""Deleted banks that several services clear at once."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from memory_service.domain.limits import Pauses
from memory_service.domain.model import Bank, Capacity, Policy
from memory_service.domain.tenants import DEFAULT_TENANT
from memory_service.storage.postgres.database import Database, raw
from memory_service.storage.postgres.rows import bank_rows, gone_rows
from tests.support.engines import ENGINES, opened
from tests.support.store import fill, new_bank

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
_LEFT = " UNION ALL ".join(
    f"SELECT bank_id FROM {table} WHERE bank_id = %(bank)s" for table in ("chunks", "keys", "evictions", "changes")
)


def clear(database: Database, bank: Bank, steps: int) -> None:
    """Clear a bank as a service does that is killed after so many steps."""
    step = partial(gone_rows.clear_bank, bank_id=bank.bank_id, most=3)
    for _ in range(steps):
        if database.change(step) is None:
            return


def test_a_deleted_bank_is_known_until_nothing_is_left_of_it(tmp_path: Path) -> None:
    with (
        KIND.place(tmp_path) as place,
        opened(place, pauses=Pauses(left_out=frozenset({"clearing"}))) as engine,
        ThreadPoolExecutor(4) as threads,
    ):
        database = Database(place["data"])
        for name in ("a", "b", "c", "d"):
            evicting = new_bank(name, capacity=Capacity("chunks", 40), policy=Policy("lru", target=50))
            bank, _ = engine.store.create_bank(evicting)
            fill(engine.store, bank, range(60))
            engine.store.delete_bank(DEFAULT_TENANT, name)
            list(threads.map(partial(clear, database, bank), (1, 4, 7, 9)))
            with database.read() as connection:
                left = raw(connection).execute(_LEFT, {"bank": bank.bank_id}).fetchall()
                known = (bank.bank_id, bank.uid) in bank_rows.gone(connection)
            assert not left or known
        database.close()
