"""The protocol `Store`, called directly: atomic steps that views and followers see as soon as they are answered."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from memory_service.domain import digest
from memory_service.domain.errors import ServiceError
from memory_service.domain.limits import Pauses
from memory_service.domain.model import (
    Bank,
    Capacity,
    Chunk,
    Condition,
    EmbeddingSpec,
    Expiry,
    Filter,
    Policy,
    Quota,
    Range,
)
from memory_service.domain.tenants import DEFAULT_TENANT, TenantQuota
from memory_service.storage.base import Engine, Ids, Retrievals, Vectors, Written
from tests.support.clocks import HOUR, Hands
from tests.support.engines import Kind, opened
from tests.support.store import (
    ALL,
    CHUNK_BYTES,
    add,
    adding,
    bank_now,
    fill,
    held,
    id_from,
    ids_in,
    new,
    new_bank,
    new_chunk,
    reason,
)
from tests.support.waiting import wait_until

Open = Callable[..., AbstractContextManager[Engine]]


class Mirror:
    """A follower that keeps what it is told, as an index does, and notes whether it was told of one thing at a time."""

    def __init__(self) -> None:
        self.vectors: dict[int, bytes] = {}
        self.banks: dict[str, Bank] = {}
        self.telling = threading.Lock()
        self.alone = True
        self.altered_ids: list[int] = []

    def added(self, bank: Bank, ids: Sequence[int], vectors: Vectors) -> None:
        self.alone &= self.telling.acquire(blocking=False)
        assert bank.name in self.banks
        self.vectors |= {int(i): row.tobytes() for i, row in zip(ids, vectors, strict=True)}
        self.telling.release()

    def removed(self, bank: Bank, ids: Sequence[int]) -> None:
        self.alone &= self.telling.acquire(blocking=False)
        for chunk_id in ids:
            self.vectors.pop(int(chunk_id), None)
        self.telling.release()

    def altered(self, bank: Bank, ids: Sequence[int]) -> None:
        self.alone &= self.telling.acquire(blocking=False)
        assert bank.name in self.banks
        self.altered_ids += ids
        self.telling.release()

    def changed(self, bank: Bank) -> None:
        self.banks[bank.name] = bank

    def dropped(self, bank: Bank) -> None:
        del self.banks[bank.name]


# Banks


def test_of_chunks_that_are_added_together_each_is_refused_alone(engine: Engine) -> None:
    """Add more than one transaction takes, in two banks, one of which is full."""
    store = engine.store
    bank, _ = store.create_bank(new_bank())
    full, _ = store.create_bank(new_bank("full", quota=Quota(chunks=2)))
    chunks = [new(store, full if number % 10 == 0 else bank, new_chunk(number)) for number in range(600)]
    chunks[5] = chunks[5]._replace(chunk=replace(chunks[5].chunk, key=chunks[4].chunk.key))
    refused = {5: "KEY_REUSED"} | dict.fromkeys(range(20, 600, 10), "QUOTA_EXCEEDED")
    ended = [future.exception(60) for future in store.add(chunks)]
    assert {number: error.reason for number, error in enumerate(ended) if isinstance(error, ServiceError)} == refused
    assert sum(error is not None for error in ended) == len(refused)
    with store.read() as view:
        there = [ids_in(view, full), ids_in(view, bank)]
    added = [chunks[number].chunk.chunk_id for number in range(600) if number not in refused]
    assert sorted([*there[0], *there[1]]) == added
    assert len(there[0]) == 2
    answers = [future.result(60) for future in store.add([new(store, bank, new_chunk(number)) for number in (1, 2, 3)])]
    assert [(each.chunk_id, each.replayed) for each in answers] == [(each.chunk.chunk_id, True) for each in chunks[1:4]]


def test_chunks_that_are_added_together_pass_no_quota_that_is_newer_than_their_bank(engine: Engine) -> None:
    store = engine.store
    engine.access.add_tenant("red", TenantQuota(chunks=3))
    of_red, (bank, _) = store.create_bank(new_bank(tenant="red"))[0], store.create_bank(new_bank())
    store.update_bank(DEFAULT_TENANT, bank.name, {"quota": Quota(chunks=2)})
    for held_bank, most in ((of_red, 3), (bank, 2)):
        futures = store.add([new(store, held_bank, new_chunk(number)) for number in range(5)])
        assert sum(future.exception(60) is None for future in futures) == most
        assert bank_now(store, held_bank).usage.chunks == most


def test_a_bank_is_made_once_found_by_name_and_deleted(open_engine: Open) -> None:
    mirror = Mirror()
    with open_engine(follower=mirror) as engine:
        store = engine.store
        bank, new = store.create_bank(new_bank(metadata={"a": "b"}))
        assert new
        assert bank.uid
        assert store.create_bank(new_bank()) == (bank, False)
        assert (
            reason(lambda: store.create_bank(replace(new_bank(), embedding=EmbeddingSpec("other", 4)))) == "BANK_EXISTS"
        )
        assert store.bank(DEFAULT_TENANT, "b") == bank
        assert store.known_banks() == [bank]
        changed = store.update_bank(DEFAULT_TENANT, "b", {"quota": Quota(chunks=5)})
        assert (changed.quota.chunks, changed.metadata) == (5, {"a": "b"})
        assert mirror.banks == {"b": changed}
        add(store, bank, 1)
        store.delete_bank(DEFAULT_TENANT, "b")
        assert mirror.banks == {}
        for call in (
            lambda: store.bank(DEFAULT_TENANT, "b"),
            lambda: store.delete_bank(DEFAULT_TENANT, "b"),
            lambda: store.update_bank(DEFAULT_TENANT, "b", {}),
        ):
            assert reason(call) == "BANK_NOT_FOUND"
        assert reason(lambda: add(store, bank, 2)) == "BANK_NOT_FOUND"
        with store.read() as view:
            assert not view.exists(bank)
        again, new = store.create_bank(new_bank())
        assert new
        assert again.uid != bank.uid
        assert held(store, again) == []


def test_banks_and_their_chunks_are_there_after_the_store_is_opened_again(open_engine: Open) -> None:
    with open_engine() as engine:
        store_id = engine.store.store_id
        bank, _ = engine.store.create_bank(new_bank(capacity=Capacity("chunks", 9), expiry=Expiry(HOUR, True)))
        ids = fill(engine.store, bank, range(5))
    with open_engine() as engine:
        assert engine.store.store_id == store_id
        assert replace(engine.store.bank(DEFAULT_TENANT, "b"), usage=bank.usage) == bank
        assert held(engine.store, bank) == ids
        assert bank_now(engine.store, bank).usage.chunks == 5


# Adding


def test_what_was_added_is_seen_by_the_next_view_and_by_followers_and_by_no_earlier_view(open_engine: Open) -> None:
    mirror = Mirror()
    with open_engine(follower=mirror) as engine:
        store = engine.store
        bank, _ = store.create_bank(new_bank())
        with store.read() as earlier:
            assert ids_in(earlier, bank) == []
            written = add(store, bank, 1)
            assert ids_in(earlier, bank) == []
        chunk = new_chunk(1)
        with store.read() as view:
            found = view.chunk(bank, written.chunk_id, embedding=True)
            assert found is not None
            said = replace(found, chunk_id=0, bank="", created=0, expiry=None, stored_bytes=CHUNK_BYTES)
            assert said == chunk
            ids, vectors = view.vectors(bank, np.array([written.chunk_id, written.chunk_id + 1]))
        assert (ids.tolist(), vectors.tobytes()) == ([written.chunk_id], chunk.embedding)
        assert mirror.vectors == {written.chunk_id: chunk.embedding}
        assert bank_now(store, bank).usage.chunks_written == 1


def test_a_key_is_written_once_and_answered_the_same_way(open_engine: Open) -> None:
    with open_engine() as engine:
        store = engine.store
        bank, _ = store.create_bank(new_bank())
        chunk = new_chunk(1)
        made, other = digest.of_request(chunk), digest.of_request(new_chunk(1, text="other"))
        assert store.replay_of(bank, chunk.key, made) is None
        first = add(store, bank, 1)
        again = Written(chunk.key, first.chunk_id, replayed=True)
        assert first == Written(chunk.key, first.chunk_id)
        assert store.replay_of(bank, chunk.key, made) == add(store, bank, 1) == again
        assert reason(lambda: store.replay_of(bank, chunk.key, other)) == "KEY_REUSED"
        assert reason(lambda: add(store, bank, 1, text="other")) == "KEY_REUSED"
        assert held(store, bank) == [first.chunk_id]
        assert store.remove(bank, [first.chunk_id]).result(60) == [first.chunk_id]
        gone = replace(again, gone=True)
        assert store.replay_of(bank, chunk.key, made) == add(store, bank, 1) == gone
    with open_engine() as engine:
        assert engine.store.replay_of(bank, chunk.key, made) == gone


def test_a_chunk_that_is_written_if_absent_is_there_once_whatever_became_of_its_key(open_engine: Open) -> None:
    """Answer a chunk that lives, also where the content is another, and do not count one that was removed or has
    expired: what is left of it takes nothing of the new chunk."""
    hands, mirror = Hands(), Mirror()
    without_expiry = Pauses(left_out=frozenset({"expiry"}))
    with open_engine(follower=mirror, clock=hands.clock(), pauses=without_expiry) as engine:
        store = engine.store
        bank, _ = store.create_bank(new_bank())
        key = new_chunk(1).key
        first = add(store, bank, 1, if_absent=True)
        known = Written(key, first.chunk_id, replayed=True)
        assert store.replay_of(bank, key, None) == known
        assert add(store, bank, 1, if_absent=True) == add(store, bank, 1, if_absent=True, text="other") == known
        store.remove(bank, [first.chunk_id]).result(60)
        assert store.replay_of(bank, key, None) is None
        second = add(store, bank, 1, if_absent=True, expiry=Expiry(HOUR))
        assert not second.replayed
        hands.go_on(HOUR)
        assert store.replay_of(bank, key, None) is None
        third = add(store, bank, 1, if_absent=True, text="other").chunk_id
        assert (held(store, bank), list(mirror.vectors)) == ([third], [third])
        usage = bank_now(store, bank).usage
        assert (usage.chunks, usage.chunks_deleted, usage.chunks_expired) == (1, 1, 1)
        hands.go_on(25 * HOUR)
        # With a removal, keys that were spent a day ago are forgotten.
        store.remove(bank, [add(store, bank, 2).chunk_id]).result(60)
        assert add(store, bank, 1, if_absent=True) == Written(key, third, replayed=True)


def test_of_many_who_write_one_key_one_writes_it(open_engine: Open) -> None:
    with open_engine() as engine, ThreadPoolExecutor(8) as threads:
        bank, _ = engine.store.create_bank(new_bank())
        written = list(threads.map(lambda _: add(engine.store, bank, 1), range(40)))
        assert sum(not each.replayed for each in written) == 1
        assert {each.chunk_id for each in written} == set(held(engine.store, bank))


def test_a_tenant_that_writes_much_makes_another_wait_for_none_of_its_queue(
    open_engine: Open, engine_kind: Kind
) -> None:
    """Hold the commits up until one tenant has hundreds of chunks waiting, and then another tenant has one."""
    with open_engine() as engine:
        store, hold, order = engine.store, threading.Event(), list[str]()
        engine.access.add_tenant("quiet", TenantQuota())
        noisy, _ = store.create_bank(new_bank())
        quiet, _ = store.create_bank(new_bank(tenant="quiet"))
        held_up = store.in_order(noisy, lambda: hold.wait(60))
        written = []
        for tenant, bank, count in (("noisy", noisy, 700), ("quiet", quiet, 1)):
            for number in range(count):
                written.append(adding(store, bank, new_chunk(number)))
                written[-1].add_done_callback(lambda _, tenant=tenant: order.append(tenant))
        hold.set()
        assert held_up.result(60)
        ids = [each.result(60).chunk_id for each in written]
    assert order.index("quiet") <= engine_kind.under_way
    assert ids == sorted(ids)


def test_a_refused_chunk_has_changed_nothing(open_engine: Open) -> None:
    """Evictions of a refused chunk are taken back, the chunk's key is not spent, and no follower has heard of it."""
    mirror = Mirror()
    with open_engine(follower=mirror) as engine:
        store = engine.store
        small = {"capacity": Capacity("chunks", 4), "quota": Quota(tokens=9), "policy": Policy("lru", target=75)}
        bank, _ = store.create_bank(new_bank(**small))
        ids = fill(store, bank, range(4))
        before, seen = bank_now(store, bank), dict(mirror.vectors)
        assert reason(lambda: add(store, bank, 9, stored_length=8, original_length=8)) == "QUOTA_EXCEEDED"
        assert reason(lambda: add(store, bank, 9, stored_length=8, original_length=8)) == "QUOTA_EXCEEDED"
        assert (held(store, bank), bank_now(store, bank), mirror.vectors) == (ids, before, seen)
        with store.read() as view:
            assert list(view.evictions(bank, 2**62)) == []
        assert not add(store, bank, 9).replayed
    assert set(ids) - set(mirror.vectors)


def test_a_bank_that_may_lose_nothing_is_full(open_engine: Open) -> None:
    with open_engine() as engine:
        store = engine.store
        bank, _ = store.create_bank(new_bank(capacity=Capacity("chunks", 2), policy=Policy("reject")))
        fill(store, bank, range(2))
        assert reason(lambda: add(store, bank, 3)) == "BANK_FULL"
        small, _ = store.create_bank(new_bank("small", capacity=Capacity("tokens", 1)))
        assert reason(lambda: add(store, small, 4)) == "TOO_LARGE"


def test_metadata_are_replaced_and_counted(open_engine: Open) -> None:
    with open_engine() as engine:
        store = engine.store
        bank, _ = store.create_bank(new_bank(quota=Quota(bytes=2 * CHUNK_BYTES)))
        chunk_id = add(store, bank, 1).chunk_id
        assert store.set_metadata(bank, chunk_id, {"a": 1.5})
        assert not store.set_metadata(bank, chunk_id + 1, {"a": "b"})
        assert reason(lambda: store.set_metadata(bank, chunk_id, {"a": "b" * 2000})) == "QUOTA_EXCEEDED"
        with store.read() as view:
            found = view.chunk(bank, chunk_id)
        assert found is not None
        assert found.metadata == {"a": 1.5}


# Evictions


def test_who_goes_next_goes_next_and_is_in_the_log(open_engine: Open) -> None:
    mirror = Mirror()
    with open_engine(follower=mirror) as engine:
        store = engine.store
        bank, _ = store.create_bank(new_bank(capacity=Capacity("chunks", 8), policy=Policy("lru", target=50)))
        ids = fill(store, bank, range(8))
        now = store.clock.now_us()
        store.count({ids[0]: Retrievals(1, now, now), ids[2]: Retrievals(2, now, now + 1)})
        store.show_counts()
        assert store.pin(bank, [ids[1], 10**9], True) == 1
        planned, why = store.explain_eviction(bank_now(store, bank), 1)
        assert why
        assert [each.chunk_id for each in planned] == [ids[place] for place in (3, 4, 5, 6)]
        written = add(store, bank, 9)
        wait_until(lambda: bank_now(store, bank).usage.chunks_evicted == 4)
        assert list(written.evicted) == [each.chunk_id for each in planned][: len(written.evicted)]
        with store.read() as view:
            log = [eviction for _, eviction in view.evictions(bank, 2**62)]
        assert [each.chunk_id for each in reversed(log)] == [each.chunk_id for each in planned]
        assert set(mirror.vectors) == set(held(store, bank)) == {*ids[:3], ids[7], written.chunk_id}


def test_counts_are_shown_when_they_are_asked_for_and_outlast_the_store(open_engine: Open) -> None:
    with open_engine() as engine:
        store = engine.store
        bank, _ = store.create_bank(new_bank())
        chunk_id = add(store, bank, 1).chunk_id
        for time in (5, 7, 6):
            store.count({chunk_id: Retrievals(1, time, time)})
        store.show_counts()
        with store.read() as view:
            found = view.chunk(bank, chunk_id)
        assert found is not None
        assert (found.retrieval_count, found.last_retrieved) == (3, 7)
        store.count({chunk_id: Retrievals(2, 8, 9)})
    with open_engine() as engine, engine.store.read() as view:
        found = view.chunk(bank, chunk_id)
        assert found is not None
        assert (found.retrieval_count, found.last_retrieved) == (5, 9)


# Expiry


def test_a_chunk_that_has_expired_is_in_no_answer_before_it_is_removed(open_engine: Open) -> None:
    hands = Hands()
    with open_engine(clock=hands.clock(), pauses=Pauses(left_out=frozenset({"expiry"}))) as engine:
        store = engine.store
        bank, _ = store.create_bank(new_bank(expiry=Expiry(HOUR)))
        gone = add(store, bank, 1).chunk_id
        renewed = add(store, bank, 2, expiry=Expiry(HOUR, True)).chunk_id
        kept = add(store, bank, 3, expiry=Expiry()).chunk_id
        hands.go_on(HOUR - 1)
        now = store.clock.now_us()
        store.count({gone: Retrievals(1, now, now), renewed: Retrievals(1, now, now)})
        hands.go_on(2)
        with store.read() as view:
            assert ids_in(view, bank) == [renewed, kept]
            assert view.chunk(bank, gone) is None
            assert {chunk.chunk_id for chunk in view.chunks(bank, [gone, renewed, kept])} == {renewed, kept}
            assert view.expired(bank).tolist() == [gone]
            assert view.ids(bank).tolist() == [gone, renewed, kept]
        assert store.pin(bank, [gone], True) == 0
        assert not store.set_metadata(bank, gone, {})
        assert add(store, bank, 1).gone


def test_what_has_expired_is_removed_by_itself(open_engine: Open) -> None:
    mirror = Mirror()
    with open_engine(follower=mirror) as engine:
        bank, _ = engine.store.create_bank(new_bank())
        gone, kept = add(engine.store, bank, 1, expiry=Expiry(1)).chunk_id, add(engine.store, bank, 2).chunk_id
        wait_until(lambda: bank_now(engine.store, bank).usage.chunks_expired == 1)
        assert set(mirror.vectors) == {kept}
        assert gone != kept


# Ids


def test_no_id_is_given_twice_however_often_the_store_is_opened(open_engine: Open) -> None:
    given: list[int] = []
    for _ in range(3):
        with open_engine() as engine, ThreadPoolExecutor(4) as threads:
            given += threads.map(lambda _: id_from(engine.store), range(700))
    assert len(set(given)) == len(given)


def give_and_add(place: Any, told: Connection) -> None:
    """Take ids and add chunks, tell of each, and be killed; this runs in a process of its own."""
    with opened(place, durability="fsync") as engine:
        bank, _ = engine.store.create_bank(new_bank())
        for number in itertools.count():
            unused = id_from(engine.store)
            told.send((unused, add(engine.store, bank, number).chunk_id))
            if number == 300:
                os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_loses_nothing_that_was_acknowledged_and_gives_no_id_twice(data: Any, open_engine: Open) -> None:
    spawn = multiprocessing.get_context("spawn")
    hears, tells = spawn.Pipe(duplex=False)
    process = spawn.Process(target=give_and_add, args=(data, tells))
    process.start()
    tells.close()
    told: list[tuple[int, int]] = []
    try:
        while True:
            told.append(hears.recv())
    except EOFError:
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    given = [chunk_id for pair in told for chunk_id in pair]
    assert len(given) == len(set(given)) == 602
    with open_engine() as engine:
        bank = engine.store.bank(DEFAULT_TENANT, "b")
        assert held(engine.store, bank) == [added for _, added in told]
        more = [id_from(engine.store) for _ in range(700)]
        assert not set(more) & set(given)
        assert add(engine.store, bank, 3).chunk_id == told[3][1]


# What is derived


def test_a_snapshot_and_what_followers_are_told_behind_it_are_the_store(open_engine: Open) -> None:
    """Changes of other writers meanwhile are in the snapshot, or told behind it, and not both."""

    class Late(Mirror):
        """Knows nothing before the moment of its snapshot."""

        begun = False

        def added(self, bank: Bank, ids: Sequence[int], vectors: Vectors) -> None:
            if self.begun:
                assert not self.vectors.keys() & set(ids)
                super().added(bank, ids, vectors)

    late, over = Late(), threading.Event()
    with open_engine(follower=late) as engine, ThreadPoolExecutor(4) as threads:
        store = engine.store
        bank, _ = store.create_bank(new_bank())

        def change(writer: int) -> None:
            for number in itertools.count(1000 * writer):
                chunk_id = add(store, bank, number).chunk_id
                if number % 3 == 0:
                    store.remove(bank, [chunk_id]).result(60)
                if over.is_set():
                    return

        changing = [threads.submit(change, writer) for writer in range(1, 4)]
        wait_until(lambda: len(held(store, bank)) > 30)
        with store.snapshot(bank, lambda: setattr(late, "begun", True)) as view:
            seen = view.ids(bank)
            wait_until(lambda: len(late.vectors) > 20)
            found, vectors = view.vectors(bank, seen)
        assert found.tolist() == seen.tolist()
        over.set()
        for each in changing:
            each.result(60)
        loaded = {int(i): row.tobytes() for i, row in zip(found, vectors, strict=True)}
        assert not loaded.keys() & late.vectors.keys()
        with store.read() as view:
            ids, vectors = view.vectors(bank, view.ids(bank))
        now = {int(i): row.tobytes() for i, row in zip(ids, vectors, strict=True)}
        # A chunk of the snapshot may be gone since; the follower was told so.
        assert {i: row for i, row in (loaded | late.vectors).items() if i in now} == now
        assert late.vectors.keys() <= now.keys()


def test_an_action_in_order_comes_between_two_commits(open_engine: Open) -> None:
    mirror = Mirror()
    with open_engine(follower=mirror) as engine:
        bank, _ = engine.store.create_bank(new_bank())
        fill(engine.store, bank, range(25))
        added = [adding(engine.store, bank, new_chunk(number)) for number in range(25, 50)]
        assert engine.store.in_order(bank, lambda: len(mirror.vectors)).result(60) >= 25
        assert [done.result(60).replayed for done in added] == [False] * 25
        engine.store.catch_up([bank])
    assert len(mirror.vectors) == 50
    assert mirror.alone


# Filters


def passes(chunk: Chunk, where: Filter) -> bool:
    """Decide by the rules of a filter in plain Python."""

    def holds(condition: Condition) -> bool:
        value = chunk.metadata.get(condition.key)
        found = value is not None
        if found and condition.values:
            found = any(type(value) is type(one) and value == one for one in condition.values)
        if found and (bounds := condition.range) is not None:
            found = isinstance(value, int | float) and not isinstance(value, bool)
            found = found and (bounds.at_least is None or value >= bounds.at_least)
            found = found and (bounds.below is None or value < bounds.below)
        return found != condition.negate

    return (
        all(map(holds, where.metadata))
        and (where.start_from is None or chunk.start >= where.start_from)
        and (where.start_before is None or chunk.start < where.start_before)
        and (where.pinned is None or chunk.pinned == where.pinned)
        and (not where.any_of or any(passes(chunk, each) for each in where.any_of))
        and (not where.stretches or any(of_stretch(chunk, *each) for each in where.stretches))
    )


def of_stretch(chunk: Chunk, branch: str, end: int | None) -> bool:
    return chunk.metadata["branch"] == branch and (end is None or chunk.start < end)


FILTERS = [
    ALL,
    Filter(metadata=(Condition("half", ("even",)),)),
    Filter(metadata=(Condition("half", ("even",), negate=True),)),
    Filter(metadata=(Condition("number", range=Range(at_least=5, below=9)), Condition("half"))),
    Filter(metadata=(Condition("number", (3, 4, "5")),)),
    Filter(metadata=(Condition("nobody", negate=True),), start_from=4, start_before=15),
    Filter(pinned=True),
    Filter(pinned=False, start_from=15),
    Filter(any_of=(Filter(metadata=(Condition("half", ("even",)),), start_before=9), Filter(pinned=True))),
    Filter(start_from=4, any_of=(Filter(start_before=6), Filter(metadata=(Condition("nobody"),)))),
    Filter(stretches=(("b1", 9), ("b0", None), ("b1", 5), ("none", None))),
    Filter(start_from=4, any_of=(Filter(stretches=(("b1", 9),)), Filter(stretches=(("b2", 12), ("b0", 7))))),
    Filter(stretches=(*((f"x{number}", None) for number in range(3000)), ("b2", None))),
]


def test_a_filter_lets_pass_what_its_rules_say(open_engine: Open) -> None:
    with open_engine() as engine:
        store = engine.store
        bank, other = (store.create_bank(new_bank(name))[0] for name in "bc")
        chunks = [new_chunk(number, pinned=number % 4 == 0) for number in range(20)]
        ids = [adding(store, bank, chunk).result(60).chunk_id for chunk in chunks]
        fill(store, other, range(20))
        for number, where in enumerate(FILTERS):
            expected = [chunk_id for chunk_id, chunk in zip(ids, chunks, strict=True) if passes(chunk, where)]
            with store.read() as view:
                assert view.matching(bank, where).tolist() == expected, number
                assert ids_in(view, bank, where) == expected, number
                some = [each for each in expected if each in ids[::2]]
                assert view.matching(bank, where, ids[::2]).tolist() == some, number
                after = [chunk.chunk_id for chunk in view.page(bank, ids[9], where, embedding=True)]
            assert after == [chunk_id for chunk_id in expected if chunk_id > ids[9]], number


def test_the_bytes_of_messages_are_bounded_without_reading_texts(open_engine: Open) -> None:
    with open_engine() as engine:
        store = engine.store
        bank, _ = store.create_bank(new_bank())
        texts = ["a" * 1000, "\u20ac" * 1000, ""]
        times = {add(store, bank, number, text=text).chunk_id: number + 1 for number, text in enumerate(texts)}
        with store.read() as view:
            least, most = view.message_bytes(times)
    exact = sum(count * len(text.encode()) for count, text in zip(times.values(), texts, strict=True))
    assert least <= exact + 6 * 200
    assert exact <= most


def test_what_is_set_aside_is_gone_for_everybody(open_engine: Open) -> None:
    mirror = Mirror()
    with open_engine(follower=mirror) as engine:
        store = engine.store
        bank, _ = store.create_bank(new_bank())
        ids: Ids = np.array(fill(store, bank, range(3)))
        assert store.set_aside(bank, {int(ids[1]): "a test says so", 10**9: "not there"}) == [ids[1]]
        assert held(store, bank) == [ids[0], ids[2]]
        assert bank_now(store, bank).usage.chunks_quarantined == 1
        assert set(mirror.vectors) == {int(ids[0]), int(ids[2])}
        assert store.totals()[:2] == (1, 2)
