"""Services that are up while their database is put back to an earlier time, as after a restore or a failover."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psycopg
import pytest

from kvbank.v1 import bank_pb2
from memory_service.api.embedded import LocalServer
from memory_service.domain.limits import Limits
from memory_service.domain.model import Bank, Condition, Filter
from memory_service.search import IndexOptions, Matches, SearchIndexes, Selection
from memory_service.storage.base import Store, Vectors
from tests.support import postgres
from tests.support.caller import DIMENSION, EMBEDDER, Caller
from tests.support.engines import ENGINES, opened
from tests.support.store import add, fill, held, new_bank, new_chunk, reason

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
# Nothing recurs while a test runs.
IDLE = Limits(expiry_s=3600)


class Copies:
    """Copies of a database, and what puts one back."""

    def __init__(self, url: str) -> None:
        self.name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
        self._server = psycopg.connect(postgres.of(url, postgres.OWNER), dbname="postgres", autocommit=True)

    def take(self) -> None:
        """Copy the database as it is now."""
        self._let_in(False)
        self._server.execute(f"CREATE DATABASE {self.name}_copy TEMPLATE {self.name} STRATEGY file_copy")
        self._let_in(True)

    def put_back(self) -> None:
        """Let the copy be the database."""
        self._server.execute(f"DROP DATABASE {self.name} WITH (FORCE)")
        self._server.execute(f"ALTER DATABASE {self.name}_copy RENAME TO {self.name}")

    def _let_in(self, everybody: bool) -> None:
        """End all connections to the database, and take new ones from everybody or from none."""
        self._server.execute(f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS {everybody}")
        ended = "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = %s"
        self._server.execute(ended, (self.name,))

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Mapping[str, Any]]:
    with KIND.place(tmp_path) as made:
        yield made


@pytest.fixture
def copies(place: Mapping[str, Any]) -> Iterator[Copies]:
    made = Copies(place["data"])
    yield made
    made.close()


def found(store: Store, indexes: SearchIndexes, bank: Bank, like: int = 1) -> list[int]:
    """Search for everything that a bank has, as a retrieval does, the nearest to the chunk of a number first."""
    (current,) = store.current(bank.tenant, [bank.name])
    query = np.frombuffer(new_chunk(like).embedding, "<f4")[None]
    index = indexes.get(current.bank)
    with store.read(apart=True) as view:
        (best,) = index.search(query, 100, partial(view.vectors, bank), Selection(None, view.expired(bank)))
    return [int(chunk_id) for chunk_id in best.ids]


@pytest.mark.parametrize("commits", [1, 2, 3])
def test_what_a_database_has_lost_is_not_found_and_what_came_since_is(
    place: Mapping[str, Any], copies: Copies, commits: int
) -> None:
    indexes: list[SearchIndexes] = []

    def above(engine: Any) -> SearchIndexes:
        indexes.append(SearchIndexes(engine.store, IndexOptions(engine.cache, 10**9, 600.0, 0, durable=False)))
        return indexes[-1]

    with ExitStack() as stack:
        here = stack.enter_context(opened(place, limits=IDLE, above=above)).store
        bank, _ = here.create_bank(new_bank())
        kept = fill(here, bank, [1]) + fill(here, bank, [2])
        copies.take()
        while _id_of(here) != 1024:  # what comes next is of a block of ids that the other service gets, too
            pass
        lost = [add(here, bank, number).chunk_id for number in (3, 4)]
        assert sorted(found(here, indexes[0], bank)) == [*kept, *lost]
        copies.put_back()
        there = stack.enter_context(opened({**place, "cache": f"{place['cache']}-b"}, limits=IDLE)).store
        new = [add(there, bank, 10 + number).chunk_id for number in range(commits)]
        assert new[0] == lost[0]
        assert found(here, indexes[0], bank, like=10)[0] == new[0]
        assert sorted(found(here, indexes[0], bank)) == sorted([*kept, *new])
        again = [add(here, bank, 20 + number).chunk_id for number in range(2)]
        assert not {*again} & {*kept, *lost, *new}
        assert sorted(found(here, indexes[0], bank)) == sorted([*kept, *new, *again])


def test_no_id_is_given_again_though_the_database_has_lost_that_it_was_given(
    place: Mapping[str, Any], copies: Copies
) -> None:
    with opened(place, limits=IDLE) as engine:
        store = engine.store
        bank, _ = store.create_bank(new_bank())
        fill(store, bank, [1])
        copies.take()
        given = {_id_of(store) for _ in range(3000)}
        engine.store.ids.refill().result(60)  # type: ignore[attr-defined]
        copies.put_back()
        assert len({_id_of(store) for _ in range(3000)} | given) == 6000


def test_a_service_gives_no_more_ids_that_another_one_was_given_since(place: Mapping[str, Any], copies: Copies) -> None:
    with ExitStack() as stack:
        here = stack.enter_context(opened(place, limits=IDLE)).store
        copies.take()
        last = _id_of(here)
        copies.put_back()
        there = stack.enter_context(opened({**place, "cache": f"{place['cache']}-b"}, limits=IDLE)).store
        bank, _ = there.create_bank(new_bank())
        ids = fill(there, bank, range(1, 5))
        assert {last + 1, last + 2} <= {*ids}
        with pytest.raises(psycopg.errors.UniqueViolation):
            add(here, bank, 10)
        assert add(here, bank, 11).chunk_id not in ids
        assert len(held(here, bank)) == 5


class Purged(Matches):
    """A follower that counts how often it is to drop what was forgotten."""

    times = 0

    def purge(self, bank: Bank | None) -> int:
        self.times += 1
        return super().purge(bank)


def test_what_is_forgotten_after_that_goes_from_the_disk_too(place: Mapping[str, Any], copies: Copies) -> None:
    follower = Purged()
    with opened(place, limits=IDLE, follower=follower) as engine:
        bank, _ = engine.store.create_bank(new_bank())
        fill(engine.store, bank, [1, 2])
        copies.take()
        for number in (1, 2):  # the second one gets the number of the first one, which the database has lost
            engine.forgetting.chunks(bank, Filter(metadata=(Condition("number", (number,)),)), "")
            assert follower.times == number
            if number == 1:
                copies.put_back()


class Named(Matches):
    """A follower that notes of which banks it was told: with "-" before the name where they were dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def added(self, bank: Bank, ids: Sequence[int], vectors: Vectors) -> None:
        self.names.append(bank.name)

    def dropped(self, bank: Bank) -> None:
        self.names.append(f"-{bank.name}")


def test_a_bank_that_gets_the_id_of_a_lost_one_is_another_bank(place: Mapping[str, Any], copies: Copies) -> None:
    follower = Named()
    with opened(place, limits=IDLE, follower=follower) as engine:
        copies.take()
        lost, _ = engine.store.create_bank(new_bank("lost"))
        copies.put_back()
        new, _ = engine.store.create_bank(new_bank("new"))
        assert new.bank_id == lost.bank_id
        written = add(engine.store, new, 1)
        assert follower.names == ["-lost", "new"]
        # What is under way for the lost one changes nothing of the new one.
        assert reason(lambda: add(engine.store, lost, 2)) == "BANK_NOT_FOUND"
        assert engine.store.remove(lost, [written.chunk_id]).result(60) == []
        assert engine.store.pin(lost, [written.chunk_id], True) == 0
        assert held(engine.store, new) == [written.chunk_id]


def _id_of(store: Store) -> int:
    while isinstance(chunk_id := store.new_id(), Future):
        chunk_id.result(60)
    return chunk_id


def test_chunks_of_a_bank_that_has_the_id_of_a_lost_one_are_not_taken_for_damaged(
    place: Mapping[str, Any], copies: Copies
) -> None:
    with ExitStack() as stack:

        def served(cache: str) -> Caller:
            settings = {**place, "cache": f"{place['cache']}{cache}", "durability": "os", "limits": IDLE}
            caller = Caller(stack.enter_context(LocalServer(**settings)).address)
            stack.callback(caller.channel.close)
            return caller

        here = served("")
        copies.take()
        here.create("v", layers=[])
        lost = here.add(bank="v", layers=[])
        here.retrieve(banks=["v"], reader_digest="")
        copies.put_back()
        there, other = served("-b"), bank_pb2.EmbeddingSpec(embedder_digest=EMBEDDER, dimension=2 * DIMENSION)
        there.create("w", layers=[], embedding=other)
        new = there.add((1,) * 2 * DIMENSION, bank="w", layers=[])
        assert new == lost
        with pytest.raises(grpc.RpcError, match="there is no bank"):
            here.retrieve(banks=["v"], reader_digest="")
        assert there.ids("w") == [new]
