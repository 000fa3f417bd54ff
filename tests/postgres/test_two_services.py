"""Two services on one database: what one has acknowledged, the other answers; what both do at once is done once."""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from memory_service.domain.errors import StartError
from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.model import Bank, Capacity, Condition, Filter, Policy
from memory_service.domain.tenants import DEFAULT_TENANT
from memory_service.search import IndexOptions, Matches, SearchIndexes, Selection
from memory_service.settings import load
from memory_service.storage.base import Engine, Retrievals, Seen, Store
from tests.support.engines import ENGINES, opened
from tests.support.store import add, bank_now, fill, held, new_bank, new_chunk, reason
from tests.support.waiting import wait_until

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
EVEN = Filter(metadata=(Condition("half", ("even",)),))


class Service(NamedTuple):
    """What answers calls in one service."""

    store: Store
    indexes: SearchIndexes
    matches: Matches

    def search(self, bank: Bank, number: int) -> list[int]:
        """Return the ids of the chunks that are nearest to the chunk of a number."""
        self.store.catch_up([bank])
        index = self.indexes.get(bank)
        query = np.frombuffer(new_chunk(number).embedding, "<f4")[None]
        with self.store.read() as view:
            (best,) = index.search(query, 10, partial(view.vectors, bank), Selection(None, view.expired(bank)))
        return [int(chunk_id) for chunk_id in best.ids]

    def even(self, bank: Bank) -> list[int]:
        """Return the ids that a filter lets pass, as a retrieval asks for them."""
        self.store.catch_up([bank])
        asked = self.matches.asked(bank, EVEN)
        with self.store.read() as view:
            there, _ = view.vectors(bank, self.matches.ids(asked, view))
        return [int(chunk_id) for chunk_id in there]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Mapping[str, Any]]:
    with KIND.place(tmp_path) as made:
        yield made


@pytest.fixture
def services(place: Mapping[str, Any]) -> Iterator[Callable[..., Service]]:
    """Open a service on the database, with a cache of its own; all are closed at the end."""
    with ExitStack() as all_of_them:

        def above(engine: Engine) -> SearchIndexes:
            return SearchIndexes(engine.store, IndexOptions(engine.cache, 10**9, 600.0, 0, durable=False))

        def service(name: str, **options: Any) -> Service:
            made: list[SearchIndexes] = []
            own = {**place, "cache": f"{place['cache']}-{name}"}
            matches = Matches()
            keep = lambda engine: made.append(above(engine)) or made[0]  # noqa: E731
            engine = all_of_them.enter_context(opened(own, above=keep, follower=matches, **options))
            return Service(engine.store, made[0], matches)

        yield service


def test_what_one_service_has_acknowledged_the_other_finds_at_once(services: Callable[..., Service]) -> None:
    here, there = services("a"), services("b")
    bank, new = here.store.create_bank(new_bank())
    assert new
    assert there.store.create_bank(new_bank()) == (bank, False)
    first = add(here.store, bank, 1)
    assert there.search(bank, 1) == [first.chunk_id]  # loaded here, and told of what follows
    for number, (one, other) in enumerate(((there, here), (here, there)) * 3, start=2):
        chunk_id = add(one.store, bank, number).chunk_id
        assert chunk_id in other.search(bank, number)
        assert chunk_id in one.search(bank, number)
        assert here.even(bank) == there.even(bank) == held(here.store, bank, EVEN)
        assert other.store.set_metadata(bank, chunk_id, {"half": "odd" if number % 2 == 0 else "even"})
        assert here.even(bank) == there.even(bank) == held(here.store, bank, EVEN)
        if number % 3 == 0:
            assert other.store.remove(bank, [chunk_id]).result(60) == [chunk_id]
            assert chunk_id not in one.search(bank, number)
            assert chunk_id not in other.search(bank, number)
    assert here.search(bank, 1) == there.search(bank, 1)


def test_of_many_who_write_at_two_services_each_key_is_written_once(services: Callable[..., Service]) -> None:
    here, there = services("a"), services("b")
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda n: (here, there)[n % 2].store.create_bank(new_bank()), range(8)))
        assert [new for _, new in made].count(True) == 1
        bank = made[0][0]
        assert {each.uid for each, _ in made} == {bank.uid}
        written = list(threads.map(lambda n: add((here, there)[n % 2].store, bank, n // 4), range(80)))
    ids = held(here.store, bank)
    assert len(ids) == 20
    assert {each.chunk_id for each in written} == set(ids)
    assert sum(not each.replayed for each in written) == 20
    assert bank_now(there.store, bank).usage.chunks == bank_now(here.store, bank).usage.chunks_written == 20
    assert reason(lambda: add(there.store, bank, 1, text="other")) == "KEY_REUSED"
    assert set(here.search(bank, 1)) == set(there.search(bank, 1))


@pytest.mark.slow
def test_a_bank_that_one_service_has_deleted_or_given_another_name_is_that_for_the_other(
    services: Callable[..., Service],
) -> None:
    here, there = services("a"), services("b")
    bank, _ = here.store.create_bank(new_bank())
    by, _ = here.store.create_bank(new_bank("by"))
    fill(here.store, bank, range(3))
    kept = fill(here.store, by, range(3, 6))
    assert len(there.search(bank, 1)) == len(there.search(by, 4)) == 3
    seen = Seen("b", bank.uid, 3, 3)
    assert here.store.replace_bank(DEFAULT_TENANT, seen, "by", by.uid, {}).uid == by.uid
    named = there.store.bank(DEFAULT_TENANT, "b")
    assert named.uid == by.uid
    assert sorted(there.search(named, 4)) == kept
    assert reason(lambda: there.search(bank, 1)) == "BANK_NOT_FOUND"
    assert reason(lambda: there.store.bank(DEFAULT_TENANT, "by")) == "BANK_NOT_FOUND"
    assert reason(lambda: add(there.store, bank, 9)) == "BANK_NOT_FOUND"
    there.store.delete_bank(DEFAULT_TENANT, "b")
    assert reason(lambda: here.store.bank(DEFAULT_TENANT, "b")) == "BANK_NOT_FOUND"
    assert reason(lambda: here.search(named, 4)) == "BANK_NOT_FOUND"
    again, new = here.store.create_bank(new_bank())
    assert new
    assert there.search(again, 1) == []


@pytest.mark.slow
def test_an_eviction_that_one_service_has_planned_another_goes_on_with(
    place: Mapping[str, Any], services: Callable[..., Service]
) -> None:
    small = Limits(step_rows=5)
    with opened(place, limits=small, pauses=Pauses(left_out=frozenset({"evictions"}))) as engine:
        bank, _ = engine.store.create_bank(new_bank(capacity=Capacity("chunks", 60), policy=Policy("lru", target=50)))
        ids = fill(engine.store, bank, range(60))
        written = add(engine.store, bank, 60)
        assert written.evicted == tuple(ids[:5])
        planned, _ = engine.store.explain_eviction(bank_now(engine.store, bank), 1)
        assert [each.chunk_id for each in planned] == ids[5:30]
        assert engine.store.pin(bank, [ids[7]], True) == 1
    other = services("b", limits=small)
    wait_until(lambda: bank_now(other.store, bank).usage.chunks_evicted >= 29)
    assert held(other.store, bank) == [ids[7], *ids[30:], written.chunk_id]


@pytest.mark.slow
def test_both_services_stay_within_a_capacity_and_evict_in_one_order(services: Callable[..., Service]) -> None:
    here, there = services("a"), services("b")
    bank, _ = here.store.create_bank(new_bank(capacity=Capacity("chunks", 10), policy=Policy("lru", target=50)))
    with ThreadPoolExecutor(4) as threads:
        most, over = [0], threading.Event()

        def watch() -> None:
            while not over.is_set():
                most.append(bank_now(here.store, bank).usage.chunks)

        watching = threads.submit(watch)
        list(threads.map(lambda n: add((here, there)[n % 2].store, bank, n), range(60)))
        over.set()
        watching.result(60)
    assert max(most) <= 10
    usage = bank_now(there.store, bank).usage
    assert usage.chunks == len(held(here.store, bank)) == usage.chunks_written - usage.chunks_evicted
    assert sorted(here.search(bank, 1)) == sorted(there.search(bank, 1)) == held(there.store, bank)


@pytest.mark.slow
def test_retrievals_that_two_services_count_are_added_up(services: Callable[..., Service]) -> None:
    here, there = services("a"), services("b")
    bank, _ = here.store.create_bank(new_bank())
    chunk_id = add(here.store, bank, 1).chunk_id
    for times, service in ((2, here), (3, there)):
        service.store.count({chunk_id: Retrievals(times, times, times)})
        service.store.show_counts()
    with here.store.read() as view:
        found = view.chunk(bank, chunk_id)
    assert found is not None
    assert (found.retrieval_count, found.last_retrieved) == (5, 3)


@pytest.mark.slow
def test_no_id_is_given_by_two_services(services: Callable[..., Service]) -> None:
    both = [services(name) for name in "ab"]
    bank, _ = both[0].store.create_bank(new_bank())
    given = [fill(service.store, bank, range(1500 * place, 1500 * place + 40)) for place, service in enumerate(both)]
    assert len(set(given[0]) | set(given[1])) == 80


@pytest.mark.slow
def test_a_cache_is_that_of_one_service(place: Mapping[str, Any]) -> None:
    with opened(place), pytest.raises(StartError, match="used by another process"), opened(place):
        pass


def test_what_a_start_lacks_is_one_line(place: Mapping[str, Any]) -> None:
    with pytest.raises(StartError, match="need a bucket"), opened({**place, "objects": ""}):
        pass
    with pytest.raises(StartError, match="--objects is for data in a database"), opened({**place, "data": "folder"}):
        pass
    nowhere = {**place, "data": "postgresql://me:secret@127.0.0.1:1/none"}
    told = r"cannot open postgresql://me:\*\*\*@127.0.0.1:1/none: "
    with pytest.raises(StartError, match=told) as caught, opened(nowhere):
        pass
    assert "secret" not in str(caught.value)
    assert "secret" not in load(nowhere).place
