"""What a service on a database tells its operators: also while the database is away."""

import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy.exc
from psycopg.conninfo import conninfo_to_dict

from memory_service.api.embedded import LocalServer
from memory_service.domain.limits import Limits
from memory_service.observe.metrics import DatabaseMetrics, Metrics
from memory_service.storage.followers import Followers
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.feed import Feed
from tests.support import postgres
from tests.support.engines import ENGINES, opened
from tests.support.stalling import StallingProxy
from tests.support.store import fill, new_bank
from tests.support.waiting import wait_until

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Mapping[str, Any]]:
    with KIND.place(tmp_path) as made:
        yield made


def figures(server: LocalServer) -> dict[str, float]:
    """Return the figures of a scrape, by name and labels."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=60) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def shut(place: Mapping[str, Any], *, is_open: bool) -> None:
    """Let a database take connections, or take none and end those that are there."""
    name = conninfo_to_dict(place["data"])["dbname"]
    owner = postgres.of(place["data"], postgres.OWNER)
    with psycopg.connect(owner, dbname="postgres", autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {is_open}")
        if not is_open:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))


def test_one_of_two_services_keeps_house_and_the_figures_tell_of_a_database_that_is_away(
    place: Mapping[str, Any],
) -> None:
    with ExitStack() as running:
        start = lambda name: running.enter_context(  # noqa: E731
            LocalServer(**place | {"cache": place["cache"] + name, "durability": "os"}, metrics_listen="127.0.0.1:0")
        )
        one, two = start("-1"), start("-2")
        wait_until(lambda: sum(figures(each)["kvbank_housekeeper"] for each in (one, two)) == 1)
        seen = figures(one)
        (info,) = (name for name in seen if name.startswith("kvbank_info"))
        assert [name for name in figures(two) if name.startswith("kvbank_info")] == [info]
        assert 'store="' in info
        assert seen["kvbank_banks"] == 0
        assert seen["kvbank_database_wait_seconds_count"] > 0
        lost = 'kvbank_database_errors_total{kind="connection"}'
        assert seen[lost] == 0
        shut(place, is_open=False)
        try:
            wait_until(lambda: figures(one)[lost] > 0)
            assert not figures(one).keys() & {"kvbank_banks", "kvbank_chunks"}
        finally:
            shut(place, is_open=True)
        wait_until(lambda: "kvbank_chunks" in figures(one))


def test_figures_of_a_service_whose_database_is_silent_come_without_those_of_the_database(
    place: Mapping[str, Any],
) -> None:
    proxy = StallingProxy.before(place["data"])
    limits = Limits(figures_s=0.5, probe_s=3600)
    try:
        with LocalServer(
            **{**place, "data": proxy.url, "durability": "os"}, metrics_listen="127.0.0.1:0", limits=limits
        ) as server:
            wait_until(lambda: "kvbank_chunks" in figures(server))
            proxy.stall()
            silent = [figures(server) for _ in range(2)]
            proxy.go_on()
            wait_until(lambda: "kvbank_chunks" in figures(server))
    finally:
        proxy.close()
    assert all("kvbank_ready" in seen and "kvbank_chunks" not in seen for seen in silent)


def test_a_service_tells_how_far_it_is_behind_another_and_when_it_begins_anew(place: Mapping[str, Any]) -> None:
    metrics, database = Metrics(), Database(place["data"])
    feed = Feed(database, Followers(), lambda: None, metrics.show_database())
    value = metrics.registry.get_sample_value
    with opened(place) as other:
        bank, _ = other.store.create_bank(new_bank())
        feed.catch_up([bank])
        fill(other.store, bank, range(3))
        feed.look_after()
        assert value("kvbank_changes_behind") == bank_head(place) > 0
        feed.catch_up([bank])
        feed.look_after()
        assert (value("kvbank_changes_behind"), value("kvbank_banks_read_anew_total")) == (0, 0)
        fill(other.store, bank, range(3, 5))
        with psycopg.connect(place["data"], autocommit=True) as connection:
            connection.execute("UPDATE banks SET trimmed = seq")
            connection.execute("DELETE FROM changes")
        feed.catch_up([bank])
        assert value("kvbank_banks_read_anew_total") == 1
    database.close()


def bank_head(place: Mapping[str, Any]) -> int:
    """Return how many changes of all banks there were."""
    with psycopg.connect(place["data"]) as connection:
        ((head,),) = connection.execute("SELECT sum(seq)::int FROM banks").fetchall()
    return int(head)


def test_what_the_database_refuses_is_counted_by_its_kind(place: Mapping[str, Any]) -> None:
    metrics = Metrics()
    shown: DatabaseMetrics = metrics.show_database()
    database = Database(place["data"])
    database.show(shown)
    value = lambda name, **labels: metrics.registry.get_sample_value(name, labels)  # noqa: E731
    with database.read():
        assert value("kvbank_database_connections") == 1
    assert value("kvbank_database_connections") == 0
    with pytest.raises(psycopg.Error):
        database.one("SELECT nothing")
    assert value("kvbank_database_errors_total", kind="statement") == 1
    tries: list[int] = []

    def once_more(connection: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise psycopg.errors.SerializationFailure

    database.change(once_more)
    assert value("kvbank_database_repeated_total") == 1
    assert value("kvbank_database_errors_total", kind="statement") == 1
    database.close()
    few = Database(place["data"], most=16, patience_s=0.01)
    few.show(shown)
    with ExitStack() as lent:
        for _ in range(16):
            lent.enter_context(few.lent())
        with pytest.raises(sqlalchemy.exc.TimeoutError):
            few.one("SELECT 1")
    assert value("kvbank_database_errors_total", kind="pool") == 1
    few.close()
