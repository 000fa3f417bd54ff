"""Housekeeping of several services on one store: a service that has lost the lease does nothing more, and nothing waits
for what takes long."""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection

from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.model import Bank, Expiry
from memory_service.domain.tenants import DEFAULT_TENANT
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.lease import Lease, LeaseLost
from tests.support.clocks import SECOND, Hands
from tests.support.engines import ENGINES, opened
from tests.support.store import add, fill, new_bank
from tests.support.waiting import wait_until

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
QUICK = Limits(step_rows=2, expiry_s=0.05, cleared_s=0.05)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Mapping[str, Any]]:
    with KIND.place(tmp_path) as made:
        yield made


class Step:
    """A point at which the first who comes waits until the test lets go; it does not wait for ever."""

    def __init__(self) -> None:
        self.reached, self.over = threading.Event(), threading.Event()

    def __call__(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            self.over.wait(60)


def chunks(place: Mapping[str, Any], bank: Bank) -> int:
    """Count the rows that are there of the chunks of a bank, deleted or not."""
    with psycopg.connect(place["data"]) as connection:
        rows = connection.execute("SELECT count(*) FROM chunks WHERE bank_id = %s", (bank.bank_id,)).fetchall()
    return int(rows[0][0])


def give_lease(place: Mapping[str, Any], until: int) -> None:
    """Give the lease to another service. until: the end of its time, microseconds since 1970."""
    with psycopg.connect(place["data"]) as connection:
        connection.execute("UPDATE leases SET holder = 'another', epoch = epoch + 1, until = %s", (until,))


@pytest.mark.parametrize(
    ("point", "other", "left"), [("clearing step", "expiry", (4, 3)), ("counts written", "clearing", (6, 3))]
)
def test_a_holder_that_was_paused_past_its_time_does_nothing_more(
    place: Mapping[str, Any], caplog: pytest.LogCaptureFixture, point: Any, other: Any, left: tuple[int, int]
) -> None:
    hands, step = Hands(), Step()
    with opened(place, clock=hands.clock(), pauses=Pauses(left_out=frozenset({"clearing", "expiry"}))) as engine:
        gone, _ = engine.store.create_bank(new_bank("gone"))
        old, _ = engine.store.create_bank(new_bank("old", expiry=Expiry(SECOND)))
        fill(engine.store, gone, range(6))
        fill(engine.store, old, range(3))
        engine.store.delete_bank(DEFAULT_TENANT, "gone")
    hands.go_on(2 * SECOND)
    pauses = Pauses(left_out=frozenset({other}), at={point: step})
    with opened(place, clock=hands.clock(), limits=QUICK, pauses=pauses):
        assert step.reached.wait(60)
        give_lease(place, 2**62)
        step.over.set()
        wait_until(lambda: "another service keeps house" in caplog.text)
        assert (chunks(place, gone), chunks(place, old)) == left
        give_lease(place, 1)
        wait_until(lambda: 0 in (chunks(place, gone), chunks(place, old)))


def test_a_transaction_of_a_holder_ends_before_another_has_the_lease(place: Mapping[str, Any]) -> None:
    database = Database(place["data"])
    one, other = Lease(database, "lease", 2), Lease(database, "lease", 600)
    assert one.take()

    def stand_still(connection: Connection) -> None:
        connection.exec_driver_sql("UPDATE store SET store_id = 'changed'")
        assert other.epoch == 0
        wait_until(other.take)

    with pytest.raises(LeaseLost):
        database.guarded(one.hold).change(stand_still)
    assert database.one("SELECT 1 FROM store WHERE store_id = 'changed'") is None
    assert not one.take()
    assert other.epoch == 2
    database.close()


def test_nothing_waits_for_the_clearing_of_a_deleted_bank(place: Mapping[str, Any]) -> None:
    hands, step = Hands(), Step()
    with opened(place, clock=hands.clock(), pauses=Pauses(left_out=frozenset({"clearing"}))) as engine:
        gone, _ = engine.store.create_bank(new_bank("gone"))
        fill(engine.store, gone, range(6))
        engine.store.delete_bank(DEFAULT_TENANT, "gone")
    with opened(place, clock=hands.clock(), limits=QUICK, pauses=Pauses(at={"clearing step": step})) as engine:
        assert step.reached.wait(60)
        old, _ = engine.store.create_bank(new_bank("old", expiry=Expiry(SECOND)))
        add(engine.store, old, 1)
        hands.go_on(2 * SECOND)
        wait_until(lambda: chunks(place, old) == 0)
        step.over.set()
        wait_until(lambda: chunks(place, gone) == 0)
