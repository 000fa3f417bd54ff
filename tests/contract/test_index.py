"""The index of a bank stands above every engine: derived from its store, it finds what brute force finds in it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import numpy as np
import pytest

from memory_service.domain.limits import IndexLimits
from memory_service.domain.model import Bank, Condition, Filter
from memory_service.search import IndexOptions, SearchIndexes, Selection
from memory_service.storage.base import Engine, Store, Vectors
from tests.support.store import DIMENSION, add, fill, held, new_bank, new_chunk

Open = Callable[..., AbstractContextManager[Engine]]
Hits = list[tuple[int, float]]
# Segments of some rows, so that there are many of them.
SMALL = IndexLimits(tail_rows=64)


@pytest.fixture
def open_indexed(open_engine: Open) -> Open:
    """Open an engine with the indexes above it, as the service does; the block has the store and the indexes."""

    @contextmanager
    def opened() -> Iterator[tuple[Store, SearchIndexes]]:
        made: list[SearchIndexes] = []

        def above(engine: Engine) -> SearchIndexes:
            options = IndexOptions(engine.cache, 10**9, 600.0, 0, durable=False, limits=SMALL)
            made.append(SearchIndexes(engine.store, options))
            return made[0]

        with open_engine(above=above) as engine:
            yield engine.store, made[0]

    return opened


def search(
    store: Store, indexes: SearchIndexes, bank: Bank, queries: Vectors, where: Filter | None = None
) -> list[Hits]:
    """Search as the service does."""
    store.catch_up([bank])
    index = indexes.get(bank)
    with store.read() as view:
        allowed = None if where is None else view.matching(bank, where)
        best = index.search(queries, 10, partial(view.vectors, bank), Selection(allowed, view.expired(bank)))
    return [list(zip(one.ids.tolist(), one.scores.tolist(), strict=True)) for one in best]


def brute_force(store: Store, bank: Bank, queries: Vectors, where: Filter | None = None) -> list[Hits]:
    """Score every chunk of a bank: the inner product in float64, rounded; ties go to the lower id."""
    ids = np.array(held(store, bank, where or Filter()), np.int64)
    with store.read() as view:
        ids, vectors = view.vectors(bank, ids)
    found = []
    for query in queries:
        scores = np.multiply(vectors, query, dtype=np.float64).sum(axis=1).astype(np.float32)
        order = np.lexsort((ids, -scores))[:10]
        found.append(list(zip(ids[order].tolist(), scores[order].tolist(), strict=True)))
    return found


def queries(count: int = 20) -> Vectors:
    return np.random.default_rng(3).standard_normal((count, DIMENSION)).astype(np.float32)


FILTERS = [
    None,
    Filter(metadata=(Condition("half", ("odd",)),)),
    Filter(start_from=100, start_before=104),
    Filter(metadata=(Condition("nobody"),)),
]


@pytest.mark.parametrize("where", FILTERS, ids=["all", "half", "few", "none"])
def test_a_search_finds_what_brute_force_finds(open_indexed: Open, where: Filter | None) -> None:
    with open_indexed() as (store, indexes):
        bank, other = (store.create_bank(new_bank(name))[0] for name in "bc")
        ids = fill(store, bank, range(150))
        search(store, indexes, bank, queries())  # loaded here, and told of what follows
        ids += fill(store, bank, range(150, 300))
        fill(store, other, range(300))
        store.remove(bank, ids[::7]).result(60)
        expected = brute_force(store, bank, queries(), where)
        assert search(store, indexes, bank, queries(), where) == expected
        assert sum(map(len, expected)) == {0: 200, 1: 200, 2: 80, 3: 0}[FILTERS.index(where)]


def test_ties_go_to_the_lower_id(open_indexed: Open) -> None:
    with open_indexed() as (store, indexes):
        bank, _ = store.create_bank(new_bank())
        vector = new_chunk(1).embedding
        ids = [add(store, bank, number, embedding=vector).chunk_id for number in range(100)]
        ((*hits,),) = search(store, indexes, bank, np.frombuffer(vector, "<f4")[None])
        assert [chunk_id for chunk_id, _ in hits] == ids[:10]


def test_an_index_is_that_of_the_store_however_often_it_is_opened(open_indexed: Open) -> None:
    for opening in range(3):
        with open_indexed() as (store, indexes):
            bank, _ = store.create_bank(new_bank())
            assert search(store, indexes, bank, queries()) == brute_force(store, bank, queries())
            ids = fill(store, bank, range(1000 * opening, 1000 * opening + 150))
            store.remove(bank, ids[::3]).result(60)
            assert search(store, indexes, bank, queries()) == brute_force(store, bank, queries())


def test_what_was_acknowledged_before_a_search_is_found_by_it(open_indexed: Open) -> None:
    """Searches find what their own thread has written, while others write and while the index is loaded."""
    with open_indexed() as (store, indexes), ThreadPoolExecutor(4) as threads:
        bank, _ = store.create_bank(new_bank())

        def write(writer: int) -> None:
            for number in range(1000 * writer, 1000 * writer + 60):
                vector = new_chunk(number).embedding
                chunk_id = add(store, bank, number, embedding=vector).chunk_id
                query = np.frombuffer(vector, "<f4")[None]
                ((best, *_),) = search(store, indexes, bank, query / np.square(query).sum())
                assert best[0] == chunk_id or best[1] >= 1
                if number % 3 == 0:
                    store.remove(bank, [chunk_id]).result(60)
                    (hits,) = search(store, indexes, bank, query)
                    assert chunk_id not in dict(hits)

        for each in [threads.submit(write, writer) for writer in range(4)]:
            each.result(120)
        assert search(store, indexes, bank, queries()) == brute_force(store, bank, queries())
