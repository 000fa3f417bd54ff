"""That a service lives is known to the others whatever it does."""

import threading
from pathlib import Path

import psycopg
import pytest

from memory_service.domain.limits import Limits, Pauses
from tests.support.clocks import SECOND, Hands
from tests.support.engines import ENGINES, opened
from tests.support.waiting import wait_until

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
_ALIVE = "SELECT count(*) FROM leases WHERE starts_with(name, 'purges of ') AND until > %s"


def test_a_service_that_expires_for_long_still_drops_what_others_forget(tmp_path: Path) -> None:
    hands, begun, over = Hands(), threading.Event(), threading.Event()

    def expire() -> None:
        begun.set()
        over.wait(60)

    with KIND.place(tmp_path) as place, psycopg.connect(place["data"], autocommit=True) as connection:
        pauses = Pauses(at={"counts written": expire})
        with opened(place, clock=hands.clock(), limits=Limits(expiry_s=0.05), pauses=pauses):
            assert begun.wait(60)
            hands.go_on(3600 * SECOND)
            try:
                wait_until(lambda: connection.execute(_ALIVE, (hands.wall,)).fetchall() == [(1,)])
            finally:
                over.set()
