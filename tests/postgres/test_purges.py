"""The rows that tell services what to drop come in the order of their numbers."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection

from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.rows import purge_rows
from tests.support import postgres
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())
_WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def test_who_has_seen_a_purge_has_seen_all_those_of_lower_numbers() -> None:
    with postgres.database() as url, ThreadPoolExecutor() as threads:
        database = Database(url)

        def numbers() -> list[int]:
            with database.read() as connection:
                return [each.number for each in purge_rows.after(connection, 0)]

        def slow(connection: Connection) -> None:
            purge_rows.add(connection, 1, "slow", 1)
            quick = threads.submit(database.change, lambda other: purge_rows.add(other, 2, "quick", 1))
            wait_until(lambda: quick.done() or database.one(_WAITING) == (1,))
            seen.extend(numbers())

        seen = list[int]()
        database.change(slow)
        wait_until(lambda: len(numbers()) == 2)
        first, last = numbers()
        assert seen in ([], [first], [first, last])
        database.close()
