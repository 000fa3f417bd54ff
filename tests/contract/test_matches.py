"""What filters let pass is kept in memory above every engine, and is what its store would answer."""

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest

from memory_service.domain.limits import IndexLimits
from memory_service.domain.model import Bank, Condition, Filter
from memory_service.search import Matches
from memory_service.storage.base import Engine, Store
from tests.support.store import add, fill, held, new_bank

Open = Callable[..., AbstractContextManager[Engine]]
EVEN, PINNED = Filter(metadata=(Condition("half", ("even",)),)), Filter(pinned=True)
LINE = Filter(stretches=(("b0", 1_000_000), ("b1", None)))


def matching(matches: Matches, store: Store, bank: Bank, where: Filter) -> list[int]:
    """Ask as the service does; what is gone does not count."""
    asked = matches.asked(bank, where)
    with store.read() as view:
        ids = matches.ids(asked, view)
        there, _ = view.vectors(bank, ids)
    assert ids.tolist() == sorted(set(ids.tolist()))
    return [int(each) for each in there]


@pytest.mark.parametrize(
    "limits", [IndexLimits(), IndexLimits(filters=2), IndexLimits(matches=5), IndexLimits(changes=3)], ids=str
)
def test_what_a_filter_lets_pass_follows_every_change(open_engine: Open, limits: IndexLimits) -> None:
    matches = Matches(limits)
    with open_engine(follower=matches) as engine:
        store = engine.store
        bank, other = (store.create_bank(new_bank(name))[0] for name in "bc")
        ids, others = fill(store, bank, range(20)), fill(store, other, range(20))

        def check() -> None:
            for where in (EVEN, PINNED, LINE):
                for each in (bank, other):
                    assert matching(matches, store, each, where) == held(store, each, where)

        check()
        ids += fill(store, bank, range(20, 30))
        check()
        for chunk_id, number in ((ids[0], 1), (ids[1], 2)):
            store.set_metadata(bank, chunk_id, {"half": "even" if number == 2 else "odd", "branch": f"b{number}"})
        store.pin(bank, ids[3:6], True)
        store.pin(other, others[:2], True)
        check()
        store.pin(bank, ids[4:5], False)
        store.remove(bank, ids[2:5]).result(60)
        check()
        store.delete_bank(bank.tenant, other.name)
        other, _ = store.create_bank(new_bank("c"))
        check()


def test_values_that_python_takes_for_equal_are_two_filters(open_engine: Open) -> None:
    matches = Matches()
    with open_engine(follower=matches) as engine:
        bank, _ = engine.store.create_bank(new_bank())
        ids = [add(engine.store, bank, place, metadata={"k": value}).chunk_id for place, value in enumerate((1, True))]
        for place, value in enumerate((1, True)):
            where = Filter(metadata=(Condition("k", (value,)),))
            assert matching(matches, engine.store, bank, where) == [ids[place]]


def test_long_filters_are_not_all_kept(open_engine: Open) -> None:
    matches = Matches(IndexLimits(matches=1_000_000))
    with open_engine(follower=matches) as engine:
        bank, _ = engine.store.create_bank(new_bank())
        tracemalloc.start()
        try:
            for number in range(50):
                matches.asked(bank, Filter(metadata=(Condition("k", (f"{number}" * 200_000,)),)))
            assert tracemalloc.get_traced_memory()[0] < 5_000_000
        finally:
            tracemalloc.stop()


def test_what_changes_behind_a_view_is_looked_at_in_a_later_one(open_engine: Open) -> None:
    matches = Matches()
    with open_engine(follower=matches) as engine:
        store = engine.store
        bank, _ = store.create_bank(new_bank())
        ids = fill(store, bank, range(4))
        for chunk_id in (ids[0], ids[2]):  # nothing is known of the filter at the first one
            asked = matches.asked(bank, EVEN)
            with store.read() as view:
                before = view.matching(bank, EVEN).tolist()
                store.set_metadata(bank, chunk_id, {"half": "odd"})
                assert matches.ids(asked, view).tolist() == before
            assert matching(matches, store, bank, EVEN) == held(store, bank, EVEN)
        assert held(store, bank, EVEN) == []


def test_what_was_changed_before_a_filter_is_asked_about_counts(open_engine: Open) -> None:
    """Threads find what they have written themselves, while others write and ask too."""
    matches = Matches(IndexLimits(changes=7))
    with open_engine(follower=matches) as engine, ThreadPoolExecutor(4) as threads:
        store = engine.store
        bank, _ = store.create_bank(new_bank())

        def write(writer: int) -> None:
            for number in range(1000 * writer, 1000 * writer + 20, 2):
                chunk_id = add(store, bank, number).chunk_id
                assert chunk_id in matching(matches, store, bank, EVEN)
                store.set_metadata(bank, chunk_id, {"half": "odd"})
                assert chunk_id not in matching(matches, store, bank, EVEN)
                store.set_metadata(bank, chunk_id, {"half": "even"})
                assert chunk_id in matching(matches, store, bank, EVEN)

        for each in [threads.submit(write, writer) for writer in range(4)]:
            each.result(120)
        assert matching(matches, store, bank, EVEN) == held(store, bank, EVEN)
