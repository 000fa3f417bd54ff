"""That a service lives is known to the others whatever it does, and whatever its clock says."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.model import Bank
from memory_service.search import Matches
from memory_service.storage.postgres.database import NOW
from tests.support.clocks import HOUR, Hands
from tests.support.engines import ENGINES, opened
from tests.support.store import ALL, add, new_bank
from tests.support.waiting import wait_until

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
_UNTIL = f"SELECT until, until > {NOW} FROM leases WHERE starts_with(name, 'purges of ')"


class Slow(Matches):
    """A follower that takes as long as a test wants to drop what was forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.over = threading.Event(), threading.Event()

    def purge(self, bank: Bank | None) -> int:
        self.wait()
        return super().purge(bank)

    def wait(self) -> None:
        self.begun.set()
        self.over.wait()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Mapping[str, Any]]:
    with KIND.place(tmp_path) as made:
        yield made


def still_told(place: Mapping[str, Any], slow: Slow) -> None:
    """Wait until a service has said again that it lives, since it has begun what takes long; then end that."""
    try:
        assert slow.begun.wait(60)
        with psycopg.connect(place["data"], autocommit=True) as connection:
            [(before, _)] = connection.execute(_UNTIL).fetchall()
            wait_until(lambda: connection.execute(_UNTIL).fetchall()[0][0] > before)
    finally:
        slow.over.set()


def test_a_service_that_expires_for_long_lives(place: Mapping[str, Any]) -> None:
    slow = Slow()
    with opened(place, limits=Limits(expiry_s=0.05), pauses=Pauses(at={"counts written": slow.wait})):
        still_told(place, slow)


def test_a_service_that_drops_for_long_what_was_forgotten_lives(place: Mapping[str, Any]) -> None:
    slow = Slow()
    with ThreadPoolExecutor(1) as threads, opened(place, limits=Limits(expiry_s=0.05), follower=slow) as engine:
        bank, _ = engine.store.create_bank(new_bank())
        add(engine.store, bank, 1)
        receipt = threads.submit(engine.forgetting.chunks, bank, ALL, "")
        still_told(place, slow)
        assert receipt.result(60).places["rows"] == 1


def test_a_service_whose_clock_is_behind_that_of_the_database_lives(place: Mapping[str, Any]) -> None:
    hands = Hands()
    hands.set_wall(-HOUR)
    with opened(place, clock=hands.clock()), psycopg.connect(place["data"], autocommit=True) as connection:
        assert [lives for _, lives in connection.execute(_UNTIL).fetchall()] == [True]


def test_what_a_killed_service_has_said_of_itself_goes_after_a_day(place: Mapping[str, Any]) -> None:
    said = f"INSERT INTO leases VALUES ('purges of ' || %s, '', 0, {NOW} - %s)"
    with opened(place) as engine, psycopg.connect(place["data"], autocommit=True) as connection:
        for name, hours in (("recent", 23), ("old", 25)):
            connection.execute(said, (name, hours * HOUR))
        bank, _ = engine.store.create_bank(new_bank())
        engine.forgetting.chunks(bank, ALL, "")
        names = {name for (name,) in connection.execute("SELECT name FROM leases").fetchall()}
        assert names & {"purges of recent", "purges of old"} == {"purges of recent"}
