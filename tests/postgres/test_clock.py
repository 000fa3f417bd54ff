"""The clock of a service, and that of the database that it follows."""

import pytest

from memory_service.domain.clock import Timepieces
from memory_service.storage.postgres.clock import Steered, StoreClock
from memory_service.storage.postgres.database import Database
from tests.support import postgres
from tests.support.clocks import HOUR, SECOND, Hands
from tests.support.waiting import wait_until


def test_a_steered_clock_makes_up_for_a_difference_and_never_goes_back() -> None:
    hands = Hands()
    clock = Steered(lambda: hands.running)
    begin, behind = clock.now(), 3000
    for number in range(60):
        clock.steer(behind - (clock.now() - begin - number * SECOND))
        before = clock.now()
        hands.go_on(SECOND)
        assert abs(clock.now() - before - SECOND) <= 500
    assert abs(clock.now() - begin - 60 * SECOND - behind) <= 10
    shown = clock.now()
    clock.steer(-HOUR)
    assert clock.now() == shown
    hands.go_on(SECOND)
    assert clock.now() == shown + SECOND - 500


@pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())
def test_a_service_follows_the_clock_of_its_database() -> None:
    hands = Hands()
    with postgres.database() as url:
        database = Database(url)
        # The clock of this machine stands still, so that it falls behind.
        store = StoreClock(database, None, Timepieces(lambda: hands.wall, lambda: hands.running))

        def is_followed() -> bool:
            database.one("SELECT 1 FROM pg_sleep(0.02)")
            store.keep_mark()
            before = store.clock.now_us()
            hands.running += 2000
            return store.clock.now_us() - before > 2000

        wait_until(is_followed)
        database.close()
