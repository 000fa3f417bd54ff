"""What followers of one service know of the changes of another, where these do not come one after the other."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from memory_service.domain.limits import Limits
from memory_service.domain.model import Expiry, Quota
from memory_service.storage.base import Engine, FlawedError, Retrievals
from tests.support import postgres
from tests.support.clocks import HOUR, SECOND, Hands
from tests.support.engines import ENGINES, opened
from tests.support.store import add, fill, held, new_bank, reason
from tests.support.waiting import wait_until

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())


class Told:
    """Keeps the ids of chunks that it is told of, each as often as it is told of it, and the kinds of index that banks
    are to have."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.kinds: list[str] = []
        self.times_dropped = 0

    def added(self, _bank: Any, ids: Any, _vectors: Any) -> None:
        self.ids += ids

    def removed(self, _bank: Any, ids: Any) -> None:
        self.ids = [chunk_id for chunk_id in self.ids if chunk_id not in ids]

    def altered(self, _bank: Any, _ids: Any) -> None: ...

    def changed(self, bank: Any) -> None:
        self.kinds.append(bank.index)

    def dropped(self, _bank: Any) -> None:
        self.ids = []
        self.times_dropped += 1

    def purge(self, _bank: Any) -> int:
        return 0


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Mapping[str, Any]]:
    with KIND.place(tmp_path) as made:
        yield made


@pytest.fixture
def engine(place: Mapping[str, Any]) -> Iterator[Callable[..., Engine]]:
    """Open a service on the database, with a cache of its own; all are closed at the end."""
    with ExitStack() as stack:
        yield lambda name, **options: stack.enter_context(
            opened({**place, "cache": f"{place['cache']}-{name}"}, **options)
        )


def change(place: Mapping[str, Any], *statements: str) -> None:
    with psycopg.connect(postgres.of(place["data"], postgres.OWNER), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def test_a_change_whose_end_could_not_be_read_is_told_once(
    place: Mapping[str, Any], engine: Callable[..., Engine]
) -> None:
    told = Told()
    here, there = engine("a", follower=told).store, engine("b").store
    bank, _ = here.create_bank(new_bank())
    ids = fill(there, bank, [1]) + fill(there, bank, [2])
    change(
        place,
        # As if both were written in one transaction.
        "UPDATE changes SET seq = 2, part = 1, mark = (SELECT mark FROM banks) WHERE seq = 1",
        "CREATE TABLE kept AS SELECT chunk_id, embedding FROM chunks",
        f"UPDATE chunks SET embedding = '[1, 2]' WHERE chunk_id = {ids[0]}",
    )
    with pytest.raises(FlawedError):
        here.catch_up([bank])
    change(place, "UPDATE chunks c SET embedding = k.embedding FROM kept k WHERE k.chunk_id = c.chunk_id")
    here.catch_up([bank])
    assert sorted(told.ids) == ids


def test_what_another_service_has_said_of_a_bank_is_told_between_its_chunks(engine: Callable[..., Engine]) -> None:
    told = Told()
    here, there = engine("a", follower=told).store, engine("b").store
    bank, _ = here.create_bank(new_bank())
    first = fill(there, bank, [1])
    here.catch_up([bank])
    there.update_bank(bank.tenant, bank.name, {"index": "exact"})
    last = fill(there, bank, [2])
    here.catch_up([bank])
    assert (told.ids, told.kinds) == ([*first, *last], ["auto", "exact"])


def test_embeddings_of_other_lengths_are_damaged_also_where_together_they_have_the_bytes(
    place: Mapping[str, Any], engine: Callable[..., Engine]
) -> None:
    store = engine("a").store
    bank, _ = store.create_bank(new_bank())
    ids = fill(store, bank, [1, 2, 3])
    for chunk_id, vector in zip(ids, ("[1, 2, 3]", "[1, 2, 3, 4, 5]"), strict=False):
        change(place, f"UPDATE chunks SET embedding = '{vector}' WHERE chunk_id = {chunk_id}")
    with store.read() as view, pytest.raises(FlawedError) as caught:
        view.vectors(bank, np.array(ids, np.int64))
    assert set(caught.value.flaws) == {*ids[:2]}


def test_a_write_that_a_quota_refuses_is_no_change_that_others_miss(engine: Callable[..., Engine]) -> None:
    told = Told()
    here, there = engine("a").store, engine("b", follower=told).store
    bank, _ = here.create_bank(new_bank(quota=Quota(chunks=1)))
    first = add(here, bank, 1).chunk_id
    there.catch_up([bank])
    assert reason(lambda: add(here, bank, 2)) == "QUOTA_EXCEEDED"
    there.catch_up([bank])
    here.remove(bank, [first]).result(60)
    second = add(here, bank, 3).chunk_id
    there.catch_up([bank])
    assert (told.ids, told.times_dropped) == ([second], 0)


def test_a_retrieval_that_another_service_has_not_written_yet_keeps_a_chunk(engine: Callable[..., Engine]) -> None:
    hands = Hands()
    here = engine("a", clock=hands.clock(), limits=Limits(expiry_s=0.05)).store
    there = engine("b", clock=hands.clock(), limits=Limits(expiry_s=1000.0)).store
    bank, _ = here.create_bank(new_bank())
    renewed = add(here, bank, 1, expiry=Expiry(HOUR, True)).chunk_id
    fixed = add(here, bank, 2, expiry=Expiry(HOUR)).chunk_id
    hands.go_on(HOUR - SECOND)
    there.count({renewed: Retrievals(1, there.clock.now_us(), there.clock.now_us())})
    hands.go_on(2 * SECOND)

    def ids() -> list[int]:
        with there.read() as view:
            return [int(chunk_id) for chunk_id in view.ids(bank)]

    wait_until(lambda: fixed not in ids())
    there.show_counts()
    assert held(here, bank) == [renewed]
    hands.go_on(2 * HOUR)
    wait_until(lambda: ids() == [])
