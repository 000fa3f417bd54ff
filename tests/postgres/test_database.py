"""Transactions on a real PostgreSQL server: what is tried again, what is taken back, what is never told twice."""

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import psycopg
import pytest
import sqlalchemy.exc
from sqlalchemy import Connection

from memory_service.domain.cancellation import Cancellation, Cancelled
from memory_service.domain.errors import ServiceError, refusal_for
from memory_service.storage.postgres import revising
from memory_service.storage.postgres.database import Database, raw, savepoint
from memory_service.storage.postgres.vectors import Embedding
from tests.support import postgres

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())


@pytest.fixture
def database() -> Iterator[Database]:
    with postgres.database() as url:
        made = Database(url)
        yield made
        made.close()


def add_bank(connection: Connection, name: str) -> None:
    columns = "bank_id, uid, tenant, name, spec, policy, meta, quota, expiry, index_kind, size, created"
    values = "nextval('bank_ids'), %s, 'default', %s, '', '', '', '', '', '', 0, 0"
    raw(connection).execute(f"INSERT INTO banks ({columns}) VALUES ({values})", (name, name))


def names(database: Database) -> list[str]:
    with database.read() as connection:
        return [name for (name,) in raw(connection).execute("SELECT name FROM banks ORDER BY name").fetchall()]


def test_services_that_begin_together_on_an_empty_database_make_its_tables_once() -> None:
    with postgres.database(empty=True) as url, ThreadPoolExecutor(4) as threads:
        made = [Database(url) for _ in range(4)]
        revised = list(threads.map(lambda each: revising.opened(each, migrate=False), made))
        assert [each.found for each in revised].count(None) == 1
        assert made[0].one("SELECT count(*) FROM store") == (1,)
        assert made[1].one("SELECT name FROM tenants") == ("default",)
        for each in made:
            each.close()


def test_an_operation_that_raises_has_changed_nothing(database: Database) -> None:
    def fail(connection: Connection) -> None:
        add_bank(connection, "a")
        raise ServiceError("BANK_FULL", "so")

    def fail_partly(connection: Connection) -> None:
        add_bank(connection, "b")
        with pytest.raises(ServiceError), savepoint(connection):
            fail(connection)

    with pytest.raises(ServiceError):
        database.change(fail)
    assert names(database) == []
    database.change(fail_partly)
    assert names(database) == ["b"]


def test_of_two_transactions_that_wait_for_each_other_both_are_committed(database: Database) -> None:
    database.change(lambda connection: [add_bank(connection, name) for name in "ab"])
    meet, tries = threading.Barrier(2), list[str]()

    def change(first: str, second: str) -> None:
        def operation(connection: Connection) -> None:
            tries.append(first)
            driver = raw(connection)
            driver.execute("UPDATE banks SET seq = seq + 1 WHERE name = %s", (first,))
            if len(tries) <= 2:
                meet.wait(60)
            driver.execute("UPDATE banks SET seq = seq + 1 WHERE name = %s", (second,))

        database.change(operation)

    with ThreadPoolExecutor(2) as threads:
        for each in [threads.submit(change, *pair) for pair in ("ab", "ba")]:
            each.result(60)
    assert len(tries) >= 3  # one more where the one that was taken back comes first again
    assert database.one("SELECT sum(seq) FROM banks") == (4,)


def test_a_transaction_whose_connection_is_lost_before_its_commit_is_run_again(database: Database) -> None:
    lost = list[int]()

    def operation(connection: Connection) -> None:
        add_bank(connection, f"try {len(lost)}")
        if not lost:
            lost.append(raw(connection).info.backend_pid)
            database.one("SELECT pg_terminate_backend(%s, 10000)", lost[0])
        raw(connection).execute("SELECT 1")

    database.change(operation)
    assert names(database) == ["try 1"]


def test_connections_that_the_server_has_closed_are_replaced(database: Database) -> None:
    with database.read(), database.read():
        pass
    others = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = current_database()"
    database.one(f"{others} AND pid != pg_backend_pid()")
    assert names(database) == []
    database.change(lambda connection: add_bank(connection, "a"))
    assert database.one("SELECT count(*) FROM banks") == (1,)


def test_the_operations_of_a_tenant_come_one_after_the_other(database: Database) -> None:
    within, most = list[int](), list[int]()

    def operation(connection: Connection) -> None:
        within.append(1)
        most.append(len(within))
        raw(connection).execute("SELECT pg_sleep(0.01)")
        within.pop()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: database.change(operation, tenant="t"), range(8)))
    assert max(most) == 1


def test_a_read_sees_one_moment_and_cannot_write(database: Database) -> None:
    with database.read() as connection:
        count = "SELECT count(*) FROM banks"
        assert raw(connection).execute(count).fetchone() == (0,)
        database.change(lambda other: add_bank(other, "a"))
        assert raw(connection).execute(count).fetchone() == (0,)
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), database.read() as connection:
        add_bank(connection, "b")
    assert names(database) == ["a"]


def test_the_statement_of_a_call_whose_caller_has_gone_is_interrupted(database: Database) -> None:
    def read(cancellation: Cancellation) -> None:
        cancellation.enter()
        with database.read() as connection:
            begun.set()
            raw(connection).execute("SELECT pg_sleep(60)")

    begun, cancellation = threading.Event(), Cancellation()
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read, cancellation)
        assert begun.wait(60)
        cancellation.cancel()
        error = reading.exception(60)
    assert isinstance(error, psycopg.Error | Cancelled)
    refusal = refusal_for(error)
    assert refusal is not None
    assert refusal.reason == "NOT_SERVING"
    assert names(database) == []


def test_a_call_whose_caller_has_gone_takes_no_connection_but_its_own(database: Database) -> None:
    def question(connection: Connection) -> None:
        begun.set()
        raw(connection).execute("SELECT pg_sleep(60)")

    def ask(cancellation: Cancellation) -> None:
        cancellation.enter()
        database.ask(question, to_the_end=False)

    def pids() -> list[int]:
        with database.look() as first, database.look() as second:
            return [raw(connection).info.backend_pid for connection in (first, second)]

    _, idle = pids()
    begun, cancellation = threading.Event(), Cancellation()
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask, cancellation)
        assert begun.wait(60)
        cancellation.cancel()
        assert isinstance(asking.exception(60), Cancelled)
    assert idle in pids()


def test_a_call_that_gets_no_connection_is_told_to_ask_again() -> None:
    with postgres.database() as url, ExitStack() as lent:
        database = Database(url, most=16, patience_s=0.01)
        lent.callback(database.close)
        for _ in range(16):
            lent.enter_context(database.lent())
        with pytest.raises(sqlalchemy.exc.TimeoutError) as caught:
            database.one("SELECT 1")
    refusal = refusal_for(caught.value)
    assert refusal is not None
    assert refusal.reason == "NOT_SERVING"


def test_a_host_that_is_gone_is_noticed_soon_unless_the_url_says_otherwise() -> None:
    with postgres.database() as url:
        for more, noticed in (("", "30000"), ("&tcp_user_timeout=7000&keepalives_idle=3", "7000")):
            database = Database(url + more)
            with database.lent() as connection:
                given = raw(connection).info.get_parameters()
            database.close()
            assert given["tcp_user_timeout"] == noticed
            assert given["keepalives_idle"] == ("3" if more else "10")
            assert given["connect_timeout"] == "10"


def test_no_bit_of_an_embedding_changes(database: Database) -> None:
    values = np.array([-0.0, 1e-45, 3.4028235e38, 0.1, -1 / 3, 16777217], "<f4").tobytes()
    for binary in (True, False):
        with database.read() as connection:
            row = raw(connection).execute("SELECT %s", (Embedding(values),), binary=binary).fetchone()
        assert row == (values,)


def test_a_connection_that_comes_back_to_a_closed_pool_is_closed(database: Database) -> None:
    with database.lent() as connection:
        driver = raw(connection)
        database.close()
        assert names(database) == []  # over a connection of the next pool
        assert not driver.closed
    assert driver.closed


def test_what_the_library_notes_of_its_connections_is_not_told_to_operators(caplog: pytest.LogCaptureFixture) -> None:
    with postgres.database() as url, caplog.at_level(logging.INFO, "memory_service"):
        made = Database(url)
        names(made)
        made.close()
    assert caplog.messages == []
