"""Searches of the database itself, for a bank whose index is being loaded: they find what the index finds."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory_service.api.embedded import LocalServer
from memory_service.domain.limits import STANDARD, Limits, Pauses
from memory_service.domain.model import Bank
from memory_service.search import AtOnce, IndexOptions, SearchIndexes, Selection, Unindexed
from memory_service.storage.base import Engine
from tests.support.caller import Caller
from tests.support.engines import ENGINES, opened
from tests.support.store import adding, new_bank, new_chunk
from tests.support.waiting import wait_until

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
NONE = np.empty(0, np.int64)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Mapping[str, Any]]:
    with KIND.place(tmp_path) as made:
        yield made


def filled(engine: Engine) -> tuple[Bank, list[int]]:
    """Make a bank of which a third of the chunks has one embedding, and another third products that are nearly
    equal."""
    bank, _ = engine.store.create_bank(new_bank())
    random, done = np.random.default_rng(3), []
    for number in range(150):
        vector = random.standard_normal(4)
        if number % 3 == 1:
            vector = np.array([1, 2, 3, 4])
        elif number % 3 == 2:
            vector = np.array([4, 3, 2, 1]) + 1e-7 * vector
        chunk = replace(new_chunk(number), embedding=vector.astype("<f4").tobytes())
        done.append(adding(engine.store, bank, chunk))
    return bank, [each.result(60).chunk_id for each in done]


def test_the_database_finds_what_the_index_finds(place: Mapping[str, Any]) -> None:
    made: list[SearchIndexes] = []

    def above(engine: Engine) -> SearchIndexes:
        made.append(SearchIndexes(engine.store, IndexOptions(engine.cache, 10**9, 600.0, 0, durable=False)))
        return made[-1]

    with opened(place, above=above) as engine:
        bank, ids = filled(engine)
        index = made[0].get(bank)
        queries = np.array([[1, 2, 3, 4], [4, 3, 2, 1], [-1, 0.5, 0, 1e-20], [0, 0, 0, 0]], np.float32)
        some = np.array(ids[::2], np.int64)
        with engine.store.read(apart=True) as view:
            for selection in (Selection(), Selection(some), Selection(None, some), Selection(some, some[:30])):
                for top_k in (1, 10, 200):
                    expected = index.search(queries, top_k, partial(view.vectors, bank), selection)
                    found = Unindexed(bank, view).search(queries, top_k, selection)
                    assert found is not None
                    for one, other in zip(found, expected, strict=True):
                        assert one.ids.tolist() == other.ids.tolist()
                        assert one.scores.tolist() == other.scores.tolist()
            # All chunks that a filter lets pass, when they are too many to be read.
            nearest = view.nearest(bank, queries[0], 10, some, NONE)
            assert nearest is not None
            assert set(nearest[0].tolist()) <= set(some.tolist())
            too_long = np.full((1, 4), 3e38, np.float32)
            assert Unindexed(bank, view).search(too_long, 10, Selection()) is None


def test_a_retrieval_does_not_wait_for_an_index_that_is_being_loaded(place: Mapping[str, Any]) -> None:
    with LocalServer(**{**place, "durability": "os"}) as server:
        caller = Caller(server.address)
        caller.create("v", layers=[])
        written = {caller.add(bank="v", layers=[]) for _ in range(3)}
        caller.channel.close()
    go_on = threading.Event()
    limits: Limits = replace(STANDARD, index=replace(STANDARD.index, patience_s=0))
    pauses = Pauses(at={"index loaded": partial(go_on.wait, 60)})
    with LocalServer(**{**place, "durability": "os"}, limits=limits, pauses=pauses) as server:
        caller = Caller(server.address)
        try:
            for _ in range(2):
                header, _ = caller.retrieve(banks=["v"], reader_digest="")
                assert {chunk.chunk_id for chunk in header.chunks} == written
            more = caller.add(bank="v", layers=[])
            header, _ = caller.retrieve(banks=["v"], reader_digest="")
            assert {chunk.chunk_id for chunk in header.chunks} == {*written, more}
        finally:
            go_on.set()
        header, _ = caller.retrieve(banks=["v"], reader_digest="")
        assert {chunk.chunk_id for chunk in header.chunks} == {*written, more}
        caller.channel.close()


def test_the_database_searches_a_bank_for_so_many_callers_at_once_and_others_wait_for_the_index(
    place: Mapping[str, Any],
) -> None:
    loaded, searched, under_way = threading.Event(), threading.Event(), list[int]()

    def search() -> None:
        under_way.append(1)
        searched.wait(60)

    limits: Limits = replace(STANDARD, index=replace(STANDARD.index, patience_s=0))
    pauses = Pauses(at={"index loaded": partial(loaded.wait, 60), "store searched": search})
    with (
        LocalServer(**{**place, "durability": "os"}, limits=limits, pauses=pauses) as server,
        ThreadPoolExecutor() as threads,
    ):
        caller = Caller(server.address)
        caller.create("v", layers=[])
        written = caller.add(bank="v", layers=[])
        asked = [threads.submit(caller.retrieve, banks=["v"], reader_digest="") for _ in range(AtOnce.MOST + 2)]
        try:
            wait_until(lambda: len(under_way) == AtOnce.MOST)
            loaded.set()
            wait_until(lambda: sum(each.done() for each in asked) == 2)
        finally:
            loaded.set()
            searched.set()
        assert all(header.chunks[0].chunk_id == written for header, _ in (each.result(60) for each in asked))
        caller.channel.close()
